"""What `t1 COMMAND --help` prints, from the config classes: every setting with its type, meaning and default.

The meaning of a field is the docstring under it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Collection
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from megatron_t1.cli.options import class_of_each, default_of
from megatron_t1.config import plain
from megatron_t1.files import dump_yaml


def help_of(command: str, summary: str, cls: Any, sections: Collection[str] = ()) -> str:
    """What `t1 <command> --help` prints.

    Args:
        sections: those that the command reads, when it does not read all of them.
    """
    parser = argparse.ArgumentParser(
        prog=f"t1 {command}",
        usage=f"t1 {command} [--config FILE.yaml] [--section.field VALUE ...]",
        description=summary,
        add_help=False,
    )
    general = parser.add_argument_group("options")
    general.add_argument("--config", metavar="FILE", help="YAML file; options after it override it")
    general.add_argument("--print_config", action="store_true", help="print all settings as YAML, and end")
    left_out = []
    for field in fields(cls):
        if sections and is_dataclass(get_type_hints(cls)[field.name]) and field.name not in sections:
            left_out.append(field.name)
        else:
            _describe(general, parser, cls, field, "", None)
    if left_out:
        parser.epilog = f"For other commands, and read without effect here: {', '.join(left_out)}."
    return parser.format_help()


def _describe(group: Any, parser: Any, cls: Any, field: Field[Any], path: str, parent: Any) -> None:
    """Adds a field, or a section with its fields, to the help."""
    hint, name = get_type_hints(cls)[field.name], path + field.name
    section = hint if is_dataclass(hint) else class_of_each(hint)
    if section is None:
        value = getattr(parent, field.name) if parent is not None else field.default
        if value is MISSING and field.default_factory is not MISSING:
            value = field.default_factory()
        default = "needed" if value is MISSING else f"default: {_shown(value)}"
        text = f"{_docs(cls).get(field.name, '')} ({default})".strip().replace("%", "%%")
        group.add_argument(f"--{name}", metavar=_metavar(hint), help=text)
        return
    if not is_dataclass(hint):
        name += ".NAME"
    title = _docs(cls).get(field.name) or (section.__doc__ or "").partition("\n")[0]
    below = parser.add_argument_group(f"{name}: {title.rstrip('.')}")
    defaults = default_of(field, parent) if is_dataclass(hint) else None
    for each in fields(section):
        _describe(below, parser, section, each, f"{name}.", defaults)


@functools.cache
def _docs(cls: Any) -> dict[str, str]:
    """What stands under each field of a dataclass, or of one that it extends."""
    parsed = [docstring_parser.parse_from_object(each) for each in reversed(cls.__mro__) if is_dataclass(each)]
    return {param.arg_name: " ".join((param.description or "").split()) for each in parsed for param in each.params}


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    return dump_yaml(plain(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _metavar(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return "|".join(_metavar(each) for each in arguments if each is not NoneType)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        return f"[{_metavar(arguments[0])},...]"
    if origin is dict:
        return f"{{NAME: {_metavar(arguments[1])}}}"
    return {str: "TEXT", bool: "true|false", Any: "VALUE"}.get(hint, getattr(hint, "__name__", "VALUE").upper())
