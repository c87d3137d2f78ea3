"""The course of one interval: what moves from update to update, computed before it begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from droptune.sites.installed import derive_keys, split_seed
from droptune.trainers.recipe import Recipe
from droptune.trainers.schedule import Array, rate_factors
from droptune.trainers.slot import Slot

BLOCK = 256  # so many updates have their keys derived at once


class Course:
    """Rates, masks' keys and learning rates of k slots over the updates of one interval.

    All on the device before the first update, so that nothing waits for the host. `factors`
    [updates, k] are the schedule's factors on the learning rate.
    """

    def __init__(self, recipe: Recipe, slots: Sequence[Slot], count: int) -> None:
        self.count = count
        at = [_progress(slot, count) for slot in slots]
        self.factors: Array = np.stack([recipe.learning_rates(x) for x in at], axis=1)
        self._rates = _rates(recipe, slots, at)
        self._sites = len(recipe.sites)
        self._seeds = torch.tensor(
            [split_seed(slot.training.seeds.weights) for slot in slots],
            dtype=torch.int32,
            device=recipe.device,
        )
        first = torch.tensor([slot.updates for slot in slots], dtype=torch.int32)
        steps = torch.arange(count, dtype=torch.int32)
        self._updates = (first[None, :] + steps[:, None]).to(recipe.device)
        self._keys: dict[int, tuple[int, Sequence[Tensor]]] = {}

    def rates(self, update: int) -> Tensor:
        """Rates [k, sites] in update number `update` of the interval; the same tensor as long as
        they stay."""
        return self._rates[update]

    def keys(self, update: int, micro: int) -> Tensor:
        """Keys int32 [k, sites, 2] of a micro-batch of update number `update`."""
        block, place = divmod(update, BLOCK)
        known = self._keys.get(micro)
        if known is None or known[0] != block:
            updates = self._updates[block * BLOCK : (block + 1) * BLOCK]
            seeds = self._seeds.expand(*updates.shape, 2)
            keys = derive_keys(seeds, updates, micro, self._sites)
            known = self._keys[micro] = (block, keys.unbind(0))
        return known[1][place]


def _progress(slot: Slot, count: int) -> Array:
    """Progress in [0, 1) before each update of the slot's next interval."""
    total = max(slot.training.intervals * count, slot.updates + count)
    at: Array = (slot.updates + np.arange(count)) / total
    return at


def _rates(recipe: Recipe, slots: Sequence[Slot], at: Sequence[Array]) -> Sequence[Tensor]:
    base = np.array([recipe.base_rates(slot.assignment) for slot in slots])
    base = base.reshape(len(slots), len(recipe.sites))
    factors = np.stack(
        [rate_factors(slot.assignment.values, x) for slot, x in zip(slots, at, strict=True)], 1
    )
    moved = [0, *(np.flatnonzero((factors[1:] != factors[:-1]).any(1)) + 1)]
    rates = torch.as_tensor(factors[moved, :, None] * base[None])
    different = rates.to(recipe.device, torch.float32 if recipe.device.type == "mps" else None)
    lasting = np.diff([*moved, len(factors)])
    return [r for r, n in zip(different.unbind(0), lasting, strict=True) for _ in range(n)]
