"""Which trial is best once the luck of its seed is taken into account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from droptune.search.judgement import completed_trials
from droptune.search.prediction import Process, Warp, direction_signs, points
from droptune.training import Record

if TYPE_CHECKING:
    from droptune.spec.objective import Objective

SEEN = 200  # completed trials, the latest


@dataclass(frozen=True)
class Smoothed:
    """A trial's value without its luck: mean and sd of the posterior at its assignment."""

    record: Record
    mean: float
    sd: float


def robust_best(records: Sequence[Record], objective: Objective) -> Smoothed | None:
    """The completed trial with the best posterior mean, under a Gaussian process over rates and
    learning rate that knows the trials to be noisy.

    The best of many noisy values is lucky; this one is good because its neighbours are as well.
    None with fewer than five completed trials, or where all are alike.
    """
    completed = [
        record
        for record in completed_trials(records)[-SEEN:]
        if record.value is not None and np.isfinite(record.value)
    ]
    sign = float(direction_signs([objective])[0])
    values = np.array([sign * record.value for record in completed if record.value is not None])
    warp = Warp.of(values) if len(values) >= 5 else None
    if warp is None:
        return None
    assignments = [r.training.assignment for r in completed if r.training.assignment is not None]
    x = points(assignments)
    mean, sd = Process(x, warp(values)).predict(x, noise=False)
    best = int(np.argmin(mean))
    value, spread = warp.back(mean[best : best + 1], sd[best : best + 1])
    return Smoothed(completed[best], sign * float(value[0]), float(spread[0]))
