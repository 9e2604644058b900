"""Reads a configuration as the `t1` command does, but goes on after an error, so that all of them are known at once.

jsonargparse stops at the first. Here every key is looked up and every value checked by jsonargparse on its own, and
each dataclass is built again without the fields that it complained of.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml


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
            text = "true" if name == "resume" else next(words, "")
        if name == "config":
            _merge(values, _read_file(Path(text), problems), cls)
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        for part in reversed(name.split(".")):
            value = {part: value}
        _merge(values, value, cls)
    return values, problems


def build(cls: type, values: dict[str, Any], problems: list[str], path: str = "") -> Any:
    """An object of the dataclass, its faulty fields at their defaults; None when a needed one is missing.

    Adds a line to `problems` for every unknown key and every value that is refused.
    """
    hints, known = get_type_hints(cls), {field.name: field for field in fields(cls)}
    good: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            problems.append(f"{path}{name} is not a setting" + (f"; did you mean {path}{close[0]}?" if close else ""))
        elif is_dataclass(hints[name]):
            if isinstance(value, dict):
                good[name] = build(hints[name], value, problems, f"{path}{name}.")
            else:
                problems.append(f"{path}{name} = {value!r} must be a section with settings of its own")
        else:
            _take(good, name, value, hints[name], path, problems)
    good = {name: value for name, value in good.items() if value is not None}
    return _construct(cls, good, values.keys(), problems, path)


def _take(good: dict[str, Any], name: str, value: Any, hint: Any, path: str, problems: list[str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        good[name] = parser.parse_object({"value": value}).value
    except Exception as error:  # jsonargparse's own class, which it does not promise to keep
        reason = str(error).strip().splitlines()[-1].strip(" -")
        problems.append(f"{path}{name} = {value!r}: {reason}")


def _construct(cls: type, good: dict[str, Any], given: Collection[str], problems: list[str], path: str) -> Any:
    hints = get_type_hints(cls)
    while True:
        missing = [
            field.name
            for field in fields(cls)
            if field.default is MISSING and field.default_factory is MISSING and field.name not in good
        ]
        if missing:
            for name in missing:
                if is_dataclass(hints[name]) and name not in given:
                    build(hints[name], {}, problems, f"{path}{name}.")
                elif name not in given:
                    problems.append(f"{path}{name} is not set")
            return None
        try:
            return cls(**good)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
            # The message names its field first; without it the others can be judged.
            named = sorted((str(error).find(name), name) for name in good if name in str(error))
            if not named:
                return None
            del good[named[0][1]]


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
