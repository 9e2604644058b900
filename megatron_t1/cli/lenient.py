"""Reads a configuration as the `t1` command does, but goes on after an error, so that all of them are known at once.

jsonargparse stops at the first. Here every key is looked up and every value checked by jsonargparse on its own, and
each dataclass is built again without the fields that it complained of.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

_FORMS = {tuple: ("[", "a list: [{}]"), dict: ("{", "values by name: {{name: value}}")}
"""How values of a type begin on the command line, and what is said to those that don't."""


def parse(cls: type, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Files (`--config`) and dotted overrides, the later in force, as nested dicts for `cls`; and what is wrong."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            problems.append(f"{word!r} is not an option")
            continue
        name, separator, text = word[2:].partition("=")
        if not separator:
            text = next(words, "")
        if name == "config":
            _merge(values, _read_file(Path(text), problems), cls)
            continue
        try:
            hint = _hint_of(cls, name)
            value: Any = yaml.safe_load(text) if is_dataclass(hint) or _class_of_each(hint) else _Word(text)
        except yaml.YAMLError as error:
            problems.append(f"{name} = {text!r} is not YAML: {error}")
            continue
        for part in reversed(name.split(".")):
            value = {part: value}
        _merge(values, value, cls)
    return values, problems


class _Word(str):
    """A value from the command line: what it means depends on the type of its field."""


def _hint_of(cls: Any, name: str) -> Any:
    """Type of the field with a dotted name; None when there is none."""
    for part in name.split("."):
        cls = get_type_hints(cls).get(part) if is_dataclass(cls) else _class_of_each(cls)
    return cls


def _class_of_each(hint: Any) -> Any:
    """The dataclass of the sections that a `dict[str, dataclass]` holds; None for other types."""
    return each if get_origin(hint) is dict and is_dataclass(each := get_args(hint)[1]) else None


def build(cls: type, values: dict[str, Any], problems: list[str], path: str = "", default: Any = None) -> Any:
    """An object of the dataclass, its faulty fields at their defaults; None when a needed one is missing.

    Args:
        default: the object that the fields which are not given are taken from, in place of the class's defaults.

    Adds a line to `problems` for every unknown key and every value that is refused.
    """
    hints, known = get_type_hints(cls), {field.name: field for field in fields(cls)}
    good: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            problems.append(f"{path}{name} is not a setting" + (f"; did you mean {path}{close[0]}?" if close else ""))
        elif is_dataclass(hints[name]):
            section = _section(hints[name], value, problems, path + name, _default_of(known[name], default))
            if section is not None:
                good[name] = section
        elif (each := _class_of_each(hints[name])) and isinstance(value, dict):
            sections = {key: _section(each, one, problems, f"{path}{name}.{key}") for key, one in value.items()}
            if None not in sections.values():
                good[name] = sections
        else:
            _take(good, name, value, hints[name], path, problems)
    return _construct(cls, good, values.keys(), problems, path, default)


def _section(cls: type, value: Any, problems: list[str], name: str, default: Any = None) -> Any:
    if isinstance(value, dict):
        return build(cls, value, problems, f"{name}.", default)
    problems.append(f"{name} = {value!r} must be a section with settings of its own")
    return None


def _default_of(known: Field[Any], of: Any) -> Any:
    """What a section is when nothing of it is given; None when it must be given."""
    if of is not None:
        return getattr(of, known.name)
    return known.default_factory() if known.default_factory is not MISSING else None


def _take(good: dict[str, Any], name: str, value: Any, hint: Any, path: str, problems: list[str]) -> None:
    from jsonargparse import ArgumentParser

    opening, wanted = _FORMS.get(get_origin(hint), ("", ""))
    if wanted and isinstance(value, (str, int, float)) and not str(value).lstrip().startswith(opening):
        problems.append(f"{path}{name} = {value!r} must be {wanted.format(value)}")
        return
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    from_words = type(value) is _Word
    try:
        parsed = parser.parse_args([f"--value={value}"]) if from_words else parser.parse_object({"value": value})
        good[name] = parsed.value
    except Exception as error:  # jsonargparse's own class, which it does not promise to keep
        reason = str(error).strip().splitlines()[-1].strip(" -")
        problems.append(f"{path}{name} = {value!r}: {reason}")


def _construct(
    cls: type, good: dict[str, Any], given: Collection[str], problems: list[str], path: str, default: Any
) -> Any:
    hints = get_type_hints(cls)
    while True:
        missing = [
            field.name
            for field in fields(cls)
            if field.default is MISSING and field.default_factory is MISSING and field.name not in good
        ]
        if missing and default is None:
            for name in missing:
                if is_dataclass(hints[name]) and name not in given:
                    build(hints[name], {}, problems, f"{path}{name}.")
                elif name not in given:
                    problems.append(f"{path}{name} is not set")
            return None
        try:
            return cls(**good) if default is None else replace(default, **good)
        except (ValueError, TypeError) as error:
            text = str(error)
            # The message names its field first; without it the others can be judged.
            place, name = min(((text.find(name), name) for name in good if name in text), default=(-1, ""))
            if place < 0:
                # What was given and refused has its own line: that the class misses it is no news.
                if not any(re.search(rf"\b{name}\b", text) for name in given if name not in good):
                    problems.append(text)
                return None
            # A class may stand in several sections and does not know in which: the path is put in its place.
            problems.append(path + text[place:] if re.fullmatch(r"[\w.]*", text[:place]) else text)
            del good[name]


def _read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        problems.append(f"{path} can't be read: {error.strerror}")
    except yaml.YAMLError as error:
        problems.append(f"{path} is not YAML: {error}")
    else:
        if found is None or isinstance(found, dict):
            return found or {}
        problems.append(f"{path} must hold settings by name, it is a {type(found).__name__}")
    return {}


def _merge(into: dict[str, Any], new: dict[str, Any], cls: Any) -> None:
    """Sections are merged; a dict that is a setting's value replaces the one before."""
    hints = get_type_hints(cls)
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict) and is_dataclass(hints.get(name)):
            _merge(into[name], value, hints[name])
        else:
            into[name] = value
