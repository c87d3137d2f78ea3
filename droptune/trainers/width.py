"""How many trainings to fuse on a device: the fastest width, found by a short measurement."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from droptune.program.data import Streamed
from droptune.program.declared import default_values
from droptune.trainers.memory import (
    empty_cache,
    free_memory,
    is_out_of_memory,
    return_freed_memory,
    used_memory,
)
from droptune.trainers.recipe import Recipe
from droptune.trainers.slot import Trainer
from droptune.training import Assignment, Seeds, Training

WIDTHS = (1, 4, 16, 64, 256)
UPDATES = 4  # in a measured interval
REPEATS = 3, 20  # of it, at least and at most; between them until ENOUGH seconds were measured
ENOUGH = 0.3
SECONDS = 20.0  # after which no further width is tried
GAIN = 0.97  # a wider group must take less than this share of the time of the best so far


@dataclass(frozen=True)
class Tried:
    """One width: seconds for one update of one training, and bytes that the group needed."""

    width: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class WidthChoice:
    """The fastest width and all that were tried; `ended` says why no wider one was."""

    width: int
    tried: tuple[Tried, ...]
    ended: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tried": [asdict(tried) for tried in self.tried]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WidthChoice:
        tried = tuple(Tried(**each) for each in data["tried"])
        return cls(int(data["width"]), tried, data["ended"])


def choose_width(
    recipe: Recipe,
    make: Callable[[Recipe, int], Trainer],
    *,
    most: int = WIDTHS[-1],
    memory: int | None = None,
    trials: float = math.inf,
) -> WidthChoice:
    """Measure 1 (solo), 4, 16, … up to `most`, then between and beside the best.

    `make(recipe, width)` makes a trainer; `memory` bytes may be used (None: a share of what is
    free now). Takes seconds. Width 1 is an answer like any other. What loading a batch of
    streamed data takes is shared by a group.

    Trials that begin together learn nothing from each other, neither where to search nor when to
    prune: in a search of so many `trials`, a group has to save the share of them that it is.
    """
    budget = free_memory(recipe.device) if memory is None else memory
    measured = _Measured(recipe, make, budget, trials)
    for width in _ladder(most):
        if not measured.goes_on(width):
            break
        measured.add(width)
    best = measured.best().width
    for width in (best // 2, best * 2):
        if 1 < width <= most and measured.goes_on(width):
            measured.add(width)
    return WidthChoice(measured.best().width, tuple(measured.tried), measured.ended)


def _ladder(most: int) -> list[int]:
    below = [width for width in WIDTHS if width < most]
    return [*below, most]


class _Measured:
    """The widths tried so far."""

    def __init__(
        self, recipe: Recipe, make: Callable[[Recipe, int], Trainer], memory: int, trials: float
    ) -> None:
        size = recipe.program.batch_size
        self._trials = trials
        self._make = make
        self._memory = memory
        started = time.perf_counter()
        self._recipe = recipe.tiny(2 * size, UPDATES)
        self._started = time.perf_counter()
        train = recipe.program.splits(0).train
        loaders = max(train.workers, 1) if isinstance(train, Streamed) else math.inf
        self._load = (self._started - started) / 2 / loaders  # seconds for a batch
        self._too_wide = math.inf
        self.tried: list[Tried] = []
        self.ended = "the widest that was asked for"

    def best(self) -> Tried:
        """The fastest for the search; of almost equal ones the narrowest."""
        best = self.tried[0]
        for tried in sorted(self.tried, key=lambda each: each.width):
            if self._cost(tried) < GAIN * self._cost(best):
                best = tried
        return best

    def _cost(self, tried: Tried) -> float:
        return self._seconds(tried) * (1 + tried.width / self._trials)

    def _seconds(self, tried: Tried) -> float:
        """For an update of one training, and its share of loading the data."""
        return tried.seconds + self._load / tried.width

    def goes_on(self, width: int) -> bool:
        """Whether this width is worth trying, and can be."""
        if any(each.width == width for each in self.tried) or width >= self._too_wide:
            return False
        if not self.tried:
            return True
        last = max(self.tried, key=lambda each: each.width)
        if width > last.width and self._flat():
            self.ended = f"width {last.width} was slower"
        elif last.memory * width / last.width > self._memory:
            self.ended = f"width {width} would need more than {self._memory / 2**30:.1f} GiB"
        elif self._elapsed + (1 + REPEATS[0]) * UPDATES * width * last.seconds > SECONDS:
            self.ended = f"measuring more would take longer than {SECONDS:.0f} s"
        else:
            return True
        return False

    def _flat(self) -> bool:
        """Whether the widest group was slower than the best, and fusing more no longer helped.

        One fused width says little: fusing costs something once, and gains with every slot.
        """
        fused = sorted((t for t in self.tried if t.width > 1), key=lambda each: each.width)
        if len(fused) < 2:
            return False
        before, last = fused[-2:]
        slower = self._seconds(last) > 1.1 * self._seconds(self.best())
        return slower and self._seconds(last) > 0.9 * self._seconds(before)

    @property
    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def add(self, width: int) -> None:
        try:
            self.tried.append(_measure(self._recipe, self._make, width))
        except Exception as error:
            if not (self.tried and is_out_of_memory(error)):
                raise  # not even one training fits, or something else is wrong
            self._too_wide, self.ended = width, f"width {width} ran out of memory"
        gc.collect()
        return_freed_memory()
        empty_cache(self._recipe.device)


def _measure(recipe: Recipe, make: Callable[[Recipe, int], Trainer], width: int) -> Tried:
    before = used_memory(recipe.device, reset=True)
    trainer = make(recipe, width)
    for index, training in enumerate(_trainings(recipe, width)):
        trainer.fill(index, training)
    _timed(trainer)  # the first time fills caches
    seconds: list[float] = []
    while len(seconds) < REPEATS[0] or (sum(seconds) < ENOUGH and len(seconds) < REPEATS[1]):
        seconds.append(_timed(trainer))
    memory = max(used_memory(recipe.device) - before, 1)
    return Tried(width, statistics.median(seconds) / width / UPDATES, memory)


def _timed(trainer: Trainer) -> float:
    one_thread = trainer.recipe.device.type == "cpu" and torch.get_num_threads() == 1
    # what else runs on the core says nothing about a width
    clock = time.process_time if one_thread else time.perf_counter
    started = clock()
    trainer.train_interval()  # ends with measurements on the host: nothing is left running
    return clock() - started


def _trainings(recipe: Recipe, width: int) -> Sequence[Training]:
    """Trainings as in a search: one data order, rates of their own."""
    lr, values = recipe.program.lr, default_values(recipe.program.searched)
    found = []
    for number in range(width):
        rates = {site.path: 0.5 * number / width for site in recipe.sites}
        seeds = Seeds(weights=number, data=0, split=0)
        found.append(Training.apart(number, Assignment(rates, lr, values), seeds, intervals=100))
    return found
