"""What is measured on a whole validation or test set.

Every function here is pure tensor arithmetic without a branch on values, so that it runs under
`torch.func.vmap` over a leading axis of slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

IGNORED = -100  # a target that counts nowhere (padding), as in torch's cross entropy
ECE_BINS = 15  # Guo et al. 2017, "On Calibration of Modern Neural Networks"

SAMPLED_EXAMPLES = 10_000  # whose logits are kept, at most
SAMPLED_NUMBERS = 1_000_000  # of their logits: 2 MB in half precision

CLASSIFICATION = ("nll", "accuracy", "error", "precision", "recall", "f1", "brier", "ece")
REGRESSION = ("mse", "rmse", "mae", "nll")


def classification_metrics(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Metrics of logits [N, ..., C] against class numbers [N, ...]; targets of -100 count nowhere.

    `nll` is the mean cross entropy in nats; `precision`, `recall` and `f1` are macro averages over
    the classes that occur in targets or predictions (0 where undefined, as in scikit-learn);
    `brier` is the mean squared distance of the probabilities from the one-hot target, summed over
    classes; `ece` the expected calibration error in 15 equal bins of confidence (Guo et al. 2017).
    """
    logits, targets = _rows(logits, targets)
    each = _per_prediction(logits, targets)
    weight = (targets != IGNORED).to(each["nll"].dtype)
    total = weight.sum().clamp(min=1)
    means = {name: (each[name] * weight).sum() / total for name in ("nll", "correct", "brier")}
    precision, recall, f1 = _macro(logits, targets, each["correct"] * weight, weight)
    return {
        "nll": means["nll"],
        "accuracy": means["correct"],
        "error": 1 - means["correct"],
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "brier": means["brier"],
        "ece": _calibration_error(each["confidence"], each["correct"], weight) / total,
    }


def regression_metrics(predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Metrics of predictions against targets of the same number of elements.

    `nll` is the mean Gaussian negative log likelihood per element with one variance for all, the
    one that fits best (the mean squared error itself): 0.5 log(2 pi mse) + 0.5.
    """
    difference = _full(predictions) - _full(targets).reshape(predictions.shape)
    mse = difference.square().mean()
    return {
        "mse": mse,
        "rmse": mse.sqrt(),
        "mae": difference.abs().mean(),
        "nll": _gaussian_nll(mse, mse),
    }


def per_example(task: str, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Scores of single examples, [N] each; their means are the metrics of the same name.

    Classification: `nll`, `correct` (its mean is the accuracy) and `brier`; examples with several
    targets (sequences) are averaged over their own. Regression: `mse`, `mae`, `nll`.
    """
    scores = _SCORES.get(task, _SCORES["regression"])(predictions, targets)
    return {name: _example_mean(score, targets, task) for name, score in scores.items()}


def calibration_sample(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What temperature scaling needs: `logits` [n, C] and `targets` [n] of evenly spaced examples.

    In half precision, each row less its largest (which changes no probability), so that likely
    classes are exact. Empty for sequences, whose predictions are no independent examples, and
    where so few examples would be kept that a temperature could not be fitted.
    """
    if logits.ndim != 2 or targets.ndim != 1:
        return {}
    known = (targets != IGNORED).nonzero().squeeze(-1)
    count = min(len(known), SAMPLED_EXAMPLES, SAMPLED_NUMBERS // logits.shape[1])
    if count < min(len(known), 200):
        return {}
    chosen = known[torch.arange(count, device=known.device) * len(known) // max(count, 1)]
    rows = _full(logits[chosen])
    near = (rows - rows.amax(-1, keepdim=True)).clamp(min=torch.finfo(torch.float16).min)
    return {"logits": near.half(), "targets": targets[chosen].int()}


def _full(values: Tensor) -> Tensor:
    """At least float32: sums over a set are lost in half precision."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _full(logits).reshape(-1, logits.shape[-1]), targets.reshape(-1)


def _per_prediction(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
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


def _macro(
    logits: Tensor, targets: Tensor, hit: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    zero = logits.new_zeros(logits.shape[-1])
    known = targets.clamp(min=0)
    hits = zero.scatter_add(0, known, hit)
    actual = zero.scatter_add(0, known, weight)
    predicted = zero.scatter_add(0, logits.argmax(-1), weight)
    occurs = ((actual + predicted) > 0).to(hits.dtype)
    classes = occurs.sum().clamp(min=1)
    precision = hits / predicted.clamp(min=1)
    recall = hits / actual.clamp(min=1)
    f1 = 2 * hits / (actual + predicted).clamp(min=1)
    return precision.sum() / classes, recall.sum() / classes, f1.sum() / classes


def _calibration_error(confidence: Tensor, correct: Tensor, weight: Tensor) -> Tensor:
    """Sum over bins of |sum of (correct - confidence)|; divided by the weight it is the ECE."""
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1  # bin b: (b/15, (b+1)/15]
    excess = (correct - confidence) * weight
    return confidence.new_zeros(ECE_BINS).scatter_add(0, bins, excess).abs().sum()


def _gaussian_nll(squared: Tensor, variance: Tensor) -> Tensor:
    variance = variance.clamp(min=torch.finfo(variance.dtype).tiny)
    return 0.5 * (math.log(2 * math.pi) + variance.log() + squared / variance)


def _classification_scores(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    each = _per_prediction(*_rows(logits, targets))
    return {name: each[name].reshape(targets.shape) for name in ("nll", "correct", "brier")}


def _regression_scores(predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    difference = _full(predictions) - _full(targets).reshape(predictions.shape)
    squared = difference.square()
    nll = _gaussian_nll(squared, squared.mean())
    return {"mse": squared, "mae": difference.abs(), "nll": nll}


_SCORES: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "classification": _classification_scores,
    "regression": _regression_scores,
}


def _example_mean(score: Tensor, targets: Tensor, task: str) -> Tensor:
    score = score.reshape(score.shape[0], -1)
    if task != "classification":
        return score.mean(-1)
    weight = (targets != IGNORED).to(score.dtype).reshape(score.shape)
    return (score * weight).sum(-1) / weight.sum(-1).clamp(min=1)
