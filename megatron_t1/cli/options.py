"""The arguments of a job: one YAML file and dotted overrides, read into the job's config class by jsonargparse."""

from __future__ import annotations

from typing import Any

from megatron_t1.cli import lenient


def read(
    program: str, description: str, arguments: list[str], cls: Any, *extra: tuple[str, str, str]
) -> tuple[Any, Any, str]:
    """The config object, the namespace with what `extra` (name, default, help) asked for, and all of it as YAML.

    Raises:
        ValueError: everything that is wrong with the arguments.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # each field's docstring is its help
    parser = ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; options after it override it")
    for name, default, text in extra:
        parser.add_argument(f"--{name}", type=str, default=default, help=text)
    parser.add_class_arguments(cls)
    arguments = in_full(arguments)
    try:
        parsed = parser.parse_args(arguments)
        namespace = parser.instantiate_classes(parsed)
    except (ArgumentError, ValueError) as error:  # the first one; a person wants all of them
        values, problems = lenient.parse(cls, _without([f"--{name}" for name, *_ in extra], arguments))
        lenient.build(cls, values, problems)
        raise ValueError("\n".join(problems) or str(error)) from None
    fields = {name: getattr(namespace, name) for name in cls.__dataclass_fields__}
    if "resume" in parsed:
        parsed.resume = False  # whoever reads this file later says so again
    return cls(**fields), namespace, parser.dump(parsed)


def in_full(arguments: list[str]) -> list[str]:
    """`--resume` alone as `--resume=true`, `--config=FILE` as two words."""
    words: list[str] = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--resume" and following not in ("true", "false"):
            words.append("--resume=true")
        elif word.startswith("--config="):
            words += word.split("=", 1)
        else:
            words.append(word)
    return words


def _without(names: list[str], arguments: list[str]) -> list[str]:
    """The arguments but these options and their values."""
    words, rest = iter(arguments), []
    for word in words:
        if word in names:
            next(words, None)
        elif word.partition("=")[0] not in names:
            rest.append(word)
    return rest
