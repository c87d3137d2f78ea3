"""One interval of slots that are trained side by side: forward, backward, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from droptune.errors import ProgramError
from droptune.program.data import Batch
from droptune.program.declared import is_number
from droptune.trainers.batched import BatchedModel, Step, Tensors
from droptune.trainers.course import Course
from droptune.trainers.feed import Update
from droptune.trainers.rules import Array
from droptune.trainers.slot import Slot
from droptune.trainers.updates import StackOptimizer


@dataclass(frozen=True)
class Chunk:
    """Slots that are trained side by side, in neighbouring rows of the stack."""

    rows: slice
    indices: tuple[int, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Trained:
    """What the updates of an interval gave: losses [updates, k], per slot their mean over the
    examples and the last learning rate."""

    losses: Array
    means: list[float]
    lrs: list[float]


class Interval:
    """The updates of one interval of a chunk, prepared: no update waits for the host."""

    def __init__(self, model: BatchedModel, optimizer: StackOptimizer, chunk: Chunk) -> None:
        self._recipe = model.recipe
        self._optimizer = optimizer
        slots, rows, layout = chunk.slots, chunk.rows, model.stack.parts.trained
        seeds = slots[0].training.seeds
        self._done = [slot.updates for slot in slots]
        self._data_seeds = [slot.training.seeds.data for slot in slots]
        self._feed = self._recipe.feed(seeds.split)
        self._count = self._recipe.updates(seeds.split)
        self._course = Course(self._recipe, slots, self._count)
        optimizer.prepare(rows, self._course.factors, np.array(self._done))
        self._lrs = [optimizer.first_lr(row) for row in range(rows.start, rows.stop)]
        self._weights = model.stack.weights[rows]
        views = layout.views(self._weights)
        self._leaves = {name: view.detach().requires_grad_() for name, view in views.items()}
        self._varying = {name: tensor[rows] for name, tensor in model.stack.varying.items()}
        self._idle = {
            name: self._varying[name].detach().requires_grad_() for name in model.stack.parts.idle
        }
        self._varying |= self._idle
        self._gradients = torch.zeros_like(self._weights)
        self._gradient_views = list(layout.views(self._gradients).values())
        self._numbers = self._numbers_of(slots)
        self._known_shares: dict[float, Tensor] = {}
        self._l1 = self._penalty(model)
        shared = self._feed.is_shared(self._data_seeds, self._done)
        words = words_of(slots[0])
        self._step: Step = model.step(words, shared=shared)
        self._replays = model.replays
        self._replace = model.stack.replace
        self._kind = rows.start, rows.stop, shared, tuple(sorted(words.items()))

    def _numbers_of(self, slots: Sequence[Slot]) -> dict[str, Tensor]:
        """The searched values that are numbers, [k] each."""
        names = [name for name, value in slots[0].assignment.values.items() if is_number(value)]
        return {
            name: self._tensor([float(slot.assignment.values[name]) for slot in slots])
            for name in names
        }

    def _penalty(self, model: BatchedModel) -> Tensor | None:
        """The l1 of each slot on its matrices and kernels, [k, P]; None where none is searched."""
        if "l1" not in self._numbers:
            return None
        layout = model.stack.parts.trained
        matrix = self._tensor([float(len(shape) > 1) for shape in layout.shapes])
        sizes = torch.tensor(layout.sizes, device=self._recipe.device)
        return self._numbers["l1"][:, None] * torch.repeat_interleave(matrix, sizes)

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=self._recipe.dtype, device=self._recipe.device)

    def train(self, stop: Callable[[], None]) -> Trained:
        """All updates; `stop` is called before each and may raise."""
        losses, sizes = [], []
        updates = self._feed.interval(self._data_seeds, self._done, self._count)
        for number, update in enumerate(updates):
            stop()
            losses.append(self._update(number, update))
            sizes.append(update.size)
        taken: Array = torch.stack(losses).double().cpu().numpy()
        factors = self._course.factors[-1].tolist()
        return Trained(
            losses=taken,
            means=np.average(taken, axis=0, weights=sizes).tolist(),
            lrs=[lr * factor for lr, factor in zip(self._lrs, factors, strict=True)],
        )

    def _update(self, number: int, update: Update) -> Tensor:
        total: Tensor | None = None
        rates = self._course.rates(number)
        for micro, (batch, share) in enumerate(zip(update.batches, update.shares, strict=True)):
            shares = self._shares(share)
            inputs = rates, self._course.keys(number, micro), self._numbers, batch, shares
            losses, *gradients = self._replays.run(self._pass, inputs, self._kind)
            add = torch._foreach_add_ if micro else torch._foreach_copy_
            add(self._gradient_views, gradients)
            part = losses * shares
            total = part if total is None else total + part
        self._apply(number)
        assert total is not None
        return total

    def _shares(self, share: float) -> Tensor:
        """The share of a micro-batch in each slot's update, [k]."""
        if share not in self._known_shares:
            self._known_shares[share] = self._tensor([share] * len(self._done))
        return self._known_shares[share]

    def _pass(
        self, rates: Tensor, keys: Tensor, numbers: Tensors, batch: Batch, shares: Tensor
    ) -> list[Tensor]:
        """Forward and backward: the losses [k], and the gradients of these shares of them."""
        with self._recipe.autocast():
            losses, replaced = self._step(self._leaves, self._varying, rates, keys, numbers, batch)
        leaves, weights = {**self._leaves, **self._idle}, shares.to(losses.dtype)
        given = torch.autograd.grad(losses, list(leaves.values()), weights, allow_unused=True)
        for name, gradient in zip(leaves, given, strict=True):
            if (gradient is None) != (name in self._idle):  # an optimizer leaves such weights alone
                raise ProgramError(f"some updates train {name}, and others do not")
        for name, tensor in replaced.items():
            if name in self._varying:
                self._varying[name].copy_(tensor.detach())
            else:
                self._replace(name)
        return [losses.detach(), *(gradient for gradient in given if gradient is not None)]

    @torch.no_grad()
    def _apply(self, number: int) -> None:
        if self._l1 is not None:
            self._gradients.addcmul_(self._weights.sign(), self._l1)
        clip = self._recipe.clip
        if clip is not None:
            norms = torch.linalg.vector_norm(self._gradients, dim=1, keepdim=True)
            self._gradients.mul_((clip / (norms + 1e-6)).clamp(max=1.0))
        self._optimizer.step(number, self._gradients)


def words_of(slot: Slot) -> dict[str, Any]:
    """The searched values of a slot that are no numbers, as its loss reads them."""
    values = slot.assignment.values
    return {n: v for n, v in values.items() if not is_number(v) and n != "schedule"}
