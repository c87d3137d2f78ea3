"""Figures of how the study went: what was pruned, and who trained what when."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from droptune.figures.canvas import COLOURS, INK, MANY, MUTED, blank, styled
from droptune.training import Record, State, TrainingKind
from droptune.verdict.evidence import Evidence, assigned
from droptune.verdict.wording import metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = np.linspace(0, 0.9, 7)
CURVES = 120  # drawn at most


@styled
def pruning(evidence: Evidence) -> Figure | None:
    """Curves of trials by how they ended, and how many ended so for each mean rate."""
    trials = [r for r in evidence.records if r.training.kind.is_trial and r.state.finished]
    if not any(record.state is State.PRUNED for record in trials):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.4))
    above, below = figure.subplots(2, 1, height_ratios=[3, 2])
    _trial_curves(above, evidence, trials)
    _by_rate(below, trials)
    return figure


def _trial_curves(axes: Axes, evidence: Evidence, trials: Sequence[Record]) -> None:
    key = evidence.objective.key
    curves = [(r.state, r.curves[key]) for r in trials if r.curves.get(key)]
    step = max(len(curves) // CURVES, 1)
    for state, curve in curves[::step]:
        pruned = state is State.PRUNED
        axes.plot(
            np.arange(1, len(curve) + 1), curve, lw=0.8, alpha=0.75 if pruned else 0.45,
            color=COLOURS["pruned"] if pruned else COLOURS["winner"], zorder=3 if pruned else 2,
            rasterized=len(curves) * len(curve) > 8000,
        )  # fmt: skip
        if pruned:
            axes.plot([len(curve)], [curve[-1]], "x", color=COLOURS["pruned"], ms=4, zorder=4)
    late = np.array([value for _, curve in curves for value in curve[len(curve) // 4 :]])
    late = late[np.isfinite(late)]  # a failed trial's are not
    if len(late):
        low, high = np.quantile(late, [0.0, 0.97] if evidence.sign < 0 else [0.03, 1.0])
        room = 0.05 * float(high - low or 1.0)
        axes.set_ylim(float(low) - room, float(high) + room)
    axes.set_xlabel("interval")
    axes.set_ylabel(f"validation {metric_name(evidence.objective.metric)}")


def _by_rate(axes: Axes, trials: Sequence[Record]) -> None:
    bottom = np.zeros(len(BINS) - 1)
    width = float(BINS[1] - BINS[0])
    ends = (
        ("completed", State.COMPLETE, "winner"),
        ("pruned", State.PRUNED, "pruned"),
        ("failed", State.FAIL, "failed"),
    )
    for name, state, colour in ends:
        rates = [
            assigned(r).mean_rate for r in trials if r.state is state and r.training.assignment
        ]
        if not rates:
            continue
        count = np.histogram(np.clip(rates, 0, BINS[-1] - 1e-9), BINS)[0]
        axes.bar(
            BINS[:-1] + width / 2, count, width * 0.86, bottom=bottom, color=COLOURS[colour],
            alpha=0.8, label=name,
        )  # fmt: skip
        bottom = bottom + count
    axes.set_xlabel("mean rate over all sites")
    axes.set_ylabel("trials")
    axes.legend(loc="best")


_KINDS = {
    TrainingKind.SEARCH: "winner",
    TrainingKind.BASELINE: "none",
    TrainingKind.CONFIRMATION: "half",
    TrainingKind.ABLATION: "author",
    TrainingKind.REPLAY: "none at the winner's lr",
}


@styled
def timeline(evidence: Evidence) -> Figure | None:
    """Which slot of which worker trained what, over time; None without times."""
    held = [r for r in evidence.records if r.started and r.ended]
    if not held:
        return None
    start = min(r.started for r in held if r.started)
    rows = _rows(held)
    longest = max((r.ended - start).total_seconds() for r in held if r.ended)
    unit, seconds = next(u for u in _UNITS if longest >= 2 * u[1] or u[1] == 1)
    figure, axes = blank(7.0, min(0.8 + 0.16 * len(rows[0]), 6.0))
    for (kind, pruned), bars in _bars(held, rows[1], start, seconds).items():
        colour = COLOURS["pruned"] if pruned else COLOURS[_KINDS[kind]]
        places, begins, widths = (np.array(column) for column in zip(*bars, strict=True))
        axes.barh(
            places, widths, left=begins, height=0.8, color=colour, alpha=0.8, lw=0,
            label="pruned" if pruned else kind.value, rasterized=len(held) > MANY,
        )  # fmt: skip
    _lane_names(axes, rows[0])
    axes.set_xlabel(unit)
    figure.legend(loc="outside upper left", ncols=5)
    return figure


_UNITS = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def _rows(held: Sequence[Record]) -> tuple[list[str], dict[int, int]]:
    """A row for each slot: trainings of one worker that overlap lie in different rows."""
    free: dict[str, list[tuple[int, datetime]]] = {}
    workers: list[str] = []
    place: dict[int, int] = {}
    for worker in sorted({r.worker or "?" for r in held}):
        lanes = free.setdefault(worker, [])
        mine = [r for r in held if (r.worker or "?") == worker]
        for record in sorted(mine, key=lambda r: (r.started, r.training.id)):
            assert record.started is not None
            assert record.ended is not None
            open_ = [i for i, (_, until) in enumerate(lanes) if until <= record.started]
            if open_:
                row = lanes[open_[0]][0]
                lanes[open_[0]] = (row, record.ended)
            else:
                row = len(workers)
                workers.append(worker)
                lanes.append((row, record.ended))
            place[record.training.id] = row
    return workers, place


Bars = dict[tuple[TrainingKind, bool], list[tuple[float, float, float]]]


def _bars(held: Sequence[Record], place: dict[int, int], start: datetime, seconds: float) -> Bars:
    bars: Bars = {}
    for record in held:
        assert record.started is not None
        assert record.ended is not None
        begun = (record.started - start).total_seconds() / seconds
        width = (record.ended - record.started).total_seconds() / seconds
        pruned = record.state is State.PRUNED
        kind = TrainingKind.SEARCH if pruned else record.training.kind
        bars.setdefault((kind, pruned), []).append((place[record.training.id], begun, width))
    return bars


def _lane_names(axes: Axes, workers: Sequence[str]) -> None:
    """One name for each worker, in the middle of its slots."""
    names = sorted(set(workers))
    middles = [float(np.mean([i for i, w in enumerate(workers) if w == name])) for name in names]
    axes.set_yticks(middles)
    axes.set_yticklabels([name[-24:] for name in names], color=INK)
    for name in names[1:]:
        axes.axhline(workers.index(name) - 0.5, color=MUTED, lw=0.6)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(workers) - 0.5, -0.5)
