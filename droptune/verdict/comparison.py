"""The winner against one other configuration, on seeds that had no part in choosing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from droptune.training import Assignment, Record
from droptune.verdict.confirmation import (
    AT_WINNERS_LR,
    Plan,
    ablated_members,
    ablation_pairs,
    gain,
    pairs,
)
from droptune.verdict.evidence import Evidence, Scores
from droptune.verdict.member import Member
from droptune.verdict.statistics import (
    ALPHA,
    Array,
    Difference,
    finite,
    holm,
    holm_alphas,
    paired,
    verdict_share,
)

PRIMARY = ("none", AT_WINNERS_LR)  # one question together, with its own 5 %


@dataclass(frozen=True)
class Comparison:
    """Winner minus another member, turned so that positive means that the winner is better.

    `ours` and `theirs` are the mean values of the objective's metric on `data` ("test", or
    "validation" where there are no test scores); `each` are the differences of single seeds;
    `adjusted_p` is corrected for the other comparisons of its family (Holm).
    """

    against: str
    assignment: Assignment
    difference: Difference
    ours: float
    theirs: float
    seeds: tuple[int, ...]
    each: tuple[float, ...]
    data: str
    stopped: str
    adjusted_p: float

    @property
    def outcome(self) -> str:
        return self.difference.outcome

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {
            "assignment": self.assignment.to_json(),
            "difference": self.difference.to_json(),
            "outcome": self.outcome,
        }
        return {name: finite(value) for name, value in fields.items()}


def compare(evidence: Evidence, plan: Plan) -> tuple[Comparison, ...]:
    """The winner against every compared member with at least one common seed.

    Test scores are looked at only when the plan is decided; without them, or before, the
    validation values are compared.
    """
    if plan.winner is None or plan.design is None:
        return ()
    found = []
    for member in plan.compared:
        stop = plan.stops.get(member.label)
        look = len(plan.design.schedule) - 1 if stop is None else stop.look
        decided = stop is not None and stop.why == "decided"
        share = verdict_share(look, plan.design.schedule, decided=decided)
        indices, ours, theirs = pairs(evidence, plan.winner, member, plan.design.schedule[look])
        why = "open" if stop is None else stop.why
        if indices:
            test = plan.decided
            found.append(_one(evidence, member, (indices, ours, theirs), share, why, test=test))
    return _corrected([c for c in found if c.against in PRIMARY], family=False) + _corrected(
        [c for c in found if c.against not in PRIMARY], family=True
    )


def ablations(evidence: Evidence, plan: Plan) -> tuple[Comparison, ...]:
    """The winner against itself without one group of sites, Holm over the groups."""
    if plan.winner is None or plan.design is None:
        return ()
    found = []
    for member in ablated_members(evidence, plan.winner):
        seeds = plan.design.schedule[0]
        ours, theirs = ablation_pairs(evidence, plan.winner, member, seeds)
        indices = [r.training.seed_index or 0 for r in ours]
        if indices:
            both = (indices, ours, theirs)
            found.append(_one(evidence, member, both, 1.0, "seeds", test=plan.decided))
    return _corrected(found, family=True)


def after_scaling(evidence: Evidence, plan: Plan) -> Comparison | None:
    """The test NLL against no dropout after temperature scaling of both.

    Temperature scaling alone repairs much of what overfitting does to probabilities, so this is
    what dropout gives beyond it. None without stored logits, or where NLL is not the objective.
    """
    none = next((m for m in plan.compared if m.label in PRIMARY), None)
    if not plan.decided or plan.winner is None or none is None or plan.design is None:
        return None
    indices, ours, theirs = pairs(evidence, plan.winner, none, plan.design.schedule[-1])
    scaled = [[evidence.scaled(record) for record in side] for side in (ours, theirs)]
    held = [[one.nll for one in side if one is not None] for side in scaled]
    complete = all(len(side) == len(indices) for side in held)
    if evidence.objective.metric != "nll" or len(indices) < 2 or not complete:
        return None
    a, b = np.stack(held[0]), np.stack(held[1])
    found = paired(b - a, overlap=evidence.overlap)
    each = tuple(float(x) for x in (b - a).mean(axis=1))
    means = float(a.mean()), float(b.mean())
    return Comparison(
        none.label, none.assignment, found, *means, tuple(indices), each, "test", "seeds", found.p
    )


Pairs = tuple[Sequence[int], Sequence[Record], Sequence[Record]]


def _one(
    evidence: Evidence, member: Member, both: Pairs, share: float, why: str, *, test: bool
) -> Comparison:
    indices, ours, theirs = both
    measured = _tested(evidence, both) if test else None
    if measured is None:
        rows: Array = gain(evidence, ours, theirs)
        data, mean, other = "validation", _mean(ours), _mean(theirs)
    else:
        indices, rows, mean, other = measured
        data = "test"
    found = paired(rows, share=share, overlap=evidence.overlap)
    each = rows if rows.ndim == 1 else rows.mean(axis=1)
    return Comparison(
        against=member.label,
        assignment=member.assignment,
        difference=found,
        ours=mean,
        theirs=other,
        seeds=tuple(indices),
        each=tuple(float(x) for x in each),
        data=data,
        stopped=why,
        adjusted_p=found.p,
    )


def _mean(records: Sequence[Record]) -> float:
    return float(np.mean([record.value for record in records if record.value is not None]))


def _tested(evidence: Evidence, both: Pairs) -> tuple[list[int], Array, float, float] | None:
    """Seed indices, differences on the test set ([seeds, examples], or [seeds]) and both means.

    Pairs without finite scores on both sides are left out; None where fewer than two are left.
    """
    metric = evidence.objective.metric
    known: list[tuple[int, Array, Array]] = []
    for index, ours, theirs in zip(*both, strict=True):
        a, b = (test_scores(evidence, record, metric) for record in (ours, theirs))
        if a is not None and b is not None:
            known.append((index, a, b))
    if len(known) < 2:
        return None
    indices, mine, others = zip(*known, strict=True)
    first, second = np.stack(mine), np.stack(others)
    rows = evidence.sign * (first - second)
    rows = rows if rows.shape[1] > 1 else rows[:, 0]
    return list(indices), rows, float(first.mean()), float(second.mean())


def test_scores(evidence: Evidence, record: Record, metric: str) -> Array | None:
    """Scores [N] of one training whose mean is its test metric, or [1] where only that is known.

    None where they are not known, or not finite.
    """
    scores = evidence.scores.get(record.training.id)
    found = None if scores is None else example_scores(metric, scores)
    tested = evidence.tested.get(record.training.id, {})
    if found is None and metric in tested:
        found = np.array([tested[metric]])
    return found if found is not None and bool(np.isfinite(found).all()) else None


def example_scores(metric: str, scores: Scores) -> Array | None:
    """Scores [N] of single examples whose mean is the metric; None where it is no such mean.

    The RMSE is linearised around the model's own (its mean over the examples is exact).
    """
    if metric in _DERIVED:
        name, derive = _DERIVED[metric]
        return derive(np.asarray(scores[name], dtype=np.float64)) if name in scores else None
    return np.asarray(scores[metric], dtype=np.float64) if metric in scores else None


def _root(squared: Array) -> Array:
    root = float(np.sqrt(squared.mean()))
    return root + (squared - root**2) / (2 * root) if root > 0 else squared


_DERIVED: Mapping[str, tuple[str, Callable[[Array], Array]]] = {
    "accuracy": ("correct", lambda correct: correct),
    "error": ("correct", lambda correct: 1 - correct),
    "rmse": ("mse", _root),
}


def _corrected(found: Sequence[Comparison], *, family: bool) -> tuple[Comparison, ...]:
    """With the levels and p-values of Holm's procedure where they are a family."""
    if not family:
        return tuple(found)
    p_values = [comparison.difference.p for comparison in found]
    levels, adjusted = holm_alphas(p_values, ALPHA), holm(p_values)
    return tuple(
        replace(one, difference=one.difference.at_level(level), adjusted_p=p)
        for one, level, p in zip(found, levels, adjusted, strict=True)
    )
