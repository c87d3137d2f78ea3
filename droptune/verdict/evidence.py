"""What is known of a study when it is judged: pure values, read from SQL by others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from droptune.sites.site import Site
from droptune.space.space import HALVED
from droptune.spec.objective import Objective
from droptune.spec.spec import StudySpec
from droptune.training import Assignment, Record, State, TrainingKind
from droptune.verdict.reliability import Scaled, scale
from droptune.verdict.statistics import Array
from droptune.verdict.wording import winner_name

# Of single test examples: "nll" [N], "correct" [N], …; of a sample of them, where classification:
# "logits" [n, C] and "targets" [n].
Scores = Mapping[str, Array]
BASELINES = ("none", "author", "half")
NAMES = {
    "none": "no dropout",
    "author": "author's rates",
    "half": "0.5 everywhere",
    "none at the winner's lr": "no dropout, winner's lr",
}


@dataclass(frozen=True, eq=False)
class Evidence:
    """One study: its spec, sites and trainings, and the test scores of its confirmations.

    `intervals` is the length of a training; `ranges` maps "lr" and site paths to (low, high) of
    the search; `groups` names the sites that share a rate; `scores` maps the id of a training to
    the scores of single test examples, `tested` to its metrics on the test set; `sizes` counts the
    examples of "train", "validation" and "test"; `fused` says whether trainings may share a device
    at the same time.
    """

    spec: StudySpec
    sites: tuple[Site, ...]
    records: tuple[Record, ...]
    intervals: int
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    scores: Mapping[int, Scores] = field(default_factory=dict)
    tested: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    author_lr: float | None = None
    fused: bool = False

    @property
    def objective(self) -> Objective:
        """What is judged: the first objective."""
        return self.spec.objectives[0]

    @property
    def sign(self) -> float:
        """+1 where greater is better, -1 where smaller is."""
        return 1.0 if self.objective.direction == "maximize" else -1.0

    @property
    def overlap(self) -> float:
        """By how much pairs of different splits are alike: validation to training examples.

        0 where all confirmations have the split of the search, and its data are taken as given.
        """
        if self.spec.confirm.splits == "same" or not self.sizes.get("train"):
            return 0.0
        return self.sizes.get("validation", 0) / self.sizes["train"]

    @cached_property
    def trials(self) -> tuple[Record, ...]:
        """Search and baseline trials that ran to their end, by number."""
        ended = [r for r in self.records if r.training.kind.is_trial and usable(r)]
        return tuple(sorted(ended, key=lambda record: record.training.number or 0))

    @cached_property
    def author(self) -> Mapping[str, float]:
        """The author's rates."""
        return {site.path: site.rate for site in self.sites}

    @cached_property
    def searched(self) -> tuple[str, ...]:
        """The sites whose rates are searched: all that have a range (all, where none is known)."""
        paths = tuple(site.path for site in self.sites)
        return tuple(path for path in paths if path in self.ranges) or paths

    @cached_property
    def fixed(self) -> Mapping[str, float]:
        """The rates of the sites that are not searched: the same in all trainings."""
        rates = assigned(self.trials[0]).rates if self.trials else {}
        return {path: rate for path, rate in rates.items() if path not in self.searched}

    def name(self, label: str) -> str:
        """What a member of the comparison is called in sentences, tables and figures."""
        kinds = {site.kind for site in self.sites if site.path in self.searched}
        if label == "half" and not kinds <= set(HALVED):
            return "0.5 at every element and channel site"  # the others have the author's rates
        return winner_name(self.records) if label == "winner" else NAMES.get(label, label)

    def has_dropout(self, assignment: Assignment) -> bool:
        """Whether any searched site has dropout; sites at a fixed rate do not count."""
        return any(assignment.rates.get(path, 0.0) > 0 for path in self.searched)

    def without_dropout(self, assignment: Assignment, paths: Iterable[str] = ()) -> Assignment:
        """The assignment with rate 0 at these sites (at all that are searched)."""
        silent = set(paths) or set(self.searched)
        rates = {p: 0.0 if p in silent else r for p, r in assignment.rates.items()}
        return replace(assignment, rates=rates)

    @cached_property
    def confirmations(self) -> Mapping[tuple[str, int], Record]:
        """Confirmations by assignment (`key`) and seed index."""
        return self._indexed(TrainingKind.CONFIRMATION)

    @cached_property
    def ablations(self) -> Mapping[tuple[str, int], Record]:
        """Ablations by assignment (`key`) and seed index."""
        return self._indexed(TrainingKind.ABLATION)

    def _indexed(self, kind: TrainingKind) -> Mapping[tuple[str, int], Record]:
        found: dict[tuple[str, int], Record] = {}
        for record in self.records:
            training = record.training
            if training.kind is kind and training.assignment and training.seed_index is not None:
                found.setdefault((key(training.assignment), training.seed_index), record)
        return found

    def confirmed(self, assignment: Assignment, indices: Iterable[int]) -> dict[int, Record]:
        """The usable confirmations of an assignment among these seeds, by seed index."""
        found = {index: self.confirmations.get((key(assignment), index)) for index in indices}
        return {index: r for index, r in found.items() if r is not None and usable(r)}

    def scaled(self, record: Record) -> Scaled | None:
        """What temperature scaling does to a training on the test set; None if not known."""
        scores = self.scores.get(record.training.id, {})
        if "logits" not in scores or "targets" not in scores:
            return None
        if record.training.id not in self._scaled:
            logits = scores["logits"]
            finite = bool(np.isfinite(logits).all())
            self._scaled[record.training.id] = scale(logits, scores["targets"]) if finite else None
        return self._scaled[record.training.id]

    @cached_property
    def _scaled(self) -> dict[int, Scaled | None]:
        return {}

    def benefit(self, record: Record) -> float:
        """The objective's value, turned so that greater is better."""
        assert record.value is not None
        return self.sign * record.value


def usable(record: Record) -> bool:
    """Whether a training ended with a finite objective."""
    ended = record.state is State.COMPLETE and record.training.assignment is not None
    return ended and record.value is not None and bool(np.isfinite(record.value))


def key(assignment: Assignment) -> str:
    """What makes two assignments the same training (JSON, floats to nine digits)."""
    rates = {path: float(f"{rate:.9g}") for path, rate in assignment.rates.items()}
    values = {
        name: float(f"{value:.9g}") if isinstance(value, float | int) else value
        for name, value in assignment.values.items()
    }
    return json.dumps([rates, float(f"{assignment.lr:.9g}"), values], sort_keys=True)


def assigned(record: Record) -> Assignment:
    """The assignment of a training that has one."""
    assert record.training.assignment is not None
    return record.training.assignment
