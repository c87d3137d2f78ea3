"""Figures of what confirmation showed: learning curves, paired differences, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from droptune.figures.canvas import COLOURS, INK, MUTED, blank, styled
from droptune.training import Record
from droptune.verdict.confirmation import AT_WINNERS_LR
from droptune.verdict.evidence import Evidence
from droptune.verdict.findings import pooled_reliability
from droptune.verdict.reliability import Reliability
from droptune.verdict.statistics import Array
from droptune.verdict.verdict import Verdict, members
from droptune.verdict.wording import PERCENT, metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("winner", "none", "author", "half")
POINTS = 240  # of a curve
EARLY = 5  # the first fifth of a training may leave the picture, so that the end can be read


@styled
def learning_curves(evidence: Evidence, verdict: Verdict) -> Figure:
    """The objective's validation curve of winner and baselines: mean and range over seeds."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = blank(4.8, 3.6)
    trained = members(evidence, verdict)
    drawn = [label for label in SHOWN if label in trained]
    ends = [_band(axes, evidence, trained[label], label) for label in drawn]
    shown = [curve for curve in ends if curve is not None]
    training = _training_key(evidence, trained.get("none", []))
    if training is not None and _fits(trained["none"], training, shown):
        for label in ("none", "winner"):
            _thin(axes, trained.get(label, []), training, label)
        axes.plot([], [], color=MUTED, lw=1.0, ls=(0, (2, 1.5)), label="training")
    _limit(axes, evidence, shown)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("interval")
    axes.set_ylabel(f"validation {metric_name(evidence.objective.metric)}")
    axes.margins(x=0.02)
    figure.legend(loc="outside upper left", handlelength=1.4, ncols=2)
    return figure


def _training_key(evidence: Evidence, records: Sequence[Record]) -> str | None:
    metric = evidence.objective.metric
    names = (f"train/{metric}", "train/loss") if metric == "nll" else (f"train/{metric}",)
    held = [name for name in names if records and all(r.curves.get(name) for r in records)]
    return held[0] if held else None


def _fits(records: Sequence[Record], key: str, shown: Sequence[Array]) -> bool:
    """Whether training curves leave room to tell the validation curves apart."""
    late = np.concatenate([rows[:, rows.shape[1] // EARLY :].ravel() for rows in shown])
    ends = [record.curves[key][-1] for record in records]
    low, high = min(float(late.min()), *ends), max(float(late.max()), *ends)
    return high - low <= 2.5 * float(late.max() - late.min())


def _stack(records: Sequence[Record], key: str) -> tuple[Array, Array] | None:
    curves = [r.curves[key] for r in records if r.curves.get(key)]
    if not curves:
        return None
    length = min(len(curve) for curve in curves)
    step = max(length // POINTS, 1)
    at = np.unique(np.append(np.arange(0, length, step), length - 1))
    rows = np.array([curve[:length] for curve in curves], dtype=np.float64)[:, at]
    return (at + 1).astype(np.float64), rows


def _name(evidence: Evidence, label: str) -> str:
    """What a member is called, in lines that are short enough for a legend."""
    return fill(evidence.name(label), 23, break_long_words=False, break_on_hyphens=False)


def _band(axes: Axes, evidence: Evidence, records: Sequence[Record], label: str) -> Array | None:
    stacked = _stack(records, evidence.objective.key)
    if stacked is None:
        return None
    at, rows = stacked
    colour = COLOURS[label]
    seeds = f" ({len(rows)} seeds)" if len(rows) > 1 else ""
    front = 3 if label in ("winner", "none") else 2
    axes.plot(
        at, rows.mean(axis=0), color=colour, label=_name(evidence, label) + seeds, zorder=front,
        lw=2.0 if front == 3 else 1.2,
    )  # fmt: skip
    if len(rows) > 1:
        axes.fill_between(
            at, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.18, lw=0, zorder=1
        )
    return rows


def _thin(axes: Axes, records: Sequence[Record], key: str, label: str) -> None:
    stacked = _stack(records, key)
    if stacked is not None:
        at, rows = stacked
        line = (0, (2, 1.5))
        axes.plot(at, rows.mean(axis=0), color=COLOURS[label], lw=1.0, ls=line, alpha=0.8)


def _limit(axes: Axes, evidence: Evidence, drawn: Sequence[Array]) -> None:
    """Leave out what only the first intervals reach, so that the end can be read."""
    if not drawn:
        return
    low, high = axes.get_ylim()
    late = np.concatenate([rows[:, rows.shape[1] // EARLY :].ravel() for rows in drawn])
    room = 0.08 * float(late.max() - late.min() or 1.0)
    if evidence.sign < 0:
        axes.set_ylim(low, min(high, float(late.max()) + room))
    else:
        axes.set_ylim(max(low, float(late.min()) - room), high)


@styled
def differences(evidence: Evidence, verdict: Verdict) -> Figure:
    """Paired differences: the interval of each comparison, and one tick for each seed."""
    from matplotlib.ticker import MaxNLocator

    shown = [*verdict.comparisons, *verdict.ablation]
    figure, axes = blank(4.8, 0.9 + 0.42 * max(len(shown), 1))
    factor = 100.0 if evidence.objective.metric in PERCENT else 1.0
    for row, one in enumerate(reversed(shown)):
        colour = COLOURS.get(one.against, COLOURS["winner"])
        found = one.difference
        if found.bounded:
            axes.plot([factor * found.low, factor * found.high], [row, row], color=colour, lw=2.2)
        axes.plot(
            factor * np.array(one.each), [row - 0.24] * len(one.each), "|", color=colour, ms=5
        )
        axes.plot([factor * found.mean], [row], "o", color=colour, ms=5.5)
    axes.axvline(0, color=INK, lw=0.9)
    axes.set_yticks(range(len(shown)))
    names = [_name(evidence, one.against) for one in reversed(shown)]
    axes.set_yticklabels([f"vs {name}" for name in names], color=INK)
    axes.set_ylim(-0.6, len(shown) - 0.5)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    unit = " (points)" if factor == 100.0 else ""
    data = verdict.objective["data"]
    axes.set_xlabel(
        f"how much better the {evidence.name('winner')} is:\n{data} "
        f"{metric_name(evidence.objective.metric)}{unit}"
    )
    return figure


@styled
def reliability(evidence: Evidence, verdict: Verdict) -> Figure | None:
    """Accuracy against confidence on the test set; None without stored confidences."""
    trained = members(evidence, verdict)
    labels = [label for label in ("winner", "none", "author", AT_WINNERS_LR) if label in trained]
    found = [(label, pooled_reliability(evidence, trained[label])) for label in labels]
    held = [(label, one) for label, one in found if one is not None]
    if not held:
        return None
    figure, axes = blank(4.8, 3.8)
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.9, ls=":", label="as often right as sure")
    for label, one in held:
        name = f"{_name(evidence, label)} (ECE {one.ece:.3f})"
        said, was, count = _bins(one)
        axes.plot(said, was, color=COLOURS[label], label=name, lw=1.4)
        axes.scatter(said, was, s=6 + 60 * count / count.sum(), color=COLOURS[label])
    for label in ("winner", "none"):
        scaled = pooled_reliability(evidence, trained.get(label, []), after=True)
        if scaled is not None:
            _scaled(axes, scaled, label)
    axes.plot([], [], color=MUTED, lw=1.0, ls=(0, (2, 1.5)), label="after temperature scaling")
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside upper left", ncols=2, handlelength=1.4)
    return figure


def _scaled(axes: Axes, one: Reliability, label: str) -> None:
    said, was, _ = _bins(one)
    axes.plot(said, was, color=COLOURS[label], lw=1.0, ls=(0, (2, 1.5)), alpha=0.8)


def _bins(one: Reliability) -> tuple[Array, Array, Array]:
    """Confidence, accuracy and count of the bins that hold enough examples to be drawn."""
    count = np.array(one.count, dtype=np.float64)
    enough = count >= max(10, count.sum() / 500)
    return np.array(one.confidence)[enough], np.array(one.accuracy)[enough], count[enough]
