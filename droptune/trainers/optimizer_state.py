"""One torch optimizer: made for an assignment, its hyperparameters, its state in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from droptune.errors import ProgramError
from droptune.program.optimizers import MakeOptimizer
from droptune.trainers.rules import Settings
from droptune.training import Assignment

_HOW = {"params", "foreach", "fused", "capturable", "differentiable"}  # not what is computed
Rest = Mapping[str, Any]  # what an optimizer remembers beside tensors, JSON-able


def build(make: MakeOptimizer, model: nn.Module, assignment: Assignment) -> Optimizer:
    """The program's optimizer for `model` with the assignment's lr and weight decay.

    A searched `weight_decay` replaces the author's in the groups where the author decays
    weights (so biases that were left out stay out), and in all groups where none does.
    """
    optimizer = make(model, assignment.lr)
    if not isinstance(optimizer, Optimizer):
        raise ProgramError(
            f"optimizer(model, lr) returned a {type(optimizer).__name__}: it must return one torch "
            "optimizer; how its learning rate moves is said by schedule(progress)"
        )
    own = names_of(model)
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if foreign:  # all trainings would train them together
        raise ProgramError(
            f"optimizer(model, lr) trains {len(foreign)} tensors that are no parameters of the "
            f"model (first: shape {tuple(foreign[0].shape)}): make them parameters of the model"
        )
    decay = assignment.values.get("weight_decay")
    if decay is None:
        return optimizer
    groups = [group for group in optimizer.param_groups if "weight_decay" in group]
    if not groups:
        kind = type(optimizer).__name__
        raise ProgramError(f"weight_decay is searched, but {kind} has none: do not search it")
    for group in [group for group in groups if group["weight_decay"]] or groups:
        group["weight_decay"] = float(decay)
    return optimizer


def use_fused_kernel(optimizer: Optimizer) -> Optimizer:
    """Let Adam and AdamW use torch's fused kernel, where their user left that open.

    On one core an AdamW step of a small model takes a quarter of the time.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    known = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    if known and all(w.device.type in ("cpu", "cuda") and w.is_floating_point() for w in weights):
        for group in optimizer.param_groups:
            chosen = group.get("differentiable") or group.get("capturable")
            if group.get("foreach") is None and group.get("fused") is None and not chosen:
                group["fused"] = True
    return optimizer


def settings_of(optimizer: Optimizer) -> list[Settings]:
    """The hyperparameters of each parameter group."""
    decoupled = {"decoupled_weight_decay": isinstance(optimizer, torch.optim.AdamW)}
    return [
        {**decoupled, **{k: v for k, v in group.items() if k not in ("params", "param_names")}}
        for group in optimizer.param_groups
    ]


def set_learning_rates(optimizer: Optimizer, base: Sequence[Settings], factor: float) -> None:
    """Set each group's lr to `factor` times what the group was made with."""
    for group, settings in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = settings["lr"] * factor


def names_of(model: nn.Module) -> dict[int, str]:
    """The name of each weight, by `id`; a tied weight has the first of its names."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def export_state(
    optimizer: Optimizer, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `optimizer` remembers: tensors `<state>/<weight's name>`, and the rest.

    `names` maps `id(parameter)` to its name.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                # of sparse gradients it may be sparse, which no snapshot holds
                whole = value.detach().to_dense() if value.is_sparse else value.detach()
                tensors[f"{key}/{names[id(parameter)]}"] = whole
            elif _is_plain(value):
                rest[f"{key}/{names[id(parameter)]}"] = value
    groups = [
        {k: v for k, v in group.items() if k not in _HOW and _is_plain(v)}
        for group in optimizer.param_groups
    ]
    return tensors, {"state": rest, "groups": groups}


def import_state(
    optimizer: Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor], rest: Rest
) -> None:
    """The inverse of `export_state`; `rest` may be empty (the state came from a stack)."""
    groups = {names[id(p)]: (p, g) for g in optimizer.param_groups for p in g["params"]}
    by_name = {name: weight for name, (weight, _) in groups.items()}
    for path, tensor in tensors.items():
        key, name = path.split("/", 1)
        weight, group = groups[name]
        alike = tensor.shape == weight.shape and key != "step"
        beside = alike or group.get("fused") or group.get("capturable")
        optimizer.state[weight][key] = tensor.to(
            device=weight.device if beside else None,
            dtype=weight.dtype if alike else tensor.dtype,
            copy=True,
        )
    for path, value in rest.get("state", {}).items():
        key, name = path.split("/", 1)
        optimizer.state[by_name[name]][key] = value
    for group, saved in zip(optimizer.param_groups, rest.get("groups", ()), strict=False):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str)
