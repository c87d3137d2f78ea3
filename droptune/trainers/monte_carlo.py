"""Monte-Carlo dropout: evaluation with dropout on, averaged over passes (Gal & Ghahramani 2016).

Gal & Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016: T stochastic forward passes
are samples from an approximate posterior predictive distribution; their mean is the prediction.
Every pass of every batch has masks of its own, which depend on a training's seeds, its interval
and the pass alone, so fused and solo give the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from droptune.program.data import Batch, InMemory, Streamed
from droptune.program.metrics import (
    IGNORED,
    Additive,
    Sums,
    classification_metrics,
    regression_metrics,
)
from droptune.sites.installed import Installed, Site, derive_keys, split_seed
from droptune.trainers.evaluation import Measuring, Metrics, evaluation_batches
from droptune.trainers.schedule import Array, rate_factors
from droptune.training import derive_seed

if TYPE_CHECKING:
    from droptune.trainers.recipe import Recipe
    from droptune.trainers.slot import Slot

Draw = Callable[[Batch, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(batch, rates [k, sites], keys int32 [k, sites, 2]) to predictions and targets [k, B, ...]."""


@contextmanager
def dropout_on(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Inside, the model is in evaluation mode but for the modules in which dropout acts.

    Dropout that was inserted right behind a batch normalisation stays off, or its statistics
    would move.
    """
    model.eval()
    for site in sites:
        owner = model.get_submodule(site.owner)
        if not isinstance(owner, nn.modules.batchnorm._BatchNorm):
            owner.training = True  # of this module alone, not of those in it
    try:
        yield
    finally:
        model.eval()


def draw_alone(recipe: Recipe, model: nn.Module, installed: Installed) -> Draw:
    """Of one model, as the only slot."""

    def draw(batch: Batch, rates: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        with installed.active(rates[0], keys[0]), recipe.autocast():
            predicted, targets = recipe.program.predict(model, batch)
        return predicted.unsqueeze(0), targets.unsqueeze(0)

    return draw


def measure_passes(
    recipe: Recipe,
    slots: Sequence[Slot],
    data: InMemory | Streamed,
    draw: Draw,
    stop: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """The `mc_...` metrics of each slot over a split, by `recipe.mc_passes` passes."""
    measuring = Measuring(METRICS[recipe.program.task], slots=True)
    for combined, targets in averaged(recipe, slots, data, draw, stop):
        measuring.add(combined, targets)
    return [
        {f"mc_{name}": value for name, value in measured.items()} for measured in measuring.finish()
    ]


def averaged(
    recipe: Recipe,
    slots: Sequence[Slot],
    data: InMemory | Streamed,
    draw: Draw,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `recipe.mc_passes` passes over a split predict, and its targets, batch by batch.

    Classification: the logarithms of the mean probabilities [k, B, ..., C]. Regression: the
    predictions of every pass [k, B, ..., passes].
    """
    device = recipe.device
    rates = torch.as_tensor(np.stack([_rates(recipe, slot) for slot in slots])).to(device)
    words = [split_seed(derive_seed(slot.training.seeds.weights, "mc")) for slot in slots]
    seeds = torch.tensor(words, dtype=torch.int32, device=device)
    interval = torch.tensor([slot.interval for slot in slots], dtype=torch.int32, device=device)
    for number, batch in enumerate(evaluation_batches(data, recipe)):
        passes = []
        for one in range(recipe.mc_passes):
            stop()
            count = number * recipe.mc_passes + one
            keys = derive_keys(seeds, interval, count, len(recipe.sites))
            predicted, target = draw(batch, rates, keys)
            passes.append(predicted)
        yield _combined(recipe.program.task, torch.stack(passes)), target


def _rates(recipe: Recipe, slot: Slot) -> Array:
    """The rates [sites] of the interval's last update."""
    end = (slot.interval + 1) / max(slot.training.intervals, slot.interval + 1)
    factor = rate_factors(slot.assignment.values, np.array([np.nextafter(end, 0)]))
    return np.array(recipe.base_rates(slot.assignment)) * factor


def _combined(task: str, passes: Tensor) -> Tensor:
    """Passes [T, k, B, ...]: joined as `averaged` says."""
    if task != "classification":
        return passes.movedim(0, -1)
    whole = passes.float() if passes.dtype.itemsize < 4 else passes
    return whole.log_softmax(-1).logsumexp(0) - math.log(len(passes))


def _mean_sums(combined: Tensor, targets: Tensor) -> Sums:
    entropy = -(combined.exp() * combined).sum(-1)
    known = (targets != IGNORED).to(entropy.dtype)
    return {**classification_metrics.sums(combined, targets), "entropy": (entropy * known).sum()}


def _mean_of(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of the mean probabilities, and `entropy`, the mean entropy of them in nats."""
    entropy = sums["entropy"] / sums["count"].clamp(min=1)
    return {**classification_metrics.of(sums), "entropy": entropy}


def _mixture(combined: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The metrics of the mean prediction, but for `nll`: the mean negative logarithm of the mean
    over passes of Gaussian densities around each (Gal & Ghahramani 2016, eq. 8), with the passes'
    mean squared error as their variance."""
    truth = targets.reshape(combined.shape[:-1]).to(combined.dtype)
    metrics = regression_metrics(combined.mean(-1), truth)
    return {**metrics, "nll": _mixture_nll(combined - truth.unsqueeze(-1))}


METRICS: dict[str, Metrics] = {
    "classification": Additive(_mean_sums, _mean_of),
    "regression": _mixture,
}
"""Of what one training's passes predict (see `averaged`); all are called `mc_...`."""


def _mixture_nll(errors: Tensor) -> Tensor:
    """Errors [n, ..., passes]."""
    squared = errors.square()
    variance = squared.mean().clamp(min=torch.finfo(errors.dtype).tiny)
    log_density = -0.5 * (math.log(2 * math.pi) + variance.log() + squared / variance)
    return -(log_density.logsumexp(-1) - math.log(errors.shape[-1])).mean()
