"""Who takes part in a confirmation: front runners of the search, and each baseline at its best.

Both are ranked with the response surface, which knows what a trial's neighbours had: the raw best
of a few noisy trials is often the luckiest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from droptune.training import Assignment, Record, TrainingKind
from droptune.verdict.evidence import BASELINES, Evidence, assigned, key
from droptune.verdict.statistics import Array
from droptune.verdict.surface import Surface

SAME_RATE, SAME_LR = 0.05, 1.25  # closer than this, two trials are one front runner


@dataclass(frozen=True)
class Member:
    """A configuration that is confirmed, and the trial of the search that it repeats."""

    label: str
    assignment: Assignment
    trial: int | None = None
    promised: float | None = None  # its objective in the search


def _member(record: Record, label: str | None = None) -> Member:
    name = label or f"trial {record.training.number}"
    return Member(name, assigned(record), record.training.number, record.value)


def best_baselines(evidence: Evidence) -> tuple[Member, ...]:
    """Each baseline at its own best: none, author, half, without those equal to an earlier one.

    Of all trials with its rates, whoever proposed them, those count that are within one standard
    error of the best on the surface, and the best value among them: where noise is large, a lucky
    trial at a poor learning rate is left out; where the surface sees no difference, the trials
    decide.
    """
    members: dict[str, Member] = {}
    for label, trials in _trials_of_baselines(evidence).items():
        if trials:
            best = _best(evidence, trials)
            members.setdefault(_rates(best), _member(best, label))
    return tuple(members.values())


def leading(evidence: Evidence) -> Member | None:
    """The trial with dropout that leads the search, be it a baseline's; chosen as theirs are."""
    trials = [r for r in evidence.trials if evidence.has_dropout(assigned(r))]
    if not trials:
        return None
    known = [m for m in best_baselines(evidence) if evidence.has_dropout(m.assignment)]
    return max(
        [*known, _member(_best(evidence, trials))],
        key=lambda member: evidence.sign * (member.promised or 0.0),
    )


def lead(evidence: Evidence, one: Member, other: Member) -> float:
    """By how much one trial was better than the other."""
    assert one.promised is not None
    assert other.promised is not None
    return evidence.sign * (one.promised - other.promised)


def _best(evidence: Evidence, trials: Sequence[Record]) -> Record:
    """The best value among the trials within one standard error of the best on the surface."""
    within = [trials[i] for i in _within_one_error(*noise_aware(evidence, trials))]
    return min(within, key=lambda r: (-evidence.benefit(r), r.training.number or 0))


def _trials_of_baselines(evidence: Evidence) -> dict[str, list[Record]]:
    trials = evidence.trials
    found = {"none": [r for r in trials if not evidence.has_dropout(assigned(r))]}
    for record in evidence.records:
        training = record.training
        if training.kind is TrainingKind.BASELINE and training.assignment is not None:
            rates = training.assignment.rates
            found[training.label] = [r for r in trials if assigned(r).rates == rates]
    return {label: found[label] for label in BASELINES if label in found}


def _rates(record: Record) -> str:
    return key(replace(assigned(record), lr=1.0, values={}))


def front_runners(evidence: Evidence, count: int) -> tuple[Member, ...]:
    """The best trials with dropout by noise-aware value, no two alike, and the mildest of the best.

    One place goes to the smallest mean rate among the trials within one standard error of the
    best.
    """
    candidates = [r for r in evidence.trials if evidence.has_dropout(assigned(r))]
    if not candidates:
        return ()
    benefit, error = noise_aware(evidence, candidates)
    order = _ranked(benefit)
    within = _within_one_error(benefit, error)
    mildest = min(within, key=lambda i: (round(assigned(candidates[i]).mean_rate, 6), i))
    ranked = order if count < 2 else [order[0], mildest, *order]
    chosen: list[Record] = []
    for index in ranked:
        if len(chosen) < count and not any(_alike(candidates[index], c) for c in chosen):
            chosen.append(candidates[index])
    return tuple(_member(record) for record in chosen)


def noise_aware(evidence: Evidence, trials: Sequence[Record]) -> tuple[Array, Array]:
    """Benefit of trials [n] on the surface, with standard errors; raw where there is no surface."""
    surface = Surface.of(evidence)
    if surface is None:
        return np.array([evidence.benefit(r) for r in trials]), np.zeros(len(trials))
    return surface.benefit([assigned(record) for record in trials])


def _ranked(benefit: Array) -> list[int]:
    """Indices, the best first; to six digits, since workers on all machines must rank alike."""
    return sorted(range(len(benefit)), key=lambda i: (-float(f"{benefit[i]:.6g}"), i))


def _within_one_error(benefit: Array, error: Array) -> list[int]:
    """Those that are less than one standard error behind the best, the best first."""
    order = _ranked(benefit)
    return [i for i in order if benefit[i] >= benefit[order[0]] - error[order[0]]]


def _alike(one: Record, other: Record) -> bool:
    a, b = assigned(one), assigned(other)
    close = all(abs(rate - b.rates.get(path, rate)) <= SAME_RATE for path, rate in a.rates.items())
    return close and max(a.lr / b.lr, b.lr / a.lr) <= SAME_LR and a.values == b.values
