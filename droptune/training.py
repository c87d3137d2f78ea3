"""One training: what is trained, from which seeds, and what SQL knows of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where a training stands; the finished states are Optuna's."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAIL = "FAIL"

    @property
    def finished(self) -> bool:
        return self in (State.COMPLETE, State.PRUNED, State.FAIL)


class TrainingKind(StrEnum):
    """Why a training exists. Only `search` and `baseline` are Optuna trials."""

    SEARCH = "search"
    BASELINE = "baseline"
    CONFIRMATION = "confirmation"
    ABLATION = "ablation"
    REPLAY = "replay"

    @property
    def is_trial(self) -> bool:
        return self in (TrainingKind.SEARCH, TrainingKind.BASELINE)


FOLDS = 5  # data that are split off are one part in so many: the test set, then, of the rest,
# the validation set


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else (SHA-256 of their JSON)."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Seeds:
    """Where the randomness of one training comes from.

    `weights` seeds initial weights and masks, `data` the order (and augmentation) of the
    training data, `split` the split into training and validation data where droptune makes it.
    """

    weights: int
    data: int
    split: int

    @classmethod
    def of_trial(cls, study_seed: int, number: int) -> Seeds:
        """Seeds of a trial of the search: own weights, data order and split of the study."""
        return cls(
            weights=derive_seed(study_seed, "trial", number),
            data=derive_seed(study_seed, "data"),
            split=derive_seed(study_seed, "split"),
        )

    @classmethod
    def of_confirmation(cls, study_seed: int, index: int, splits: str = "same") -> Seeds:
        """Seeds of the confirmations with this index: equal for all members of a pair.

        `splits` same: that of the search; fresh: one drawn for each index; folds: five indices
        in a row share a draw and take one fifth each.
        """
        return cls(
            weights=derive_seed(study_seed, "confirmation", index),
            data=derive_seed(study_seed, "confirmation data", index),
            split=_split_of(study_seed, index, splits),
        )

    def to_json(self) -> dict[str, int]:
        return {"weights": self.weights, "data": self.data, "split": self.split}

    @classmethod
    def from_json(cls, data: Mapping[str, int]) -> Seeds:
        return cls(**data)


def _split_of(study_seed: int, index: int, splits: str) -> int:
    """A split seed names an order of the examples; its remainder, which fifth is held out."""
    if splits == "folds":
        draw = derive_seed(study_seed, "folds", index // FOLDS)
        return draw - draw % FOLDS + index % FOLDS
    return derive_seed(study_seed, "split", *([index] if splits == "fresh" else []))


@dataclass(frozen=True)
class Assignment:
    """The values of one training.

    `rates` maps a site's path to its rate (probability of zeroing, in [0, 1)); `lr` is the
    learning rate; `values` holds whatever else is searched (`weight_decay`, `label_smoothing`,
    `schedule`, `cutoff`, and what the program declares).
    """

    rates: Mapping[str, float]
    lr: float
    values: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def mean_rate(self) -> float:
        return sum(self.rates.values()) / len(self.rates) if self.rates else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"rates": dict(self.rates), "lr": self.lr, "values": dict(self.values)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Assignment:
        return cls(rates=dict(data["rates"]), lr=data["lr"], values=dict(data["values"]))


@dataclass(frozen=True)
class NewTraining:
    """A training to be queued: its assignment is known, no worker has it yet."""

    kind: TrainingKind
    assignment: Assignment
    label: str  # "none", "half", "author" for baselines; "trial 17" and the like for others
    seeds: Seeds | None = None  # None: a trial's own, from its number
    seed_index: int | None = None  # which confirmation seed
    intervals: int | None = None  # None: the study's


@dataclass(frozen=True)
class Training:
    """One assignment trained once, as its worker holds it.

    `number` is the Optuna trial number (None where the training is no trial). `attempt` counts
    restarts from nothing, `lease_epoch` every claim: a write with an old epoch is refused.
    `assignment` is None between the claim of a new trial and the sampler's answer.
    """

    id: int
    study_id: int
    kind: TrainingKind
    number: int | None
    label: str
    assignment: Assignment | None
    seeds: Seeds
    seed_index: int | None
    intervals: int
    attempt: int
    lease_epoch: int

    @classmethod
    def apart(cls, number: int, assignment: Assignment, seeds: Seeds, intervals: int) -> Training:
        """One of no study, to try or to measure a trainer."""
        return cls(
            id=number,
            study_id=0,
            kind=TrainingKind.REPLAY,
            number=None,
            label="apart",
            assignment=assignment,
            seeds=seeds,
            seed_index=None,
            intervals=intervals,
            attempt=1,
            lease_epoch=1,
        )

    @property
    def name(self) -> str:
        """How people see it: `trial 0017`, `baseline none 0003`, `confirm none s2`."""
        if self.kind is TrainingKind.SEARCH:
            return f"trial {self.number:04d}"
        if self.kind is TrainingKind.BASELINE:
            return f"baseline {self.label} {self.number:04d}"
        suffix = "" if self.seed_index is None else f" s{self.seed_index}"
        verb = {"confirmation": "confirm"}.get(self.kind.value, self.kind.value)
        return f"{verb} {self.label}{suffix}"


@dataclass(frozen=True)
class Measurement:
    """What one training measured at the end of one interval (intervals count from 1)."""

    interval: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Record:
    """A training as SQL knows it: what was measured and how it ended.

    `curves` maps a key (`val/nll`, `train/loss`, …) to its values; position i is interval i+1.
    `values` are the objective values of a COMPLETE training, one per objective;
    `best_interval` is the interval they (and the kept weights) belong to.
    """

    training: Training
    state: State
    reason: str | None = None
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    values: tuple[float, ...] | None = None
    best_interval: int | None = None
    started: datetime | None = None
    ended: datetime | None = None
    worker: str | None = None

    @property
    def value(self) -> float | None:
        return None if self.values is None else self.values[0]

    @property
    def intervals_done(self) -> int:
        return max((len(curve) for curve in self.curves.values()), default=0)
