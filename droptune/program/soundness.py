"""What a program's model and loss must be, before anything is spent on training them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from droptune.errors import ProgramError

_SPREAD = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def check_model(model: Any) -> None:
    """Raises ProgramError unless it is a module that one device can train."""
    if not isinstance(model, nn.Module):
        raise ProgramError(
            f"model() returned a {type(model).__name__}: it must return an nn.Module"
        )
    for module in model.modules():
        if any(kind.__name__ in _SPREAD for kind in type(module).__mro__):
            raise ProgramError(
                f"model() returned a {type(module).__name__}: a trial fits one device, and several "
                "devices train several trials; return the model that it wraps"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ProgramError(
                f"{name} has no shape yet (a lazy module): run the model once in model()"
            )


def check_made(model: nn.Module, names: Container[str]) -> None:
    """Raises ProgramError where a model that ran has more in its state than these `names`."""
    new = next((name for name in model.state_dict() if name not in names), None)
    if new is not None:
        raise ProgramError(
            f"the model makes {new} when it first runs, where no optimizer knows it and no fresh "
            "model can load it: make it in __init__, or run the model once in model()"
        )


def check_loss(loss: Any) -> None:
    """Raises ProgramError unless it is a finite scalar that depends on the weights."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ProgramError(f"loss(model, batch) returned {shape}: it must return a scalar tensor")
    if not bool(torch.isfinite(loss)):
        raise ProgramError(
            f"the loss of the first examples is {loss.item()}: check the data and the model"
        )
    if not loss.requires_grad:
        raise ProgramError("the loss does not depend on the model's weights: nothing to train")


def check_prediction(found: Any) -> tuple[Tensor, Tensor]:
    """What predict(model, batch) returned. Raises ProgramError unless it is a pair of tensors."""
    pair = isinstance(found, tuple | list) and len(found) == 2
    if not pair or not all(isinstance(each, Tensor) for each in found):
        what = ", ".join(type(e).__name__ for e in found) if isinstance(found, tuple | list) else ""
        raise ProgramError(
            f"predict(model, batch) returned a {type(found).__name__}{what and f' of {what}'}: it "
            "must return (predictions, targets), two tensors with a row for each example"
        )
    return found[0], found[1]


def check_metrics(measured: Any) -> None:
    """Raises ProgramError unless what metrics(predictions, targets) returned are named numbers."""
    if not isinstance(measured, Mapping):
        kind = type(measured).__name__
        raise ProgramError(f"metrics(predictions, targets) returned a {kind}, not a dict")
    for name, value in measured.items():
        try:
            number = torch.as_tensor(value).numel() == 1
        except (TypeError, ValueError, RuntimeError):
            number = False
        if not number:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ProgramError(
                f"metrics(predictions, targets) gave {name!r} as {what}: it must be one number"
            )


def calls_eagerly(
    modules: Iterable[nn.Module],
) -> Callable[[], AbstractContextManager[object]]:
    """A context in which compiled parts of the model run as written: compiled code would not
    show its dropout, and needs a C++ compiler. Nothing where nothing is compiled."""
    if any(_is_compiled(module) for module in modules):
        return lambda: torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None
