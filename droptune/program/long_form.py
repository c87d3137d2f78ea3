"""The long form of a program: an object, or a class, with `model()`, `data()` and `loss(…)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from droptune.errors import ProgramError, nearest
from droptune.program.declared import declared, default_values
from droptune.program.intake import RawSplits
from droptune.program.optimizers import make_optimizer, make_schedule
from droptune.program.program import Program
from droptune.program.short_form import batch_size_of, fresh, positive
from droptune.program.source import blamed
from droptune.program.tasks import (
    TASKS,
    Loss,
    Metrics,
    Predict,
    Values,
    both,
    loss_as_prediction,
    mean_loss,
    output_and_targets,
)


def adapt(given: Any) -> Program:
    """The Program that an object (or a class without arguments) of the long form describes.

    Needed: `model()`; `data()` returning {"train": …, "validation": …, "test": …} (each as in the
    short form, the last two may be missing); `loss(model, batch)` returning a scalar, or
    `loss(model, batch, values)` where searched values matter; `batch_size`, `epochs`, `lr`.
    May have: `optimizer(model, lr)` (a function as in the short form, or a name),
    `schedule(progress)`, `predict(model, batch)` returning (predictions, targets),
    `metrics(predictions, targets)` returning a dict, `task`, `interval_updates`, `clip`,
    `searched`. Without `metrics` and `task` the validation loss is the only metric, `loss`.
    """
    if isinstance(given, Program):
        return given
    source = _instance(given)
    task = getattr(source, "task", "custom")
    if task not in ("classification", "regression", "custom"):
        raise ProgramError(
            f"unknown task {task!r}{nearest(task, ('classification', 'regression', 'custom'))}"
        )
    searched = declared(getattr(source, "searched", None))
    loss = _long_loss(source.loss)
    predict, metrics = _long_metrics(source, task, loss, default_values(searched))
    return Program(
        task=task,
        model=fresh(source.model, None),
        data=lambda: _long_data(source.data),
        loss=loss,
        predict=predict,
        metrics=metrics,
        optimizer=make_optimizer(getattr(source, "optimizer", "adamw")),
        batch_size=batch_size_of(getattr(source, "batch_size", None), None),
        epochs=positive("epochs", getattr(source, "epochs", None), int),
        lr=positive("lr", getattr(source, "lr", None), float),
        schedule=make_schedule(getattr(source, "schedule", None)),
        interval_updates=getattr(source, "interval_updates", None),
        clip=getattr(source, "clip", None),
        searched=searched,
    )


def is_long_form(given: Any) -> bool:
    return all(callable(getattr(given, name, None)) for name in ("model", "data", "loss"))


def _instance(given: Any) -> Any:
    source = given() if isinstance(given, type) else given
    missing = [name for name in ("model", "data", "loss") if not hasattr(source, name)]
    if missing:
        raise ProgramError(
            f"a program needs {', '.join(f'{name}()' for name in missing)}: "
            f"{type(source).__name__} has none"
        )
    return source


def _long_loss(loss: Callable[..., Tensor]) -> Loss:
    parameters = inspect.signature(loss).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return loss
    return lambda model, batch, values: loss(model, batch)


def _long_metrics(source: Any, task: str, loss: Loss, values: Values) -> tuple[Predict, Metrics]:
    own: Metrics | None = getattr(source, "metrics", None)
    if task in TASKS:
        _, predict, built_in = TASKS[task]
        metrics = built_in if own is None else both(built_in, own)
    elif own is None:
        return loss_as_prediction(loss, values), mean_loss
    else:
        predict, metrics = output_and_targets, own
    return getattr(source, "predict", predict), metrics


def _long_data(data: Callable[[], Any]) -> RawSplits:
    with blamed("data()"):
        given = data()
    if isinstance(given, RawSplits):
        return given
    if not isinstance(given, Mapping) or "train" not in given:
        raise ProgramError(
            "data() must return a dict with 'train' and, where there are, 'validation' and 'test'; "
            f"it returned a {type(given).__name__}"
        )
    unknown = set(given) - {"train", "validation", "test"}
    if unknown:
        word = sorted(map(str, unknown))[0]
        raise ProgramError(
            f"data() returned {word!r}{nearest(word, ('train', 'validation', 'test'))}"
        )
    return RawSplits(**given)
