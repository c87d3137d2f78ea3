"""The sections of a study file: what each may hold, and its defaults."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from droptune.errors import nearest
from droptune.spec.document import Strict
from droptune.spec.ranges import LogRange, Positive, Rate, RateRange, ShareRange, ValueRange

SAMPLERS = ("auto", "tpe", "gp", "cmaes", "random", "qmc")
PRUNERS = ("fair", "median", "percentile", "sha", "hyperband", "patient", "none")

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Budget(Strict):
    """What the search may spend; it ends with whatever is spent first. Default: 60 trials."""

    trials: Count | None = None
    epochs: Count | None = None
    device_hours: Positive | None = None
    deadline: datetime | None = None

    def __post_init__(self) -> None:
        if not (self.trials or self.epochs or self.device_hours or self.deadline):
            object.__setattr__(self, "trials", 60)
        if self.deadline is not None and self.deadline.tzinfo is None:
            object.__setattr__(self, "deadline", self.deadline.replace(tzinfo=UTC))


def named(given: Any) -> Any:
    """`tpe` or {name: tpe, option: value} as {name, options}."""
    if isinstance(given, str):
        return {"name": given}
    if isinstance(given, Mapping) and not set(given) <= {"name", "options"}:
        options = {key: value for key, value in given.items() if key != "name"}
        return {**({"name": given["name"]} if "name" in given else {}), "options": options}
    return given


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}{nearest(name, known)}")


@dataclass(frozen=True)
class Sampler(Strict):
    """What proposes trials; options are Optuna's."""

    name: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("sampler", self.name, SAMPLERS)


@dataclass(frozen=True)
class Pruner(Strict):
    """What stops trials early; options are its own."""

    name: str = "fair"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name("pruner", self.name, PRUNERS)


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


def _listed_values(given: Any) -> Any:
    if isinstance(given, Mapping):
        return {name: _listed(value) for name, value in given.items()}
    return given


def _numbers(given: Any) -> Any:
    if not isinstance(given, list | tuple):
        return given
    numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in given)
    if not numbers or len(set(given)) < max(len(given), 2):
        raise ValueError(
            f"{list(given)!r}: give two or more different numbers; words are declared in the "
            "program, with searched={…}"
        )
    return given


Searched = ValueRange | Annotated[tuple[float, ...], Field(min_length=2)]
Globs = tuple[str, ...]
Schedule = Literal["constant", "up", "early", "late"]


@dataclass(frozen=True)
class SpaceSpec(Strict):
    """What is searched beside the defaults; see `droptune.space`.

    Keys of `rates`, `fixed` and the globs of `groups` and `linear_in_depth` are matched against
    site paths: `*` stands for anything, dots included; `kind:attention` for a kind of site.
    """

    rates: Mapping[str, RateRange] = field(default_factory=dict)
    groups: Annotated[
        Literal["auto", "none"] | Mapping[str, Globs],
        BeforeValidator(
            _listed_values,
            json_schema_input_type=Literal["auto", "none"] | Mapping[str, str | Globs],
        ),
    ] = "auto"
    linear_in_depth: Annotated[
        Globs, BeforeValidator(_listed, json_schema_input_type=str | Globs)
    ] = ()
    fixed: Mapping[str, Rate] = field(default_factory=dict)
    lr: LogRange | None = None
    weight_decay: LogRange | None = None
    l1: LogRange | None = None
    label_smoothing: ShareRange | None = None
    values: Mapping[
        str, Annotated[Searched, BeforeValidator(_numbers, json_schema_input_type=Searched)]
    ] = field(default_factory=dict)
    schedule: Annotated[
        tuple[Schedule, ...],
        BeforeValidator(_listed, json_schema_input_type=Schedule | tuple[Schedule, ...]),
    ] = ("constant",)

    def __post_init__(self) -> None:
        if "constant" not in self.schedule:
            raise ValueError("schedule must hold 'constant': the baselines are trained with it")
        if len(set(self.schedule)) < len(self.schedule):
            raise ValueError(f"schedule holds a word twice: {', '.join(self.schedule)}")


@dataclass(frozen=True)
class Insertion(Strict):
    """Sites to add at rate 0 after the modules whose path (glob) or type name is `after`."""

    after: str
    kind: str = "element"  # an insertable kind of `dropout.KINDS`, checked where it is inserted


@dataclass(frozen=True)
class Baselines(Strict):
    """Which baselines are searched, each with `trials` learning rates."""

    trials: Count = 5
    none: bool = True
    half: bool = True
    author: bool = True


@dataclass(frozen=True)
class Confirm(Strict):
    """How front runners and baselines are retrained on fresh seeds.

    `splits`: on the same split into training and validation data as the search, on a fresh one for
    each seed, or on folds (cross-validation); for small data without validation data of their own.
    """

    enabled: bool = True
    top: Count = 3
    min_seeds: Annotated[int, Field(ge=2)] = 3
    max_seeds: Annotated[int, Field(ge=2)] = 10
    share: Annotated[float, Field(gt=0, le=1)] = 0.3333
    splits: Literal["same", "fresh", "folds"] = "same"
    ablate: bool = False

    def __post_init__(self) -> None:
        if self.min_seeds > self.max_seeds:
            raise ValueError(f"min_seeds {self.min_seeds} is above max_seeds {self.max_seeds}")


AutoCount = Literal["auto"] | Count


@dataclass(frozen=True)
class TrainingSpec(Strict):
    """How a training is run; `width`, `memory` and `threads` belong to a worker, results do not
    change.

    memory: GiB that a group of width `auto` may take (None: 85 % of what a GPU has free, a quarter
        of what the host has)
    mc_passes: forward passes with dropout on in each evaluation (Monte-Carlo dropout), 0: none
    """

    trainer: Literal["auto", "solo", "fused"] = "auto"
    width: AutoCount = "auto"
    memory: Positive | None = None
    precision: Literal["float32", "float64", "bf16"] = "float32"
    clip: Positive | None = None
    accumulate: Count = 1
    threads: AutoCount = "auto"
    mc_passes: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Checkpoints(Strict):
    """Where snapshots of running trainings lie."""

    store: Literal["directory", "sql"] = "directory"
    directory: str | None = None


def _model_name(given: str) -> str:
    if not given or re.search(r"""[/:'"]""", given):
        raise ValueError(f"{given!r}: the name of a model in MLflow has no / : ' or \"")
    return given


@dataclass(frozen=True)
class Mlflow(Strict):
    """Who copies the study to MLflow, and under which names (None: from the study's)."""

    mirror: Literal["worker", "external", "none"] = "worker"
    experiment: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    registered_model: Annotated[str, Field(max_length=250), AfterValidator(_model_name)] | None = (
        None
    )
