"""What a study optimises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from droptune.errors import nearest
from droptune.spec.document import Strict

DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {
    **dict.fromkeys(
        ("nll", "error", "mse", "rmse", "mae", "brier", "ece", "gap", "seconds", "loss"),
        "minimize",
    ),
    **dict.fromkeys(("accuracy", "precision", "recall", "f1"), "maximize"),
}
MONTE_CARLO: dict[str, tuple[str, ...]] = {  # measured where `training: {mc_passes: …}` asks for it
    "classification": (
        "mc_nll", "mc_accuracy", "mc_error", "mc_precision", "mc_recall", "mc_f1", "mc_brier",
        "mc_ece", "mc_entropy",
    ),
    "regression": ("mc_nll", "mc_mse", "mc_rmse", "mc_mae"),
}  # fmt: skip
DIRECTIONS |= {
    name: DIRECTIONS.get(name.removeprefix("mc_"), "minimize")
    for names in MONTE_CARLO.values()
    for name in names
}


@dataclass(frozen=True)
class Objective(Strict):
    """Which validation metric is optimised, and whether its last or its best interval counts."""

    metric: str
    take: Literal["last", "best"] = "last"
    direction: Literal["minimize", "maximize"] | None = None

    def __post_init__(self) -> None:
        known = DIRECTIONS.get(self.metric)
        if known is None and self.direction is None:
            raise ValueError(
                f"unknown metric {self.metric!r}{nearest(self.metric, DIRECTIONS)}; a metric of "
                "the program's own needs `direction: minimize` or `maximize`"
            )
        if known is not None and self.direction not in (None, known):
            raise ValueError(f"metric {self.metric!r} is there to {known}")
        object.__setattr__(self, "direction", known or self.direction)

    @property
    def key(self) -> str:
        """Its key among measurements."""
        return "time/seconds" if self.metric == "seconds" else f"val/{self.metric}"

    def value(self, curve: Sequence[float]) -> tuple[float, int]:
        """(the objective's value, the interval it is taken at, from 1) of a curve.

        Ties go to the earlier interval; a NaN is never the best.
        """
        if not curve:
            raise ValueError(f"no measurement of {self.key} yet")
        if self.take == "last":
            return curve[-1], len(curve)
        sign = 1 if self.direction == "minimize" else -1
        best = min(
            range(len(curve)),
            key=lambda i: math.inf if math.isnan(curve[i]) else sign * curve[i],
        )
        return curve[best], best + 1
