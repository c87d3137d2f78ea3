"""How sure one can be of a difference between two configurations.

The main method is one interval for the mean paired difference, from seeds and, where scores of
single examples are known, from examples too (`paired`); one sequential rule says when there are
seeds enough (`looks`, `settled`); Holm corrects where several baselines are compared. Why each was
chosen, and how it was checked, is in `docs/statistics.md` and `benchmarks/calibration.py`.

Differences are given so that positive means better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]

ALPHA = 0.05  # two-sided, of one question
POWER = 0.8  # what "would have been detected" means
LOOKS = 3  # how often a sequential comparison looks at its seeds


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its interval.

    `seed_error` and `example_error` are the standard errors that come from the seeds and from the
    examples of the test set; `share` is the part of alpha that this look may spend (1 where there
    is a single look).
    """

    mean: float
    low: float
    high: float
    seeds: int
    seed_error: float
    example_error: float = 0.0
    examples: int | None = None
    alpha: float = ALPHA
    share: float = 1.0

    @property
    def outcome(self) -> str:
        """`better`, `worse`, or `undetected` where the interval holds 0."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "undetected"

    @property
    def bounded(self) -> bool:
        """Whether there is an interval: not from one seed, nor where all agree to the last digit.

        Seeds agree by the coarseness of a metric (a count of few examples), not for certain.
        """
        return math.isfinite(self.error)

    @property
    def p(self) -> float:
        """The smallest alpha whose interval excludes 0, from 1e-12 to 1."""
        if not self.bounded:
            return 1.0
        return _p_value(self.mean, self.share, self.seeds, self.seed_error, self.example_error)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.hypot(self.seed_error, self.example_error)

    @property
    def detectable(self) -> float:
        """The smallest true difference that this many seeds show with 80 % power."""
        return detectable(
            self.seed_error, self.example_error, self.seeds, alpha=self.alpha, share=self.share
        )

    def at_level(self, alpha: float) -> Difference:
        """The same difference with the interval of another level."""
        if not self.bounded:
            return replace(self, alpha=alpha)
        half = _half_width(alpha, self.share, self.seeds, self.seed_error, self.example_error)
        return replace(self, low=self.mean - half, high=self.mean + half, alpha=alpha)

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {"p": self.p, "outcome": self.outcome, "detectable": self.detectable}
        return {name: finite(value) for name, value in fields.items()}


def finite(value: Any) -> Any:
    """The value, or None where it is a float that JSON cannot say."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- one difference -------------------------------------------------------------------------------


def paired(
    differences: Array, *, alpha: float = ALPHA, share: float = 1.0, overlap: float = 0.0
) -> Difference:
    """The interval of a mean paired difference, from [seeds] or [seeds, examples].

    Each row is one seed: the same initial weights, data order and test examples for both members.
    Seeds and examples are crossed random effects, as readers and cases are in multi-reader studies
    (Dorfman, Berbaum & Metz 1992). The variance of the seeds' means holds what seeds cause, with
    the interaction; the variance of the examples' means, less what the interaction puts into it,
    holds what examples cause; the degrees of freedom grow from n - 1 with the examples' part
    (`_freedom`). Only the seeds' part is taken at level `alpha * share`: stopping has looked at
    seeds, never at test examples.

    Where every seed has its own split of the same data, training sets overlap, and differences are
    correlated: `overlap`, validation to training examples, is added to 1/n in the variance from
    seeds (Nadeau & Bengio 2003).
    """
    given = np.asarray(differences, dtype=np.float64)
    rows = given[:, None] if given.ndim == 1 else given
    seeds, examples = rows.shape
    mean = float(rows.mean())
    seed_error, example_error = _errors(rows)
    seed_error *= math.sqrt(1 + seeds * overlap)
    known = math.isfinite(seed_error)
    half = _half_width(alpha, share, seeds, seed_error, example_error) if known else math.inf
    counted = examples if examples > 1 else None
    return Difference(
        mean, mean - half, mean + half, seeds, seed_error, example_error, counted, alpha, share
    )


def _errors(rows: Array) -> tuple[float, float]:
    """Standard errors of the grand mean from seeds (with interaction) and from examples.

    Infinite where nothing is known of them: one seed, or all differences the same. Where only the
    seeds' means are the same, which counts of few examples can be, the seeds' error is what the
    interaction alone would make it.
    """
    seeds, examples = rows.shape
    if seeds < 2 or _same(rows):
        return math.inf, 0.0
    by_seed = rows.mean(axis=1)
    seed_variance = float(by_seed.var(ddof=1)) / seeds
    if examples < 2:
        return math.sqrt(seed_variance), 0.0
    by_example = rows.mean(axis=0)
    residual = rows - by_seed[:, None] - by_example + rows.mean()
    interaction = float((residual**2).sum()) / ((seeds - 1) * (examples - 1))
    if _same(by_seed):
        seed_variance = interaction / (seeds * examples)
    example_variance = (float(by_example.var(ddof=1)) - interaction / seeds) / examples
    return math.sqrt(seed_variance), math.sqrt(max(example_variance, 0.0))


def _same(values: Array) -> bool:
    """Whether all are equal, but for rounding."""
    return float(np.ptp(values)) <= 1e-6 * float(np.abs(values).max())


def _half_width(
    alpha: float, share: float, seeds: int, seed_error: float, example_error: float
) -> float:
    freedom = _freedom(seeds, seed_error, example_error)
    from_seeds = float(stats.t.isf(alpha * share / 2, freedom)) * seed_error
    from_examples = float(stats.t.isf(alpha / 2, freedom)) * example_error
    return math.hypot(from_seeds, from_examples)


def _freedom(seeds: int, seed_error: float, example_error: float) -> float:
    """Degrees of freedom of the sum of both variances, the examples' taken as known.

    Hillis (2007) squares the factor. Three seeds often show too small a variance by chance, which
    then also claims too many degrees of freedom: squared, 92 to 95 % of the intervals covered in
    simulation; as it stands, 94.5 to 97 % (`benchmarks/calibration.py`).
    """
    if seed_error == 0:
        return 1e6
    return float((seeds - 1) * (1 + (example_error / seed_error) ** 2))


def _p_value(
    mean: float, share: float, seeds: int, seed_error: float, example_error: float
) -> float:
    def excess(log_alpha: float) -> float:
        half = _half_width(math.exp(log_alpha), share, seeds, seed_error, example_error)
        return half - abs(mean)

    lowest = math.log(1e-12)
    if excess(0.0) >= 0:
        return 1.0
    if excess(lowest) <= 0:
        return 1e-12
    return math.exp(float(optimize.brentq(excess, lowest, 0.0, xtol=1e-6)))


def detectable(
    seed_error: float,
    example_error: float,
    seeds: int,
    *,
    alpha: float = ALPHA,
    share: float = 1.0,
    power: float = POWER,
) -> float:
    """The smallest true mean difference whose interval excludes 0 with this power.

    From the noncentral t distribution with the degrees of freedom of `paired`.
    """
    error = math.hypot(seed_error, example_error)
    if not math.isfinite(error):
        return math.inf
    critical = _half_width(alpha, share, seeds, seed_error, example_error) / error
    return error * _noncentrality(critical, _freedom(seeds, seed_error, example_error), power)


@lru_cache(maxsize=1024)
def _noncentrality(critical: float, freedom: float, power: float) -> float:
    """Where a noncentral t exceeds the critical value with this probability."""
    if freedom > 200:
        return critical + float(stats.norm.ppf(power))

    def missing(delta: float) -> float:
        return float(stats.nct.sf(critical, freedom, delta)) - power

    return float(optimize.brentq(missing, 0.0, 4 * critical + 4))


# -- when there are seeds enough ------------------------------------------------------------------


def looks(first: int, last: int) -> tuple[int, ...]:
    """At how many seeds a comparison is looked at: at most three, evenly spaced in ratio."""
    if last <= first:
        return (first,)
    between = np.geomspace(first, last, LOOKS)
    return tuple(sorted({round(float(n)) for n in between}))


def shares(schedule: Sequence[int]) -> tuple[float, ...]:
    """The part of alpha that each look may spend: in proportion to the seeds that it adds.

    Alpha spending, linear in the seeds (Lan & DeMets 1983; Kim & DeMets 1987). The parts add up to
    one, so the error holds by the union bound, whatever the dependence between looks.
    """
    steps = np.diff([0, *schedule])
    return tuple(float(step) / schedule[-1] for step in steps)


def settled(
    differences: Array,
    schedule: Sequence[int],
    look: int,
    alpha: float = ALPHA,
    overlap: float = 0.0,
) -> str | None:
    """Whether a comparison may stop at this look: `decided`, `hopeless`, or None to go on.

    Decided: the look's own interval (alpha times its share) excludes 0. Hopeless, between the
    first look and the last: even were the difference one standard error larger than seen, all
    seeds of the schedule would not show it. Giving up only lowers the error of claiming a
    difference. `differences` [seeds] may be fewer than the look's where trainings failed;
    `overlap` as in `paired`.
    """
    parts = shares(schedule)
    seen = paired(differences, alpha=alpha, share=parts[look], overlap=overlap)
    if seen.outcome != "undetected":
        return "decided"
    if seen.seeds < 2 or look in (0, len(schedule) - 1):
        return None
    last = schedule[-1]
    final_error = seen.seed_error * math.sqrt((1 / last + overlap) / (1 / seen.seeds + overlap))
    threshold = float(stats.t.isf(alpha * parts[-1] / 2, last - 1)) * final_error
    return "hopeless" if abs(seen.mean) + seen.seed_error < threshold else None


def verdict_share(look: int, schedule: Sequence[int], *, decided: bool) -> float:
    """The part of alpha for the interval that is reported after stopping at this look.

    Decided: the look's own share (repeated intervals, Jennison & Turnbull 1989); at the first look
    all of it, since in the stage-wise order of outcomes (Fairbanks & Madsen 1982; Tsiatis, Rosner
    & Mehta 1984) the interval after the first look is the ordinary one. Stopped for another reason
    it was the last look: all that is not spent yet (Lan & DeMets 1983).
    """
    parts = shares(schedule)
    if decided and look > 0:
        return parts[look]
    return 1.0 - sum(parts[:look])


@dataclass(frozen=True)
class Operating:
    """What a sequential comparison does for one true effect."""

    power: float  # chance that it finds the difference
    seeds: float  # expected number of seeds


def operating(
    effect: float, schedule: Sequence[int], *, alpha: float = ALPHA, draws: int = 20_000
) -> Operating:
    """Power and expected seeds of the rule for a true effect, by simulation from a fixed seed.

    `effect` is in standard deviations of a pair's difference.
    """
    normal = np.random.default_rng(0).standard_normal((draws, schedule[-1])) + effect
    last, parts = schedule[-1], shares(schedule)
    threshold = float(stats.t.isf(alpha * parts[-1] / 2, last - 1)) / math.sqrt(last)
    found, going = np.zeros(draws, dtype=bool), np.ones(draws, dtype=bool)
    spent = np.zeros(draws)
    for look, seeds in enumerate(schedule):
        spent[going] = seeds
        sample = normal[:, :seeds]
        size = np.abs(sample.mean(axis=1)) / sample.std(axis=1, ddof=1)
        critical = float(stats.t.isf(alpha * parts[look] / 2, seeds - 1)) / math.sqrt(seeds)
        found |= going & (size > critical)
        hopeless = (look > 0) & (size + 1 / math.sqrt(seeds) < threshold)
        going &= (size <= critical) & ~hopeless
    return Operating(float(found.mean()), float(spent.mean()))


# -- several comparisons --------------------------------------------------------------------------


def holm_alphas(p_values: Sequence[float], alpha: float = ALPHA) -> tuple[float, ...]:
    """The level that Holm's step-down procedure (1979) tests each hypothesis at.

    An interval at that level excludes 0 exactly where Holm rejects: after the first hypothesis
    that is kept, all that follow have its level.
    """
    levels = [alpha] * len(p_values)
    kept: float | None = None
    for step, index in enumerate(np.argsort(p_values, kind="stable")):
        level = kept or alpha / (len(p_values) - step)
        levels[int(index)] = level
        if kept is None and p_values[int(index)] > level:
            kept = level
    return tuple(levels)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P-values adjusted by Holm's procedure; rejected are those of at most alpha."""
    count = len(p_values)
    order = np.argsort(p_values, kind="stable")
    scaled = np.array([p_values[int(i)] * (count - step) for step, i in enumerate(order)])
    result = np.empty(count)
    result[order] = np.minimum(np.maximum.accumulate(scaled), 1.0) if count else scaled
    return tuple(float(p) for p in result)


# -- what a study can see at all ------------------------------------------------------------------


def binomial_error(accuracy: float, examples: int) -> float:
    """Standard error of an accuracy measured on this many examples (never 0: Laplace's rule)."""
    share = (accuracy * examples + 1) / (examples + 2)
    return math.sqrt(share * (1 - share) / examples)


@dataclass(frozen=True)
class Curse:
    """The winner's curse: what the search promised and what fresh seeds delivered.

    `none` is the excess of no dropout: all trials of a search share their data order, and what
    that adds to all of them is no curse.
    """

    promised: float
    delivered: float
    error: float  # standard error of `delivered`
    excess: float  # how much better the promise was; positive: the search flattered
    none: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: finite(getattr(self, name)) for name in self.__dataclass_fields__}


def winners_curse(promised: float, confirmed: Array, direction: str) -> Curse:
    """Compare a search value (the best of many) with the values of fresh seeds [n]."""
    values = np.asarray(confirmed, dtype=np.float64)
    delivered = float(values.mean())
    n = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    sign = 1.0 if direction == "maximize" else -1.0
    return Curse(promised, delivered, error, sign * (promised - delivered))
