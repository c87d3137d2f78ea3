"""What a search varies: one number or choice each, as it is stored and as a sampler sees it.

A rate must be able to be exactly 0, which a continuous range never draws. So the range of a
rate that may be 0 has a **dead zone**: it goes on below its lowest value for a tenth of its
length, and what falls there is the rate 0.

Stored (in SQL, in Optuna's tables) is always the rate itself. A sampler may see another
coordinate, on which equal steps matter equally:

    linear   the rate; the dead zone is [-w, 0]
    log      Optuna's own logarithmic scale from 0.001; below 0.002 is the dead zone
    logit    log(p / (1 - p)) from p = 0.01; the dead zone lies below
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

ZERO_SHARE = 0.1  # of a range's length: what a uniform draw gives the rate 0
LOG_LOW, LOG_ZERO = 1e-3, 2e-3  # log scale: the range's end, and below what the rate is 0
LOGIT_LOW = 0.01  # logit scale: the smallest rate above 0

Value = float | str


@dataclass(frozen=True)
class RateParameter:
    """One rate for one or more sites.

    A site's rate is the parameter's value times its weight: 1 for tied sites, growing with depth
    to 1 where the rate is linear in depth. `explicit` ranges were written by the user.
    """

    name: str
    sites: tuple[str, ...]
    weights: tuple[float, ...]
    low: float
    high: float
    scale: str = "linear"

    @property
    def _dead_zone(self) -> float:
        return (self.high - self.low) * ZERO_SHARE / (1 - ZERO_SHARE) if self.low == 0 else 0.0

    def distribution(self) -> BaseDistribution:
        """Of the stored rate; its dead zone lies below 0."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low - self._dead_zone, self.high)

    def clamped(self, raw: float) -> float:
        """The rate of a stored or drawn value: max(0, raw), within the range."""
        return min(max(self.low, raw), self.high)

    def rates(self, value: float) -> dict[str, float]:
        return {site: value * w for site, w in zip(self.sites, self.weights, strict=True)}

    def value_of(self, rates: Mapping[str, float]) -> float:
        """The value that gives these rates; where none does, the closest (least squares)."""
        given = [rates[site] for site in self.sites]
        value = given[self.weights.index(1.0)]
        if any(value * w != rate for w, rate in zip(self.weights, given, strict=True)):
            products = sum(w * rate for w, rate in zip(self.weights, given, strict=True))
            value = products / sum(w * w for w in self.weights)
        return self.clamped(value)

    # -- as a sampler sees it -----------------------------------------------------------------

    def sampler_distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution

        if self.scale == "linear":
            return self.distribution()
        if self.scale == "log":
            return FloatDistribution(self.low or LOG_LOW, self.high, log=True)
        return FloatDistribution(self._lowest_logit, _logit(self.high))

    def to_sampler(self, rate: float) -> float:
        if self.scale == "linear":
            return rate
        if self.scale == "log":
            zero = rate < LOG_ZERO and self.low == 0
            return math.sqrt(LOG_LOW * LOG_ZERO) if zero else rate
        if rate == 0:
            return (self._lowest_logit + _logit(LOGIT_LOW)) / 2
        return min(_logit(max(rate, self.low or LOGIT_LOW)), _logit(self.high))

    def from_sampler(self, raw: float) -> float:
        if self.scale == "linear":
            return self.clamped(raw)
        if self.scale == "log":
            return 0.0 if raw < LOG_ZERO and self.low == 0 else self.clamped(raw)
        if self.low == 0 and raw < _logit(LOGIT_LOW):
            return 0.0
        return self.clamped(1 / (1 + math.exp(-raw)))

    @property
    def _lowest_logit(self) -> float:
        if self.low > 0:
            return _logit(self.low)
        lowest = _logit(LOGIT_LOW)
        return lowest - (_logit(self.high) - lowest) * ZERO_SHARE / (1 - ZERO_SHARE)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sites": list(self.sites), "weights": list(self.weights)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RateParameter:
        return cls(**{**data, "sites": tuple(data["sites"]), "weights": tuple(data["weights"])})

    def describe(self) -> str:
        """`dropout/encoder (12 sites): 0 to 0.8`."""
        many = "" if len(self.sites) == 1 else f" ({len(self.sites)} sites)"
        scale = "" if self.scale == "linear" else f", {self.scale}"
        depth = "" if set(self.weights) == {1.0} else ", growing with depth"
        return f"{self.name}{many}: {self.low:g} to {self.high:g}{scale}{depth}"


def _logit(rate: float) -> float:
    return math.log(rate / (1 - rate))


@dataclass(frozen=True)
class ValueParameter:
    """A number in [low, high], or one of `choices`."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[Value, ...] = ()

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        return FloatDistribution(self.low, self.high, log=self.log)

    def at(self, share: float) -> Value:
        """The value at a share in [0, 1) of the range (of its logarithm), or of the choices."""
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + (self.high - self.low) * share

    def clamped(self, value: Value) -> Value:
        """The nearest value of the range; ValueError for a choice that there is not."""
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"{self.name}={value!r} is none of {self.choices}")
            return value
        return min(max(float(value), self.low), self.high)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "choices": list(self.choices)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ValueParameter:
        return cls(**{**data, "choices": tuple(data["choices"])})

    def describe(self) -> str:
        if self.choices:
            return f"{self.name}: one of {', '.join(map(str, self.choices))}"
        return f"{self.name}: {self.low:g} to {self.high:g}{', log' if self.log else ''}"
