"""How rates and learning rate move over a training: factors on what its assignment says."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from droptune.errors import ProgramError, SpecError, nearest

Array = NDArray[np.float64]

RATE_SCHEDULES: dict[str, Callable[[Array, float], Array]] = {
    "constant": lambda progress, cutoff: np.ones_like(progress),
    # curriculum: Morerio et al., ICCV 2017; linear as in DropBlock (NeurIPS 2018)
    "up": lambda progress, cutoff: progress,
    # Liu et al., Dropout reduces underfitting, ICML 2023
    "early": lambda progress, cutoff: (progress < cutoff).astype(float),
    "late": lambda progress, cutoff: (progress >= cutoff).astype(float),
}


def rate_factors(values: Mapping[str, Any], at: Array) -> Array:
    """The factor on all rates at each progress: `schedule` and `cutoff` of an assignment."""
    name = str(values.get("schedule", "constant"))
    if name not in RATE_SCHEDULES:
        raise SpecError(f"unknown schedule of rates {name!r}{nearest(name, RATE_SCHEDULES)}")
    return RATE_SCHEDULES[name](at, float(values.get("cutoff", 0.5)))


def learning_rates(schedule: Callable[[float], float]) -> Callable[[Array], Array]:
    """A program's `schedule(progress)` over arrays, asked once for each progress."""

    @functools.lru_cache(maxsize=1 << 16)
    def ask(progress: float) -> float:
        factor = float(schedule(progress))
        if not math.isfinite(factor):
            raise ProgramError(f"schedule({progress:g}) is {factor}: it must be a finite factor")
        return factor

    return lambda at: np.array([ask(x) for x in at.tolist()], dtype=np.float64)
