"""What a person who mistypes an option is told: each fault once, by its full name, with what to write instead."""

from __future__ import annotations

import pytest

from megatron_t1.cli.options import read
from megatron_t1.evaluation.config import EvaluateConfig
from megatron_t1.synthesize.config import SynthesizeConfig

NO_URL = "endpoints.big.url is not a setting; did you mean endpoints.big.urls?"


def told(cls: type, *arguments: str) -> list[str]:
    with pytest.raises(ValueError, match=r".+") as error:
        read(cls, list(arguments))
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--endpoints", "{big: {url: [http://x]}}"], [NO_URL]),
        (["--endpoints.big.url", "[http://x]"], [NO_URL]),
        (["--endpoints", "{big: {urls: [x]}}"], ["endpoints.big.urls = ['x'] must start with http:// or https://"]),
        (["--endpoints", "{big: x}"], ["endpoints.big = 'x' must be a section with settings of its own"]),
        (["--endpoints", "big"], ["endpoints = 'big' must be values by name: {name: value}"]),
        (["--endpoints.big.max_retries", "-1"], ["endpoints.big.max_retries = -1 must be at least 0"]),
        ([], ["endpoints = {} must name one, or give `model`, a folder to serve here"]),
    ],
)
def test_a_fault_of_an_endpoint_is_told_once_by_its_full_name(arguments: list[str], lines: list[str]) -> None:
    assert told(SynthesizeConfig, "--questions", "q.jsonl", "--out", "out", *arguments) == lines


def test_good_endpoints_are_kept_beside_another_fault() -> None:
    good = ["--endpoints", "{big: {urls: [http://x]}}", "--critique_with", "big"]
    problems = told(SynthesizeConfig, "--questions", "q.jsonl", "--out", "out", *good, "--seeed", "3")
    assert problems == ["seeed is not a setting; did you mean seed?"]


def test_a_single_value_for_a_list_is_shown_as_a_list() -> None:
    assert told(EvaluateConfig, "--sets", "math500") == ["sets = 'math500' must be a list: [math500]"]
