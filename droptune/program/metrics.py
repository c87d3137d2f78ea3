"""What is measured on a whole validation or test set.

Every function here is pure tensor arithmetic without a branch on values, so that it runs under
`torch.func.vmap` over a leading axis of slots. All metrics follow from sums over examples, so a
large set is measured part by part and its predictions are never held at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a target that counts nowhere (padding), as in torch's cross entropy
ECE_BINS = 15  # Guo et al. 2017, "On Calibration of Modern Neural Networks"

CLASSIFICATION = ("nll", "accuracy", "error", "precision", "recall", "f1", "brier", "ece")
REGRESSION = ("mse", "rmse", "mae", "nll")


Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Additive:
    """Metrics of a whole set: `sums(predictions, targets)` of its parts are added up, and
    `of(sums)` says what follows from the total."""

    sums: Callable[[Tensor, Tensor], Sums]
    of: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

    def __call__(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return self.of(self.sums(predictions, targets))


# -- classification -------------------------------------------------------------------------------


def classification_sums(logits: Tensor, targets: Tensor) -> Sums:
    """Of logits [N, ..., C] against class numbers [N, ...]; targets of -100 count nowhere."""
    logits, targets = full(logits).reshape(-1, logits.shape[-1]), targets.reshape(-1)
    each = per_prediction(logits, targets)
    weight = (targets != IGNORED).to(each["nll"].dtype)
    hit = each["correct"] * weight
    zero = logits.new_zeros(logits.shape[-1])
    known = targets.clamp(min=0)
    return {
        "count": weight.sum(),
        **{name: (each[name] * weight).sum() for name in ("nll", "correct", "brier")},
        "hits": zero.scatter_add(0, known, hit),
        "actual": zero.scatter_add(0, known, weight),
        "predicted": zero.scatter_add(0, logits.argmax(-1), weight),
        "excess": _excess_confidence(each["confidence"], each["correct"], weight),
    }


def classification_of(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`nll` is the mean cross entropy in nats; `precision`, `recall` and `f1` are macro averages
    over the classes that occur in targets or predictions (0 where undefined, as in scikit-learn);
    `brier` is the mean squared distance of the probabilities from the one-hot target, summed over
    classes; `ece` the expected calibration error in 15 equal bins of confidence (Guo et al. 2017).
    """
    total = sums["count"].clamp(min=1)
    accuracy = sums["correct"] / total
    precision, recall, f1 = _macro(sums["hits"], sums["actual"], sums["predicted"])
    return {
        "nll": sums["nll"] / total,
        "accuracy": accuracy,
        "error": 1 - accuracy,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "brier": sums["brier"] / total,
        "ece": sums["excess"].abs().sum() / total,
    }


classification_metrics = Additive(classification_sums, classification_of)


def per_prediction(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """`nll`, `correct`, `brier` and `confidence` of each prediction: logits [..., C] and targets
    [...] to [...]."""
    known = targets.clamp(min=0).unsqueeze(-1)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    confidence, predicted = p.max(-1)
    p_target = p.gather(-1, known).squeeze(-1)
    return {
        "nll": -log_p.gather(-1, known).squeeze(-1),
        "correct": (predicted == targets).to(p.dtype),
        "brier": p.square().sum(-1) - 2 * p_target + 1,
        "confidence": confidence,
    }


def _macro(hits: Tensor, actual: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    occurs = ((actual + predicted) > 0).to(hits.dtype)
    classes = occurs.sum().clamp(min=1)
    precision = hits / predicted.clamp(min=1)
    recall = hits / actual.clamp(min=1)
    f1 = 2 * hits / (actual + predicted).clamp(min=1)
    return precision.sum() / classes, recall.sum() / classes, f1.sum() / classes


def _excess_confidence(confidence: Tensor, correct: Tensor, weight: Tensor) -> Tensor:
    """The sum of correct - confidence in each bin: the ECE is the sum of their sizes by count."""
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1  # bin b: (b/15, (b+1)/15]
    return confidence.new_zeros(ECE_BINS).scatter_add(0, bins, (correct - confidence) * weight)


# -- regression -----------------------------------------------------------------------------------


def regression_sums(predictions: Tensor, targets: Tensor) -> Sums:
    """Of predictions against targets of the same number of elements."""
    difference = full(predictions) - full(targets).reshape(predictions.shape)
    return {
        "count": torch.ones_like(difference).sum(),
        "squared": difference.square().sum(),
        "absolute": difference.abs().sum(),
    }


def regression_of(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`nll` is the mean Gaussian negative log likelihood per element with one variance for all, the
    one that fits best (the mean squared error itself): 0.5 log(2 pi mse) + 0.5."""
    mse = sums["squared"] / sums["count"]
    return {
        "mse": mse,
        "rmse": mse.sqrt(),
        "mae": sums["absolute"] / sums["count"],
        "nll": gaussian_nll(mse, mse),
    }


regression_metrics = Additive(regression_sums, regression_of)


def gaussian_nll(squared: Tensor, variance: Tensor) -> Tensor:
    """Of squared errors under one variance, in nats."""
    variance = variance.clamp(min=torch.finfo(variance.dtype).tiny)
    return 0.5 * (math.log(2 * math.pi) + variance.log() + squared / variance)


def full(values: Tensor) -> Tensor:
    """At least float32: sums over a set are lost in half precision."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
