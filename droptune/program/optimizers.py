"""Optimizers and learning rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from droptune.errors import ProgramError, nearest

MakeOptimizer = Callable[[nn.Module, float], torch.optim.Optimizer]

_OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


def make_optimizer(chosen: Any, weight_decay: float | None = None) -> MakeOptimizer:
    """A function (model, lr) -> optimizer from a name, a torch.optim class, or such a function."""
    options = {} if weight_decay is None else {"weight_decay": weight_decay}
    if isinstance(chosen, str):
        if chosen not in _OPTIMIZERS:
            raise ProgramError(f"unknown optimizer {chosen!r}{nearest(chosen, _OPTIMIZERS)}")
        kind, defaults = _OPTIMIZERS[chosen]
        return lambda model, lr: kind(model.parameters(), lr=lr, **{**defaults, **options})
    bare = getattr(chosen, "func", chosen)  # of a functools.partial
    if isinstance(bare, type) and issubclass(bare, torch.optim.Optimizer):
        return lambda model, lr: chosen(model.parameters(), lr=lr, **options)
    if not callable(chosen):
        raise ProgramError(
            f"optimizer= is {chosen!r}: give one of {', '.join(_OPTIMIZERS)}, a torch.optim class, "
            "or a function of (model, lr)"
        )
    if options:
        raise ProgramError("weight_decay= and a function as optimizer=: set it in the function")
    made: MakeOptimizer = chosen
    return made


_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}


def make_schedule(chosen: str | Callable[[float], float] | None) -> Callable[[float], float]:
    """The factor on the learning rate over progress in [0, 1], from a name or a function."""
    if callable(chosen):
        return chosen
    name = chosen or "constant"
    if name not in _SCHEDULES:
        raise ProgramError(f"unknown schedule {name!r}{nearest(name, _SCHEDULES)}")
    return _SCHEDULES[name]
