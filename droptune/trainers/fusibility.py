"""Whether a program can be trained fused: found by trying, never by names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from droptune.program.declared import branches
from droptune.program.source import blamed
from droptune.trainers.fused import Fused, one_line
from droptune.trainers.recipe import Recipe, writes_to
from droptune.trainers.slot import Outcome, Snapshot, Trainer
from droptune.trainers.solo import Solo, host_state
from droptune.training import Assignment, Seeds, Training

_TRIED_EXAMPLES = 4
_TRIED_UPDATES = 5  # of an interval: the last two of them are replayed, where that can be

_NOT_OF_THE_MODEL = ("training", "_torchdynamo_wrapper_id")  # the second numbers compiled modules

_ROUNDINGS = (1, -1, 3)  # of the weights, in parts of their precision
SAME = 10.0  # times what one rounding of the weights changes

Left = dict[str, Tensor]  # everything that a training leaves behind
Distances = dict[str, float]
T = TypeVar("T")


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
    found = [_fusible(recipe, values) for values in branches(recipe.program.searched)]
    return next((each for each in found if not each.ok), found[0])


def _fusible(recipe: Recipe, values: Mapping[str, Any]) -> Fusibility:
    trainings = three_trainings(recipe, values)
    exact, alone, tolerance = tried(recipe, lambda tiny: _train_solo(tiny, trainings))
    try:
        fused = Fused(exact, len(trainings))
        together, reason = _train_fused(fused, trainings)
    except Exception as error:
        return Fusibility(False, one_line(error))
    if reason is not None:
        return Fusibility(False, reason)
    apart = [distances(a, b) for a, b in zip(alone, together, strict=True)]
    rounding = _rounding(exact, trainings, alone)
    if not all(_is_within(tolerance, *pair) for pair in zip(apart, rounding, strict=True)):
        most = max(max(each.values()) for each in apart)
        return Fusibility(False, f"tried: side by side they differ from alone by {most:.1e}")
    condition = ", where trainings see the same batches" if fused.shares_batches else ""
    return Fusibility(True, f"tried: each trains as it would alone{condition}")


def tried(recipe: Recipe, run: Callable[[Recipe], T]) -> tuple[Recipe, T, float]:
    """The recipe on a few examples, what `run` gives of it, and how far apart two such may be.

    In float64, or in the recipe's precision where the model insists on it (then beside what
    rounding changes).
    """
    exact = replace(recipe, precision="float64").tiny(_TRIED_EXAMPLES, _TRIED_UPDATES)
    try:
        return exact, run(exact), 1e-6
    except Exception:  # the model has a type of its own; what else is wrong shows below
        own = recipe.tiny(_TRIED_EXAMPLES, _TRIED_UPDATES)
        with blamed("training on the first examples"):
            return own, run(own), 1e-2 if recipe.precision == "bf16" else 1e-5


def three_trainings(recipe: Recipe, values: Mapping[str, Any]) -> list[Training]:
    """The first two on the same data, as in a search."""
    found = []
    for k in range(3):
        rates = {site.path: 0.2 + 0.2 * k for site in recipe.sites}
        assignment = Assignment(rates, recipe.program.lr, dict(values))
        seeds = Seeds(weights=k, data=k // 2, split=0)
        found.append(Training.apart(k, assignment, seeds, intervals=2))
    return found


def _train_solo(recipe: Recipe, trainings: list[Training], *, nudge: float = 0.0) -> list[Left]:
    """One interval, two and one; `nudge` is the share that weights are off in the beginning."""
    left = []
    for training, intervals in zip(trainings, (1, 2, 1), strict=True):
        solo = Solo(recipe)
        solo.fill(0, training)
        if nudge:
            solo.fill(0, training, nudged(solo.snapshot(0), nudge))
        outcomes = [solo.train_interval()[0] for _ in range(intervals)]
        left.append(left_by(solo, 0, outcomes[-1]))
    return left


def _rounding(recipe: Recipe, trainings: list[Training], alone: list[Left]) -> list[Distances]:
    """What roundings of the weights change: optimizers make steps of whatever is left of a
    gradient that should be 0. Several, for one may happen to change a number little."""
    most: list[Distances] = [{} for _ in alone]
    for share in () if recipe.precision == "float64" else _ROUNDINGS:
        off = _train_solo(recipe, trainings, nudge=share * torch.finfo(recipe.dtype).eps)
        for known, a, b in zip(most, alone, off, strict=True):
            known |= {key: max(d, known.get(key, 0.0)) for key, d in distances(a, b).items()}
    return most


def nudged(start: Snapshot, share: float) -> Snapshot:
    """The beginning of a training with each weight off by a share of it."""
    tensors = {
        name: tensor * (1 + share)
        if name.startswith("model/") and tensor.is_floating_point()
        else tensor
        for name, tensor in start.tensors.items()
    }
    return replace(start, tensors=tensors)


def _is_within(tolerance: float, apart: Distances, rounding: Distances) -> bool:
    return all(d <= tolerance + SAME * rounding.get(key, 0.0) for key, d in apart.items())


def _train_fused(fused: Fused, trainings: list[Training]) -> tuple[list[Left], str | None]:
    """One interval of the first two, then one of the second and the third.

    Also why not to do so: it had to be done alone, or something moves that slots cannot have for
    themselves; it may not matter yet.
    """
    host = host_state()
    for index, training in enumerate(trainings[:2]):
        fused.fill(index, training)
    outcomes = fused.train_interval()
    left, numbers = [left_by(fused, 0, outcomes[0])], numbers_of(fused.module)
    fused.fill(2, trainings[2])
    fused.empty(0)
    outcomes = fused.train_interval()
    left += [left_by(fused, index, outcomes[index]) for index in (1, 2)]
    return left, fused.alone or _shared_state(fused.module, host, numbers)


def _shared_state(model: nn.Module, host: object, numbers: Mapping[str, float]) -> str | None:
    """What has moved, for all slots together, since `host` and `numbers` were read."""
    if host != host_state():
        return "the model draws from NumPy's or Python's generator: once for all slots"
    moved = [name for name, number in numbers_of(model).items() if number != numbers.get(name)]
    return f"the model changes {moved[0]} in every call: for all slots" if moved else None


def numbers_of(model: nn.Module, *others: object) -> dict[str, float]:
    """The numbers that a model holds as attributes of its modules, and others as their own; of a
    tensor that is no buffer, how often it was written to."""
    holders = [(path or type(module).__name__, module) for path, module in model.named_modules()]
    return {
        f"{path}.{name}": writes_to(value) if isinstance(value, Tensor) else value
        for path, holder in (*holders, *((type(other).__name__, other) for other in others))
        for name, value in vars(holder).items()
        if isinstance(value, int | float | Tensor) and name not in _NOT_OF_THE_MODEL
    }


def left_by(trainer: Trainer, index: int, outcome: Outcome) -> Left:
    """What was measured, and the snapshot."""
    values = {k: v for k, v in outcome.measurement.values.items() if k != "time/seconds"}
    numbers = {key: torch.tensor(value) for key, value in values.items()}
    return {**numbers, **trainer.snapshot(index).tensors}


def distance(first: Left, second: Left) -> float:
    """The largest difference, relative to each tensor's largest number."""
    return max(distances(first, second).values(), default=0.0)


def distances(first: Left, second: Left) -> Distances:
    """The largest difference of each tensor, relative to its largest number."""
    if first.keys() != second.keys():
        return dict.fromkeys(first.keys() ^ second.keys(), math.inf)
    return {key: _distance(a, second[key]) for key, a in first.items() if a.numel()}


def _distance(a: Tensor, b: Tensor) -> float:
    if not a.is_complex():
        a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs().nan_to_num(math.inf))
    return float(difference.max()) / (1.0 + float(a.abs().max()))
