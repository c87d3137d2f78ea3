"""Figures of what the search saw: slices, importance, interaction, all trials at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from droptune.figures.canvas import COLOURS, INK, LINE, MANY, MUTED, blank, styled
from droptune.training import Record, State
from droptune.verdict.evidence import Evidence, assigned
from droptune.verdict.statistics import Array
from droptune.verdict.surface import Input, Slice, Surface
from droptune.verdict.verdict import Verdict
from droptune.verdict.wording import metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

LINES = 150  # of parallel coordinates


@styled
def slice_of(evidence: Evidence, verdict: Verdict, one: Slice) -> Figure:
    """The objective over one rate: all trials, the surface through the winner, the flat region."""
    figure, axes = blank(3.4, 2.5)
    trials = evidence.trials
    at = np.array([one.input.of(assigned(record)) for record in trials])
    at = 10**at if one.input.log else at
    values = np.array([record.value for record in trials], dtype=np.float64)
    low, high = _window(evidence, values, one)
    shown = (values >= low) & (values <= high)
    axes.axvspan(*one.near, color=COLOURS["winner"], alpha=0.12, lw=0)
    axes.plot(
        at[shown], values[shown], "o", color=MUTED, ms=2.6, alpha=0.55, mew=0,
        rasterized=len(trials) > MANY,
    )  # fmt: skip
    _surface(axes, one)
    _marks(axes, evidence, verdict, one.input)
    if one.input.log:
        axes.set_xscale("log")
        _few_ticks(axes.xaxis, one.at)
    axes.set_ylim(low, high)
    axes.set_title(one.input.name)
    names = {"lr": "learning rate"}
    axes.set_xlabel("rate" if one.input.paths else names.get(one.input.name, one.input.name))
    axes.set_ylabel(metric_name(evidence.objective.metric))
    return figure


def _few_ticks(axis: Axis, span: Array) -> None:
    """Three readable ticks on a log axis, however short it is."""
    ticks = np.geomspace(span[0], span[-1], 3)
    axis.set_ticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _window(evidence: Evidence, values: Array, one: Slice) -> tuple[float, float]:
    """Where to look: the slice and the better three quarters of the trials."""
    good = np.quantile(values, [0.0, 0.75] if evidence.sign < 0 else [0.25, 1.0])
    low = min(float(good[0]), float((one.mean - one.error).min()))
    high = max(float(good[1]), float((one.mean + one.error).max()))
    room = 0.06 * (high - low)
    return low - room, high + room


def _surface(axes: Axes, one: Slice) -> None:
    colour = COLOURS["winner"]
    axes.fill_between(
        one.at, one.mean - one.error, one.mean + one.error, color=colour, alpha=0.2, lw=0
    )
    axes.plot(one.at, one.mean, color=colour, lw=1.8)


def _marks(axes: Axes, evidence: Evidence, verdict: Verdict, one: Input) -> None:
    """Where the winner and the author's values lie."""
    if verdict.winner is not None:
        value = one.of(verdict.winner.assignment)
        axes.axvline(10**value if one.log else value, color=COLOURS["winner"], lw=1.2)
    author = evidence.author_lr if one.name == "lr" else None
    if one.paths:
        author = sum(evidence.author[path] for path in one.paths) / len(one.paths)
    if author is not None:
        axes.axvline(author, color=COLOURS["author"], lw=1.2, ls=(0, (3, 2)))


@styled
def importance(evidence: Evidence, verdict: Verdict) -> Figure:
    """What it costs to get one input wrong, in the objective's own units."""
    ranked = sorted(verdict.importance.items(), key=lambda item: item[1])[-12:]
    figure, axes = blank(4.8, 0.7 + 0.26 * max(len(ranked), 1))
    colours = [MUTED if name == "lr" else COLOURS["winner"] for name, _ in ranked]
    axes.barh(range(len(ranked)), [value for _, value in ranked], color=colours, height=0.6)
    axes.set_yticks(range(len(ranked)))
    axes.set_yticklabels([_short(name) for name, _ in ranked], color=INK)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"mean loss of {metric_name(evidence.objective.metric)} when set at random")
    return figure


def _short(name: str, length: int = 26) -> str:
    return name if len(name) <= length else f"…{name[-length + 1 :]}"


@styled
def interaction(evidence: Evidence, verdict: Verdict, surface: Surface) -> Figure | None:
    """The surface over lr and the rate of the most important site, with the best rate at each."""
    if verdict.interaction is None or verdict.winner is None:
        return None
    name = verdict.interaction.input
    at, lrs, plane = surface.plane(name, "lr", verdict.winner.assignment)
    figure, axes = blank(4.8, 3.2)
    levels = np.quantile(plane, np.linspace(0, 0.9 if evidence.sign < 0 else 1, 9))
    levels = np.unique(levels if evidence.sign < 0 else np.quantile(plane, np.linspace(0.1, 1, 9)))
    if len(levels) > 2:
        axes.contour(at, lrs, plane, levels=levels, colors=[COLOURS["winner"]], linewidths=0.8)
    ridge = at[np.argmax(evidence.sign * plane, axis=1)]
    axes.plot(ridge, lrs, color=COLOURS["none"], lw=2.0, label="best rate at this lr")
    winner = verdict.winner.assignment
    one = next(i for i in surface.inputs if i.name == name)
    axes.plot([one.of(winner)], [winner.lr], "*", color=INK, ms=11, label="winner", clip_on=False)
    axes.set_yscale("log")
    _few_ticks(axes.yaxis, lrs)
    axes.set_xlabel(f"rate at {_short(name, 40)}")
    axes.set_ylabel("learning rate")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@styled
def parallel(evidence: Evidence, surface: Surface) -> Figure:
    """Every completed trial as a line over what was searched; the best tenth in colour."""
    ranked = sorted(evidence.trials, key=evidence.benefit)
    best = ranked[-min(max(len(ranked) // 10, 3), 40) :]
    rest = ranked[: -len(best)][-LINES:]
    figure, axes = blank(max(4.8, 0.95 * (len(surface.inputs) + 1)), 3.2)
    scales = [_scale(one, ranked) for one in surface.inputs]
    rows = {id(r): _row(evidence, surface.inputs, scales, r, ranked) for r in (*rest, *best)}
    at = np.arange(len(surface.inputs) + 1)
    for record in rest:
        axes.plot(at, rows[id(record)], color=MUTED, lw=0.6, alpha=0.3, rasterized=len(rest) > 100)
    for record in best:
        axes.plot(at, rows[id(record)], color=COLOURS["winner"], lw=1.2, alpha=0.8)
    _axes_of_parallel(axes, evidence, surface.inputs, scales)
    return figure


def _scale(one: Input, trials: Sequence[Record]) -> tuple[float, float]:
    values = [one.of(assigned(record)) for record in trials]
    return min(values), max(values)


def _row(
    evidence: Evidence,
    inputs: Sequence[Input],
    scales: Sequence[tuple[float, float]],
    record: Record,
    ranked: Sequence[Record],
) -> list[float]:
    row = [
        (one.of(assigned(record)) - low) / ((high - low) or 1.0)
        for one, (low, high) in zip(inputs, scales, strict=True)
    ]
    middle = evidence.benefit(ranked[len(ranked) // 4])
    top = evidence.benefit(ranked[-1])
    last = (evidence.benefit(record) - middle) / ((top - middle) or 1.0)
    return [*row, max(last, -0.05)]


def _axes_of_parallel(
    axes: Axes, evidence: Evidence, inputs: Sequence[Input], scales: Sequence[tuple[float, float]]
) -> None:
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for place, (one, (low, high)) in enumerate(zip(inputs, scales, strict=True)):
        axes.axvline(place, color=LINE, lw=1.0, zorder=0)
        ends = [10**v if one.log else v for v in (low, high)]
        for end, height, side in ((ends[0], -0.03, "top"), (ends[1], 1.03, "bottom")):
            axes.text(place, height, f"{end:.2g}", ha="center", va=side, color=MUTED, fontsize=8.5)
    axes.axvline(len(inputs), color=LINE, lw=1.0, zorder=0)
    axes.text(len(inputs), 1.03, "best", ha="center", va="bottom", color=MUTED, fontsize=8.5)
    axes.set_yticks([])
    axes.set_ylim(-0.1, 1.1)
    axes.set_xticks(range(len(inputs) + 1))
    names = [_short(one.name, 14) for one in inputs] + [metric_name(evidence.objective.metric)]
    axes.set_xticklabels(names, color=INK, rotation=20 if len(inputs) > 4 else 0)


@styled
def history(evidence: Evidence) -> Figure:
    """The objective of every trial in the order of their numbers, and the best so far."""
    figure, axes = blank(4.8, 2.8)
    trials = sorted(
        (r for r in evidence.records if r.training.kind.is_trial),
        key=lambda r: r.training.number or 0,
    )
    key = evidence.objective.key
    held = {
        "completed": list(evidence.trials),
        "pruned": [r for r in trials if r.state is State.PRUNED and r.curves.get(key)],
    }
    _dots(axes, held["completed"], [r.value or 0.0 for r in held["completed"]], "winner", "o")
    _dots(axes, held["pruned"], [r.curves[key][-1] for r in held["pruned"]], "pruned", "x")
    benefits = np.maximum.accumulate([evidence.benefit(r) for r in held["completed"]])
    numbers = [r.training.number or 0 for r in held["completed"]]
    axes.step(numbers, evidence.sign * benefits, where="post", color=INK, lw=1.0)
    values = np.array([record.value for record in held["completed"]], dtype=np.float64)
    if len(values):
        low, high = np.quantile(values, [0.0, 0.9] if evidence.sign < 0 else [0.1, 1.0])
        room = 0.08 * float(high - low or 1.0)
        axes.set_ylim(float(low) - room, float(high) + room)
    axes.set_xlabel("trial")
    axes.set_ylabel(metric_name(evidence.objective.metric))
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _dots(
    axes: Axes, records: Sequence[Record], values: Sequence[float], label: str, mark: str
) -> None:
    numbers = [record.training.number or 0 for record in records]
    name = "completed" if label == "winner" else label
    axes.plot(
        numbers, values, mark, color=COLOURS[label], ms=3.5, alpha=0.75, label=name, ls="",
        rasterized=len(records) > MANY,
    )  # fmt: skip


@styled
def gap(evidence: Evidence) -> Figure | None:
    """How far validation lags behind training at the end, over the mean rate; None unmeasured."""
    metric = evidence.objective.metric
    keys = (f"train/{metric}", evidence.objective.key)
    held = [r for r in evidence.trials if all(r.curves.get(key) for key in keys)]
    ends = [[r.curves[key][-1] for key in keys] for r in held]
    gaps = np.array([evidence.sign * (training - validation) for training, validation in ends])
    rates = np.array([assigned(record).mean_rate for record in held])
    known = np.isfinite(gaps)
    if known.sum() < 5:
        return None
    gaps, rates = gaps[known], rates[known]
    figure, axes = blank(4.8, 2.8)
    axes.axhline(0, color=INK, lw=0.8)
    axes.plot(
        rates, gaps, "o", color=COLOURS["winner"], ms=3.5, alpha=0.7, mew=0,
        rasterized=len(held) > MANY,
    )  # fmt: skip
    room = 0.08 * float(np.ptp(gaps) or 1.0)
    axes.set_ylim(min(0.0, gaps.min() - room), max(0.0, float(np.quantile(gaps, 0.95)) + room))
    axes.set_xlabel("mean rate over all sites")
    axes.set_ylabel(f"{metric_name(metric)}: training ahead of validation")
    return figure


@styled
def lengths(evidence: Evidence) -> Figure | None:
    """The rates that would have won, had all trainings ended at each interval."""
    key = evidence.objective.key
    full = [r for r in evidence.trials if len(r.curves.get(key, ())) == evidence.intervals]
    if evidence.objective.take != "last" or len(full) < 10 or evidence.intervals < 8:
        return None
    curves = evidence.sign * np.array([r.curves[key] for r in full])
    rates = np.array([assigned(r).mean_rate for r in full])
    top = np.argsort(-curves, axis=0, kind="stable")[:3]
    figure, axes = blank(4.8, 2.8)
    at = np.arange(1, evidence.intervals + 1)
    axes.plot(at, rates[top[0]], "o", color=COLOURS["winner"], ms=2.6, alpha=0.45, mew=0)
    axes.plot(at, rates[top].mean(axis=0), color=COLOURS["winner"], lw=1.8)
    axes.set_ylim(-0.02, max(0.1, 1.08 * float(rates.max())))
    axes.set_xlabel("length of training (intervals)")
    axes.set_ylabel("mean rate of the best")
    return figure


@styled
def pareto(evidence: Evidence) -> Figure | None:
    """The first two objectives of all completed trials and their front; None with one objective."""
    objectives = evidence.spec.objectives
    held = [r for r in evidence.trials if r.values is not None and len(r.values) > 1]
    if len(objectives) < 2 or not held:
        return None
    signs = np.array([1.0 if o.direction == "maximize" else -1.0 for o in objectives[:2]])
    values = np.array([r.values[:2] for r in held if r.values is not None])
    gains = values * signs
    order = np.lexsort((-gains[:, 1], -gains[:, 0]))
    best = np.maximum.accumulate(gains[order, 1])
    front = order[np.append(True, best[1:] > best[:-1])]
    figure, axes = blank(4.8, 3.2)
    axes.plot(*values.T, "o", color=MUTED, ms=3, alpha=0.6, mew=0, rasterized=len(held) > MANY)
    axes.plot(*values[front].T, "o-", color=COLOURS["winner"], ms=4, lw=1.2)
    axes.set_xlabel(metric_name(objectives[0].metric))
    axes.set_ylabel(metric_name(objectives[1].metric))
    return figure


def slices(evidence: Evidence, verdict: Verdict, surface: Surface) -> Mapping[str, Figure]:
    """A slice for each input, the most important first."""
    if verdict.winner is None:
        return {}
    found = sorted(surface.slices(verdict.winner.assignment), key=lambda one: -one.importance)
    return {one.input.name: slice_of(evidence, verdict, one) for one in found}
