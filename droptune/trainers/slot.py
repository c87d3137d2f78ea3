"""A slot: the place of one training in a trainer, and what goes in and out of it."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from droptune.trainers.recipe import Recipe
from droptune.training import Assignment, Measurement, Training


class Interrupted(Exception):
    """`interrupt` ended an interval before its end; every slot is at its last boundary."""


@dataclass(frozen=True)
class Snapshot:
    """A training at the end of interval `interval`: all that is needed to go on with it.

    `tensors` (host memory): `model/<name>` weights and buffers, `optimizer/<state>/<name>`, and,
    where the best interval's weights are kept, `best/<name>`. `meta` is JSON-able. A snapshot
    of any trainer fits any other, whatever its width.
    """

    interval: int
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def with_meta(self, **more: Any) -> Snapshot:
        """The same with more in `meta`."""
        return replace(self, meta={**self.meta, **more})

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under `name/`, without it."""
        start = name + "/"
        return {k[len(start) :]: t for k, t in self.tensors.items() if k.startswith(start)}


@dataclass(frozen=True)
class Outcome:
    """What one interval of one training gave; `failure` says why the training cannot go on."""

    measurement: Measurement
    failure: str | None = None


@dataclass(frozen=True)
class Scores:
    """The weights of the objective's interval, scored once on a whole split.

    `metrics` are the program's; `examples` its scores per example [n] in the split's order (see
    `examples.example_scores`) and a sample of logits (`calibration_sample`), in host memory.
    """

    split: str
    metrics: Mapping[str, float]
    examples: Mapping[str, Tensor]


@dataclass
class Slot:
    """One training in progress: how far it is, and its best interval so far."""

    training: Training
    interval: int = 0
    updates: int = 0
    best_value: float | None = None
    best_interval: int | None = None

    @classmethod
    def start(cls, training: Training, snapshot: Snapshot | None) -> Slot:
        """At the beginning, or where a snapshot left it."""
        if snapshot is None:
            return cls(training)
        meta = snapshot.meta
        return cls(
            training,
            snapshot.interval,
            int(meta["updates"]),
            meta.get("best_value"),
            meta.get("best_interval"),
        )

    @property
    def assignment(self) -> Assignment:
        assert self.training.assignment is not None, "a slot holds trainings with an assignment"
        return self.training.assignment

    @property
    def meta(self) -> dict[str, Any]:
        """What a snapshot keeps beside tensors."""
        return {
            "updates": self.updates,
            "best_value": self.best_value,
            "best_interval": self.best_interval,
        }

    def finish_interval(self, updates: int, value: float, *, minimize: bool) -> bool:
        """Count an interval; True where `value` is the best so far."""
        self.interval += 1
        self.updates += updates
        best = self.best_value
        improved = not math.isnan(value) and (
            best is None or (value < best if minimize else value > best)
        )
        if improved:
            self.best_value, self.best_interval = value, self.interval
        return improved


def failure_of(losses: list[float], updates: int, key: str, value: float) -> str | None:
    """Why a training cannot go on after an interval with these losses, or None.

    `updates` is how many updates the training had behind it when the interval began.
    """
    for number, loss in enumerate(losses, start=updates + 1):
        if not math.isfinite(loss):
            return f"the loss was {loss} at update {number}"
    if not math.isfinite(value):
        return f"{key} was {value}"
    return None


class Trainer(ABC):
    """`width` slots, each empty or with one training. Everything happens at interval boundaries.

    Solo and fused trainers differ in how gradients are made and in nothing that can be seen in
    the results: a training's weights, data order and masks depend on its seeds alone.
    """

    width: int

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.interrupted = threading.Event()

    @abstractmethod
    def fill(self, index: int, training: Training, snapshot: Snapshot | None = None) -> None:
        """Put a training into slot `index`, fresh or from a snapshot."""

    @abstractmethod
    def empty(self, index: int) -> None:
        """Free slot `index`."""

    @abstractmethod
    def occupied(self) -> tuple[int, ...]:
        """The slots that are filled."""

    @abstractmethod
    def train_interval(self) -> dict[int, Outcome]:
        """Train one interval in every filled slot and evaluate; one outcome per filled slot.

        When it raises (a signal, `Interrupted`), every slot is back at its last boundary.
        """

    @abstractmethod
    def snapshot(self, index: int) -> Snapshot:
        """Slot `index` at its last boundary."""

    @abstractmethod
    def weights(self, index: int) -> dict[str, Tensor]:
        """The `state_dict` (host memory) of the objective's interval: the best, or the last."""

    @abstractmethod
    def score(self, index: int) -> Scores:
        """Score `weights(index)` on the test set (on validation data where there is none)."""

    def interrupt(self) -> None:
        """From any thread or signal handler: end the running interval after its current batch."""
        self.interrupted.set()

    def _stop_if_interrupted(self) -> None:
        if self.interrupted.is_set():
            self.interrupted.clear()
            raise Interrupted


__all__ = ["Interrupted", "Outcome", "Scores", "Slot", "Snapshot", "Trainer"]
