"""A trial trained again, solo, beside what was recorded of it.

In float32 two orders of summation differ by rounding, and training amplifies it. So the trial is
trained a second time from weights that are off by one rounding: by as much as the two differ,
the recorded curve may differ from the replayed one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from droptune.errors import DroptuneError
from droptune.program.loading import load_program
from droptune.study import Study
from droptune.trainers.fusibility import SAME, nudged
from droptune.trainers.recipe import Recipe
from droptune.trainers.slot import Snapshot
from droptune.trainers.solo import Solo
from droptune.training import Record, Training

Curves = Mapping[str, tuple[float, ...]]
LOSS = "train/loss"


@dataclass(frozen=True)
class Replayed:
    """The largest difference over all intervals, and that of one rounding, by measurement key."""

    name: str
    intervals: int
    differences: Mapping[str, float]
    rounding: Mapping[str, float]

    @property
    def agrees(self) -> bool:
        """Whether the training loss differs by no more than rounding explains.

        Other metrics follow it; those that count examples jump where one example tips over.
        """
        return self.differences[LOSS] <= SAME * self.rounding[LOSS] + 1e-6

    def text(self) -> str:
        """A line for each key, then the answer."""
        lines = [f"{self.name} trained again solo, {self.intervals} intervals:"]
        for key, difference in self.differences.items():
            lines.append(
                f"  {key:<20} largest difference {difference:.2e}, "
                f"one rounding of the weights gives {self.rounding[key]:.2e}"
            )
        verdict = "the same within rounding" if self.agrees else "NOT the same"
        return "\n".join([*lines, verdict])


def replay(study: Study, number: int, root: Path, device: torch.device) -> Replayed:
    """Train a trial twice, solo: as it was, and from weights one rounding away."""
    record = study.trial(number)
    if not record.intervals_done or record.training.assignment is None:
        raise DroptuneError(f"{record.training.name} has measured nothing yet; try a finished one")
    program = load_program(study.spec.program, root)
    recipe = Recipe.of(program, study.sites, study.spec, device)
    again = _train(recipe, record, None)
    nudged = _train(recipe, record, _nudged(recipe, record.training))
    keys = [key for key in record.curves if key not in ("time/seconds", "lr") and key in again]
    return Replayed(
        record.training.name,
        record.intervals_done,
        {key: _apart(record.curves[key], again[key]) for key in keys},
        {key: _apart(again[key], nudged[key]) for key in keys},
    )


def _train(recipe: Recipe, record: Record, start: Snapshot | None) -> Curves:
    trainer = Solo(recipe)
    trainer.fill(0, record.training, start)
    measured = [
        trainer.train_interval()[0].measurement.values for _ in range(record.intervals_done)
    ]
    return {key: tuple(values[key] for values in measured) for key in measured[0]}


def _nudged(recipe: Recipe, training: Training) -> Snapshot:
    """The beginning of a training, every weight off by at most one rounding."""
    trainer = Solo(recipe)
    trainer.fill(0, training)
    return nudged(trainer.snapshot(0), torch.finfo(recipe.dtype).eps)


def _apart(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    return max(_difference(a, b) for a, b in zip(first, second, strict=True))


def _difference(a: float, b: float) -> float:
    """Infinite where only one of both is no number."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return math.inf if math.isnan(a - b) else abs(a - b)
