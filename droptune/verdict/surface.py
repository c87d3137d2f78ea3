"""The response surface: what a search says of the objective as a function of what it searched."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from droptune.training import Assignment, Record, TrainingKind
from droptune.verdict.evidence import Evidence, assigned
from droptune.verdict.statistics import Array

MIN_TRIALS = 10  # below this a surface says nothing that the raw values do not
MAX_TRIALS = 200  # a Gaussian process is cubic in them
GRID = 33


@dataclass(frozen=True)
class Input:
    """One coordinate of the surface: what it is called and how it is read off an assignment."""

    name: str
    paths: tuple[str, ...] = ()  # sites whose rates are tied together
    value: str = ""  # a searched value
    word: str | None = None  # one word of a choice
    log: bool = False

    def of(self, assignment: Assignment) -> float:
        """Its coordinate: the mean rate of its sites, or the value (log10 where `log`)."""
        if self.paths:
            return sum(assignment.rates.get(path, 0.0) for path in self.paths) / len(self.paths)
        value = assignment.values[self.value] if self.value else assignment.lr
        if self.word is not None:
            return float(str(value) == self.word)
        return math.log10(float(value)) if self.log else float(value)


@dataclass(frozen=True)
class Slice:
    """The surface along one input through one assignment; `mean` is the objective itself."""

    input: Input
    at: Array  # [GRID], in the input's own units
    mean: Array
    error: Array
    near: tuple[float, float]  # as good as the assignment's own place, or as far as can be told
    importance: float  # mean loss when this input is drawn at random from its range


class Surface:
    """A Gaussian process over the completed trials of a search.

    Matérn 5/2 with one length scale per input (of at least 0.3 of its range: a shorter one follows
    noise between trials that crowd together) and learnt noise (Snoek et al. 2012). Values much
    worse than the median are pulled in, so that diverged trials do not set the scale; with more
    than 200 trials the better half of the places goes to the best.
    """

    def __init__(self, evidence: Evidence, trials: Sequence[Record]) -> None:
        self.sign = evidence.sign
        chosen = _thinned(evidence, trials)
        self.inputs = find_inputs(evidence, chosen)
        raw = np.array([[i.of(assigned(r)) for i in self.inputs] for r in chosen])
        self._low, high = raw.min(axis=0), raw.max(axis=0)
        self._span = np.where(high > self._low, high - self._low, 1.0)
        loss = _pulled_in(np.array([-evidence.benefit(record) for record in chosen]))
        self._center, self._scale = float(loss.mean()), float(loss.std()) or 1.0
        self._process = _fit(self._unit(raw), (loss - self._center) / self._scale)
        self.noise = math.sqrt(self._process.kernel_.k2.noise_level) * self._scale

    @classmethod
    def of(cls, evidence: Evidence) -> Surface | None:
        """The surface of a search, or None where it has too few trials to speak of one.

        It is fitted once for each evidence.
        """
        if evidence not in _FITTED:
            _FITTED[evidence] = cls._fitted(evidence)
        return _FITTED[evidence]

    @classmethod
    def _fitted(cls, evidence: Evidence) -> Surface | None:
        trials = evidence.trials
        if len(trials) < MIN_TRIALS or len({record.value for record in trials}) < 3:
            return None
        return cls(evidence, trials) if find_inputs(evidence, trials) else None

    def _unit(self, raw: Array) -> Array:
        unit: Array = (raw - self._low) / self._span
        return unit

    def benefit(self, assignments: Sequence[Assignment]) -> tuple[Array, Array]:
        """Posterior mean (greater is better) and standard error of noiseless values [n]."""
        raw = np.array([[i.of(a) for i in self.inputs] for a in assignments])
        return self._benefit(raw)

    def _benefit(self, raw: Array) -> tuple[Array, Array]:
        mean, deviation = self._process.predict(self._unit(raw), return_std=True)
        variance = np.maximum(deviation**2 - self._process.kernel_.k2.noise_level, 1e-12)
        return -(mean * self._scale + self._center), np.sqrt(variance) * self._scale

    def _axis(self, column: int) -> Array:
        low = self._low[column]
        axis: Array = np.linspace(low, low + self._span[column], GRID)
        return axis

    def slice(self, name: str, through: Assignment) -> Slice:
        """The surface along the input of that name through an assignment."""
        column = next(j for j, one in enumerate(self.inputs) if one.name == name)
        one = self.inputs[column]
        raw = np.tile([i.of(through) for i in self.inputs], (GRID, 1))
        raw[:, column] = np.linspace(
            self._low[column], self._low[column] + self._span[column], GRID
        )
        mean, error = self._benefit(raw)
        here = one.of(through)
        best, own = int(mean.argmax()), int(np.abs(raw[:, column] - here).argmin())
        first, last = _run(mean >= min(mean[own], mean[best] - error[best]), own)
        near = np.array([min(raw[first, column], here), max(raw[last, column], here)])
        at, (low, high) = _own_units(one, raw[:, column]), _own_units(one, near).tolist()
        lost = float(mean[best] - mean.mean())
        return Slice(one, at, self.sign * mean, error, (low, high), lost)

    def slices(self, through: Assignment) -> tuple[Slice, ...]:
        """The slices along all inputs through an assignment."""
        return tuple(self.slice(one.name, through) for one in self.inputs)

    def plane(self, first: str, second: str, through: Assignment) -> tuple[Array, Array, Array]:
        """Axes of two inputs and the objective [GRID, GRID] over them (rows: the second)."""
        names = [one.name for one in self.inputs]
        a, b = names.index(first), names.index(second)
        raw = np.tile([i.of(through) for i in self.inputs], (GRID * GRID, 1))
        xs, ys = self._axis(a), self._axis(b)
        raw[:, a], raw[:, b] = np.tile(xs, GRID), np.repeat(ys, GRID)
        mean = self.sign * self._benefit(raw)[0].reshape(GRID, GRID)
        return _own_units(self.inputs[a], xs), _own_units(self.inputs[b], ys), mean


_FITTED: WeakKeyDictionary[Evidence, Surface | None] = WeakKeyDictionary()


def interaction(plane: Array) -> float:
    """The share of the variance over two inputs that neither causes alone; [rows, columns]."""
    centred = plane - plane.mean()
    rows, columns = centred.mean(axis=1, keepdims=True), centred.mean(axis=0, keepdims=True)
    total = float((centred**2).sum())
    return float(((centred - rows - columns) ** 2).sum()) / total if total > 0 else 0.0


def find_inputs(evidence: Evidence, trials: Sequence[Record]) -> tuple[Input, ...]:
    """What varied in the search: rates (of groups; what always agrees is one input), lr, values."""
    sampled = [assigned(r) for r in trials if r.training.kind is TrainingKind.SEARCH]
    assignments = [assigned(record) for record in trials]
    lr = [Input("lr", log=True)] if len({a.lr for a in assignments}) > 1 else []
    rates = _rate_inputs(evidence, sampled or assignments)
    return (*rates, *lr, *_value_inputs(assignments))


def _rate_inputs(evidence: Evidence, assignments: Sequence[Assignment]) -> list[Input]:
    grouped = {path for paths in evidence.groups.values() for path in paths}
    alone = {site.path: (site.path,) for site in evidence.sites if site.path not in grouped}
    inputs: dict[tuple[float, ...], Input] = {}
    for name, paths in {**evidence.groups, **alone}.items():
        one = Input(name, paths=tuple(paths))
        column = tuple(one.of(assignment) for assignment in assignments)
        if len(set(column)) > 1:
            same = inputs.get(column)
            inputs[column] = one if same is None else _joined(same, one)
    return list(inputs.values())


def _joined(one: Input, other: Input) -> Input:
    return Input(f"{one.name} = {other.name}", paths=one.paths + other.paths)


def _value_inputs(assignments: Sequence[Assignment]) -> list[Input]:
    inputs = []
    for name in sorted(set.intersection(*(set(a.values) for a in assignments))):
        seen = {a.values[name] for a in assignments}
        numbers = [float(value) for value in seen if isinstance(value, int | float)]
        if len(numbers) < len(seen):
            words = sorted(map(str, seen))
            inputs += [Input(f"{name} = {word}", value=name, word=word) for word in words[1:]]
        elif len(numbers) > 1:
            wide = min(numbers) > 0 and max(numbers) > 20 * min(numbers)
            inputs.append(Input(name, value=name, log=wide))
    return inputs


def _thinned(evidence: Evidence, trials: Sequence[Record]) -> list[Record]:
    if len(trials) <= MAX_TRIALS:
        return list(trials)
    ranked = sorted(trials, key=evidence.benefit, reverse=True)
    rest = ranked[MAX_TRIALS // 2 :]
    step = len(rest) / (MAX_TRIALS - MAX_TRIALS // 2)
    spread = [rest[int(i * step)] for i in range(MAX_TRIALS - MAX_TRIALS // 2)]
    return ranked[: MAX_TRIALS // 2] + spread


def _pulled_in(loss: Array) -> Array:
    middle = float(np.median(loss))
    limit = middle + 2 * (middle - float(loss.min()))
    return np.minimum(loss, limit)


def _fit(unit: Array, target: Array) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    smooth = Matern(np.full(unit.shape[1], 0.5), (0.3, 20.0), nu=2.5)
    kernel = ConstantKernel(1.0, (0.05, 50.0)) * smooth + WhiteKernel(0.1, (1e-5, 1.5))
    process = GaussianProcessRegressor(kernel, alpha=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(unit, target)


def _run(close: Array, index: int) -> tuple[int, int]:
    """The unbroken run of True around an index."""
    first = last = index
    while first > 0 and close[first - 1]:
        first -= 1
    while last < len(close) - 1 and close[last + 1]:
        last += 1
    return first, last


def _own_units(one: Input, axis: Array) -> Array:
    own: Array = 10**axis if one.log else axis
    return own
