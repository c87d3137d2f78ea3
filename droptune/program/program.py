"""What is tuned: the user's model, data and loss, without a loop, a device or a search in it.

Short form, in the user's file:

    program = droptune.classification(
        model=Net, train=(x, y), batch_size=128, epochs=20, optimizer="adamw", lr=1e-3
    )

Long form: an object (or class) named `program` with `model()`, `data()`, `loss(model, batch)`,
the attributes `batch_size`, `epochs`, `lr`, and, where wanted, what `adapt` lists.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from droptune.errors import ProgramError, nearest
from droptune.program.data import Batch, InMemory, Splits, split_target
from droptune.program.declared import declared, default_values
from droptune.program.intake import LOOKED_AT, RawSplits, make_splits, read_splits
from droptune.program.labels import check_known, check_several
from droptune.program.metrics import (
    CLASSIFICATION,
    REGRESSION,
    classification_metrics,
    regression_metrics,
)
from droptune.program.optimizers import MakeOptimizer, make_optimizer, make_schedule
from droptune.program.soundness import check_loss, check_model
from droptune.program.source import blamed, defined_in, import_source, pick
from droptune.program.tasks import (
    Loss,
    Metrics,
    Predict,
    Values,
    cross_entropy,
    loss_as_prediction,
    mean_loss,
    output_and_targets,
    predict_classes,
    predict_numbers,
    squared_error,
)

__all__ = [
    "Program",
    "adapt",
    "classification",
    "default_values",
    "load_program",
    "load_program_or_model",
    "regression",
]


@dataclass(frozen=True, eq=False)
class Program:
    """What trainers train. `loss` and `predict` only call `model`, so they run solo and fused.

    `task` classification | regression | custom
    `model()` a fresh model, its weights drawn from torch's current generator
    `loss(model, batch, values)` a scalar; runs under vmap, values may be 0-dim tensors
    `predict(model, batch)` (predictions [B, ...], targets [B, ...]) of an evaluation batch
    `metrics(predictions, targets)` of a whole set, by name
    `schedule(progress)` the factor on the learning rate, progress in [0, 1]
    `interval_updates` updates in an interval; None: one pass over the training data
    `clip` the largest norm of a training's gradient; None: not clipped
    `searched` further values that may be searched: a (low, high) pair, a mapping with low, high
    and log, or a list of choices
    """

    task: str
    model: Callable[[], nn.Module]
    data: Callable[[], RawSplits]
    loss: Loss
    predict: Predict
    metrics: Metrics
    optimizer: MakeOptimizer
    batch_size: int
    epochs: int
    lr: float
    schedule: Callable[[float], float] = lambda progress: 1.0
    interval_updates: int | None = None
    clip: float | None = None
    searched: Mapping[str, Any] = field(default_factory=dict)
    loss_values: tuple[str, ...] = ()  # that the loss knows beside the declared ones
    own_metrics: tuple[str, ...] | None = None  # names beside the task's; None: found by trying

    @functools.cached_property
    def _read(self) -> RawSplits:
        return read_splits(self.data(), self.task, self.batch_size)

    def splits(self, seed: int) -> Splits:
        """Training, validation and test data; missing ones are split off (see `Splits.made`).

        Data are read and checked once per process. Raises ProgramError in one line.
        """
        return make_splits(self._read, seed, self.task)

    def example_batch(self, size: int = 2) -> Batch:
        """The first training examples, on the CPU."""
        train = self._read.train
        order = torch.arange(min(size, train.n))
        if isinstance(train, InMemory):
            return train.gather(order)
        whole = replace(train, batch_size=size, workers=0)  # one batch, of whatever size
        return next(whole.batches(order, seed=0, epoch=0, device="cpu"))

    @functools.cached_property
    def metric_names(self) -> tuple[str, ...]:
        """What `metrics` measures; for the long form by trying it on two examples."""
        if self.own_metrics is not None:
            built_in = {"classification": CLASSIFICATION, "regression": REGRESSION}[self.task]
            return (*built_in, *(name for name in self.own_metrics if name not in built_in))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            model = self.model().eval()
            return tuple(self.metrics(*self.predict(model, self.example_batch())))

    def check(self) -> None:
        """Tries one loss and one prediction, and the class numbers against the model's outputs.

        Raises ProgramError in one line. Leaves torch's generator as it was.
        """
        batch = self.example_batch()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the same program is found good every time
            with blamed("model()"):
                model = self.model()
            check_model(model)
            if self.task == "classification":  # before a loss stumbles over wrong numbers
                self._check_classes(self._tried_prediction(model, batch).shape[-1])
            with blamed("the loss of the first examples"):
                loss = self.loss(model.train(), batch, default_values(self.searched))
            check_loss(loss)
            self._tried_prediction(model, batch)

    def _tried_prediction(self, model: nn.Module, batch: Batch) -> Tensor:
        with blamed("the prediction of the first examples"), torch.no_grad():
            return self.predict(model.eval(), batch)[0]

    def _check_classes(self, classes: int) -> None:
        """All class numbers; of a training stream those of the first examples."""
        for name in ("train", "validation", "test"):
            data = getattr(self._read, name)
            if isinstance(data, InMemory):
                numbers = split_target(data.tree)[2]
                check_known(numbers, classes, name)
                if name == "train":
                    check_several(numbers, name)
            elif name == "train":
                check_known(split_target(self.example_batch(LOOKED_AT))[2], classes, name)


# --- the short form -----------------------------------------------------------------------


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


_TASKS: dict[str, tuple[Loss, Predict, Metrics]] = {
    "classification": (cross_entropy, predict_classes, classification_metrics),
    "regression": (squared_error, predict_numbers, regression_metrics),
}


def _short_form(task: str, **given: Any) -> Program:
    loss, predict, metrics = _TASKS[task]
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
        model=_fresh(given["model"], given["pretrained"]),
        data=lambda: RawSplits(given["train"], given["validation"], given["test"]),
        loss=loss,
        predict=predict,
        metrics=_with_own(metrics, given["metrics"]),
        optimizer=make_optimizer(given["optimizer"], given["weight_decay"]),
        batch_size=_batch_size(given["batch_size"], given["train"]),
        epochs=_positive("epochs", given["epochs"], int),
        lr=_positive("lr", given["lr"], float),
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
    return _both(built_in, lambda *given: {name: metric(*given) for name, metric in own.items()})


def _fresh(
    model: Any, pretrained: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | None
) -> Callable[[], nn.Module]:
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


def _positive(name: str, value: Any, kind: type) -> Any:
    good = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if not good or (kind is int and value != int(value)) or value == math.inf:
        raise ProgramError(f"{name}={value!r}: it must be a positive {kind.__name__}")
    return kind(value)


def _batch_size(given: Any, train: Any) -> int:
    size = given if given is not None else getattr(train, "batch_size", None)
    if size is None:
        raise ProgramError("batch_size= is missing: how many examples go into one update")
    return int(_positive("batch_size", size, int))


# --- the long form ------------------------------------------------------------------------


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
        model=_fresh(source.model, None),
        data=lambda: _long_data(source.data),
        loss=loss,
        predict=predict,
        metrics=metrics,
        optimizer=make_optimizer(getattr(source, "optimizer", "adamw")),
        batch_size=_batch_size(getattr(source, "batch_size", None), None),
        epochs=_positive("epochs", getattr(source, "epochs", None), int),
        lr=_positive("lr", getattr(source, "lr", None), float),
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
    if task in _TASKS:
        _, predict, built_in = _TASKS[task]
        metrics = built_in if own is None else _both(built_in, own)
    elif own is None:
        return loss_as_prediction(loss, values), mean_loss
    else:
        predict, metrics = output_and_targets, own
    return getattr(source, "predict", predict), metrics


def _both(first: Metrics, second: Metrics) -> Metrics:
    return lambda predictions, targets: {
        **first(predictions, targets),
        **second(predictions, targets),
    }


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


# --- from a file --------------------------------------------------------------------------


def load_program(reference: str, root: Path) -> Program:
    """The program that `file.py[:name]` or `package.module[:name]` names.

    The file must lie under `root`, the project's folder. A file that would start training when
    imported is refused before it runs. Raises ProgramError.
    """
    source = import_source(reference, root)
    found = pick(source, _is_program, "program")
    if _is_model(found) or _is_built(found):
        raise ProgramError(
            f"{reference} is a model without a program: write one:\n\n{source.text.skeleton}"
        )
    try:
        return adapt(found)
    except ProgramError as error:
        raise ProgramError(f"{source.where}: {error}") from error


def load_program_or_model(reference: str, root: Path) -> Program | Callable[[], nn.Module]:
    """What a reference names, or the file's program, or its only model: a built `nn.Module`, or
    a class of one. A named function without arguments builds a model. Raises ProgramError."""
    source = import_source(reference, root)
    own = [value for value in vars(source.module).values() if defined_in(value, source)]
    fits = next((fits for fits in (_is_program, _is_built) if any(map(fits, own))), _is_model)
    found = pick(source, fits, "program or model")
    if _is_program(found):
        return adapt(found)
    if _is_built(found):
        return lambda: found
    return _fresh(found, None)


def _is_program(value: Any) -> bool:
    return isinstance(value, Program) or is_long_form(value)


def _is_built(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)
