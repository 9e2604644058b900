"""The options of a job: one YAML file and dotted overrides, read into the job's config class. The only such reader.

    words and files -> settings by name (`_collect`) -> the config, section by section (`_build`)

It goes on after an error, so that a person is told everything at once; an error carries its field (`FieldError`).
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import reprlib
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from megatron_t1 import plugins
from megatron_t1.fields import FieldError
from megatron_t1.files import parse_yaml, read_text

T = TypeVar("T")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 300
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 12
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def read(cls: type[T], arguments: Sequence[str]) -> T:
    """The config that the options make.

    Raises:
        ValueError: everything that is wrong with them, a line each.
    """
    config, problems = parse(cls, arguments)
    if config is None or problems:
        raise ValueError("\n".join(problems))
    return config


def parse(cls: type[T], arguments: Sequence[str]) -> tuple[T | None, list[str]]:
    """The config with every faulty field at its default (None when one is needed), and a line for each fault.

    Raises:
        ValueError: one of `plugins` can't be loaded.
    """
    problems: list[str] = []
    settings = _collect(cls, arguments, problems)
    if "plugins" in settings and "plugins" in get_type_hints(cls):
        with contextlib.suppress(msgspec.ValidationError):  # `_build` says what is wrong with it
            plugins.load(_typed(settings["plugins"], tuple[str, ...]))  # the other settings name what they bring
    return _build(cls, settings, problems), problems


class _Word(str):
    """A value from the command line: what it means depends on the type of its field."""


def _collect(cls: type, arguments: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Files (`--config`) and overrides, the later in force, as nested dicts."""
    settings: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word!r} is not an option")
            continue
        name, separator, text = word[2:].partition("=")
        hint = _hint_of(cls, name)
        if not separator:
            if hint is bool and (not words or words[0] not in ("true", "false")):
                text = "true"
            elif not words or words[0].startswith("--"):
                problems.append(f"--{name} needs a value")
                continue
            else:
                text = words.pop(0)
        if name == "config":
            _merge(settings, _read_file(Path(text), problems), cls)
            continue
        try:
            value = _value_of(text, hint, _hint_of(cls, name.rpartition(".")[0]))
        except ValueError as error:
            problems.append(f"{name} = {text!r} is not YAML: {error}")
            continue
        parts = name.split(".")
        for part in reversed(parts):
            value = {part: value}
        _merge(settings, value, cls, len(parts))
    return settings


def _value_of(text: str, hint: Any, parent: Any) -> Any:
    """What a word says for a field of type `hint`, or for an entry of a field of type `parent`."""
    if parent is Any or get_origin(parent) is dict:
        return text if hint is str else parse_yaml(text)
    return parse_yaml(text) if is_dataclass(hint) or class_of_each(hint) else _Word(text)


def _read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        text = read_text(path)
    except OSError as error:
        problems.append(f"{path} can't be read: {error.strerror}")
        return {}
    except ValueError as error:
        problems.append(str(error))
        return {}
    try:
        settings = parse_yaml(text)
    except ValueError as error:
        problems.append(f"{path} is not YAML: {error}")
    else:
        if settings is None or isinstance(settings, dict):
            return settings or {}
        problems.append(f"{path} must hold settings by name, it is a {type(settings).__name__}")
    return {}


def _merge(into: dict[str, Any], new: dict[str, Any], cls: Any, depth: int = 0) -> None:
    """Sections are merged; a dict that is a setting's value replaces the one before.

    Args:
        depth: how many names an option gives one after the other: what lies between them is merged, whatever it is.
    """
    for name, value in new.items():
        hint = _hint_of(cls, str(name))
        inside = depth > 1 or is_dataclass(hint)
        if isinstance(value, dict) and isinstance(into.get(name), dict) and inside:
            _merge(into[name], value, hint, depth - 1)
        else:
            into[name] = value


def _hint_of(cls: Any, name: str) -> Any:
    """Type of the field with a dotted name, or of an entry of one that is a dict; None when there is none."""
    for part in name.split("."):
        if is_dataclass(cls):
            cls = get_type_hints(cls).get(part)
        elif cls is not Any:
            cls = get_args(cls)[1] if get_origin(cls) is dict else None
    return cls


def class_of_each(hint: Any) -> Any:
    """The dataclass of the sections that a `dict[str, dataclass]` holds; None for other types."""
    return each if get_origin(hint) is dict and is_dataclass(each := get_args(hint)[1]) else None


def _build(cls: Any, settings: dict[str, Any], problems: list[str], path: str = "", default: Any = None) -> Any:
    """An object of the dataclass without its faulty fields; None when a needed one is missing.

    Args:
        default: the object that the fields which are not given are taken from, in place of the class's defaults.

    Adds a line to `problems` for every unknown name and every value that is refused.
    """
    hints, known = get_type_hints(cls), {field.name: field for field in fields(cls)}
    good: dict[str, Any] = {}
    for name, value in settings.items():
        if not isinstance(name, str):
            problems.append(f"{path}{_shown(name)} is not a setting: names are text")
        elif _hint_of(cls, name) and name not in known:
            nested = ": {".join(name.split(".")) + ": ...}" + "}" * (name.count(".") - 1)
            problems.append(f"{path}{name} is written by sections in a file: {nested}")
        elif name not in known:
            close = difflib.get_close_matches(name, known, 1)
            problems.append(
                f"{path}{name[:80]} is not a setting" + (f"; did you mean {path}{close[0]}?" if close else "")
            )
        elif is_dataclass(hints[name]):
            section = _section(hints[name], value, problems, path + name, default_of(known[name], default))
            if section is not None:
                good[name] = section
        elif (each := class_of_each(hints[name])) and isinstance(value, dict):
            sections = {key: _section(each, one, problems, f"{path}{name}.{key}") for key, one in value.items()}
            if None not in sections.values():
                good[name] = sections
        else:
            try:
                good[name] = _convert(value, hints[name])
            except msgspec.ValidationError as error:
                problems.append(f"{path}{name} = {_shown(value)} must be {_wanted(hints[name], value, str(error))}")
            except ValueError as error:
                problems.append(f"{path}{name} = {_shown(value)} {error}")
    return _construct(cls, good, settings.keys(), problems, path, default)


def _shown(value: Any) -> str:
    """Not all of it: an alias of YAML is a short word for as much as one likes."""
    return _SHORT.repr(value)


def _section(cls: type, value: Any, problems: list[str], name: str, default: Any = None) -> Any:
    if isinstance(value, dict):
        return _build(cls, value, problems, f"{name}.", default)
    problems.append(f"{name} = {_shown(value)} must be a section with settings of its own")
    return None


def default_of(field: Field[Any], parent: Any) -> Any:
    """What a section is when nothing of it is given; None when it must be given."""
    if parent is not None:
        return getattr(parent, field.name)
    return field.default_factory() if field.default_factory is not MISSING else None


def _expanded(value: Any) -> Any:
    """Paths with `~` and the environment's variables written out, as a shell does it; other text stays as it is.

    Raises:
        ValueError: a variable that is not set.
    """
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    text = str(value)
    if not isinstance(value, (str, Path)) or "://" in text:
        return value
    begins = text.startswith("~/") or re.match(_VARIABLE.pattern + "/|/[^\\s/]+/", text)
    if re.search(r"\s", text) and not begins and not isinstance(value, Path):  # a sentence, not a path
        return value
    if not text.startswith(("~", "$")) and "/" not in text:
        return value
    text = os.path.expandvars(os.path.expanduser(text))
    if left := _VARIABLE.search(text):
        raise ValueError(f"names {left[0]}, which the environment does not have")
    return type(value)(text)


def _convert(value: Any, hint: Any) -> Any:
    converted = _typed(value, hint)
    _check_finite(converted)
    return _expanded(converted)


def _check_finite(value: Any) -> None:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for each in inner:
        _check_finite(each)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")


def _typed(value: Any, hint: Any) -> Any:
    if not isinstance(value, _Word):
        return msgspec.convert(value, hint, strict=False, dec_hook=_path_of)
    if value == "null" and NoneType in get_args(hint):
        return None
    try:
        return msgspec.convert(str(value), hint, dec_hook=_path_of)  # a field of text takes the word as it is
    except msgspec.ValidationError:
        try:
            parsed = parse_yaml(value)
        except ValueError as error:
            raise msgspec.ValidationError(f"not YAML: {error}") from None
        return msgspec.convert(parsed, hint, strict=False, dec_hook=_path_of)


def _path_of(kind: type, value: Any) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise msgspec.ValidationError(f"Expected a path, got `{type(value).__name__}`")


def _wanted(hint: Any, value: Any, reason: str) -> str:
    """What a value of the type is, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_wanted(each, value, reason) for each in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, dict):
        opening, form = ("[", f"a list: [{value}]") if origin is tuple else ("{", "values by name: {name: value}")
        return form if not str(value).lstrip().startswith(opening) else f"{form[: form.index(':')]} ({reason})"
    return "null" if hint is NoneType else _KINDS.get(hint, reason)


def _construct(
    cls: Any, good: dict[str, Any], given: Collection[str], problems: list[str], path: str, default: Any
) -> Any:
    if default is None:
        missing = [field.name for field in fields(cls) if _is_needed(field) and field.name not in good]
        problems += [f"{path}{name} is not set" for name in missing if name not in given]
        if missing:
            return None
    while True:
        try:
            return cls(**good) if default is None else replace(default, **good)
        except FieldError as error:
            field = error.field.partition(".")[0]
            if field not in good:
                if field not in given:  # what was given and refused has a line of its own
                    problems.append(f"{path}{error}")
                return None
            problems.append(f"{path}{error}")
            del good[field]
            if default is None and _is_needed(cls.__dataclass_fields__[field]):
                return None


def _is_needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
