"""The tasks that droptune knows: their losses and predictions, from a model's output.

Everything only calls the model and runs under `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from droptune.errors import ProgramError
from droptune.program.data import Batch, size_of, split_target
from droptune.program.metrics import IGNORED, classification_metrics, regression_metrics

FEW_CLASSES = 16
Model = Callable[..., Any]  # a module, or a function bound to the weights of one slot
Values = Mapping[str, Any]  # searched values of one training: numbers or 0-dim tensors
Loss = Callable[[Model, Batch, Values], Tensor]
Predict = Callable[[Model, Batch], tuple[Tensor, Tensor]]
Metrics = Callable[[Tensor, Tensor], dict[str, Tensor]]


def output_and_targets(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs, named, targets = split_target(batch)
    output = model(*inputs, **named)
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"], targets
    return cast(Tensor, getattr(output, "logits", output)), targets


def predict_classes(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [B, ..., C] with the classes last, and targets [B, ...]."""
    logits, targets = output_and_targets(model, batch)
    if logits.shape == targets.shape:
        logits = logits.unsqueeze(-1)
    elif logits.shape[:-1] != targets.shape:
        if logits.shape[:1] + logits.shape[2:] != targets.shape:
            raise ProgramError(
                f"the model's output of shape {tuple(logits.shape)} does not fit class numbers of "
                f"shape {tuple(targets.shape)}: one logit per class is needed for each"
            )
        logits = logits.movedim(1, -1)
    if logits.shape[-1] == 1:  # one logit for two classes: sigmoid(z) = softmax(0, z)
        logits = torch.cat([torch.zeros_like(logits), logits], -1)
    return logits, targets


def cross_entropy(model: Model, batch: Batch, values: Values) -> Tensor:
    """Mean cross entropy; `label_smoothing` in values as in torch, but it may be a tensor."""
    logits, targets = predict_classes(model, batch)
    log_p = log_softmax(logits)
    each = -log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if "label_smoothing" in values:
        smoothing = values["label_smoothing"]
        each = (1 - smoothing) * each - smoothing * log_p.mean(-1)
    weight = (targets != IGNORED).to(each.dtype)
    return (each * weight).sum() / weight.sum().clamp(min=1)


def log_softmax(logits: Tensor) -> Tensor:
    """The logarithm of the softmax over the last dimension.

    Torch's kernel is not vectorised over so short a dimension (20 ns a number at 10 classes, a
    tenth of a small network's fused update); written out it takes a third of that.
    """
    if logits.shape[-1] > FEW_CLASSES or logits.device.type != "cpu":
        return logits.log_softmax(-1)
    below = logits - logits.detach().amax(-1, keepdim=True)
    return below - below.exp().sum(-1, keepdim=True).log()


def predict_numbers(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    output, targets = output_and_targets(model, batch)
    if output.shape in (targets.shape, (*targets.shape, 1)) or targets.shape == (*output.shape, 1):
        return output.reshape(targets.shape), targets
    raise ProgramError(
        f"the model's output of shape {tuple(output.shape)} does not fit targets of shape "
        f"{tuple(targets.shape)}"
    )


def squared_error(model: Model, batch: Batch, values: Values) -> Tensor:
    output, targets = predict_numbers(model, batch)
    return (output - targets).square().mean()


def loss_as_prediction(loss: Loss, values: Values) -> Predict:
    """The batch's loss as every example's prediction: its mean over a set is the set's loss."""

    def predict(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        each = loss(model, batch, values).expand(size_of(batch))
        return each, torch.zeros_like(each)

    return predict


def mean_loss(predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"loss": predictions.mean()}


def both(first: Metrics, second: Metrics) -> Metrics:
    """What either measures, the second for names that they share."""
    return lambda predictions, targets: {
        **first(predictions, targets),
        **second(predictions, targets),
    }


TASKS: dict[str, tuple[Loss, Predict, Metrics]] = {
    "classification": (cross_entropy, predict_classes, classification_metrics),
    "regression": (squared_error, predict_numbers, regression_metrics),
}
