"""Whether a program can be trained fused: found by trying, never by names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from droptune.program.declared import branches
from droptune.program.source import blamed
from droptune.trainers.fused import Fused, one_line
from droptune.trainers.recipe import Recipe
from droptune.trainers.slot import Outcome, Trainer
from droptune.trainers.solo import Solo, host_state
from droptune.training import Assignment, Seeds, Training

_TRIED_EXAMPLES = 4

Left = dict[str, Tensor]  # everything that a training leaves behind


@dataclass(frozen=True)
class Fusibility:
    """Whether a program can be trained fused; `reason` is one line, also where it can."""

    ok: bool
    reason: str


def fusible(recipe: Recipe) -> Fusibility:
    """Try it on a few examples: two slots on the same batches, then one of them beside a refilled
    slot on others, each against the same training alone.

    Nothing is decided by name. Both must give the same losses, metrics and weights, in float64,
    or in the recipe's precision where the model insists on it, and for each word that the loss
    may branch on. Raises ProgramError where the program does not train at all.
    """
    tried = [_fusible(recipe, values) for values in branches(recipe.program.searched)]
    return next((each for each in tried if not each.ok), tried[0])


def _fusible(recipe: Recipe, values: Mapping[str, Any]) -> Fusibility:
    exact = replace(recipe, precision="float64").tiny(_TRIED_EXAMPLES)
    trainings = _three_trainings(recipe, values)
    try:
        alone, tolerance = _train_solo(exact, trainings), 1e-6
    except Exception:  # the model has a type of its own; what else is wrong shows below
        exact, tolerance = recipe.tiny(_TRIED_EXAMPLES), 1e-2
        with blamed("training on the first examples"):
            alone = _train_solo(exact, trainings)
    try:
        fused = Fused(exact, len(trainings))
        together, reason = _train_fused(fused, trainings)
    except Exception as error:
        return Fusibility(False, one_line(error))
    if reason is not None:
        return Fusibility(False, reason)
    apart = max(_distance(a, b) for a, b in zip(alone, together, strict=True))
    if not apart <= tolerance:
        return Fusibility(False, f"tried: side by side they differ from alone by {apart:.1e}")
    condition = ", where trainings see the same batches" if fused.shares_batches else ""
    return Fusibility(True, f"tried: each trains as it would alone{condition}")


def _three_trainings(recipe: Recipe, values: Mapping[str, Any]) -> list[Training]:
    """The first two on the same data, as in a search."""
    found = []
    for k in range(3):
        rates = {site.path: 0.2 + 0.2 * k for site in recipe.sites}
        assignment = Assignment(rates, recipe.program.lr, dict(values))
        seeds = Seeds(weights=k, data=k // 2, split=0)
        found.append(Training.apart(k, assignment, seeds, intervals=2))
    return found


def _train_solo(recipe: Recipe, trainings: list[Training]) -> list[Left]:
    left = []
    for training, intervals in zip(trainings, (1, 2, 1), strict=True):
        solo = Solo(recipe)
        solo.fill(0, training)
        outcomes = [solo.train_interval()[0] for _ in range(intervals)]
        left.append(_left(solo, 0, outcomes[-1]))
    return left


def _train_fused(fused: Fused, trainings: list[Training]) -> tuple[list[Left], str | None]:
    """One interval of the first two, then one of the second and the third.

    Also why not to do so: it had to be done alone, or something moves that slots cannot have for
    themselves; it may not matter yet.
    """
    host = host_state()
    for index, training in enumerate(trainings[:2]):
        fused.fill(index, training)
    outcomes = fused.train_interval()
    left, numbers = [_left(fused, 0, outcomes[0])], _numbers(fused.module)
    fused.fill(2, trainings[2])
    fused.empty(0)
    outcomes = fused.train_interval()
    left += [_left(fused, index, outcomes[index]) for index in (1, 2)]
    return left, fused.alone or _shared_state(fused.module, host, numbers)


def _shared_state(model: nn.Module, host: object, numbers: Mapping[str, float]) -> str | None:
    """What has moved, for all slots together, since `host` and `numbers` were read."""
    if host != host_state():
        return "the model draws from NumPy's or Python's generator: once for all slots"
    moved = [name for name, number in _numbers(model).items() if number != numbers.get(name)]
    return f"the model changes {moved[0]} in every call: for all slots" if moved else None


def _numbers(model: nn.Module) -> dict[str, float]:
    """The numbers that a model holds as attributes of its modules."""
    return {
        f"{path or type(module).__name__}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float) and name != "training"
    }


def _left(trainer: Trainer, index: int, outcome: Outcome) -> Left:
    values = {k: v for k, v in outcome.measurement.values.items() if k != "time/seconds"}
    numbers = {key: torch.tensor(value) for key, value in values.items()}
    return {**numbers, **trainer.snapshot(index).tensors}


def _distance(first: Left, second: Left) -> float:
    """The largest difference, relative to each tensor's largest number."""
    if first.keys() != second.keys():
        return math.inf
    apart = 0.0
    for key, a in first.items():
        a, b = a.double(), second[key].double()
        if a.numel():
            scale = 1.0 + float(a.abs().max())
            same = (a == b) | (a.isnan() & b.isnan())
            difference = torch.where(same, 0.0, (a - b).abs().nan_to_num(math.inf))
            apart = max(apart, float(difference.max()) / scale)
    return apart
