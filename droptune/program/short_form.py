"""The short form of a program: one call in the user's file.

program = droptune.classification(
    model=Net, train=(x, y), batch_size=128, epochs=20, optimizer="adamw", lr=1e-3
)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from droptune.errors import ProgramError, nearest
from droptune.program.declared import declared
from droptune.program.intake import RawSplits
from droptune.program.optimizers import MakeOptimizer, make_optimizer, make_schedule
from droptune.program.program import Program
from droptune.program.tasks import TASKS, Metrics, both


def classification(
    *,
    model: Callable[[], nn.Module],
    train: Any,
    validation: Any = None,
    test: Any = None,
    epochs: int,
    lr: float,
    batch_size: int | None = None,
    optimizer: str | MakeOptimizer | type[torch.optim.Optimizer] = "adamw",
    schedule: str | Callable[[float], float] | None = None,
    weight_decay: float | None = None,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None = None,
    clip: float | None = None,
    searched: Mapping[str, Any] | None = None,
    pretrained: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | None = None,
    interval_updates: int | None = None,
) -> Program:
    """A program with cross entropy on class numbers.

    `model` a class or a function without arguments; its output (or the output's `.logits`) is
    logits [B, C], [B, ..., C] or [B, C, ...], or one logit per example for two classes.
    `train`, `validation`, `test` (inputs..., targets) as tensors or arrays, a dict with `labels`
    whose other entries go to the model by name, a `Dataset`, a `DataLoader`, or a function
    returning one of these (read only when needed). Without `test` a fifth of the training data
    is split off, unless `test=False`; without `validation` a fifth of the rest.
    `optimizer` sgd (momentum 0.9), adam, adamw, rmsprop, a torch.optim class, or a function of
    (model, lr). `schedule` constant, cosine, linear, or a function of progress in [0, 1].
    `metrics` further functions of (logits, targets) over the whole set, by name.
    `pretrained` a state dict, or a function returning it, read once per process; what it lacks
    (a new head) stays freshly initialised.
    """
    return _short_form("classification", **locals())


def regression(
    *,
    model: Callable[[], nn.Module],
    train: Any,
    validation: Any = None,
    test: Any = None,
    epochs: int,
    lr: float,
    batch_size: int | None = None,
    optimizer: str | MakeOptimizer | type[torch.optim.Optimizer] = "adamw",
    schedule: str | Callable[[float], float] | None = None,
    weight_decay: float | None = None,
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None = None,
    clip: float | None = None,
    searched: Mapping[str, Any] | None = None,
    pretrained: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | None = None,
    interval_updates: int | None = None,
) -> Program:
    """A program with the mean squared error; arguments as in `classification`.

    The model's output must have the targets' shape, up to a last dimension of one.
    """
    return _short_form("regression", **locals())


def _short_form(task: str, **given: Any) -> Program:
    loss, predict, metrics = TASKS[task]
    smoothing = ("label_smoothing",) if task == "classification" else ()
    searched = declared(given["searched"])
    for name in searched:
        if name not in (known := (*smoothing, "weight_decay", "l1")):
            raise ProgramError(
                f"searched {name!r} is nothing that the built-in loss knows"
                f"{nearest(name, known)}; write the long form with loss(model, batch, values)"
            )
    return Program(
        task=task,
        model=fresh(given["model"], given["pretrained"]),
        data=lambda: RawSplits(given["train"], given["validation"], given["test"]),
        loss=loss,
        predict=predict,
        metrics=_with_own(metrics, given["metrics"]),
        optimizer=make_optimizer(given["optimizer"], given["weight_decay"]),
        batch_size=batch_size_of(given["batch_size"], given["train"]),
        epochs=positive("epochs", given["epochs"], int),
        lr=positive("lr", given["lr"], float),
        schedule=make_schedule(given["schedule"]),
        interval_updates=given["interval_updates"],
        clip=given["clip"],
        searched=searched,
        loss_values=smoothing,
        own_metrics=tuple(given["metrics"] or ()),
    )


def _with_own(
    built_in: Metrics, own: Mapping[str, Callable[[Tensor, Tensor], Any]] | None
) -> Metrics:
    if not own:
        return built_in
    return both(built_in, lambda *given: {name: metric(*given) for name, metric in own.items()})


def fresh(
    model: Any, pretrained: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | None
) -> Callable[[], nn.Module]:
    """What builds the model anew, with pretrained weights where there are; or ProgramError."""
    if isinstance(model, nn.Module):
        raise ProgramError(
            f"model= is a built {type(model).__name__}: give the class, or a function without "
            "arguments that builds one, because every trial needs fresh weights"
        )
    if not callable(model):
        raise ProgramError(
            f"model= is a {type(model).__name__}: give a class or a function that builds the model"
        )
    fresh: Callable[[], nn.Module] = model
    if pretrained is None:
        return fresh
    weights = functools.cache(pretrained if callable(pretrained) else (lambda: pretrained))

    def build() -> nn.Module:
        module = fresh()
        unknown = module.load_state_dict(weights(), strict=False).unexpected_keys
        if unknown:
            raise ProgramError(
                f"pretrained weights hold {len(unknown)} names that the model lacks "
                f"(first: {unknown[0]}{nearest(unknown[0], module.state_dict())})"
            )
        return module

    return build


def positive(name: str, value: Any, kind: type) -> Any:
    """The value as `kind`, int or float; ProgramError where it is no positive number of it."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if not good or (kind is int and value != int(value)) or value == math.inf:
        raise ProgramError(f"{name}={value!r}: it must be a positive {kind.__name__}")
    return kind(value)


def batch_size_of(given: Any, train: Any) -> int:
    """The batch size that was given, or the one of training data that have one (a DataLoader)."""
    size = given if given is not None else getattr(train, "batch_size", None)
    if size is None:
        raise ProgramError("batch_size= is missing: how many examples go into one update")
    return int(positive("batch_size", size, int))
