"""What is tuned: the user's model, data and loss, without a loop, a device or a search in it.

A user writes it in the short form (`short_form`) or in the long one (`long_form`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from droptune.program.data import Batch, InMemory, Splits, epoch_order, seeded, split_target
from droptune.program.declared import default_values
from droptune.program.intake import LOOKED_AT, RawSplits, make_splits, read_splits
from droptune.program.labels import check_known, check_several
from droptune.program.metrics import CLASSIFICATION, REGRESSION
from droptune.program.optimizers import MakeOptimizer
from droptune.program.soundness import (
    calls_eagerly,
    check_loss,
    check_made,
    check_metrics,
    check_model,
    check_prediction,
)
from droptune.program.source import blamed
from droptune.program.tasks import Loss, Metrics, Predict


@dataclass(frozen=True, eq=False)
class Program:
    """What trainers train. `loss` and `predict` only call `model`, so they run solo and fused.

    `task` classification | regression | custom
    `model()` a fresh model, its weights drawn from torch's current generator
    `loss(model, batch, values)` a scalar; runs under vmap, values may be 0-dim tensors
    `predict(model, batch)` (predictions [B, ...], targets [B, ...]) of an evaluation batch
    `metrics(predictions, targets)` of a whole set, by name
    `schedule(progress)` the factor on the learning rate, progress in [0, 1]
    `interval_updates` updates in an interval; None: one pass over the training data
    `clip` the largest norm of a training's gradient; None: not clipped
    `searched` further values that may be searched: a (low, high) pair, a mapping with low, high
    and log, or a list of choices
    """

    task: str
    model: Callable[[], nn.Module]
    data: Callable[[], RawSplits]
    loss: Loss
    predict: Predict
    metrics: Metrics
    optimizer: MakeOptimizer
    batch_size: int
    epochs: int
    lr: float
    schedule: Callable[[float], float] = lambda progress: 1.0
    interval_updates: int | None = None
    clip: float | None = None
    searched: Mapping[str, Any] = field(default_factory=dict)
    loss_values: tuple[str, ...] = ()  # that the loss knows beside the declared ones
    own_metrics: tuple[str, ...] | None = None  # names beside the task's; None: found by trying

    @functools.cached_property
    def _read(self) -> RawSplits:
        return read_splits(self.data(), self.task, self.batch_size)

    def splits(self, seed: int) -> Splits:
        """Training, validation and test data; missing ones are split off (see `Splits.made`).

        Data are read and checked once per process. Raises ProgramError in one line.
        """
        return make_splits(self._read, seed, self.task)

    def example_batch(self, size: int = 2, *, drawn: bool = False) -> Batch:
        """The first training examples, on the CPU; or, always the same, `drawn` from them all."""
        train = self._read.train
        order = (epoch_order(train.n, 0, 0) if drawn else torch.arange(train.n))[:size]
        if isinstance(train, InMemory):
            return train.gather(order)
        whole = replace(train, batch_size=size, workers=0)  # one batch, of whatever size
        return next(whole.batches(order, seed=0, epoch=0, device="cpu"))

    @functools.cached_property
    def metric_names(self) -> tuple[str, ...]:
        """What `metrics` measures; for the long form by trying it on two examples."""
        if self.own_metrics is not None:
            built_in = {"classification": CLASSIFICATION, "regression": REGRESSION}[self.task]
            return (*built_in, *(name for name in self.own_metrics if name not in built_in))
        with seeded(0), torch.no_grad():
            model = self.model().eval()
            with calls_eagerly(model.modules())():
                pair = self._tried_prediction(model, self.example_batch())
            with blamed("measuring the first examples"):
                measured = self.metrics(*pair)
            check_metrics(measured)
            return tuple(measured)

    def check(self) -> None:
        """Tries one loss and one prediction, and the class numbers against the model's outputs.

        Raises ProgramError in one line. Leaves all generators as they were.
        """
        batch = self.example_batch()
        with seeded(0):  # the same program is found good every time
            with blamed("model()"):
                model = self.model()
            check_model(model)
            names = set(model.state_dict())
            with calls_eagerly(model.modules())():
                self._try(model, batch)
            check_made(model, names)

    def _try(self, model: nn.Module, batch: Batch) -> None:
        if self.task == "classification":  # before a loss stumbles over wrong numbers
            self._check_classes(self._tried_prediction(model, batch)[0].shape[-1])
        with blamed("the loss of the first examples"):
            loss = self.loss(model.train(), batch, default_values(self.searched))
        check_loss(loss)
        self._tried_prediction(model, batch)

    def _tried_prediction(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with blamed("the prediction of the first examples"), torch.no_grad():
            found = self.predict(model.eval(), batch)
        return check_prediction(found)

    def _check_classes(self, classes: int) -> None:
        """All class numbers; of a training stream those of the first examples."""
        for name in ("train", "validation", "test"):
            data = getattr(self._read, name)
            if isinstance(data, InMemory):
                numbers = split_target(data.tree)[2]
                check_known(numbers, classes, name)
                if name == "train":
                    check_several(numbers, name)
            elif name == "train":
                check_known(split_target(self.example_batch(LOOKED_AT))[2], classes, name)
