"""What else a study shows beside the comparison: sites, overfitting, interaction, calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from droptune.training import Assignment, Record
from droptune.verdict.comparison import test_scores
from droptune.verdict.confirmation import Plan
from droptune.verdict.evidence import Evidence
from droptune.verdict.member import best_baselines
from droptune.verdict.reliability import Reliability, pooled
from droptune.verdict.statistics import Array, finite, paired
from droptune.verdict.surface import Slice, Surface, interaction
from droptune.verdict.wording import learning_rate, level, metric_name, rate

EDGE = 0.05  # of a range: a best value closer to its end may lie beyond it


class Finding:
    """Plain values that JSON can say."""

    def to_json(self) -> dict[str, Any]:
        return {name: finite(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class SiteFinding(Finding):
    """One site: the rate recommended, the winner's, and what the search says around that.

    `near` is the range of rates around the winner's that the response surface has as good, or
    cannot tell from the best one, all else as in the winner; `importance` the mean loss of the
    objective when the rate is drawn from its range; `edge` "low" or "high" where the rate lies at
    the end of the range searched.
    """

    path: str
    kind: str
    rate: float
    winner: float
    author: float
    near: tuple[float, float] | None
    importance: float | None
    edge: str | None


def site_findings(
    evidence: Evidence, slices: Sequence[Slice], found: Assignment, winner: Assignment
) -> tuple[SiteFinding, ...]:
    """Every site at the rates recommended, in the order of the model."""
    by_path = {path: one for one in slices for path in one.input.paths}
    return tuple(
        SiteFinding(
            site.path,
            site.kind,
            found.rates.get(site.path, site.rate),
            winner.rates.get(site.path, site.rate),
            site.rate,
            _near(by_path.get(site.path), site.path, winner),
            by_path[site.path].importance if site.path in by_path else None,
            edge(winner.rates.get(site.path, site.rate), evidence.ranges.get(site.path)),
        )
        for site in evidence.sites
    )


def _near(one: Slice | None, path: str, winner: Assignment) -> tuple[float, float] | None:
    """The slice's range in this site's own rates; a group's slice is over its mean rate."""
    if one is None:
        return None
    mean = one.input.of(winner)
    weight = winner.rates[path] / mean if mean > 0 else 1.0
    return one.near[0] * weight, one.near[1] * weight


def edge(value: float, searched: tuple[float, float] | None, *, log: bool = False) -> str | None:
    """ "low" or "high" where a value lies within 5 % of that end; a rate of 0 is no edge."""
    if searched is None or searched[0] == searched[1]:  # such as a first block's, always 0
        return None
    low, high = searched
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    margin = EDGE * (high - low)
    if value >= high - margin:
        return "high"
    return "low" if value <= low + margin and (log or low > 0) else None


def edge_warnings(
    evidence: Evidence, sites: Iterable[SiteFinding], found: Assignment, none: Assignment | None
) -> tuple[str, ...]:
    """One line for each value that lies at the end of its range, no dropout's lr among them."""
    warnings = [
        f"the winner's rate {rate(site.winner)} at {site.path} lies at the {site.edge} end of its "
        f"range ({_span(evidence.ranges[site.path])}); widen it, the best may lie beyond"
        for site in sites
        if site.edge is not None
    ]
    advice = {"the winner's": "widen it", "no dropout's": "it may do better beyond; widen it"}
    for whose, one in zip(advice, (found, none), strict=True):
        searched = evidence.ranges.get("lr")
        at = edge(one.lr, searched, log=True) if one else None
        if one is not None and at is not None and searched is not None:
            warnings.append(
                f"{whose} lr {learning_rate(one.lr)} lies at the {at} end of its range "
                f"({learning_rate(searched[0])} to {learning_rate(searched[1])}); {advice[whose]}"
            )
    return tuple(warnings)


def _span(searched: tuple[float, float]) -> str:
    return f"{rate(max(searched[0], 0.0))} to {rate(searched[1])}"


# -- do I overfit at all --------------------------------------------------------------------------


@dataclass(frozen=True)
class Overfitting(Finding):
    """Training without dropout: how far validation lags, and whether it turned round."""

    metric: str
    train: float
    validation: float
    best: float
    best_interval: int
    intervals: int
    trainings: int
    sentence: str


def overfitting(evidence: Evidence, plan: Plan) -> Overfitting | None:
    """The gap between training and validation at rate 0, from confirmations where there are any."""
    records = _without_dropout(evidence, plan)
    key = evidence.objective.key
    measured = _train_key(evidence, records)
    if not records or measured is None or any(key not in r.curves for r in records):
        return None
    validation = mean_curve([r.curves[key] for r in records])
    train = float(np.mean([r.curves[measured][-1] for r in records]))
    best = int(np.argmax(evidence.sign * validation))
    last = float(validation[-1])
    return Overfitting(
        metric=evidence.objective.metric,
        train=train,
        validation=last,
        best=float(validation[best]),
        best_interval=best + 1,
        intervals=len(validation),
        trainings=len(records),
        sentence=_overfitting_sentence(evidence, measured, train, validation, best),
    )


def _without_dropout(evidence: Evidence, plan: Plan) -> list[Record]:
    none = next((m for m in plan.compared if m.label == "none"), None)
    if none is None:
        none = next((m for m in best_baselines(evidence) if m.label == "none"), None)
    if none is None:
        return []
    seeds = range(evidence.spec.confirm.max_seeds)
    confirmed = list(evidence.confirmed(none.assignment, seeds).values())
    return confirmed or [r for r in evidence.trials if r.training.number == none.trial]


def _train_key(evidence: Evidence, records: Sequence[Record]) -> str | None:
    metric = evidence.objective.metric
    names = [f"train/{metric}", *(["train/loss"] if metric in ("nll", "mse", "loss") else [])]
    held = [name for name in names if records and all(name in r.curves for r in records)]
    return held[0] if held else None


def mean_curve(curves: Sequence[Sequence[float]]) -> Array:
    """The mean of curves over their common length."""
    length = min(len(curve) for curve in curves)
    mean: Array = np.mean([curve[:length] for curve in curves], axis=0)
    return mean


def _overfitting_sentence(
    evidence: Evidence, measured: str, train: float, validation: Array, best: int
) -> str:
    metric = evidence.objective.metric
    last = float(validation[-1])
    gap = evidence.sign * (train - last)
    turned = evidence.sign * (float(validation[best]) - last)
    name = metric_name(metric)
    figures = f"{name} {level(metric, train)} in training, {level(metric, last)} in validation"
    if gap <= 0.02 * abs(last):
        return f"Without dropout this model does not overfit: {figures} at the end."
    if turned > 0.05 * abs(float(validation[best])) and best < len(validation) - 2:
        return (
            f"Without dropout this model overfits: {figures} at the end; validation was best "
            f"({level(metric, float(validation[best]))}) after {best + 1} of {len(validation)} "
            "intervals."
        )
    return (
        f"Without dropout this model fits the training data better than new data ({figures}), but "
        "validation gets no worse towards the end."
    )


# -- learning rate and rate together --------------------------------------------------------------


@dataclass(frozen=True)
class Interaction(Finding):
    """How far the best rate depends on the learning rate (by the response surface)."""

    input: str
    share: float  # of the variance over both that neither causes alone
    sentence: str


def lr_interaction(
    surface: Surface | None, slices: Sequence[Slice], found: Assignment
) -> Interaction | None:
    """The interaction of lr with the most important site's rate, through the assignment found."""
    rates = [one for one in slices if one.input.paths]
    if surface is None or not rates or all(one.input.name != "lr" for one in slices):
        return None
    top = max(rates, key=lambda one: one.importance).input.name
    at, lrs, plane = surface.plane(top, "lr", found)
    share = interaction(plane)
    ridge = at[np.argmax(surface.sign * plane, axis=1)]
    low, high = float(ridge[len(ridge) // 4]), float(ridge[-len(ridge) // 4])
    few, many = float(lrs[len(lrs) // 4]), float(lrs[-len(lrs) // 4])
    return Interaction(top, share, _interaction_sentence(top, share, (few, low), (many, high)))


def _interaction_sentence(
    top: str, share: float, low: tuple[float, float], high: tuple[float, float]
) -> str:
    """`low` and `high`: a learning rate and the best rate at it."""
    part = f"({100 * share:.0f} % of the variance over both is interaction)"
    if share <= 0.05:
        return f"lr and the rate at {top} act nearly independently {part}."
    if abs(low[1] - high[1]) < 0.03:
        return f"lr and the rate at {top} interact {part}, yet the best rate stays the same."
    return (
        f"lr and the rate at {top} interact {part}: the best rate is {rate(low[1])} at lr "
        f"{learning_rate(low[0])} and {rate(high[1])} at lr {learning_rate(high[0])}."
    )


# -- cost and calibration -------------------------------------------------------------------------


@dataclass(frozen=True)
class DropoutCost(Finding):
    """Seconds per interval with and without dropout, over the same seeds (medians).

    `low` and `high`: the 95 % interval of their ratio, from pairs of one seed.
    """

    winner: float
    none: float
    low: float
    high: float


def dropout_cost(
    evidence: Evidence, ours: Sequence[Record], theirs: Sequence[Record]
) -> DropoutCost | None:
    """What masks cost in time: median seconds per interval of the winner and of no dropout.

    None where the study trains fused: trainings of one group share its time equally.
    """
    if evidence.fused:
        return None
    seconds = [[_seconds(record) for record in records] for records in (ours, theirs)]
    a, b = np.array(seconds[0]), np.array(seconds[1])
    if len(a) < 2 or not (np.all(a > 0) and np.all(b > 0)):
        return None
    ratio = paired(np.log(a / b))
    if not ratio.bounded:
        return None
    low, high = math.exp(ratio.low), math.exp(ratio.high)
    return DropoutCost(float(np.median(a)), float(np.median(b)), low, high)


def _seconds(record: Record) -> float:
    return float(np.median(record.curves.get("time/seconds") or [math.nan]))


@dataclass(frozen=True)
class Calibration(Finding):
    """How well one member's probabilities are calibrated on the test set, before and after scaling.

    Means over seeds; with stored logits, over the examples that those are of. `ece_after`,
    `nll_after` and `temperature` are None without.
    """

    label: str
    ece: float
    nll: float
    ece_after: float | None = None
    nll_after: float | None = None
    temperature: float | None = None


def calibration(evidence: Evidence, label: str, records: Sequence[Record]) -> Calibration | None:
    """Calibration of a member's trainings on the test set; None where it is not known."""
    scaled = [one for record in records if (one := evidence.scaled(record)) is not None]
    if scaled and len(scaled) == len(records):
        return Calibration(
            label,
            float(np.mean([one.before.ece for one in scaled])),
            float(np.mean([one.nll_before.mean() for one in scaled])),
            float(np.mean([one.after.ece for one in scaled])),
            float(np.mean([one.nll.mean() for one in scaled])),
            float(np.mean([one.temperature for one in scaled])),
        )
    nll, ece = (_mean_test(evidence, records, metric) for metric in ("nll", "ece"))
    return None if math.isnan(ece) else Calibration(label, ece, nll)


def pooled_reliability(
    evidence: Evidence, records: Sequence[Record], *, after: bool = False
) -> Reliability | None:
    """The reliability over all seeds and test examples, `after` scaling; None without logits."""
    scaled = [one for record in records if (one := evidence.scaled(record)) is not None]
    return pooled([one.after if after else one.before for one in scaled]) if scaled else None


def _mean_test(evidence: Evidence, records: Sequence[Record], metric: str) -> float:
    found = [test_scores(evidence, record, metric) for record in records]
    held = [float(one.mean()) for one in found if one is not None]
    return float(np.mean(held)) if held else math.nan


def values_at_objective(records: Sequence[Record], key: str) -> list[float]:
    """A curve's value at the interval that each training's objective was taken at."""
    return [
        r.curves[key][(r.best_interval or len(r.curves[key])) - 1]
        for r in records
        if r.curves.get(key)
    ]
