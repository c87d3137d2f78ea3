"""Where something is searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from droptune.spec.document import Strict

MAX_RATE = 0.9  # above it training gets unstable (MacKay et al. 2019 cap there, too)

Rate = Annotated[float, Field(ge=0, lt=1)]
SearchedRate = Annotated[float, Field(ge=0, le=MAX_RATE)]
Positive = Annotated[float, Field(gt=0)]


def _check_range(low: float | None, high: float | None) -> None:
    if low is not None and high is not None and low >= high:
        raise ValueError(f"low {low:g} must be below high {high:g}")


@dataclass(frozen=True)
class RateRange(Strict):
    """Where a rate is searched; None: by the site's kind."""

    low: SearchedRate | None = None
    high: SearchedRate | None = None
    scale: Literal["linear", "logit", "log"] = "linear"

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)


@dataclass(frozen=True)
class ValueRange(Strict):
    """Where a value is searched."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be above 0 on a log scale")


@dataclass(frozen=True)
class LogRange(Strict):
    """Where a positive value is searched, on a log scale."""

    low: Positive
    high: Positive

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)


@dataclass(frozen=True)
class ShareRange(Strict):
    """Where a share in [0, 1) is searched."""

    high: Rate
    low: Rate = 0.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
