"""The fused trainer: K slots trained as one program, each as if it were alone.

The slots' weights are rows of one stack; `torch.func.vmap` runs the user's loss over the rows,
one backward pass gives all gradients, one vectorised optimizer updates all rows. Rates, masks'
keys, learning rates, searched values and (where data order differs) batches are per slot.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from droptune.errors import DroptuneError
from droptune.program.source import told
from droptune.spec.spec import StudySpec
from droptune.trainers.batched import BatchedModel
from droptune.trainers.evaluation import measure, measured_values
from droptune.trainers.interval import Chunk, Interval, words_of
from droptune.trainers.memory import empty_cache, is_out_of_memory
from droptune.trainers.monte_carlo import dropout_on, measure_passes
from droptune.trainers.optimizer_state import build
from droptune.trainers.recipe import Recipe, tensors_of, to_host
from droptune.trainers.replays import ReplayError
from droptune.trainers.rules import Array
from droptune.trainers.scoring import score
from droptune.trainers.slot import Interrupted, Outcome, Scores, Slot, Snapshot, Trainer, failure_of
from droptune.trainers.solo import Solo
from droptune.trainers.updates import stack_optimizer
from droptune.trainers.width import WIDTHS, WidthChoice, choose_width
from droptune.training import Measurement, Training

log = logging.getLogger("droptune.trainer")

Metrics = dict[str, float]


@dataclass(frozen=True)
class _Result:
    """What an interval of a chunk gave: losses [updates, k], and values for each slot."""

    chunk: Chunk
    losses: Array
    values: tuple[Metrics, ...]


class Fused(Trainer):
    """A trainer of `width` slots on one device.

    `shares_batches` becomes the reason where the model turns out to look into its inputs (as with
    a padding mask that it skips when nothing is padded): then only trainings at the same place in
    the same data are trained side by side. `alone` becomes the reason where the slots have to be
    trained one by one, because the program does something that cannot be fused after all.
    """

    def __init__(self, recipe: Recipe, width: int) -> None:
        super().__init__(recipe)
        self.width = width
        self._model = BatchedModel(recipe, width)
        self._stack = self._model.stack
        made = recipe.program.optimizer(self._model.module, recipe.program.lr)
        self._optimizer = stack_optimizer(self._stack.weights, self._stack.parts.trained, made)
        self._slots: dict[int, Slot] = {}
        self._rows: dict[int, int] = {}
        self._limit = width  # rows that go through the model at once
        self.shares_batches: str | None = None
        self.alone: str | None = None
        self._ends: dict[int, Snapshot] = {}  # of slots that a row of the stack cannot hold
        self._solo = Solo(recipe)
        self._solo.interrupted = self.interrupted

    @property
    def module(self) -> nn.Module:
        """The module that all slots run."""
        return self._model.module

    # -- filling ------------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, index: int, training: Training, snapshot: Snapshot | None = None) -> None:
        slot = Slot.start(training, snapshot)
        free = sorted(set(range(self.width)) - set(self._rows.values()))
        row = self._rows[index] if index in self._rows else free[0]
        model = self.recipe.fresh_model(training.seeds.weights)
        self._stack.write(row, tensors_of(model))
        state, rest = {}, {}
        if snapshot is not None:
            self._separate(self._stack.differing(snapshot.part("model")))
            state, rest = snapshot.part("optimizer"), snapshot.meta.get("rest", {})
            self._stack.write(row, snapshot.part("model"))
            self._stack.write_best(row, snapshot.part("best"))
        made = build(self.recipe.program.optimizer, model, slot.assignment)
        self._optimizer.fill(row, made, state, rest)
        self._slots[index], self._rows[index] = slot, row
        self._ends.pop(index, None)
        if snapshot is not None:
            self._keep_what_no_row_holds(index, snapshot, state)

    def _keep_what_no_row_holds(
        self, index: int, snapshot: Snapshot, state: Mapping[str, Tensor]
    ) -> None:
        """An optimizer that has left some weights alone in some updates knows more than a row."""
        held, _ = self._optimizer.export(self._rows[index], snapshot.meta["updates"])
        if not _equal(held, state):
            self._ends[index] = snapshot
            self.alone = "some weights have had fewer updates than others"

    def empty(self, index: int) -> None:
        self._slots.pop(index, None)
        self._rows.pop(index, None)
        self._ends.pop(index, None)

    def occupied(self) -> tuple[int, ...]:
        return tuple(sorted(self._slots))

    # -- one interval -------------------------------------------------------------------------

    def train_interval(self) -> dict[int, Outcome]:
        if not self._slots:
            return {}
        before = self.shares_batches, self.alone
        try:
            outcomes = self._train()
        except BaseException:
            self.shares_batches, self.alone = before  # no remedy: how it is trained is not at fault
            raise
        if self.alone != before[1]:
            log.info("trainings are no longer fused: %s", self.alone)
        elif self.shares_batches != before[0]:
            log.info("only trainings that see the same batches are fused: %s", self.shares_batches)
        return outcomes

    def _train(self) -> dict[int, Outcome]:
        while self.alone is None:
            cohorts = self._arrange()
            kept = self._stack.keep(len(self._slots)), self._optimizer.keep(len(self._slots))
            try:
                results = [self._run(chunk) for chunk in self._chunks(cohorts)]
            except BaseException as error:
                remedy = self._remedy(error)
                if remedy is None:
                    self._put_back(*kept)
                    raise
            else:
                if not self._stack.changed():
                    return {i: o for result in results for i, o in self._settle(result).items()}
                remedy = _nothing  # but to go back
            self._put_back(*kept)  # outside of the except block: its traceback keeps tensors alive
            remedy()
        return self._train_alone()

    def _train_alone(self) -> dict[int, Outcome]:
        """Each slot by a solo trainer; all or none."""
        outcomes, slots = {}, dict(self._slots)
        starts = {index: self.snapshot(index) for index in slots}
        try:
            for index, slot in slots.items():
                self._solo.fill(0, slot.training, starts[index])
                outcomes[index] = self._solo.train_interval()[0]
                self.fill(index, slot.training, self._solo.snapshot(0))
        except BaseException:
            for index, slot in slots.items():
                self.fill(index, slot.training, starts[index])
            raise
        finally:
            self._solo.empty(0)
        return outcomes

    def _put_back(self, stack: Any, optimizer: Any) -> None:
        self._stack.put_back(stack)
        self._optimizer.put_back(optimizer)
        self._separate(self._stack.changed())

    def _separate(self, names: Collection[str]) -> None:
        """Give each slot its own of tensors that seemed to stay the same in all."""
        if not names:
            return
        fresh = tensors_of(self.recipe.fresh_model(0))
        self._stack.separate({name: fresh[name] for name in names})
        self._model.replays.clear()
        log.info("each training has its own %s: some updates change it", ", ".join(sorted(names)))

    def _remedy(self, error: BaseException) -> Callable[[], None] | None:
        """How the same interval can be trained after all; None where it cannot."""
        replays, short = self._model.replays, is_out_of_memory(error)
        if isinstance(error, ReplayError) or (short and replays.replayed):
            # a group needs less memory without, whatever was too large for it
            log.info("updates are no longer replayed: %s", one_line(error))
            return replays.stop
        if short:
            return self._narrow if min(self._limit, len(self._slots)) > 1 else None
        if not isinstance(error, Exception) or isinstance(error, Interrupted):
            return None
        if self._stack.changed():
            return _nothing
        narrower = "shares_batches" if self.shares_batches is None else "alone"
        return functools.partial(setattr, self, narrower, one_line(error))

    def _narrow(self) -> None:
        self._limit = min(self._limit, len(self._slots)) // 2
        self._model.replays.clear()
        log.warning("out of memory: going on with %d trainings at a time", self._limit)
        empty_cache(self.recipe.device)

    def _arrange(self) -> list[list[int]]:
        """Cohorts of slots that can be trained side by side, moved to neighbouring rows."""
        cohorts: dict[object, list[int]] = {}
        for index in sorted(self._rows, key=self._rows.__getitem__):
            cohorts.setdefault(self._cohort(self._slots[index]), []).append(index)
        indices = [index for cohort in cohorts.values() for index in cohort]
        order = [self._rows[index] for index in indices]
        if order != list(range(len(order))):
            self._stack.permute(order)
            self._optimizer.permute(order)
            self._rows = {index: row for row, index in enumerate(indices)}
        return list(cohorts.values())

    def _cohort(self, slot: Slot) -> object:
        """What must agree between slots that are trained side by side."""
        seeds, values = slot.training.seeds, slot.assignment.values
        feed = self.recipe.feed(seeds.split)
        stream = (seeds.data, slot.updates) if feed.streamed or self.shares_batches else None
        words = tuple(sorted(words_of(slot).items()))
        return seeds.split, feed.phase(slot.updates), stream, words, tuple(sorted(values))

    def _chunks(self, cohorts: list[list[int]]) -> Iterator[Chunk]:
        first = 0
        for cohort in cohorts:
            for start in range(0, len(cohort), self._limit):
                part = tuple(cohort[start : start + self._limit])
                rows = slice(first, first + len(part))
                yield Chunk(rows, part, tuple(self._slots[i] for i in part))
                first += len(part)

    def _run(self, chunk: Chunk) -> _Result:
        started = time.perf_counter()
        trained = Interval(self._model, self._optimizer, chunk).train(self._stop_if_interrupted)
        validation, probe = self._evaluate(chunk)
        share = (time.perf_counter() - started) / len(chunk.slots)
        values = tuple(
            measured_values(
                self.recipe,
                validation[k],
                None if probe is None else probe[k],
                loss=trained.means[k],
                lr=trained.lrs[k],
                seconds=share,
            )
            for k in range(len(chunk.slots))
        )
        return _Result(chunk, trained.losses, values)

    def _settle(self, result: _Result) -> dict[int, Outcome]:
        key, outcomes, improved = self.recipe.objective.key, {}, []
        for k, (index, slot) in enumerate(
            zip(result.chunk.indices, result.chunk.slots, strict=True)
        ):
            values, losses = result.values[k], result.losses[:, k].tolist()
            failure = failure_of(losses, slot.updates, key, values[key])
            if slot.finish_interval(len(losses), values[key], minimize=self.recipe.minimize):
                improved.append(self._rows[index])
            outcomes[index] = Outcome(Measurement(slot.interval, values), failure)
        if self.recipe.keeps_best:
            self._stack.keep_best(improved)
        return outcomes

    @torch.no_grad()
    def _evaluate(self, chunk: Chunk) -> tuple[list[Metrics], list[Metrics] | None]:
        """Metrics of each slot on validation data, and on the training data's fixed part."""
        recipe, split = self.recipe, chunk.slots[0].training.seeds.split
        predict, probe = self._model.predictor(chunk.rows), recipe.probe(split)
        data, stop = recipe.data(split, "validation"), self._stop_if_interrupted
        validation = measure(recipe, predict, data, slots=True, stop=stop)
        if recipe.mc_passes:
            draw = self._model.draw(chunk.rows)
            with dropout_on(self._model.module, recipe.sites):
                passes = measure_passes(recipe, chunk.slots, data, draw, stop)
            validation = [{**a, **b} for a, b in zip(validation, passes, strict=True)]
        if probe is None:
            return validation, None
        return validation, measure(recipe, predict, probe, slots=True, stop=stop)

    # -- what comes out -----------------------------------------------------------------------

    def snapshot(self, index: int) -> Snapshot:
        if index in self._ends:
            return self._ends[index]
        slot, row = self._slots[index], self._rows[index]
        state, rest = self._optimizer.export(row, slot.updates)
        parts = {"model": self._stack.read(row), "optimizer": state}
        if self.recipe.keeps_best and slot.best_interval is not None:
            parts["best"] = self._stack.read_best(row)
        tensors = {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}
        return Snapshot(slot.interval, to_host(tensors), {**slot.meta, "rest": rest})

    def weights(self, index: int) -> dict[str, Tensor]:
        slot, row = self._slots[index], self._rows[index]
        best = self.recipe.keeps_best and slot.best_interval is not None
        tensors = self._stack.read_best(row) if best else self._stack.read(row)
        return to_host({key: tensors[name] for key, name in self._model.state_names.items()})

    def score(self, index: int) -> Scores:
        return score(self.recipe, self.weights(index), self._slots[index])


def _nothing() -> None:
    """A remedy where going back is one."""


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether the same is in both."""
    same = functools.partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
    return first.keys() == second.keys() and all(
        same(tensor.cpu().double(), second[name].double()) for name, tensor in first.items()
    )


def one_line(error: BaseException) -> str:
    """Where an error is from and what it says, in one line that is not too long."""
    text = str(error) if isinstance(error, DroptuneError) else told(error)
    return text if len(text) <= 300 else f"{text[:299]}…"


# -- the trainer of a worker ----------------------------------------------------------------------


class Studied(Protocol):
    """What a trainer needs to know of a study."""

    @property
    def spec(self) -> StudySpec: ...
    @property
    def storage(self) -> Remembers: ...
    @property
    def row(self) -> HasMeta: ...


class HasMeta(Protocol):
    @property
    def meta(self) -> Mapping[str, Any]: ...


class Remembers(Protocol):
    def remember_width(self, device: str, fingerprint: str, width: Mapping[str, Any]) -> None: ...
    def recall_width(self, device: str, fingerprint: str) -> dict[str, Any] | None: ...


def make_trainer(recipe: Recipe, study: Studied, width: int | None = None) -> Trainer:
    """The trainer of a worker: fused where the study found that it can be.

    `width` None: what the spec says, and for `auto` the fastest on this device, measured once
    per device and code and remembered in SQL.
    """
    if study.row.meta["trainer"] == "solo":
        return Solo(recipe)
    asked = study.spec.training.width
    if width is None and asked != "auto":
        width = asked
    return trainer_of(recipe, _best_width(recipe, study) if width is None else width)


def trainer_of(recipe: Recipe, width: int) -> Trainer:
    """Solo at width 1, fused above."""
    return Solo(recipe) if width == 1 else Fused(recipe, width)


def _best_width(recipe: Recipe, study: Studied) -> int:
    most = widest(study.spec)
    device, code = _device_name(recipe.device), _code(recipe, study)
    known = study.storage.recall_width(device, code)
    if known is not None:
        return WidthChoice.from_json(known).width
    gib = study.spec.training.memory
    memory = None if gib is None else int(gib * 2**30)
    trials = study.spec.full_trials or math.inf
    choice = choose_width(recipe, trainer_of, most=most, memory=memory, trials=trials)
    study.storage.remember_width(device, code, choice.to_json())
    log.info("width %d is the best here (%s)", choice.width, choice.ended)
    return choice.width


def widest(spec: StudySpec) -> int:
    """The widest group that is useful to a study: a third of its trials.

    What a sampler learns from a trial helps only trials that begin after it.
    """
    trials = spec.full_trials
    return WIDTHS[-1] if trials is None else min(max(trials // 3, 8), WIDTHS[-1])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.processor() or platform.machine()} {os.cpu_count()} cores"


def _code(recipe: Recipe, study: Studied) -> str:
    """What a measured width depends on, beside the device."""
    facts = {
        "files": study.row.meta.get("fingerprint"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": recipe.precision,
        "accumulate": recipe.accumulate,
        "trials": study.spec.full_trials,
        "memory": study.spec.training.memory,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
