"""What a study is: frozen values, read from a YAML file or from the JSON in SQL."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, BeforeValidator, Field

from droptune.errors import SpecError, nearest
from droptune.program.source import project_root
from droptune.spec.document import Document, Place, Strict, adapter, checked
from droptune.spec.objective import DIRECTIONS, MONTE_CARLO, Objective
from droptune.spec.sections import (
    Baselines,
    Budget,
    Checkpoints,
    Confirm,
    Count,
    Insertion,
    Mlflow,
    Pruner,
    Sampler,
    SpaceSpec,
    TrainingSpec,
    Whole,
    named,
)

__all__ = ["FREE_KEYS", "Objective", "StudySpec", "json_schema", "project_root"]


FREE_KEYS = ("budget", "priority", "mlflow.mirror", "confirm")  # may change on continuation
FIXED_KEYS = ("confirm.splits",)  # but not these: pairs would no longer share their data


class Described(Protocol):
    """What `resolved` reads of a program."""

    @property
    def task(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def interval_updates(self) -> int | None: ...
    @property
    def metric_names(self) -> Sequence[str]: ...


def _objectives(given: Any) -> Any:
    """One objective or a list of them, each by its metric's name or with keys and values."""
    listed = [given] if isinstance(given, str | Mapping) else given
    if not isinstance(listed, list | tuple):
        return listed
    return [{"metric": each} if isinstance(each, str) else each for each in listed]


_NAME = r"^\w[\w.\-]*$"


def _name(given: str) -> str:
    if not re.match(_NAME, given):
        shown = f"'{given}'" if given.isprintable() else repr(given)
        raise ValueError(
            f"{shown}: a name may hold letters, digits, _ . and -, and starts with no . or -"
        )
    return given


_UPDATES = re.compile(r"([1-9]\d*)\s+updates?")


def _interval(given: Any) -> Any:
    if given is None or given == "epoch":
        return given
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return f"{given} updates"
    found = _UPDATES.fullmatch(str(given).strip())
    if found is None:
        raise ValueError(f"give 'epoch' or 'N updates', got {given!r}")
    return f"{found[1]} updates"


@dataclass(frozen=True)
class StudySpec(Strict):
    """A whole study. `objectives` empty, `epochs` or `interval` None: the program's (`resolved`).

    In the file `objectives` is `objective`: one, or a list of them.
    """

    name: Annotated[
        str, AfterValidator(_name), Field(max_length=100, json_schema_extra={"pattern": _NAME})
    ]
    program: str
    seed: Whole = 0
    objectives: Annotated[
        tuple[Objective, ...],
        BeforeValidator(
            _objectives, json_schema_input_type=str | Objective | tuple[str | Objective, ...]
        ),
        Field(alias="objective"),
    ] = ()
    epochs: Count | None = None
    interval: Annotated[
        str | None, BeforeValidator(_interval, json_schema_input_type=str | int | None)
    ] = None
    budget: Budget = field(default_factory=Budget)
    sampler: Annotated[
        Sampler, BeforeValidator(named, json_schema_input_type=str | dict[str, Any])
    ] = field(default_factory=Sampler)
    pruner: Annotated[
        Pruner, BeforeValidator(named, json_schema_input_type=str | dict[str, Any])
    ] = field(default_factory=Pruner)
    space: SpaceSpec = field(default_factory=SpaceSpec)
    insert: tuple[Insertion, ...] = ()
    baselines: Baselines = field(default_factory=Baselines)
    confirm: Confirm = field(default_factory=Confirm)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    priority: int = 0
    mlflow: Mlflow = field(default_factory=Mlflow)

    def __post_init__(self) -> None:
        metrics = [objective.metric for objective in self.objectives]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"objective: a metric twice in {', '.join(metrics)}")

    # -- reading and writing ------------------------------------------------------------------

    @classmethod
    def load(cls, path: Path) -> StudySpec:
        """The study that a YAML file describes; its program relative to the project's root.

        Without a `name` it has the file's, with dashes for what a name cannot hold.
        Raises SpecError: the first fault with its line, in one line.
        """
        document = Document.read(path)
        stem = re.sub(r"[^\w.\-]+", "-", path.stem).strip(".-") or "study"
        content = {"name": stem, **document.content}
        spec = checked(cls, content, document, _refused)
        return replace(spec, program=_from_root(spec.program, path))

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> StudySpec:
        """The study that plain data describe, as in the file. Raises SpecError."""
        return checked(cls, content, None, _refused)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StudySpec:
        """What `to_json` wrote."""
        return cls.parse(data)

    def to_json(self) -> dict[str, Any]:
        """Everything, defaults included, in JSON's types."""
        written: dict[str, Any] = adapter(StudySpec).dump_python(self, mode="json", by_alias=True)
        return written

    # -- what follows from it -----------------------------------------------------------------

    def resolved(self, program: Described) -> StudySpec:
        """With the program's objective, epochs and interval where the file leaves them open.

        Raises SpecError where the program does not measure an objective's metric.
        """
        defaults = {"classification": "nll", "regression": "rmse"}
        measured = [*program.metric_names, "gap", "seconds"]
        monte_carlo = MONTE_CARLO.get(program.task, ())
        if self.training.mc_passes:
            if not monte_carlo:
                raise SpecError(
                    "training: mc_passes needs a program for classification or regression, "
                    f"and {self.program} has a loss of its own"
                )
            measured += monte_carlo
        objectives = self.objectives
        if not objectives:
            metric = defaults.get(program.task, measured[0])
            if metric not in DIRECTIONS:
                raise SpecError(
                    f"objective is missing: choose a metric of {self.program} "
                    f"({', '.join(program.metric_names)}) and its direction"
                )
            objectives = (Objective(metric),)
        for objective in objectives:
            if objective.metric in monte_carlo and not self.training.mc_passes:
                raise SpecError(
                    f"objective: {objective.metric} is measured with dropout on: say how often, "
                    "for example `training: {mc_passes: 20}`"
                )
            if objective.metric not in measured:
                raise SpecError(
                    f"objective: {self.program} does not measure {objective.metric!r}"
                    f"{nearest(objective.metric, measured)}"
                )
        updates = program.interval_updates
        interval = self.interval or ("epoch" if updates is None else f"{updates} updates")
        epochs = self.epochs or program.epochs
        return replace(self, objectives=objectives, epochs=epochs, interval=interval)

    @property
    def interval_updates(self) -> int | None:
        """Updates in an interval; None: one pass over the training data."""
        found = _UPDATES.fullmatch(self.interval or "")
        return None if found is None else int(found[1])

    def intervals(self, program: Described, examples: int) -> int:
        """How many intervals a full training takes on that many training examples."""
        epochs = self.epochs or program.epochs
        updates = self.interval_updates or program.interval_updates
        if self.interval == "epoch" or updates is None:
            return epochs
        batches = math.ceil(examples / program.batch_size)
        return math.ceil(epochs * batches / updates)

    @property
    def full_trials(self) -> int | None:
        """How many trials the budget has where each is trained to its end; None: not counted."""
        limits = [] if self.budget.trials is None else [self.budget.trials]
        if self.budget.epochs is not None and self.epochs is not None:
            limits.append(self.budget.epochs // self.epochs)
        return min(limits, default=None)

    @property
    def experiment(self) -> str:
        """The MLflow experiment's name."""
        return self.mlflow.experiment or f"droptune/{self.name}"

    @property
    def registered_model(self) -> str:
        """The name of the registered MLflow model."""
        return self.mlflow.registered_model or f"droptune-{self.name}"

    def renamed(self, name: str) -> StudySpec:
        return StudySpec.parse({**self.to_json(), "name": name})

    def changes(self, other: StudySpec) -> tuple[str, ...]:
        """The dotted keys in which another spec differs."""
        mine, others = _flat(self.to_json()), _flat(other.to_json())
        missing = object()
        keys = [*mine, *(key for key in others if key not in mine)]
        return tuple(key for key in keys if mine.get(key, missing) != others.get(key, missing))

    def describe_changes(self, other: StudySpec) -> str:
        """`budget.trials 60 → 9`, for each key in which another spec differs."""
        mine, others = _flat(self.to_json()), _flat(other.to_json())
        return ", ".join(
            f"{key} {_word(mine.get(key))} → {_word(others.get(key))}"
            for key in self.changes(other)
        )

    @staticmethod
    def is_free(key: str) -> bool:
        """Whether a study may go on although this key has changed."""
        free = any(key == each or key.startswith(f"{each}.") for each in FREE_KEYS)
        return free and key not in FIXED_KEYS


def json_schema() -> dict[str, Any]:
    """The JSON Schema of study files (`name` may be left out: the file's stem)."""
    schema = adapter(StudySpec).json_schema()
    schema["required"] = ["program"]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


_SHAPES = (
    *("batch_size", "batch", "hidden", "hidden_size", "units", "width", "layers", "depth"),
    *("channels", "heads", "activation", "kernel_size", "embedding_dim", "model", "architecture"),
    "optimizer",
)


def _refused(place: Place) -> str | None:
    """Why a key of `space` is not searched, where that is worth saying."""
    if place[:1] != ("space",) or place[-1] not in _SHAPES:
        return None
    if place[-1] == "optimizer":
        return "is not searched: make a study for each optimizer"
    return (
        "is not searched, because it changes tensor shapes, and rates belong to one architecture "
        "and batch size: make a study for each"
    )


def _from_root(program: str, file: Path) -> str:
    """A program named relative to the study file, relative to the project's root."""
    target, colon, name = program.partition(":")
    if not target.endswith(".py"):
        return program
    path, root = (file.parent / target).resolve(), project_root(file.resolve())
    if not path.is_relative_to(root):
        raise SpecError(
            f"program {program} lies outside the project {root}: "
            "move it there, or put a droptune.toml into the folder above both"
        )
    return f"{path.relative_to(root).as_posix()}{colon}{name}"


def _word(value: Any) -> str:
    return "none" if value is None else f"{value}"


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
