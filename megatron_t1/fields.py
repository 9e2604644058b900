"""How a setting is refused: `section.field = value must ...`, in one spelling for all configs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_t1.plugins import Registry


class FieldError(ValueError):
    """A setting that can't be.

    A config class does not know in which section it stands: `field` is the name inside the class, and `cli.options`
    puts the section before it.
    """

    def __init__(self, field: str, value: Any, rule: str) -> None:
        """`rule` goes on after the value: what it must be, or why it is refused, and the remedy."""
        shown = list(value) if isinstance(value, tuple) else value
        super().__init__(f"{field} = {shown!r} {rule}")
        self.field = field


def known(config: object, field: str, registry: Registry, name: str, also: Iterable[str] = ()) -> None:
    """Raises FieldError when `name`, of that field of `config`, is neither registered nor in `also`."""
    if name not in also and name not in registry:
        names = ", ".join(sorted({*registry, *also})) or "none"
        raise FieldError(
            field,
            getattr(config, field),
            f"has the {registry.kind} {name!r}, which is not known; known: {names}. One of your own stands in a module "
            "that `plugins` names",
        )


def at_least(config: object, least: float, *names: str) -> None:
    """Raises FieldError for a field of `config` that is less."""
    for name in names:
        if not getattr(config, name) >= least:
            raise FieldError(name, getattr(config, name), f"must be at least {least}")


def above(config: object, bound: float, *names: str) -> None:
    """Raises FieldError for a field of `config` that is `bound` or less."""
    for name in names:
        if not getattr(config, name) > bound:
            raise FieldError(name, getattr(config, name), f"must be above {bound}")


def within(config: object, low: float, high: float, *names: str) -> None:
    """Raises FieldError for a field of `config` outside of [low, high]."""
    for name in names:
        if not low <= getattr(config, name) <= high:
            raise FieldError(name, getattr(config, name), f"must lie in [{low}, {high}]")


def another_file(config: object, name: str, inputs: Iterable[str | Path]) -> None:
    """Raises FieldError when the file to write that the field names is a folder, or one of `inputs`, also by a link."""
    output = str(getattr(config, name) or "")
    if output and Path(output).is_dir():
        raise FieldError(name, output, "must be a file to write: this is a folder")
    for path in map(Path, inputs):
        if path.is_file() and Path(output).is_file() and path.samefile(output):
            raise FieldError(name, output, f"must be another file than {path}, which is read")


def a_folder(config: object, name: str) -> None:
    """Raises FieldError when the field names no folder, or one that can't be made where a file is."""
    path = getattr(config, name)
    if not path:
        raise FieldError(name, path, "must be a folder to write to")
    for part in (Path(path), *Path(path).parents):
        if os.path.exists(part) and not os.path.isdir(part):
            raise FieldError(name, path, f"must be a folder to write to: {part} is a file")


def http_only(config: object, name: str) -> None:
    """Raises FieldError when one of the URLs in the field is not of HTTP."""
    urls = getattr(config, name)
    if not all(url.startswith(("http://", "https://")) for url in urls):
        raise FieldError(name, urls, "must start with http:// or https://")
