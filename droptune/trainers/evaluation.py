"""Evaluating weights on a whole split, for one model or for all slots of a stack at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from droptune.errors import ProgramError
from droptune.program.data import Batch, InMemory, Streamed
from droptune.program.metrics import Additive, Sums
from droptune.program.soundness import check_metrics
from droptune.sites.installed import Installed
from droptune.trainers.feed import cut
from droptune.trainers.recipe import Recipe

EVALUATION_BATCHES = 4  # an evaluation batch holds so many training batches: it has no gradients
HELD = 1 << 24  # numbers of predictions that wait to be summed up, at most: 64 MB
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


class Measuring:
    """Measures a split whose predictions come batch by batch: [B, ...] of one model or, `slots`,
    [k, B, ...] of k slots at once.

    Metrics that are sums over examples are taken part by part, whatever the batches' other
    dimensions; for any others all predictions are held until the end.
    """

    def __init__(self, metrics: Metrics, *, slots: bool) -> None:
        self._metrics = metrics
        self._slots = slots
        self._axis = int(slots)
        self._held: list[tuple[Tensor, Tensor]] = []
        self._numbers = 0  # of the predictions that are held
        self._total: Sums = {}

    def add(self, predicted: Tensor, targets: Tensor) -> None:
        if self._held:
            alike, numbers = self._alike(predicted, targets), self._numbers + predicted.numel()
            if isinstance(self._metrics, Additive) and (not alike or numbers > HELD):
                self._sum_up(self._metrics)
            elif not alike:
                raise self._unequal(predicted)
        self._held.append((predicted, targets))
        self._numbers += predicted.numel()

    def _alike(self, *pair: Tensor) -> bool:
        """Whether this pair can be joined to those that are held."""
        rest = self._axis + 1
        return all(
            a.shape[rest:] == b.shape[rest:] for a, b in zip(self._held[-1], pair, strict=True)
        )

    def _unequal(self, predicted: Tensor) -> ProgramError:
        shapes = (str(tuple(t.shape[self._axis :])) for t in (self._held[-1][0], predicted))
        return ProgramError(
            "metrics of the program's own need the predictions of all batches in one tensor, and "
            f"their shapes are {' and '.join(shapes)}: pad to one length"
        )

    def _joined(self) -> tuple[Tensor, Tensor, bool]:
        """All that is held, and whether its targets [n, ...] are those of all slots."""
        predicted, targets = ([pair[i] for pair in self._held] for i in (0, 1))
        self._held, self._numbers = [], 0
        shared = self._slots and all(part.stride(0) == 0 for part in targets)
        joined = (
            torch.cat([part[0] for part in targets]) if shared else torch.cat(targets, self._axis)
        )
        return torch.cat(predicted, self._axis), joined, shared

    def _of(self, function: Metrics, predicted: Tensor, targets: Tensor, shared: bool) -> Any:
        if not self._slots:
            return function(predicted, targets)
        batched = torch.func.vmap(function, in_dims=(0, None if shared else 0))
        return batched(predicted, targets)

    def _sum_up(self, metrics: Additive) -> None:
        sums = self._of(metrics.sums, *self._joined())
        total = self._total
        self._total = {n: total[n] + v if total else v for n, v in sums.items()}

    def finish(self) -> list[dict[str, float]]:
        """The metrics of each slot; of one model the only entry."""
        metrics = self._metrics
        if isinstance(metrics, Additive):
            self._sum_up(metrics)
            return (
                _rows(torch.func.vmap(metrics.of)(self._total))
                if self._slots
                else _floats([metrics.of(self._total)])
            )
        predicted, targets, shared = self._joined()
        if not self._slots:
            return _floats([metrics(predicted, targets)])
        try:
            return _rows(self._of(metrics, predicted, targets, shared))
        except Exception:  # whatever a metric of the user's own does that cannot be batched
            each = [targets] * len(predicted) if shared else targets
            return _floats([metrics(p, t) for p, t in zip(predicted, each, strict=True)])


def measure(
    recipe: Recipe,
    predict: Predict,
    data: InMemory | Streamed,
    *,
    slots: bool,
    stop: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """The program's metrics on a whole split, see `Measuring`; `stop` is called before each batch
    and may raise."""
    measuring = Measuring(recipe.program.metrics, slots=slots)
    for batch in evaluation_batches(data, recipe):
        stop()
        measuring.add(*predict(batch))
    return measuring.finish()


def _rows(stacked: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Metrics [k] of k slots in one transfer from the device."""
    names, columns = list(stacked), torch.stack([v.double() for v in stacked.values()], 1)
    return [dict(zip(names, row, strict=True)) for row in columns.tolist()]


def _floats(measured: list[Any]) -> list[dict[str, float]]:
    """Metrics as numbers, whatever the program gives them as."""
    for metrics in measured:
        check_metrics(metrics)
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
