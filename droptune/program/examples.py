"""Scores of single examples: what trainings are compared by, and temperatures fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from droptune.program.metrics import IGNORED, Sums, full, gaussian_nll, per_prediction

SAMPLED_EXAMPLES = 10_000  # whose logits are kept, at most
SAMPLED_NUMBERS = 1_000_000  # of their logits: 2 MB in half precision


def example_sums(task: str, predictions: Tensor, targets: Tensor) -> Sums:
    """Sums over each example's own targets (a sequence has several), [N], and their `count`.

    Classification: `nll`, `correct` and `brier`; regression: `squared` and `absolute` errors.
    """
    if task == "classification":
        each = per_prediction(full(predictions), targets)
        weight = (targets != IGNORED).to(each["nll"].dtype)
        kept = {name: each[name] * weight for name in ("nll", "correct", "brier")}
    else:
        difference = full(predictions) - full(targets).reshape(predictions.shape)
        weight = torch.ones_like(difference)
        kept = {"squared": difference.square(), "absolute": difference.abs()}
    return {n: v.reshape(len(v), -1).sum(-1) for n, v in {**kept, "count": weight}.items()}


def example_scores(task: str, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Scores [N] whose means over the examples are the metrics of the whole set.

    `parts` are `example_sums`. An example counts by its targets, and not at all without any.
    Classification: `nll`, `correct` (its mean is the accuracy) and `brier`; regression: `mse`,
    `mae` and `nll` (see `metrics.regression_of`).
    """
    sums = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    count = sums.pop("count")
    typical = count.mean().clamp(min=torch.finfo(count.dtype).tiny)
    scores = {name: values / typical for name, values in sums.items()}
    if task == "classification":
        return scores
    mse, share = scores["squared"], count / typical
    constant = gaussian_nll(torch.zeros_like(mse), mse.mean())
    fit = gaussian_nll(mse, mse.mean()) - constant
    return {"mse": mse, "mae": scores["absolute"], "nll": share * constant + fit}


class Examples:
    """The scores of n examples whose predictions come batch by batch, and a sample of logits, in
    host memory; nothing of tasks that droptune does not know."""

    def __init__(self, task: str, n: int) -> None:
        self._task, self._n, self._done = task, n, 0
        self._sums: list[Sums] = []
        self._sample: list[dict[str, Tensor]] = []

    def add(self, predictions: Tensor, targets: Tensor) -> None:
        if self._task not in ("classification", "regression"):
            return
        self._sums.append(_on_host(example_sums(self._task, predictions, targets)))
        if self._task == "classification" and targets.ndim == 1:
            chosen = sampled_positions(self._n, predictions.shape[-1]) - self._done
            here = chosen[(chosen >= 0) & (chosen < len(targets))].to(targets.device)
            self._sample.append(_on_host(calibration_sample(predictions[here], targets[here])))
        self._done += len(targets)

    def scores(self) -> dict[str, Tensor]:
        """`example_scores`, and `calibration_sample` where there is one."""
        if not self._sums:
            return {}
        scores = example_scores(self._task, self._sums)
        names = self._sample[0] if self._sample else ()
        sample = {name: torch.cat([part[name] for part in self._sample]) for name in names}
        return {**scores, **{name: kept for name, kept in sample.items() if len(kept)}}


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def sampled_positions(n: int, classes: int) -> Tensor:
    """Which of n examples, evenly spaced, have their logits kept.

    None where so few would be that a temperature could not be fitted.
    """
    count = min(n, SAMPLED_EXAMPLES, SAMPLED_NUMBERS // classes)
    return torch.arange(0 if count < min(n, 200) else count) * n // max(count, 1)


def calibration_sample(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What temperature scaling needs of single predictions: `logits` [n, C] and `targets` [n].

    In half precision, each row less its largest (which changes no probability), so that likely
    classes are exact; without targets that are unknown.
    """
    known = targets != IGNORED
    rows = full(logits[known])
    near = (rows - rows.amax(-1, keepdim=True)).clamp(min=torch.finfo(torch.float16).min)
    return {"logits": near.half(), "targets": targets[known].int()}
