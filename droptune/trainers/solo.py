"""The solo trainer: one slot, a plain module and a plain torch optimizer. The reference."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from droptune.program.data import seeded
from droptune.sites.installed import Installed
from droptune.trainers.course import Course
from droptune.trainers.evaluation import measure, measured_values, predictor
from droptune.trainers.feed import Update
from droptune.trainers.monte_carlo import draw_alone, dropout_on, measure_passes
from droptune.trainers.optimizer_state import (
    build,
    export_state,
    import_state,
    names_of,
    set_learning_rates,
    settings_of,
    use_fused_kernel,
)
from droptune.trainers.recipe import Recipe, state_names, tensors_of, to_host
from droptune.trainers.rules import Settings
from droptune.trainers.scoring import score
from droptune.trainers.slot import Outcome, Scores, Slot, Snapshot, Trainer, failure_of
from droptune.training import Measurement, Training


@dataclass
class _Held:
    """What trains in the slot."""

    slot: Slot
    model: nn.Module
    installed: Installed
    optimizer: Optimizer
    base: list[Settings]
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> list[nn.Parameter]:
        """What the optimizer trains."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]


class Solo(Trainer):
    """A trainer of one slot."""

    width = 1

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._held: _Held | None = None

    # -- filling ------------------------------------------------------------------------------

    def fill(self, index: int, training: Training, snapshot: Snapshot | None = None) -> None:
        slot = Slot.start(training, snapshot)
        model = self.recipe.fresh_model(training.seeds.weights)
        made = build(self.recipe.program.optimizer, model, slot.assignment)
        optimizer = use_fused_kernel(made)
        base = settings_of(optimizer)
        held = _Held(slot, model, self.recipe.install(model), optimizer, base)
        if snapshot is not None:
            _load(held, snapshot)
        self._held = held

    def empty(self, index: int) -> None:
        self._held = None

    def occupied(self) -> tuple[int, ...]:
        return () if self._held is None else (0,)

    @property
    def parts(self) -> tuple[nn.Module, Optimizer]:
        """What trains in the slot."""
        return self._filled().model, self._filled().optimizer

    def _filled(self) -> _Held:
        assert self._held is not None, "the slot is empty"
        return self._held

    # -- training -----------------------------------------------------------------------------

    def train_interval(self) -> dict[int, Outcome]:
        if self._held is None:
            return {}
        held, boundary = self._held, self.snapshot(0)
        started = time.perf_counter()
        try:
            with _own_randomness(self.recipe.device):
                losses, sizes, lr = self._train(held)
                # evaluation may be random too: seeded apart from all updates
                seed, number = held.slot.training.seeds.weights, -1 - held.slot.interval
                _reseed(seed, number, self.recipe.device, host=True)
                validation, probe = self._evaluate(held)
        except BaseException:
            self.fill(0, held.slot.training, boundary)
            raise
        values = measured_values(
            self.recipe,
            validation,
            probe,
            loss=float(np.average(losses, weights=sizes)),
            lr=lr,
            seconds=time.perf_counter() - started,
        )
        return {0: self._settle(held, losses, values)}

    def _settle(self, held: _Held, losses: list[float], values: dict[str, float]) -> Outcome:
        slot, value = held.slot, values[self.recipe.objective.key]
        failure = failure_of(losses, slot.updates, self.recipe.objective.key, value)
        improved = slot.finish_interval(len(losses), value, minimize=self.recipe.minimize)
        if improved and self.recipe.keeps_best:
            held.best = to_host(tensors_of(held.model))
        return Outcome(Measurement(slot.interval, values), failure)

    def _train(self, held: _Held) -> tuple[list[float], list[int], float]:
        """One interval: each update's loss and size, and the last learning rate."""
        slot, seeds = held.slot, held.slot.training.seeds
        count = self.recipe.updates(seeds.split)
        course = Course(self.recipe, [slot], count)
        feed = self.recipe.feed(seeds.split)
        held.model.train()
        losses, sizes = [], []
        draws = True  # whether NumPy's or Python's generators are used; seen at the first update
        for number, update in enumerate(feed.interval([seeds.data], [slot.updates], count)):
            self._stop_if_interrupted()
            before = _reseed(seeds.weights, slot.updates + number, self.recipe.device, host=draws)
            set_learning_rates(held.optimizer, held.base, float(course.factors[number, 0]))
            losses.append(self._update(held, course, number, update))
            sizes.append(update.size)
            draws = draws and before != host_state()
        return torch.stack(losses).tolist(), sizes, held.optimizer.param_groups[0]["lr"]

    def _update(self, held: _Held, course: Course, number: int, update: Update) -> Tensor:
        values = held.slot.assignment.values
        held.optimizer.zero_grad()
        total: Tensor | None = None
        for micro, (batch, share) in enumerate(zip(update.batches, update.shares, strict=True)):
            rates, keys = course.rates(number)[0], course.keys(number, micro)[0]
            with held.installed.active(rates, keys), self.recipe.autocast():
                loss = self.recipe.program.loss(held.model, batch, values)
            loss = loss if share == 1 else loss * share
            loss.backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        self._penalise(held, float(values.get("l1", 0.0)))
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(held.weights, self.recipe.clip)
        held.optimizer.step()
        assert total is not None
        return total

    def _penalise(self, held: _Held, l1: float) -> None:
        """The gradient of l1 times the sum of absolute weights (matrices and kernels only)."""
        if not l1:
            return
        for weight in held.weights:
            if weight.grad is not None and weight.ndim > 1:
                weight.grad.add_(weight.detach().sign(), alpha=l1)

    @torch.no_grad()
    def _evaluate(self, held: _Held) -> tuple[dict[str, float], dict[str, float] | None]:
        """Metrics on validation data, and on the training data's fixed part."""
        recipe, split = self.recipe, held.slot.training.seeds.split
        predict = predictor(recipe, held.model.eval(), held.installed)
        data, probe = recipe.data(split, "validation"), recipe.probe(split)
        stop = self._stop_if_interrupted
        validation = measure(recipe, predict, data, slots=False, stop=stop)[0]
        if recipe.mc_passes:
            draw = draw_alone(recipe, held.model, held.installed)
            with dropout_on(held.model, recipe.sites):
                validation |= measure_passes(recipe, [held.slot], data, draw, stop)[0]
        if probe is None:
            return validation, None
        return validation, measure(recipe, predict, probe, slots=False, stop=stop)[0]

    # -- what comes out -----------------------------------------------------------------------

    def snapshot(self, index: int) -> Snapshot:
        held = self._filled()
        state, rest = export_state(held.optimizer, names_of(held.model))
        parts = {"model": tensors_of(held.model), "optimizer": state, "best": held.best}
        tensors = {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}
        return Snapshot(held.slot.interval, to_host(tensors), {**held.slot.meta, "rest": rest})

    def weights(self, index: int) -> dict[str, Tensor]:
        held = self._filled()
        tensors = held.best or tensors_of(held.model)
        return to_host({key: tensors[name] for key, name in state_names(held.model).items()})

    def score(self, index: int) -> Scores:
        return score(self.recipe, self.weights(index), self._filled().slot)


@torch.no_grad()
def _load(held: _Held, snapshot: Snapshot) -> None:
    saved = snapshot.part("model")
    for name, tensor in tensors_of(held.model).items():
        if name in saved:
            tensor.copy_(saved[name])
    held.best = snapshot.part("best")
    state, rest = snapshot.part("optimizer"), snapshot.meta.get("rest", {})
    import_state(held.optimizer, names_of(held.model), state, rest)


# -- randomness of the model that is no site ------------------------------------------------------


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leaves the process's generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), seeded(0):  # by each update anew
        yield


def _reseed(seed: int, update: int, device: torch.device, *, host: bool) -> object:
    """Seed torch's (and NumPy's and Python's) generators from (seed, update) alone."""
    mixed = (seed ^ (update * 0x9E3779B97F4A7C15)) & (2**63 - 1)
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)
    if not host:
        return None
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    return host_state()


def host_state() -> object:
    """Where NumPy's and Python's generators are."""
    return random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]
