"""Calibration: whether a model is right as often as it says, before and after temperature scaling.

Source: Guo, Pleiss, Sun & Weinberger 2017, "On Calibration of Modern Neural Networks".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special

from droptune.verdict.statistics import Array

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Accuracy within bins of confidence; `ece` is the expected calibration error."""

    confidence: tuple[float, ...]  # mean confidence of each bin that holds examples
    accuracy: tuple[float, ...]
    count: tuple[int, ...]
    ece: float

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def reliability(confidence: Array, correct: Array) -> Reliability:
    """Reliability of predictions [N] in 15 equal bins (b/15, (b + 1)/15] of confidence."""
    bins = np.clip(np.ceil(confidence * BINS).astype(int), 1, BINS) - 1
    count = np.bincount(bins, minlength=BINS)
    held = count > 0
    said = np.bincount(bins, weights=confidence, minlength=BINS)[held] / count[held]
    was = np.bincount(bins, weights=correct, minlength=BINS)[held] / count[held]
    ece = float((np.abs(said - was) * count[held]).sum() / count.sum())
    return Reliability(
        tuple(float(x) for x in said),
        tuple(float(x) for x in was),
        tuple(int(x) for x in count[held]),
        ece,
    )


def pooled(each: Sequence[Reliability]) -> Reliability:
    """The reliability of all examples of several models together; `ece` is the mean of theirs."""
    count, said, was = np.zeros(BINS), np.zeros(BINS), np.zeros(BINS)
    for one in each:
        weight = np.array(one.count)
        bins = np.clip(np.ceil(np.array(one.confidence) * BINS).astype(int), 1, BINS) - 1
        np.add.at(count, bins, weight)
        np.add.at(said, bins, weight * np.array(one.confidence))
        np.add.at(was, bins, weight * np.array(one.accuracy))
    held = count > 0
    return Reliability(
        tuple(float(x) for x in said[held] / count[held]),
        tuple(float(x) for x in was[held] / count[held]),
        tuple(int(x) for x in count[held]),
        float(np.mean([one.ece for one in each])),
    )


def log_likelihood(logits: Array, targets: Array, temperature: float) -> Array:
    """Log probabilities [N] of the targets [N] under logits [N, C] divided by a temperature."""
    log_p = special.log_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=-1)
    chosen: Array = log_p[np.arange(len(targets)), np.asarray(targets, dtype=int)]
    return chosen


def fit_temperature(logits: Array, targets: Array) -> float:
    """The temperature in [0.05, 20] with the smallest NLL of logits [N, C] on targets [N]."""

    def nll(log_temperature: float) -> float:
        return -float(log_likelihood(logits, targets, float(np.exp(log_temperature))).mean())

    found = optimize.minimize_scalar(nll, bounds=(np.log(0.05), np.log(20.0)), method="bounded")
    return float(np.exp(found.x))


@dataclass(frozen=True)
class Scaled:
    """What temperature scaling does to one model, fitted on one half and measured on the other."""

    temperature: float
    nll: Array  # of single examples [N], after scaling
    nll_before: Array  # of the same examples
    before: Reliability
    after: Reliability


def scale(logits: Array, targets: Array) -> Scaled:
    """Temperature scaling of logits [N, C] in two halves: no example is scaled by its own fit."""
    even = np.arange(len(targets)) % 2 == 0
    temperature = np.empty(len(targets))
    temperature[even] = fit_temperature(logits[~even], targets[~even])
    temperature[~even] = fit_temperature(logits[even], targets[even])
    scaled = np.asarray(logits, dtype=np.float64) / temperature[:, None]
    correct = (logits.argmax(axis=-1) == targets).astype(np.float64)
    return Scaled(
        float(temperature[:2].mean()),
        -log_likelihood(scaled, targets, 1.0),
        -log_likelihood(logits, targets, 1.0),
        reliability(special.softmax(logits, axis=-1).max(axis=-1), correct),
        reliability(special.softmax(scaled, axis=-1).max(axis=-1), correct),
    )
