"""The verdict: does dropout matter here, which rates, and how sure can one be.

better         the winner beats no dropout, also at the winner's own learning rate
learning_rate  it beats no dropout at that one's own learning rate, but not at the winner's
undetected     no difference was detected
worse          no dropout is better than the best dropout found
none           no training without dropout could be compared
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from droptune.training import Assignment, Record, State
from droptune.verdict.comparison import PRIMARY, Comparison, ablations, after_scaling, compare
from droptune.verdict.confirmation import AT_WINNERS_LR, Plan, pairs, plan
from droptune.verdict.evidence import BASELINES, Evidence, key
from droptune.verdict.findings import (
    Calibration,
    DropoutCost,
    Interaction,
    Overfitting,
    SiteFinding,
    calibration,
    dropout_cost,
    edge_warnings,
    lr_interaction,
    overfitting,
    site_findings,
)
from droptune.verdict.member import Member, best_baselines, lead, leading
from droptune.verdict.sentences import (
    baseline_sentence,
    headline,
    none_reason,
    provisional_headline,
    provisional_reason,
    recommendation_reason,
    scaling_sentence,
    winners_lr_sentence,
)
from droptune.verdict.statistics import Curse, winners_curse
from droptune.verdict.surface import Surface
from droptune.verdict.weakness import hints


@dataclass(frozen=True)
class Recommendation:
    """What to use: the `winner`, `none`, the `author`'s rates, or `half`; and why."""

    choice: str
    assignment: Assignment
    trial: int | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "assignment": self.assignment.to_json()}


@dataclass(frozen=True)
class Verdict:
    """The answer of a study; `to_json` is plain JSON.

    `sentence` is the answer in one sentence, `second` tells dropout's part from the learning
    rate's, `details` are the other comparisons. All differences are turned so that positive means
    that the winner is better. `leading` are the trials that lead the search, by label ("winner"
    where they have dropout), whose values the sentence compares where nothing is confirmed.
    """

    study: str
    confirmed: bool
    outcome: str
    sentence: str
    second: str
    details: tuple[str, ...]
    objective: Mapping[str, Any]
    winner: Member | None
    leading: Mapping[str, int]
    comparisons: tuple[Comparison, ...]
    recommended: Recommendation | None
    sites: tuple[SiteFinding, ...]
    importance: Mapping[str, float]
    overfitting: Overfitting | None
    curse: Curse | None
    interaction: Interaction | None
    cost: DropoutCost | None
    calibration: tuple[Calibration, ...]
    after_scaling: Comparison | None
    ablation: tuple[Comparison, ...]
    warnings: tuple[str, ...]
    hints: tuple[str, ...]
    counts: Mapping[str, int]
    plan: str

    def comparison(self, against: str) -> Comparison | None:
        """The comparison with a baseline, if there is one."""
        return next((one for one in self.comparisons if one.against == against), None)

    def to_json(self) -> dict[str, Any]:
        return {name: _json(value) for name, value in vars(self).items()}


def _json(value: Any) -> Any:
    if isinstance(value, Member):
        return {**vars(value), "assignment": value.assignment.to_json()}
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, tuple):
        return [_json(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


def judge(evidence: Evidence) -> Verdict:
    """The verdict on what is known now; provisional until every comparison is decided."""
    planned = plan(evidence)
    surface = Surface.of(evidence)
    compared = compare(evidence, planned)
    confirmed = planned.decided and any(one.difference.seeds > 1 for one in compared)
    winner = planned.winner or leading(evidence)
    outcome = _outcome(compared) if confirmed else "none"
    recommended = None
    if winner is not None and confirmed:
        recommended = _recommend(evidence, planned, compared, winner, outcome)
    elif winner is not None:
        recommended = _provisional(evidence, surface, winner)
    found = recommended.assignment if recommended else None
    slices = surface.slices(winner.assignment) if surface and winner else ()
    sites = site_findings(evidence, slices, found, winner.assignment) if found and winner else ()
    ours, theirs = _trained(evidence, planned)
    scaled = after_scaling(evidence, planned)
    return Verdict(
        study=evidence.spec.name,
        confirmed=confirmed,
        outcome=outcome,
        sentence=_sentence(evidence, outcome, compared, winner, confirmed=confirmed),
        second=_second(evidence, compared) if confirmed else "",
        details=_details(evidence, compared, scaled) if confirmed else (),
        objective=_objective(evidence, compared),
        winner=winner,
        leading=_leading_trials(evidence, winner),
        comparisons=compared,
        recommended=recommended,
        sites=sites,
        importance={one.input.name: one.importance for one in slices},
        overfitting=overfitting(evidence, planned),
        curse=_curse(evidence, planned, ours, theirs),
        interaction=lr_interaction(surface, slices, winner.assignment) if winner else None,
        cost=dropout_cost(evidence, ours, theirs),
        calibration=_calibrations(evidence, planned),
        after_scaling=scaled,
        ablation=ablations(evidence, planned),
        warnings=edge_warnings(evidence, sites, winner.assignment, _none(evidence))
        if winner
        else (),
        hints=hints(evidence, planned, compared),
        counts=_counts(evidence),
        plan=planned.reason,
    )


def _outcome(compared: Sequence[Comparison]) -> str:
    """Better only if better at the winner's lr, too: where both must hold, neither is corrected."""
    found = {one.against: one for one in compared}
    own, twin = found.get("none"), found.get(AT_WINNERS_LR)
    first = own or twin
    if first is None:
        return "none"
    if first.outcome == "better" and twin is not None and twin.outcome != "better":
        return "learning_rate"
    return first.outcome


def _leading_trials(evidence: Evidence, winner: Member | None) -> dict[str, int]:
    numbers = {"winner": winner.trial} if winner else {}
    numbers |= {member.label: member.trial for member in best_baselines(evidence)}
    return {label: number for label, number in numbers.items() if number is not None}


def _sentence(
    evidence: Evidence,
    outcome: str,
    compared: Sequence[Comparison],
    winner: Member | None,
    *,
    confirmed: bool,
) -> str:
    if confirmed:
        return headline(evidence, outcome, {one.against: one for one in compared})
    none = next((m for m in best_baselines(evidence) if m.label == "none"), None)
    return provisional_headline(evidence, winner, none)


def _none(evidence: Evidence) -> Assignment | None:
    """No dropout at its own best learning rate."""
    found = next((m for m in best_baselines(evidence) if m.label == "none"), None)
    return found.assignment if found else None


def _second(evidence: Evidence, compared: Sequence[Comparison]) -> str:
    return winners_lr_sentence(evidence, {one.against: one for one in compared})


def _details(
    evidence: Evidence, compared: Sequence[Comparison], scaled: Comparison | None
) -> tuple[str, ...]:
    found = {one.against: one for one in compared}
    others = [baseline_sentence(evidence, found[k]) for k in ("author", "half") if k in found]
    said = [*others, scaling_sentence(evidence, scaled)]
    return tuple(sentence for sentence in said if sentence)


def _objective(evidence: Evidence, compared: Sequence[Comparison]) -> dict[str, Any]:
    objective = evidence.objective
    return {
        "metric": objective.metric,
        "take": objective.take,
        "direction": objective.direction,
        "intervals": evidence.intervals,
        "data": compared[0].data if compared else "validation",
    }


def _recommend(
    evidence: Evidence,
    planned: Plan,
    compared: Sequence[Comparison],
    winner: Member,
    outcome: str,
) -> Recommendation:
    """The winner where it is better, or leads by more than one standard error; else no dropout.

    The author's rates or 0.5 where those beat the winner, and lead it by more than no dropout does.
    The simpler of two that cannot be told apart is the rule of one standard error (Breiman et al.
    1984).
    """
    members = {member.label: member for member in planned.compared}
    found = {one.against: one for one in compared}
    ahead = _ahead(found)
    if ahead is not None and _leads_most(ahead, found):
        choice, member = ahead.against, members[ahead.against]
    elif outcome in ("better", "none") or (outcome == "undetected" and _leads(found)):
        choice, member = "winner", winner
    else:
        none = _better_none(found)
        reason = none_reason(evidence, none, beaten=ahead is not None)
        return Recommendation("none", none.assignment, members[none.against].trial, reason)
    reason = recommendation_reason(evidence, choice, outcome)
    return Recommendation(choice, member.assignment, member.trial, reason)


def _provisional(evidence: Evidence, surface: Surface | None, winner: Member) -> Recommendation:
    """What leads the search; dropout only where it leads no dropout by more than chance does.

    Chance is the standard deviation of the difference of two single trainings, by the noise of the
    surface; any lead counts where there is none.
    """
    none = next((m for m in best_baselines(evidence) if m.label == "none"), None)
    ahead = math.inf if none is None else lead(evidence, winner, none)
    chance = math.sqrt(2) * surface.noise if surface else 0.0
    if none is not None and ahead <= chance:
        choice, member = "none", none
    else:
        choice, member = (winner.label if winner.label in BASELINES else "winner"), winner
    reason = provisional_reason(evidence, choice, ahead, chance)
    return Recommendation(choice, member.assignment, member.trial, reason)


def _ahead(found: Mapping[str, Comparison]) -> Comparison | None:
    """The one of author's rates and 0.5 that beats the winner by most; None where neither does."""
    others = (one for label, one in found.items() if label not in PRIMARY)
    beating = [one for one in others if one.outcome == "worse"]
    return min(beating, key=lambda one: one.difference.mean, default=None)


def _leads_most(ahead: Comparison, found: Mapping[str, Comparison]) -> bool:
    """Whether a baseline leads the winner by more than every no dropout does."""
    rivals = [found[label].difference for label in PRIMARY if label in found]
    return all(ahead.difference.mean < rival.mean for rival in rivals)


def _leads(found: Mapping[str, Comparison]) -> bool:
    """Whether the winner is more than one standard error above every no dropout."""
    rivals = [found[label].difference for label in PRIMARY if label in found]
    return all(rival.mean > rival.error for rival in rivals)


def _better_none(found: Mapping[str, Comparison]) -> Comparison:
    known = (found[label] for label in PRIMARY if label in found)
    return min(known, key=lambda one: one.difference.mean)


def _trained(evidence: Evidence, planned: Plan) -> tuple[list[Record], list[Record]]:
    """Verdict trainings of the winner and of no dropout on their common seeds."""
    none = [m for m in planned.compared if m.label in PRIMARY]
    if planned.winner is None or not none or planned.design is None:
        return [], []
    _, ours, theirs = pairs(evidence, planned.winner, none[0], planned.design.schedule[-1])
    return ours, theirs


def _curse(
    evidence: Evidence, planned: Plan, ours: Sequence[Record], theirs: Sequence[Record]
) -> Curse | None:
    found = _excess(evidence, planned.winner, ours)
    none = next((m for m in planned.compared if m.label == "none"), None)
    common = _excess(evidence, none, theirs)
    return found and replace(found, none=common.excess if common else None)


def _excess(evidence: Evidence, member: Member | None, trained: Sequence[Record]) -> Curse | None:
    if member is None or member.promised is None or not trained:
        return None
    values = np.array([record.value for record in trained], dtype=np.float64)
    return winners_curse(member.promised, values, str(evidence.objective.direction))


def _calibrations(evidence: Evidence, planned: Plan) -> tuple[Calibration, ...]:
    if not planned.decided or planned.winner is None:
        return ()
    assignments = {"winner": planned.winner.assignment}
    assignments |= {member.label: member.assignment for member in planned.compared}
    trained = _on_common_seeds(evidence, assignments)
    found = [calibration(evidence, label, records) for label, records in trained.items()]
    return tuple(one for one in found if one is not None)


def _on_common_seeds(
    evidence: Evidence, assignments: Mapping[str, Assignment]
) -> dict[str, list[Record]]:
    """Verdict trainings by label, on the seeds that all have (if two), so that means compare."""
    seeds = range(evidence.spec.confirm.max_seeds)
    trained = {label: evidence.confirmed(one, seeds) for label, one in assignments.items()}
    held = {label: by_seed for label, by_seed in trained.items() if by_seed}
    common = set(seeds).intersection(*held.values())
    return {
        label: [by_seed[i] for i in sorted(by_seed) if i in common or len(common) < 2]
        for label, by_seed in held.items()
    }


def _counts(evidence: Evidence) -> dict[str, int]:
    trials = [r for r in evidence.records if r.training.kind.is_trial]
    others = [r for r in evidence.records if not r.training.kind.is_trial]
    return {
        "trials": len(trials),
        "completed": sum(1 for r in trials if r.state is State.COMPLETE),
        "pruned": sum(1 for r in trials if r.state is State.PRUNED),
        "failed": sum(1 for r in trials if r.state is State.FAIL),
        "confirmations": sum(1 for r in others if r.state.finished),
        "distinct": len({key(r.training.assignment) for r in trials if r.training.assignment}),
        "intervals": sum(r.intervals_done for r in evidence.records),
    }


def members(evidence: Evidence, verdict: Verdict) -> dict[str, list[Record]]:
    """The trainings of the winner and of what it is compared with; single trials before that."""
    assignments: dict[str, Assignment] = {}
    if verdict.winner is not None:
        assignments["winner"] = verdict.winner.assignment
    assignments |= {one.against: one.assignment for one in verdict.comparisons}
    found = _on_common_seeds(evidence, assignments)
    if len(found) > 1:
        return found
    by_number = {record.training.number: record for record in evidence.trials}
    return {label: [by_number[number]] for label, number in verdict.leading.items()}
