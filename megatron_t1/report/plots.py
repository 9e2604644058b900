"""The report's plots: small matplotlib figures as SVG data URIs, one a panel, so that a phone stacks them.

Left out: pyplot and its global state.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.typing import ColorType

_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "megatron_t1",
}


class Plot(NamedTuple):
    title: str
    """Also the text for who can't see it."""
    uri: str


class _Panel(NamedTuple):
    title: str
    names: tuple[str, ...]
    """Metrics of one panel; a name that ends in / takes all that start so."""
    log: bool = False


_PANELS = (
    _Panel("Reward", ("reward",)),
    _Panel("Pass rate on training prompts", ("pass_rate",)),
    _Panel("Negative log-likelihood (nats a token)", ("nll", "heldout_nll")),
    _Panel("Entropy (nats a token)", ("entropy",)),
    _Panel("KL to the anchor (nats a token)", ("kl_k1", "kl_k3")),
    _Panel("KL to the anchor (nats a sample)", ("kl_sample", "kl_sample_std")),
    _Panel("Mismatch of trainer and servers (mean)", ("logprob_diff", "prob_diff", "kl_behaviour"), log=True),
    _Panel("Off policy (share of tokens)", ("effective_sample_size", "clip_fraction", "masked")),
    _Panel("KL to the starting policy (nats a sample)", ("kl_start",)),
    _Panel("Response tokens", ("response_tokens_mean", "response_tokens_max")),
    _Panel("Response tokens, right and wrong ones", ("response_tokens_right", "response_tokens_wrong")),
    _Panel("Words of reasoning (in a response)", ("words/",)),
    _Panel("Words of reasoning, right and wrong ones", ("words_right", "words_wrong")),
    _Panel(
        "Tokens of a batch, and of groups that teach nothing: in it, and left out of it",
        ("num_response_tokens", "tokens_all_equal", "refill/tokens"),
    ),
    _Panel("Gradient norm", ("grad_norm",)),
    _Panel("Learning rate", ("lr",)),
    _Panel("Shares of samples and groups", ("share_cut", "penalized", "groups_all_equal")),
    _Panel("Penalties by kind (share of samples)", ("penalty/",)),
    _Panel("Outcomes other than correct (share)", ("outcome/",)),
    _Panel("Idle (share of a step)", ("idle/",)),
    _Panel("Imbalance of data-parallel ranks, padding (share)", ("packing/",)),
    _Panel("Surrogates (only their gradients mean something)", ("loss", "pg_loss", "kl_loss")),
    _Panel("Tokens a second", ("generate_tokens_per_s", "train_tokens_per_s")),
)


@matplotlib.rc_context(_STYLE)
def learning_curves(rows: Sequence[dict[str, float]]) -> dict[str, list[Plot]]:
    """Rows of a metrics file -> its plots, {"main": [...], "more": what no panel names}."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    if "nll" in names:  # in SFT the loss is that, in RL a surrogate
        names = [name for name in names if name != "loss"]
    steps = np.array([row["step"] for row in rows])
    # A penalty that hit nobody in a step is not in its row.
    absent = {name: 0.0 if name.startswith("penalty/") else None for name in names}
    series = {name: np.array([_number(row.get(name, absent[name])) for row in rows]) for name in names}
    stages = [name for name in names if name.startswith("seconds/")]
    left = [name for name in names if name not in stages]
    main = []
    for panel in _PANELS:
        chosen = [name for name in left if any(name == n or (n[-1] == "/" and name.startswith(n)) for n in panel.names)]
        left = [name for name in left if name not in chosen]
        if chosen:
            main.append(_curves(panel.title, steps, {name: series[name] for name in chosen}, log=panel.log))
    if stages:
        main.append(_stacked("Seconds a step, by stage", steps, {name: series[name] for name in stages}))
    return {"main": main, "more": [_curves(name, steps, {name: series[name]}) for name in left]}


@matplotlib.rc_context(_STYLE)
def reward_against_kl(runs: Mapping[str, Sequence[dict[str, Any]]]) -> Plot | None:
    """What the reward cost in distance from the starting policy, a line a run: the paper's figure; None where that is
    not known of any."""
    measured = {name: [row for row in rows if "kl_start" in row] for name, rows in runs.items()}
    known = {name: rows for name, rows in measured.items() if len(rows) > 1}
    if not known:
        return None
    title = "Reward against KL to the starting policy"
    figure, axes = _figure(title)
    for name, rows in known.items():
        kl, reward = [row["kl_start"] for row in rows], [row["reward"] for row in rows]
        axes.plot(kl, reward, "o-", markersize=4, label=_literal(name))
        axes.annotate(f"step {rows[-1]['step']}", (kl[-1], reward[-1]), xytext=(4, 4), textcoords="offset points")
    if len(runs) > 1:
        _legend(figure)
    axes.set_xlabel("nats a sample")
    return _plot(title, figure)


@matplotlib.rc_context(_STYLE)
def along_training(evals: dict[str, list[dict[str, Any]]]) -> list[Plot]:
    """{set: its evaluations in the order of the training} -> a plot, or none where there are but ends."""
    evals = {name: of_set for name, of_set in evals.items() if len(of_set) > 2}
    if not evals:
        return []
    title = "Held-out accuracy along the training with 95% interval"
    figure, axes = _figure(title)
    for place, (name, of_set) in enumerate(evals.items()):
        points = [
            {"step": s["settings"]["step"], "accuracy": s["pass_at_1"], "interval": s["interval"]} for s in of_set
        ]
        _band(axes, points, "step", f"C{place % 10}", "o-", name)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(evals) > 1:
        _legend(figure)
    return [_plot(title, figure)]


def _arms(found: Iterable[dict[str, Any]]) -> list[list[float]]:
    """[below, above] the accuracies, to their intervals' ends; matplotlib refuses what rounding made negative."""
    ends = [(one["pass_at_1"], *one["interval"]) for one in found]
    return [[max(0.0, value - low) for value, low, _ in ends], [max(0.0, high - value) for value, _, high in ends]]


@matplotlib.rc_context(_STYLE)
def accuracy(evals: dict[str, dict[str, Any]]) -> Plot:
    """Accuracy of every evaluation with its 95% interval."""
    title = "Held-out accuracy with 95% interval"
    figure, axes = _figure(title, height=1.2 + 0.45 * len(evals))
    for place, result in enumerate(evals.values()):
        value = result["pass_at_1"]
        axes.errorbar(value, place, xerr=_arms([result]), fmt="o", capsize=4, color=f"C{place}")
        axes.annotate(f"{100 * value:.1f}%", (value, place), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(evals)), [_literal(label) for label in evals])
    axes.set_ylim(len(evals) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    return _plot(title, figure)


@matplotlib.rc_context(_STYLE)
def groups(name: str, kind: str, found: dict[str, dict[str, Any]]) -> Plot:
    """Accuracy of one evaluation by level or subject, with 95% intervals."""
    title = f"{name}: accuracy by {kind}"
    figure, axes = _figure(title, height=1.0 + 0.3 * len(found))
    values = [group["pass_at_1"] for group in found.values()]
    axes.barh(range(len(found)), values, xerr=_arms(found.values()), color="C0", alpha=0.75, capsize=3)
    labels = [f"{_literal(group)} ({found[group]['num_questions']})" for group in found]
    axes.set_yticks(range(len(found)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    return _plot(title, figure)


_INSTRUMENTS = {
    "forced": ("mean_thinking_tokens", "o-", "answer forced from the cut"),
    "summary": ("mean_thinking_tokens", "^:", "answer by summary"),
    "majority": ("mean_tokens", "s--", "majority of n"),
}
"""How a curve of `scaling` was measured -> the tokens of a point, its style, its name."""


@matplotlib.rc_context(_STYLE)
def scaling(models: dict[str, dict[str, list[dict[str, Any]]]]) -> Plot:
    """Accuracy against the tokens that were used, with 95% bands. {model: {instrument: points}}: a color a model, a
    style an instrument."""
    title = "Accuracy against tokens"
    figure, axes = _figure(title, width=8.2, height=4.4)
    sets = {label: next(iter(curves.values()))[0]["set"] for label, curves in models.items()}
    drawn = [name for name in _INSTRUMENTS if any(len(curves.get(name, ())) > 1 for curves in models.values())]
    for place, (label, curves) in enumerate(models.items()):
        color = f"C{place % 10}"
        name = f"{label} · {sets[label]}" if len(set(sets.values())) > 1 else label
        axes.plot([], [], color=color, linewidth=3, label=_literal(name))
        for instrument, points in curves.items():
            x, style, _ = _INSTRUMENTS[instrument]
            if instrument != "majority" or len(points) > 1:
                _band(axes, points, x, color, style)
    if "majority" in drawn:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
    if len(drawn) > 1:
        for instrument in drawn:
            _, style, said = _INSTRUMENTS[instrument]
            axes.plot([], [], style, markersize=4, color="gray", label=said)
    axes.set_xlabel("mean tokens used for a question")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    _legend(figure)
    return _plot(title, figure)


def _band(axes: Axes, points: list[dict[str, Any]], x: str, color: str, style: str, label: str = "") -> None:
    used = [point[x] for point in points]
    low, high = zip(*(point["interval"] for point in points), strict=True)
    axes.plot(used, [point["accuracy"] for point in points], style, markersize=4, color=color, label=_literal(label))
    axes.fill_between(used, low, high, color=color, alpha=0.12, linewidth=0)


def _curves(title: str, steps: np.ndarray, series: dict[str, np.ndarray], log: bool = False) -> Plot:
    figure, axes = _figure(title)
    prefix = next(iter(series)).partition("/")[0] + "/" if all("/" in name for name in series) else ""
    for name, values in series.items():
        color = smoothed(axes, steps, values, name.removeprefix(prefix))
        known = np.isfinite(values)
        axes.plot(steps[known], values[known], color=color, alpha=0.25, linewidth=0.8)
    if log and any((values > 0).any() for values in series.values()):
        axes.set_yscale("log")
    if len(series) > 1:
        _legend(figure)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    return _plot(title, figure)


def smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str) -> ColorType:
    """Draws the mean of the last twentieth of the run's steps, as far as a value is known there; returns its color.

    steps, values: [num_rows] of the whole run, nan where a step was not measured.
    """
    known = np.isfinite(values)
    at, values = steps[known], values[known]
    first = np.searchsorted(at, at - max(1, len(steps) // 20), side="right")
    means = [values[start : end + 1].mean() for end, start in enumerate(first)]
    (line,) = axes.plot(at, means, label=_literal(label), marker="o" if len(at) == 1 else "", linewidth=1.6)
    return line.get_color()


def _stacked(title: str, steps: np.ndarray, series: dict[str, np.ndarray]) -> Plot:
    figure, axes = _figure(title)
    labels = [_literal(name.removeprefix("seconds/")) for name in series]
    axes.stackplot(steps, np.nan_to_num(np.array(list(series.values()))), labels=labels, alpha=0.85)
    _legend(figure)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    return _plot(title, figure)


def _literal(text: str) -> str:
    """A dollar sign in a label is no mathematics, and a label that begins with _ is none for matplotlib's legend."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _figure(title: str, *, width: float = 4.6, height: float = 2.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(_literal(title))
    return figure, axes


def _legend(figure: Figure) -> None:
    """Below the axes, in as many columns as fit."""
    labels = figure.axes[0].get_legend_handles_labels()[1]
    column_pt = 4.8 * max(map(len, labels)) + 41  # a letter's mean width; line and gaps
    columns = int((72 * figure.get_figwidth() + 17) / column_pt)
    figure.legend(loc="outside lower center", ncols=max(1, min(columns, len(labels), 4)))


def _plot(title: str, figure: Figure) -> Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Plot(title, "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())
