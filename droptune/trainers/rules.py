"""Optimizers written out over the rows of a stack: the same maths as `torch.optim`.

Every row is a slot with its own hyperparameters; an update of all rows is a handful of
operations, where K optimizers would take K times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

Settings = Mapping[str, Any]  # one parameter group of one slot, without its parameters
Array = NDArray[np.float64]
Number = float | Tensor  # one value for all slots, or [k, 1]


@dataclass(frozen=True)
class Rows:
    """The columns of one parameter group in the rows that are in training, all [k, n]."""

    weights: Tensor
    state: Mapping[str, Tensor]
    scratch: Tensor
    settings: Settings


@dataclass(frozen=True)
class Rule:
    """One type of optimizer over rows of a stack.

    `states` names what it keeps per weight; `coefficients(settings, lr, step)` gives the
    numbers of its updates (lr and step, counted from 1, of equal shape); `apply(rows, gradients,
    numbers)` changes weights, state and gradients in place. `counts`: torch keeps a `step`.
    """

    states: Callable[[Settings], tuple[str, ...]]
    coefficients: Callable[[Settings, Array, Array], dict[str, Array]]
    apply: Callable[[Rows, Tensor, Mapping[str, Number]], None]
    counts: bool


def _subtract(weights: Tensor, update: Tensor, scale: Number) -> None:
    if isinstance(scale, Tensor):
        weights.addcmul_(update, scale, value=-1)
    else:
        weights.add_(update, alpha=-scale)


def _add_decay(gradients: Tensor, weights: Tensor, decay: Number) -> None:
    if isinstance(decay, Tensor):
        gradients.addcmul_(weights, decay)
    elif decay:
        gradients.add_(weights, alpha=decay)


def _sgd_states(settings: Settings) -> tuple[str, ...]:
    return ("momentum_buffer",) if settings["momentum"] else ()


def _sgd_coefficients(settings: Settings, lr: Array, step: Array) -> dict[str, Array]:
    return {
        "lr": lr,
        "decay": np.full_like(lr, settings["weight_decay"]),
        "momentum": np.full_like(lr, settings["momentum"]),
        # torch starts the buffer with the first gradient, undamped
        "gain": np.where(step == 1, 1.0, 1.0 - settings["dampening"]),
    }


def _sgd(rows: Rows, gradients: Tensor, numbers: Mapping[str, Number]) -> None:
    _add_decay(gradients, rows.weights, numbers["decay"])
    if "momentum_buffer" in rows.state:
        buffer, momentum = rows.state["momentum_buffer"], numbers["momentum"]
        buffer.mul_(momentum)
        buffer.add_(torch.mul(gradients, numbers["gain"], out=rows.scratch))
        if rows.settings["nesterov"]:
            gradients.add_(torch.mul(buffer, momentum, out=rows.scratch))
        else:
            gradients = buffer
    _subtract(rows.weights, gradients, numbers["lr"])


def _adam_states(settings: Settings) -> tuple[str, ...]:
    names = ("exp_avg", "exp_avg_sq")
    return (*names, "max_exp_avg_sq") if settings["amsgrad"] else names


def _adam_coefficients(settings: Settings, lr: Array, step: Array) -> dict[str, Array]:
    beta1, beta2 = (float(beta) for beta in settings["betas"])
    root = np.sqrt(1.0 - beta2**step)
    decay = settings["weight_decay"]
    return {
        "first": np.full_like(lr, 1.0 - beta1),
        "second": np.full_like(lr, 1.0 - beta2),
        "eps": settings["eps"] * root,
        "scale": lr * root / (1.0 - beta1**step),
        "decay": np.full_like(lr, decay),
        "keep": 1.0 - lr * decay,
    }


def _adam(rows: Rows, gradients: Tensor, numbers: Mapping[str, Number]) -> None:
    if not rows.settings["decoupled_weight_decay"]:
        _add_decay(gradients, rows.weights, numbers["decay"])
    elif isinstance(numbers["keep"], Tensor) or numbers["keep"] != 1.0:
        rows.weights.mul_(numbers["keep"])
    mean, square = rows.state["exp_avg"], rows.state["exp_avg_sq"]
    mean.lerp_(gradients, numbers["first"])
    square.lerp_(gradients.mul_(gradients), numbers["second"])
    if "max_exp_avg_sq" in rows.state:
        largest = rows.state["max_exp_avg_sq"]
        square = torch.maximum(largest, square, out=largest)
    # m / (sqrt(v) / root + eps), with torch's two bias corrections moved into eps and scale
    torch.sqrt(square, out=rows.scratch)
    rows.scratch.add_(numbers["eps"])
    torch.div(mean, rows.scratch, out=rows.scratch)
    _subtract(rows.weights, rows.scratch, numbers["scale"])


def _rmsprop_states(settings: Settings) -> tuple[str, ...]:
    momentum = ("momentum_buffer",) if settings["momentum"] else ()
    centered = ("grad_avg",) if settings["centered"] else ()
    return ("square_avg", *momentum, *centered)


def _rmsprop_coefficients(settings: Settings, lr: Array, step: Array) -> dict[str, Array]:
    return {
        "lr": lr,
        "decay": np.full_like(lr, settings["weight_decay"]),
        "weight": np.full_like(lr, 1.0 - settings["alpha"]),
        "momentum": np.full_like(lr, settings["momentum"]),
        "eps": np.full_like(lr, settings["eps"]),
    }


def _rmsprop(rows: Rows, gradients: Tensor, numbers: Mapping[str, Number]) -> None:
    _add_decay(gradients, rows.weights, numbers["decay"])
    square, update = rows.state["square_avg"], rows.scratch
    square.lerp_(torch.mul(gradients, gradients, out=update), numbers["weight"])
    if "grad_avg" in rows.state:
        mean = rows.state["grad_avg"]
        mean.lerp_(gradients, numbers["weight"])
        torch.addcmul(square, mean, mean, value=-1, out=update).sqrt_()
    else:
        torch.sqrt(square, out=update)
    torch.div(gradients, update.add_(numbers["eps"]), out=update)
    if "momentum_buffer" in rows.state:
        update = rows.state["momentum_buffer"].mul_(numbers["momentum"]).add_(update)
    _subtract(rows.weights, update, numbers["lr"])


_ADAM = Rule(_adam_states, _adam_coefficients, _adam, counts=True)
RULES: dict[type[Optimizer], Rule] = {
    torch.optim.SGD: Rule(_sgd_states, _sgd_coefficients, _sgd, counts=False),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RMSprop: Rule(_rmsprop_states, _rmsprop_coefficients, _rmsprop, counts=True),
}
