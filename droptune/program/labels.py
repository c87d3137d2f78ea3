"""Labels of a classification: class numbers from 0. What could be meant otherwise is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from droptune.errors import ProgramError
from droptune.program.metrics import IGNORED

_ENOUGH = 1000  # examples that tell whether labels are one-hot


def check_labels(labels: Any, where: str) -> None:
    """Raises ProgramError on labels, as they were given, that are no class numbers.

    Class numbers are integers. Floats are taken where all are 0 or 1, which is what torch's
    binary cross entropy asks for; other floats are probabilities (for torch's cross entropy) or
    the numbers of a regression, and would be trained on as something else than was meant.
    """
    if not isinstance(labels, Tensor):
        raise ProgramError(
            f"{where} holds labels of type {_type(labels)}: give class numbers, integers from 0"
        )
    first = labels[:_ENOUGH]
    if _sums_to_one(first):
        what = "one-hot rows" if bool(((first == 0) | (first == 1)).all()) else "probabilities"
        raise ProgramError(
            f"{where} holds {what} of shape {tuple(labels.shape)}: give class numbers, "
            "y.argmax(1); soft targets need the long form, with a loss and metrics of its own"
        )
    if labels.is_floating_point() and bool(((labels != 0) & (labels != 1)).any()):
        raise ProgramError(
            f"{where} holds labels of type {_type(labels)}: give class numbers, integers from 0 "
            "(y.long()), or use droptune.regression to predict numbers"
        )


def check_several(numbers: Tensor, where: str) -> None:
    """Raises ProgramError where there is nothing to tell apart."""
    known = numbers[numbers != IGNORED]
    if known.numel() == 0:
        raise ProgramError(f"{where} holds no class number, only {IGNORED} (to be ignored)")
    if bool((known == known[0]).all()):
        raise ProgramError(
            f"{where} holds only the class number {int(known[0])}: give examples of two classes "
            "or more"
        )


def class_numbers(labels: Tensor, where: str) -> Tensor:
    """Labels as int64, without a last dimension of one. Raises ProgramError on negative ones."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    labels = labels.long()
    wrong = (labels < 0) & (labels != IGNORED)
    if bool(wrong.any()):
        raise ProgramError(
            f"{where} holds the class number {int(labels[wrong].min())}: classes count from 0 "
            f"({IGNORED} marks targets to be ignored)"
        )
    return labels


def check_known(numbers: Tensor, classes: int, where: str) -> None:
    """Raises ProgramError on a class number for which the model has no output."""
    largest = int(numbers.max())
    if largest >= classes:
        raise ProgramError(
            f"{where} holds the class number {largest}, but the model's output tells {classes} "
            f"classes apart, 0 to {classes - 1}: give it {largest + 1} outputs, or mend the labels"
        )


def _sums_to_one(labels: Tensor) -> bool:
    """Whether numbers in [0, 1] sum to one over the second or the last of several dimensions."""
    if labels.ndim < 2 or bool(((labels < 0) | (labels > 1)).any()):
        return False
    sums = (labels.double().sum(axis) for axis in {1, labels.ndim - 1} if labels.shape[axis] > 1)
    return any(torch.allclose(each, torch.ones_like(each), atol=1e-3) for each in sums)


def _type(labels: Any) -> str:
    if isinstance(labels, Tensor):
        return str(labels.dtype).removeprefix("torch.")
    first = labels[0] if isinstance(labels, list | tuple) and labels else labels
    return type(first).__name__
