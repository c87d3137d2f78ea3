"""Predict what a training will reach from what it has shown, its rates and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from droptune.search.judgement import completed_trials
from droptune.training import Assignment, Record, State, TrainingKind

if TYPE_CHECKING:
    from droptune.spec.objective import Objective

Array = npt.NDArray[np.float64]
T = TypeVar("T")

PILOTS = 6  # completed trainings before the first prediction
SEEN = 48  # completed trainings that a prediction learns from, at most
RATES = 6  # columns of rates
UNCERTAINTY = "sd"  # the user attribute where an Optuna trial carries `Expected.sds`


@dataclass(frozen=True)
class Trace:
    """One training as numbers.

    curves: [objectives, intervals done], smaller is better
    point: where it lies in the search space, in columns that are the same for all trainings
    values: the objectives' values where it has completed, smaller is better
    protected: never pruned; audited: finished even where it would be pruned
    """

    key: int
    curves: Array
    point: Array
    values: Array | None = None
    protected: bool = False
    audited: bool = False

    @property
    def intervals(self) -> int:
        return int(self.curves.shape[1])


class Process:
    """Regression by a Gaussian process, small and with its leave-one-out errors at hand.

    The kernel is constant + linear + squared exponential + noise on standardised columns; its
    numbers are those of a coarse grid with the greatest evidence (Rasmussen & Williams 2006,
    eq. 5.8; leave-one-out: eqs. 5.10-5.12). In closed form, since a few dozen points are fitted
    again and again; an optimiser of the numbers costs far more and predicts no better here.

    x: [n, columns], y: [n]; `error` is the root mean square of the leave-one-out errors.
    """

    LINEAR, LENGTH, NOISE = (
        grid.ravel() for grid in np.meshgrid((0.25, 1.0, 4.0), (1.0, 2.0), (0.02, 0.1, 0.3, 1.0))
    )

    def __init__(self, x: Array, y: Array) -> None:
        self._center, self._scale = x.mean(0), np.maximum(x.std(0), 1e-12)
        self._columns = max(1, int((self._scale > 1e-12).sum()))  # those that vary
        self._mean, self._spread = float(y.mean()), max(float(y.std()), 1e-12)
        self._x, target = self._standard(x), (y - self._mean) / self._spread
        kernels = self._kernel(self._x, slice(None))
        inverses = np.linalg.inv(kernels + self.NOISE[:, None, None] * np.eye(len(x)))
        weights = inverses @ target
        evidence = np.linalg.slogdet(inverses)[1] - weights @ target
        self._chosen = int(np.argmax(evidence))
        self._inverse, self._weights = inverses[self._chosen], weights[self._chosen]
        variance = 1 / np.diag(self._inverse)
        errors = self._weights * variance
        self.error = self._spread * float(np.sqrt(np.mean(errors**2)))
        self._inflation = max(1.0, float(np.sqrt(np.mean(errors**2 / variance))))

    def _standard(self, x: Array) -> Array:
        return np.asarray((x - self._center) / self._scale)

    def _kernel(self, x: Array, at: slice | int) -> Array:
        """Covariance without noise of x with the training points: [grid of `at`, m, n]."""
        linear, length = (n[at, ..., None, None] for n in (self.LINEAR, self.LENGTH))
        product, columns = x @ self._x.T, self._columns
        distance = (x**2).sum(1)[:, None] + (self._x**2).sum(1) - 2 * product
        curved = np.exp(-np.maximum(distance, 0) / columns / (2 * length**2))
        return np.asarray(1 + linear * product / columns + curved)

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation [m] of y at x [m, columns], noise included."""
        x, at = self._standard(x), self._chosen
        cross = self._kernel(x, at)
        prior = 2 + self.LINEAR[at] * (x**2).sum(1) / self._columns + self.NOISE[at]
        variance = prior - np.einsum("ij,jk,ik->i", cross, self._inverse, cross)
        sd = np.sqrt(np.maximum(variance, 1e-12)) * self._inflation
        return self._mean + self._spread * (cross @ self._weights), self._spread * sd


@dataclass(frozen=True)
class Warp:
    """A monotone map, asinh, that keeps differences near the best and tames blow-ups.

    Beyond LIMIT, ten times as far as the median, values only count as bad (or, of curves that
    rise again, as good).
    """

    LIMIT: ClassVar = 3.0

    best: float
    scale: float

    @classmethod
    def of(cls, values: Array) -> Warp | None:
        """The best at 0, the median at asinh 1; None where the median ties with the best."""
        scale = float(np.median(values) - values.min())
        return cls(float(values.min()), scale) if scale > 0 else None

    def __call__(self, values: Array) -> Array:
        return np.clip(np.arcsinh((values - self.best) / self.scale), -self.LIMIT, self.LIMIT)

    def back(self, mean: Array, sd: Array) -> tuple[Array, Array]:
        mean = np.clip(mean, -self.LIMIT, self.LIMIT)
        return self.best + self.scale * np.sinh(mean), self.scale * np.cosh(mean) * sd


def jumps(curves: Array) -> float:
    """How far curves [n, intervals] lie from a straight line over their last third: the median of
    their standard deviations."""
    tail = curves[:, -max(4, curves.shape[1] // 3) :]
    time = np.linspace(-1, 1, tail.shape[1])
    level = tail - tail.mean(1, keepdims=True)
    return float(np.median((level - np.outer(level @ time / (time @ time), time)).std(1)))


def shape(curves: Array) -> Array:
    """What curves [n, intervals] have shown [n, 3]: level now, change since half-way, lowest."""
    interval = curves.shape[1]
    window, half = max(1, interval // 5), max(1, interval // 2)
    now = curves[:, -window:].mean(1)
    before = curves[:, max(0, half - window) : half].mean(1)
    return np.column_stack([now, now - before, curves.min(1)])


@dataclass(frozen=True)
class Prediction:
    """Final values in one objective: mean and sd [n] in warped units.

    error: of leaving one out, as a share of the final values' standard deviation
    jumps: how far values jump from interval to interval, where the objective is `counted`
    """

    warp: Warp
    mean: Array
    sd: Array
    error: float
    jumps: float = 0.0


def predict(
    completed: Sequence[Trace],
    asked: Sequence[Trace],
    interval: int,
    takes: Sequence[str],
    counted: Sequence[bool] = (),
    *,
    pilots: int = PILOTS,
    seen: int = SEEN,
) -> tuple[Prediction, ...] | None:
    """Final values of `asked`, seen up to `interval`: one Prediction per objective.

    takes: "last" or "best" per objective; counted: whether it counts right and wrong, so that its
    values jump from interval to interval. None where the completed are too few or all alike.
    """
    able = [c for c in completed if c.intervals >= interval]
    if len(able) < pilots or not asked:
        return None
    teachers = _teachers(able, seen)
    points, reached = np.stack([c.point for c in teachers]), _reached(teachers)
    asked_points = np.stack([c.point for c in asked])
    shortest = min(c.intervals for c in teachers)
    made = []
    for objective, take in enumerate(takes):
        warp = Warp.of(_reached(completed)[:, objective])
        if warp is None:
            return None
        shown, asked_shown = (
            shape(warp(np.stack([c.curves[objective, :interval] for c in group])))
            for group in (teachers, asked)
        )
        y = warp(reached[:, objective])
        process = Process(np.hstack([shown, points]), y)
        mean, sd = process.predict(np.hstack([asked_shown, asked_points]))
        if take == "best":
            mean = np.minimum(mean, asked_shown[:, 2])  # what it has reached, it keeps
        error = process.error / max(float(y.std()), 1e-12)
        whole = np.stack([c.curves[objective, :shortest] for c in teachers])
        jumping = jumps(warp(whole)) if any(counted[objective : objective + 1]) else 0.0
        made.append(Prediction(warp, mean, np.maximum(sd, process.error), error, jumping))
    return tuple(made)


def _reached(completed: Sequence[Trace]) -> Array:
    return np.stack([c.values for c in completed if c.values is not None])


def _teachers(completed: Sequence[Trace], most: int) -> list[Trace]:
    reached = [0.0 if c.values is None else float(c.values[0]) for c in completed]
    return spread_over_ranks(completed, reached, most)


def spread_over_ranks(items: Sequence[T], values: Sequence[float], most: int) -> list[T]:
    """At most `most` of the items, evenly from the lowest value to the highest."""
    if len(items) <= most:
        return list(items)
    ranks = np.argsort(values, kind="stable")
    chosen = ranks[np.linspace(0, len(ranks) - 1, most).round().astype(int)]
    return [items[i] for i in sorted(chosen)]


def points(assignments: Sequence[Assignment]) -> Array:
    """Assignments as columns [n, columns]: the mean rate, every site's rate, log lr, further
    numbers (their logarithm where all are positive), and one column per word.

    Equal columns appear once, constant ones never. More than six rates, in the order of their
    paths, become the means of six runs of them: a few dozen trainings cannot tell more apart.
    """
    rates = _distinct([[a.rates.get(s, 0.0) for a in assignments] for s in _sites(assignments)])
    if len(rates) > RATES:
        rates = [np.mean(run, axis=0).tolist() for run in np.array_split(np.array(rates), RATES)]
    columns = [[a.mean_rate for a in assignments], *rates, [math.log(a.lr) for a in assignments]]
    for name in sorted({name for a in assignments for name in a.values}):
        columns += _value_columns([a.values.get(name) for a in assignments])
    return np.array(_distinct(columns) or [[0.0] * len(assignments)]).T


def _sites(assignments: Sequence[Assignment]) -> list[str]:
    return sorted({site for a in assignments for site in a.rates})


def _distinct(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """Those that are neither constant nor equal to one before."""
    kept = dict.fromkeys(tuple(column) for column in columns if len(set(column)) > 1)
    return [list(column) for column in kept]


def _value_columns(values: Sequence[float | str | None]) -> list[list[float]]:
    words = sorted({value for value in values if isinstance(value, str)})
    if words:
        return [[float(value == word) for value in values] for word in words]
    numbers = [float(value) if value is not None else 0.0 for value in values]
    return [[math.log(n) for n in numbers] if min(numbers) > 0 else numbers]


def traces(
    records: Sequence[Record],
    objectives: Sequence[Objective],
    intervals: int,
    audited: Callable[[Record], bool] = lambda _: False,
    among: Sequence[Record] = (),
) -> list[Trace]:
    """The records that can be compared, on columns that all of these and `among` have in common."""
    known = [r for r in records if r.training.assignment is not None]
    told = (r.training.assignment for r in (*known, *among))
    rows = points([assignment for assignment in told if assignment is not None])[: len(known)]
    made = (
        _trace(record, row, objectives, intervals, audited(record))
        for record, row in zip(known, rows, strict=True)
    )
    return [trace for trace in made if trace is not None]


def _trace(
    record: Record, point: Array, objectives: Sequence[Objective], intervals: int, audited: bool
) -> Trace | None:
    """None where an objective was not measured, is not finite, or a completed curve is short."""
    signs = direction_signs(objectives)
    measured = [record.curves.get(objective.key, ()) for objective in objectives]
    done = min(len(curve) for curve in measured)
    curves = signs[:, None] * np.array([curve[:done] for curve in measured])
    if not done or not np.isfinite(curves).all():
        return None
    values = None
    if record.state is State.COMPLETE:
        if done < intervals or record.values is None:
            return None
        values = signs * np.array(record.values)
    protected = record.training.kind is not TrainingKind.SEARCH
    return Trace(record.training.id, curves, point, values, protected, audited)


def direction_signs(objectives: Sequence[Objective]) -> Array:
    """1 for objectives to minimise, -1 for those to maximise."""
    return np.array([1.0 if o.direction == "minimize" else -1.0 for o in objectives])


@dataclass(frozen=True)
class Expected:
    """What a pruned trial would probably have reached: value and standard deviation for each
    objective, in its own direction."""

    values: tuple[float, ...]
    sds: tuple[float, ...]


def expected_values(
    records: Sequence[Record], objectives: Sequence[Objective], intervals: int
) -> dict[int, Expected]:
    """By training id, for samplers that cannot learn from a pruned trial; never stored.

    Empty while there is too little to predict from.
    """
    cut = [r for r in records if r.state is State.PRUNED and r.training.kind.is_trial]
    known = traces(completed_trials(records) + cut, objectives, intervals)
    completed = [c for c in known if c.values is not None]
    takes, signs = [o.take for o in objectives], direction_signs(objectives)
    expected: dict[int, Expected] = {}
    for interval in sorted({c.intervals for c in known if c.values is None}):
        asked = [c for c in known if c.values is None and c.intervals == interval]
        predictions = predict(completed, asked, interval, takes)
        if predictions is None:
            continue
        ends = np.array([p.warp.back(p.mean, p.sd) for p in predictions])  # [objectives, 2, asked]
        for trace, (mean, sd) in zip(asked, ends.transpose(2, 1, 0), strict=True):
            expected[trace.key] = Expected(tuple(signs * mean), tuple(sd))
    return expected
