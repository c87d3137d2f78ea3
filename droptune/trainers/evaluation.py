"""Evaluating weights on a whole split, for one model or for all slots of a stack at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from droptune.errors import ProgramError
from droptune.program.data import Batch, InMemory, Streamed
from droptune.program.program import Program
from droptune.sites.installed import Installed
from droptune.trainers.feed import cut
from droptune.trainers.recipe import Recipe

EVALUATION_BATCHES = 4  # an evaluation batch holds so many training batches: it has no gradients
Predict = Callable[[Batch], tuple[Tensor, Tensor]]
Metrics = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
Measured = Mapping[str, float]


def evaluation_batches(data: InMemory | Streamed, recipe: Recipe) -> Iterator[Batch]:
    """A whole split in its own order."""
    if isinstance(data, Streamed):
        read = data.batches(torch.arange(data.n), seed=0, epoch=0, device=recipe.device)
        yield from map(recipe.place, read)
        return
    for start, stop in cut(data.n, EVALUATION_BATCHES * recipe.program.batch_size):
        yield data.gather(torch.arange(start, stop, device=recipe.device))


def predictions(
    predict: Predict,
    data: InMemory | Streamed,
    recipe: Recipe,
    axis: int = 0,
    stop: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Predictions and targets of a whole split, joined along `axis` (1 where slots come first).

    `stop` is called before each batch and may raise.
    """
    pairs = []
    for batch in evaluation_batches(data, recipe):
        stop()
        pairs.append(predict(batch))
    return torch.cat([p for p, _ in pairs], axis), torch.cat([t for _, t in pairs], axis)


def measure(program: Program, predicted: Tensor, targets: Tensor) -> dict[str, float]:
    """The program's metrics of one model on a whole split."""
    return _floats([program.metrics(predicted, targets)])[0]


def measure_stack(metrics: Metrics, predicted: Tensor, targets: Tensor) -> list[dict[str, float]]:
    """The same for predictions [k, n, ...] of k slots: at once where the metrics can be batched."""
    shared = targets.stride(0) == 0
    try:
        stacked = torch.func.vmap(metrics, in_dims=(0, None if shared else 0))(
            predicted, targets[0] if shared else targets
        )
        names, columns = list(stacked), torch.stack([v.double() for v in stacked.values()], 1)
        return [dict(zip(names, row, strict=True)) for row in columns.tolist()]
    except Exception:  # whatever a metric of the user's own does that cannot be batched
        pairs = zip(predicted, targets, strict=True)
        return _floats([metrics(p, t) for p, t in pairs])


def _floats(measured: list[Any]) -> list[dict[str, float]]:
    """Metrics of several models in one transfer from the device."""
    for metrics in measured:
        if not isinstance(metrics, Mapping):
            kind = type(metrics).__name__
            raise ProgramError(f"metrics(predictions, targets) returned a {kind}, not a dict")
    flat = [torch.as_tensor(v).double().cpu().reshape(()) for m in measured for v in m.values()]
    numbers = iter(torch.stack(flat).tolist() if flat else [])
    return [{name: next(numbers) for name in metrics} for metrics in measured]


def measured_values(
    recipe: Recipe,
    validation: Measured,
    probe: Measured | None,
    *,
    loss: float,
    lr: float,
    seconds: float,
) -> dict[str, float]:
    """All that is measured of one training at the end of an interval.

    `train/loss` is the mean over the interval's examples (in training mode, dropout on);
    `train/<metric>` of the objective (and of the gap) is measured on a fixed part of the training
    data in evaluation mode, so that dropout itself does not hide overfitting; `val/gap` is the
    generalisation gap: how much worse the program's nll (or another metric, `Recipe.gap`) is on
    validation data. Streamed training data have neither.
    """
    values = {"train/loss": loss, **{f"val/{name}": v for name, v in validation.items()}}
    if probe is not None:
        name, sign = recipe.gap or ("", 0.0)
        values |= {
            f"train/{key}": probe[key] for key in (name, recipe.objective.metric) if key in probe
        }
        if name:
            values["val/gap"] = sign * (validation[name] - probe[name])
    return {**values, "lr": lr, "time/seconds": seconds}


def predictor(recipe: Recipe, model: nn.Module, installed: Installed) -> Predict:
    """Predictions of one model, dropout off."""

    def predict(batch: Batch) -> tuple[Tensor, Tensor]:
        with installed.active(training=False), recipe.autocast():
            return recipe.program.predict(model, batch)

    return predict
