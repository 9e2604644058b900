"""The report: every part when its files are there, none when not, and hostile text that stays text."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_t1.evaluation.figures import summarize
from megatron_t1.evaluation.results import published
from megatron_t1.files import write_json, write_jsonl, write_text
from megatron_t1.report import plots
from megatron_t1.report.report import MAX_CHARS, MAX_SAMPLES, _rl_samples, write_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e$x^$ {{ 7*7 }} ]]></style>\x00\ud800"


class Page(HTMLParser):
    """Text, headings, and everything that could load or run something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def row(identity: str, response: str, correct: bool, penalties: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "id": identity,
        "prompt": f"question {identity}",
        "gold": "7",
        "response": response,
        "num_tokens": 40,
        "finish_reason": "stop",
        "subject": None,
        "reward": {
            "value": -1.0 if penalties else float(correct),
            "correct": correct,
            "outcome": "correct" if correct else "wrong",
            "extracted": "7",
            "reason": "equal numbers",
            "penalties": penalties or {},
            "seconds": 0.0,
        },
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "sft/metrics.jsonl", [{"step": 1, "nll": 2.0, "lr": 1e-3, "seconds/train": 0.1}])
    write_jsonl(
        tmp_path / "rl/metrics.jsonl",
        [
            {"step": i, "reward": i / 9, "logprob_diff": 1e-5 * i, "penalty/repetition": 0.1, "other$": None}
            | {"num_response_tokens": 40, "tokens_all_equal": 10}
            | ({"refill/tokens": 20} if i == 8 else {})
            | ({"kl_start": i / 3, "heldout/set": 0.5} if i % 2 else {})
            for i in range(1, 9)
        ],
    )
    write_jsonl(tmp_path / "rl/samples.jsonl", [{"step": i, **row("t", f"rollout {i}", True)} for i in range(1, 30)])
    for label, right in (("sft", 2), ("rl$", 8)):
        texts = ["right" if i < right else "a" * (MAX_CHARS + 5) for i in range(10)]
        rows = [row(str(i), text, i < right) | {"level": i % 2} for i, text in enumerate(texts)]
        rows[0] = row("0", HOSTILE.replace("\ud800", ""), False, {"garbled": HOSTILE.replace("\ud800", "")})
        folder = tmp_path / "evaluate" / label / "set<b>"
        write_jsonl(folder / "responses.jsonl", rows)
        write_json(folder / "summary.json", asdict(summarize(label, "set<b>", rows, {"step": right})))
        point = {"set": "heldout", "budget": 24, "mean_thinking_tokens": 20.0, "accuracy": 0.2, "interval": [0.1, 0.3],
                 "share_forced": 1}  # fmt: skip
        write_json(tmp_path / "scaling" / label / "points.json", [point, {**point, "budget": 48, "accuracy": 0.8}])
        write_json(tmp_path / "scaling" / label / "summary_points.json", [{**point, "accuracy": 0.456}])
        one = {"num_samples": 1, "mean_tokens": 40.0, "accuracy": 0.2, "interval": [0.1, 0.3]}
        write_json(tmp_path / "scaling" / label / "majority.json", [one, {**one, "num_samples": 2, "accuracy": 0.3}])
    summary = {"seconds": {"sft": 75.0, "total": 300.0}, "seed": 3, "versions": {"torch": "2.13.0", "apex": None}}
    write_json(tmp_path / "summary.json", summary)
    write_text(tmp_path / "config.yaml", "rl:\n  steps: 60 # <b>\n")
    return tmp_path


def read(run_dir: Path) -> Page:
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_a_label_of_an_unknown_step_is_not_taken_for_the_first(run_dir: Path) -> None:
    """`aaa` comes before the others by its name, and has no step; with one other it comes last."""
    folder = run_dir / "evaluate"
    shutil.copytree(folder / "sft", folder / "aaa")
    summary = json.loads((folder / "aaa/set<b>/summary.json").read_text())
    del summary["settings"]["step"]
    write_json(folder / "aaa/set<b>/summary.json", {**summary, "label": "aaa"})
    assert "sft → rl$" in read(run_dir).text
    shutil.rmtree(folder / "rl$")
    assert "sft → aaa" in read(run_dir).text


def test_evaluations_along_the_training_are_a_curve_and_the_ends_of_it_are_shown(run_dir: Path) -> None:
    folder, curve = run_dir / "evaluate", "Held-out accuracy along the training with 95% interval"
    assert curve not in {attrs.get("alt") for _, attrs in read(run_dir).tags}, "the two ends alone"
    for step in (4, 6):  # sft has 2 steps, rl$ 8
        shutil.copytree(folder / "sft", folder / f"middle{step}")
        summary = json.loads((folder / "sft/set<b>/summary.json").read_text())
        summary |= {"label": f"middle{step}", "settings": {"step": step}}
        write_json(folder / f"middle{step}/set<b>/summary.json", summary)
    page = read(run_dir)
    assert curve in {attrs.get("alt") for _, attrs in page.tags}
    assert "sft → rl$" in page.text
    assert "middle" not in page.text


def test_of_some_steps_the_first_question_is_shown(tmp_path: Path) -> None:
    asked = [*["b"] * (MAX_SAMPLES + 1), "a", "b"]
    lines = [{"step": i, **row(name, f"{name}{k}", True)} for i in range(20) for k, name in enumerate(asked)]
    write_jsonl(tmp_path / "rl/samples.jsonl", lines)
    shown = [(row["source"], row["response"]) for row in _rl_samples(tmp_path)]
    steps = (0, 4, 8, 11, 15, 19)
    assert shown == [(f"RL step {step}", f"b{k}") for step in steps for k in range(MAX_SAMPLES)]


def headings(run_dir: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", write_report(run_dir).read_text())


def test_every_part_is_there(run_dir: Path) -> None:
    assert headings(run_dir) == [
        "Accuracy on held-out questions",
        "Accuracy against thinking budget",
        "Reinforcement learning",
        "Supervised fine-tuning",
        "Responses",
        "Time by stage",
        "Run",
    ]
    page = read(run_dir)
    for text in ("20.0%", "80.0%", "+60.0 points", "1 min 15 s", "rollout 29", "steps: 60 # <b>", "2.13.0", "other$"):
        assert text in page.text or any(text == attrs.get("alt") for _, attrs in page.tags), text
    assert "(5 more characters)" in page.text
    for text in ("29.4% of all generated tokens", "By summary", "45.6%"):
        assert text in page.text
    alts = [attrs.get("alt") for _, attrs in page.tags]
    assert {"Reward against KL to the starting policy", "Held-out accuracy with 95% interval"} <= set(alts)


def test_hostile_text_stays_text_and_nothing_is_loaded(run_dir: Path) -> None:
    page = read(run_dir)
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in page.text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "base"}
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")], tag
        assert all((attrs[name] or "").startswith("data:image/svg+xml") for name in ("src", "href") if name in attrs)
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_missing_parts_are_left_out(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "scaling")
    shutil.rmtree(run_dir / "evaluate" / "rl$")
    (run_dir / "summary.json").unlink()
    found = headings(run_dir)
    assert "Accuracy on held-out questions" in found
    assert not {"Accuracy against thinking budget", "Time by stage"} & set(found)


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path} holds no results.*rl/metrics.jsonl, evaluate/.*scaling/"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_curves_of_several_sets_name_theirs(run_dir: Path) -> None:
    def said(plot: plots.Plot) -> str:
        return base64.b64decode(plot.uri.partition(",")[2]).decode()  # the legend's texts are comments beside its paths

    def curve(name: str) -> list[dict[str, Any]]:
        return [{**point, "set": name} for point in json.loads((run_dir / "scaling/sft/points.json").read_text())]

    one = said(plots.scaling({"a": {"forced": curve("math500")}, "b": {"forced": curve("math500")}}))
    assert "<!-- a -->" in one
    two = said(plots.scaling({"a": {"forced": curve("math500")}, "b": {"forced": curve("aime2024")}}))
    assert "<!-- a · math500 -->" in two
    assert "<!-- b · aime2024 -->" in two
    assert "math500" not in read(run_dir).text
    write_json(run_dir / "scaling/sft/points.json", curve("math500"))
    assert read(run_dir).text.count("math500") == 3, "in the row of every table"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        ("", ""),
        ("#verdict=correct", 'data-verdict="correct"'),
        ("#text=QUESTION+3", "question 3"),
        ("#outcome=wrong&penalty=garbled", 'data-penalty="garbled"'),
    ],
)
def test_the_filter_works_under_the_pages_policy_in_a_browser(
    chosen: str, wanted: str, run_dir: Path, tmp_path: Path
) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", write_report(run_dir).as_uri() + chosen]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout
    shown = re.search(r"<output>(\d+) of (\d+)</output>", dom)
    assert shown is not None
    rows = re.findall(r"<tr data-source=.*?</tr>", dom, re.S)
    visible = [row for row in rows if " hidden=" not in row.partition(">")[0]]
    assert (int(shown[1]), int(shown[2])) == (len(visible), len(rows))
    if not wanted:
        assert len(visible) == len(rows) > 0
    else:
        assert 0 < len(visible) == sum(wanted in row for row in rows) < len(rows)


def test_what_is_measured_now_and_then_is_smoothed_over_steps() -> None:
    """By rows it would be the mean of the whole run: 25 measurements in 500 steps, and a window of 25."""
    steps, values = np.arange(1, 501), np.full(500, np.nan)
    values[::20] = np.arange(25)
    _, axes = plots._figure("")
    plots.smoothed(axes, steps, values, "")
    assert list(axes.lines[0].get_ydata()) == [0, *np.arange(24) + 0.5]  # the last 25 steps hold two of them
    plots.smoothed(axes, steps, steps * 1.0, "")
    assert axes.lines[1].get_ydata()[-1] == np.mean(steps[-25:])


def test_only_a_loss_is_called_one() -> None:
    """What RL differentiates has no meaning as a value; SFT's loss is its negative log-likelihood, shown once."""
    rl, sft = {"step": 1, "loss": 0.1, "pg_loss": 0.2, "kl_loss": 9.0}, {"step": 1, "loss": 1.5, "nll": 1.5}
    titles = [[plot.title for part in plots.learning_curves([row]).values() for plot in part] for row in (rl, sft)]
    assert titles == [["Surrogates (only their gradients mean something)"], ["Negative log-likelihood (nats a token)"]]


def test_published_figures_stand_beside_the_papers_sets_alone() -> None:
    assert published([{"set": "ours"}, {"set": "gpqa"}, {"set": "math500"}])["T1 (Qwen2.5-32B)"] == ["92.4", "56.1", ""]
    assert published([{"set": "ours"}]) == {}


def test_intervals_that_rounding_ends_short_of_the_accuracy_are_drawn() -> None:
    """As files have them that were written by versions before."""
    found = {
        "wrong": {"pass_at_1": 0.0, "interval": [6e-18, 0.1]},
        "right": {"pass_at_1": 1.0, "interval": [0.7, 1 - 1e-16]},
    }
    assert plots.accuracy(found).uri
