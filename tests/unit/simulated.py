"""Studies that nobody trained: the truth is known, and the noise is like that of real ones.

`World` is a truth with noise; `search` and `confirm` play a study in it, with the real planner.
`fashion` is a world with whole curves, shaped like recorded trainings of an MLP on 2000 images.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property

import numpy as np

from droptune.sites.site import Site
from droptune.spec.spec import StudySpec
from droptune.training import (
    Assignment,
    NewTraining,
    Record,
    Seeds,
    State,
    Training,
    TrainingKind,
)
from droptune.verdict.confirmation import plan
from droptune.verdict.evidence import Evidence, key

START = datetime(2026, 3, 1, 9, 0, 0)
AUTHOR = (0.2, 0.5, 0.5)
Curves = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class World:
    """A truth and its noise.

    `loss(rates, lr)` is the true value of the objective; `seed_sd` what a seed adds to one
    training, `validation_sd` what the validation set adds to one configuration (the same in
    search and confirmation: what the best of many trials exploits), `example_sd` and
    `interaction_sd` what single test examples add to a configuration and to a training.
    """

    loss: Callable[[Mapping[str, float], float], float]
    rng: np.random.Generator
    sites: tuple[str, ...] = ("fc1", "fc2")
    seed_sd: float = 0.02
    validation_sd: float = 0.005
    example_sd: float = 0.2
    interaction_sd: float = 0.1
    examples: int = 200
    salt: int = 0
    metric: str = "nll"

    def truth(self, assignment: Assignment) -> float:
        return self.loss(assignment.rates, assignment.lr)

    def of_configuration(self, assignment: Assignment, what: str) -> np.random.Generator:
        """The noise of one configuration: the same whenever it is trained."""
        return np.random.default_rng([self.salt, zlib.crc32((what + key(assignment)).encode())])

    def train(self, assignment: Assignment) -> tuple[Curves, Mapping[str, np.ndarray]]:
        """Curves of one training, and its scores of single test examples."""
        offset = self.rng.normal(0, self.seed_sd)
        shift = self.of_configuration(assignment, "validation").normal(0, self.validation_sd)
        value = self.truth(assignment) + offset
        own = self.of_configuration(assignment, "test").normal(0, self.example_sd, self.examples)
        noise = self.rng.normal(0, self.interaction_sd, self.examples)
        return {f"val/{self.metric}": (value + shift,)}, {self.metric: value + own + noise}


def make_spec(name: str = "simulated", **more: object) -> StudySpec:
    content = {"name": name, "program": "net.py", "seed": 7, "objective": {"metric": "nll"}}
    return StudySpec.parse({**content, **more})


def sites_of(paths: Sequence[str], rates: Sequence[float] = AUTHOR) -> tuple[Site, ...]:
    return tuple(
        Site(path, "element", rate, (128, 512), attribute=f"{path}.p")
        for path, rate in zip(paths, rates, strict=False)
    )


def make_record(
    identity: int,
    new: NewTraining,
    curves: Curves,
    *,
    number: int | None = None,
    state: State = State.COMPLETE,
    value: float | None = None,
    lane: int = 0,
    start: float = 0.0,
    seconds: float = 30.0,
) -> Record:
    training = Training(
        identity, 1, new.kind, number, new.label, new.assignment,
        new.seeds or Seeds.of_trial(7, identity), new.seed_index,
        max(len(curve) for curve in curves.values()), 1, 1,
    )  # fmt: skip
    done = state is State.COMPLETE
    return Record(
        training=training,
        state=state,
        curves=curves,
        values=(value,) if done and value is not None else None,
        best_interval=max(len(curve) for curve in curves.values()) if done else None,
        started=START + timedelta(seconds=start),
        ended=START + timedelta(seconds=start + seconds),
        worker=f"node{lane % 2 + 1}/cuda:{lane % 2}",
    )


def assignments(
    world: World, trials: int, lr: tuple[float, float] = (3e-4, 1e-2), high: float = 0.8
) -> list[NewTraining]:
    """Baselines (none, author, half; five learning rates each) and random trials."""
    rng, paths = world.rng, world.sites
    author = dict(zip(paths, AUTHOR, strict=False))
    grid = np.geomspace(*lr, 5)
    baselines = [
        NewTraining(TrainingKind.BASELINE, Assignment(dict(rates), float(one)), label)
        for label, rates in (
            ("none", dict.fromkeys(paths, 0.0)),
            ("half", dict.fromkeys(paths, 0.5)),
            ("author", author),
        )
        for one in grid
    ]
    random = [
        NewTraining(
            TrainingKind.SEARCH,
            Assignment(
                {p: max(0.0, float(rng.uniform(-0.05, high))) for p in paths},
                float(np.exp(rng.uniform(*np.log(lr)))),
            ),
            f"trial {number}",
        )
        for number in range(trials)
    ]
    return baselines + random


def search(world: World, spec: StudySpec | None = None, trials: int = 45) -> Evidence:
    """A study whose search has ended."""
    spec = spec or make_spec()
    records, scores = [], {}
    for number, new in enumerate(assignments(world, trials)):
        curves, _ = world.train(new.assignment)
        value = curves[spec.objectives[0].key][-1]
        place = {"lane": number % 8, "start": 31.0 * (number // 8)}
        records.append(make_record(number, new, curves, number=number, value=value, **place))
    return Evidence(
        spec=spec,
        sites=sites_of(world.sites),
        records=tuple(records),
        intervals=max(r.intervals_done for r in records),
        ranges={"lr": (3e-4, 1e-2), **dict.fromkeys(world.sites, (0.0, 0.8))},
        scores=scores,
        sizes={"train": 2000, "validation": 5000, "test": world.examples},
        author_lr=1e-3,
    )


def confirm(world: World, evidence: Evidence, rounds: int = 20) -> Evidence:
    """The study after its confirmations, trained as the planner asks."""
    for _ in range(rounds):
        planned = plan(evidence)
        if planned.decided:
            return evidence
        assert planned.queue, planned.reason
        evidence = train(world, evidence, planned.queue)
    raise AssertionError("the planner does not come to an end")


def train(world: World, evidence: Evidence, queue: Sequence[NewTraining]) -> Evidence:
    """The evidence with these trainings trained."""
    records, scores = list(evidence.records), dict(evidence.scores)
    begun = max((r.ended - START).total_seconds() for r in records if r.ended) + 2
    for position, new in enumerate(queue):
        identity = len(records)
        curves, scores[identity] = world.train(new.assignment)
        value = curves[evidence.objective.key][-1]
        place = {"lane": position % 8, "start": begun + 31.0 * (position // 8)}
        records.append(make_record(identity, new, curves, value=value, **place))
    return replace(evidence, records=tuple(records), scores=scores)


# -- a world with curves --------------------------------------------------------------------------


@dataclass(frozen=True)
class Fashion(World):
    """Trainings of 60 intervals with every curve that a classification has."""

    intervals: int = 60
    examples: int = 2000
    sites: tuple[str, ...] = ("drop1", "drop2", "head.drop")
    seed_sd: float = 0.008
    interaction_sd: float = 0.15

    def truth(self, assignment: Assignment) -> float:
        return float(self.nll(assignment)[-1])

    @cached_property
    def weights(self) -> np.ndarray:
        return np.array([0.15, 0.5, 0.35])

    def strength(self, assignment: Assignment) -> float:
        rates = np.array([assignment.rates[path] for path in self.sites])
        return float(self.weights @ rates)

    def nll(self, assignment: Assignment) -> np.ndarray:
        """Validation NLL: a fit that dropout slows, plus overfitting that dropout prevents."""
        p, epoch = self.strength(assignment), np.arange(1, self.intervals + 1)
        speed = (assignment.lr / 1e-3) ** 0.7 * (1 - 0.75 * p)
        progress = epoch * speed
        fit = 0.40 + 0.75 / (1 + 0.7 * progress)
        over = 0.012 * (1 - p) ** 2.2 * np.maximum(progress - 6, 0) ** 0.95
        rough = 0.03 * max(np.log10(assignment.lr / 3e-3), 0) ** 2 + 0.25 * max(p - 0.62, 0) ** 2
        return fit + over + rough

    def accuracy(self, assignment: Assignment) -> np.ndarray:
        p, epoch = self.strength(assignment), np.arange(1, self.intervals + 1)
        progress = epoch * (assignment.lr / 1e-3) ** 0.7 * (1 - 0.75 * p)
        return 0.835 + 0.006 * p - 0.14 / (1 + 0.9 * progress)

    def train(self, assignment: Assignment) -> tuple[Curves, Mapping[str, np.ndarray]]:
        p, n = self.strength(assignment), self.intervals
        offset = self.rng.normal(0, self.seed_sd)
        wiggle = self.rng.normal(0, 0.006, n)
        nll = self.nll(assignment)
        progress = np.arange(1, n + 1) * (assignment.lr / 1e-3) ** 0.7 * (1 - 0.75 * p)
        train_nll = 1.1 / (1 + 0.75 * progress) ** 1.25 + 0.32 * p**1.5
        accuracy = self.accuracy(assignment) + self.rng.normal(0, 0.003, n)
        ece = np.clip(0.02 + 0.25 * (nll - 0.46), 0.015, None)
        curves = {
            "val/nll": nll + offset + wiggle,
            "train/nll": train_nll + self.rng.normal(0, 0.003, n).clip(-0.004),
            "train/loss": train_nll * 1.1 + 0.02,
            "val/accuracy": accuracy,
            "train/accuracy": 1 - 0.09 * train_nll,
            "val/ece": ece,
            "val/brier": 0.24 + 0.1 * (nll - 0.46),
            "lr": np.full(n, assignment.lr),
            "time/seconds": 0.5 + 0.04 * (p > 0) + self.rng.normal(0, 0.01, n),
        }
        ready = {name: tuple(float(x) for x in curve) for name, curve in curves.items()}
        return ready, self.scores(assignment, float(nll[-1] + offset))

    def scores(self, assignment: Assignment, nll: float) -> dict[str, np.ndarray]:
        """Logits of a calibrated model, sharpened until their NLL is the training's."""
        shared = np.random.default_rng([self.salt, 99])
        base = shared.normal(0, 7.0, (self.examples, 10))
        gumbel = shared.gumbel(size=base.shape)
        targets = (base + gumbel).argmax(axis=1)
        own = self.of_configuration(assignment, "test").normal(0, 0.5, base.shape)
        noisy = base + own + self.rng.normal(0, 0.6, base.shape)
        rows = np.arange(self.examples)

        def log_p(sharpness: float) -> np.ndarray:
            scaled = sharpness * noisy
            return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))

        low, high = 0.9, 8.0
        for _ in range(30):
            middle = (low + high) / 2
            if -log_p(middle)[rows, targets].mean() < nll:
                low = middle
            else:
                high = middle
        found = log_p(low)
        return {
            "nll": -found[rows, targets],
            "correct": (found.argmax(axis=1) == targets).astype(float),
            "confidence": np.exp(found.max(axis=1)),
            "logits": found,
            "targets": targets,
        }


def fashion(seed: int = 0, **more: object) -> Fashion:
    return Fashion(loss=lambda rates, lr: 0.0, rng=np.random.default_rng(seed), **more)


def pruned(evidence: Evidence, share: float, rng: np.random.Generator) -> Evidence:
    """The evidence with the worse part of the search trials stopped early."""
    searched = [r for r in evidence.records if r.training.kind is TrainingKind.SEARCH]
    ranked = sorted(searched, key=evidence.benefit)
    stopped = {r.training.id for r in ranked[: int(share * len(ranked))]}
    return replace(
        evidence,
        records=tuple(
            _stopped(r, int(rng.integers(12, 30))) if r.training.id in stopped else r
            for r in evidence.records
        ),
    )


def _stopped(record: Record, at: int) -> Record:
    curves = {name: curve[:at] for name, curve in record.curves.items()}
    return replace(record, state=State.PRUNED, curves=curves, values=None, best_interval=None)
