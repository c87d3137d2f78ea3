"""Which trainings confirm a study: front runners to choose from, then the chosen one in pairs.

Two stages, on different seeds. On the choice seeds every front runner is trained, and the winner is
chosen by its validation values. On the verdict seeds, which had no part in the choice, the winner
and the baselines are trained in pairs, sequentially, until each comparison is decided. So what is
said of the winner is free of the choice; what stops the seeds is in `statistics.settled`.

All is a function of the records alone: any worker can plan, at any time, again and again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from droptune.spec.sections import Confirm
from droptune.training import Assignment, NewTraining, Record, Seeds, TrainingKind
from droptune.verdict.evidence import Evidence, key, usable
from droptune.verdict.member import Member, best_baselines, front_runners
from droptune.verdict.statistics import ALPHA, Array, looks, settled

CHOICE = 100  # seed indices from here on choose the winner; those below are the verdict's
AT_WINNERS_LR = "none at the winner's lr"


@dataclass(frozen=True)
class Design:
    """What confirming this study takes, fixed before the first confirmation."""

    front: tuple[Member, ...]
    baselines: tuple[Member, ...]
    choice_seeds: int  # 0 where there is nothing to choose
    schedule: tuple[int, ...]  # verdict seeds at each look
    allowance: float  # trainings

    @property
    def choice_indices(self) -> range:
        return range(CHOICE, CHOICE + self.choice_seeds)


@dataclass(frozen=True)
class Stop:
    """Where a comparison stopped: `decided`, `hopeless`, `seeds` (all spent) or `budget`."""

    look: int
    why: str


@dataclass(frozen=True)
class Plan:
    """What to train next. `decided`: nothing; `winner` is known once it is chosen.

    `stops` maps the label of each compared member to where its comparison stopped.
    """

    queue: tuple[NewTraining, ...]
    decided: bool
    reason: str
    design: Design | None = None
    winner: Member | None = None
    compared: tuple[Member, ...] = ()
    stops: Mapping[str, Stop] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """Confirmations that a study will train, at least and at most, and their intervals."""

    least: int
    most: int
    intervals_least: int
    intervals_most: int


Wanted = tuple[Member, int]  # a member and a seed index


def plan(evidence: Evidence) -> Plan:
    """What to train next so that the study can be judged."""
    if not evidence.spec.confirm.enabled:
        return Plan((), True, "confirmation was left out")
    design = make_design(evidence)
    if design is None:
        return Plan((), True, "no trial with dropout ended with a finite objective")
    choosing = [(m, i) for m in design.front for i in design.choice_indices]
    first = [(m, i) for m in design.baselines for i in range(design.schedule[0])]
    if _unfinished(evidence, choosing):
        reason = f"choosing among {len(design.front)} front runners"
        return Plan(_queue(evidence, choosing + first), False, reason, design)
    winner = choose(evidence, design)
    if winner is None:
        return Plan((), True, "every front runner failed on a fresh seed", design)
    paired = _compare(evidence, design, winner)
    if paired.decided and evidence.spec.confirm.ablate:
        return _ablate(evidence, paired)
    return paired


def predicted_cost(confirm: Confirm, *, trials: int, baselines: int, intervals: int) -> Cost:
    """What confirming costs, before the search has run.

    `baselines` counts those that are searched (equal ones once); one more is trained at the
    winner's learning rate.
    """
    allowance = allowance_of(confirm, trials)
    kept, front, choice_seeds = _sizes(confirm, allowance, baselines)
    first = front * choice_seeds + (2 + kept) * confirm.min_seeds
    last = front * choice_seeds + (2 + kept) * confirm.max_seeds
    most = int(max(first, min(last, allowance)))
    return Cost(first, most, first * intervals, most * intervals)


def allowance_of(confirm: Confirm, trials: int) -> float:
    """Trainings that confirming may take, so that they are `share` of search and confirmation."""
    if confirm.share >= 1:
        return math.inf
    return float(round(trials * confirm.share / (1 - confirm.share)))


def _sizes(confirm: Confirm, allowance: float, baselines: int) -> tuple[int, int, int]:
    """How many baselines and front runners fit the allowance, and on how many choice seeds.

    The winner and no dropout on `min_seeds` each are trained whatever the allowance says; a
    choice takes a third of it at most.
    """
    seeds = confirm.min_seeds
    while baselines > 1 and (2 + baselines) * seeds > allowance:
        baselines -= 1
    room = min(allowance - (2 + baselines) * seeds, allowance / 3)
    front = confirm.top + 1 if math.isinf(room) else min(confirm.top + 1, int(room // seeds))
    return (baselines, front, seeds) if front > 1 and confirm.top > 1 else (baselines, 1, 0)


# -- who takes part -------------------------------------------------------------------------------


def make_design(evidence: Evidence) -> Design | None:
    """Front runners, baselines and seeds of a study whose search has ended."""
    confirm = evidence.spec.confirm
    spent = sum(1 for r in evidence.records if r.training.kind.is_trial and r.state.finished)
    allowance = allowance_of(confirm, spent)
    known = best_baselines(evidence)
    kept, count, choice_seeds = _sizes(confirm, allowance, len(known))
    front = front_runners(evidence, count)
    if not front:
        return None
    if len(front) == 1:
        choice_seeds = 0
    schedule = looks(confirm.min_seeds, _last_seed(confirm, allowance, kept, count * choice_seeds))
    return Design(front, known[:kept], choice_seeds, schedule, allowance)


def _last_seed(confirm: Confirm, allowance: float, baselines: int, choosing: int) -> int:
    """How many verdict seeds the winner and one baseline can reach within the allowance."""
    left = allowance - choosing - (2 + baselines) * confirm.min_seeds
    further = confirm.max_seeds if math.isinf(left) else max(math.floor(left / 2), 0)
    return min(confirm.max_seeds, confirm.min_seeds + further)


# -- what is missing ------------------------------------------------------------------------------


def choose(evidence: Evidence, design: Design) -> Member | None:
    """The winner: the mildest front runner within one standard error of the best on choice seeds.

    A front runner that failed on a seed is out; None where all failed.
    """
    if len(design.front) == 1:
        return design.front[0]
    values: dict[str, Array] = {}
    for member in design.front:
        found = evidence.confirmed(member.assignment, design.choice_indices)
        if len(found) == design.choice_seeds:
            values[member.label] = np.array([evidence.benefit(found[i]) for i in sorted(found)])
    able = [member for member in design.front if member.label in values]
    if not able:
        return None
    best = max(able, key=lambda member: float(values[member.label].mean()))
    within = [m for m in able if _within_one_error(values[best.label] - values[m.label])]
    return min(within, key=lambda m: (round(m.assignment.mean_rate, 6), m.trial or 0))


def _within_one_error(lead: Array) -> bool:
    error = float(lead.std(ddof=1)) / math.sqrt(len(lead)) if len(lead) > 1 else 0.0
    return float(lead.mean()) <= error


def compared_members(evidence: Evidence, design: Design, winner: Member) -> tuple[Member, ...]:
    """Whom the winner is compared with: the baselines, and no dropout at the winner's own lr."""
    twin = Member(AT_WINNERS_LR, evidence.without_dropout(winner.assignment))
    none = next((m for m in design.baselines if m.label == "none"), None)
    others = [m for m in design.baselines if key(m.assignment) != key(winner.assignment)]
    if none is None or not _same_lr(none.assignment, twin.assignment):
        others.append(twin)
    return tuple(others)


def _same_lr(one: Assignment, other: Assignment) -> bool:
    close = max(one.lr / other.lr, other.lr / one.lr) <= 1.1
    return close and one.values == other.values


def alpha_of(label: str, compared: Sequence[Member]) -> float:
    """The error a comparison is stopped at.

    No dropout is the question of the study and has its own 5 %; the other baselines share 5 %.
    """
    others = [m for m in compared if m.label not in ("none", AT_WINNERS_LR)]
    return ALPHA if label in ("none", AT_WINNERS_LR) else ALPHA / max(len(others), 1)


def _compare(evidence: Evidence, design: Design, winner: Member) -> Plan:
    compared = compared_members(evidence, design, winner)
    stops: dict[str, Stop] = {}
    for look, seeds in enumerate(design.schedule):
        open_ = _affordable(evidence, design, winner, _open(compared, stops), look)
        for member in _open(compared, stops)[len(open_) :]:
            stops[member.label] = Stop(look - 1, "budget")
        if not open_:
            break
        wanted = [(m, i) for m in (winner, *open_) for i in range(seeds)]
        if _unfinished(evidence, wanted):
            reason = f"{len(open_)} of {len(compared)} comparisons open, {seeds} seeds"
            new = _queue(evidence, wanted)
            return Plan(new, False, reason, design, winner, compared, stops)
        stops |= dict(_stopped(evidence, design, winner, open_, look))
    return Plan((), True, _why(stops), design, winner, compared, stops)


def _open(compared: Sequence[Member], stops: Mapping[str, Stop]) -> list[Member]:
    """Members whose comparison goes on, the question of the study first."""
    first = ("none", AT_WINNERS_LR)
    going = [member for member in compared if member.label not in stops]
    return sorted(going, key=lambda m: first.index(m.label) if m.label in first else len(first))


def _affordable(
    evidence: Evidence, design: Design, winner: Member, open_: list[Member], look: int
) -> list[Member]:
    """As many of the open members, from the first, as this look may train; all at look 0."""
    if look == 0:
        return open_
    for count in range(len(open_), 0, -1):
        members = (winner, *open_[:count])
        new = _queue(evidence, [(m, i) for m in members for i in range(design.schedule[look])])
        if not new or len(evidence.confirmations) + len(new) <= design.allowance:
            return open_[:count]
    return []


def _stopped(
    evidence: Evidence, design: Design, winner: Member, open_: Sequence[Member], look: int
) -> Iterator[tuple[str, Stop]]:
    for member in open_:
        indices, ours, theirs = pairs(evidence, winner, member, design.schedule[look])
        gains = gain(evidence, ours, theirs)
        alpha = alpha_of(member.label, compared_members(evidence, design, winner))
        overlap = evidence.overlap
        known = len(indices) > 1
        why = settled(gains, design.schedule, look, alpha, overlap) if known else None
        if why is not None:
            yield member.label, Stop(look, why)
        elif look == len(design.schedule) - 1:
            yield member.label, Stop(look, "seeds")


def pairs(
    evidence: Evidence, winner: Member, other: Member, seeds: int
) -> tuple[list[int], list[Record], list[Record]]:
    """Seed indices below `seeds` on which both were trained to the end, and their records."""
    ours = evidence.confirmed(winner.assignment, range(seeds))
    theirs = evidence.confirmed(other.assignment, range(seeds))
    both = sorted(set(ours) & set(theirs))
    return both, [ours[i] for i in both], [theirs[i] for i in both]


def gain(evidence: Evidence, ours: Sequence[Record], theirs: Sequence[Record]) -> Array:
    """Paired differences of the validation objective [pairs]; positive: ours are better."""
    both = zip(ours, theirs, strict=True)
    return np.array([evidence.benefit(a) - evidence.benefit(b) for a, b in both])


def _why(stops: Mapping[str, Stop]) -> str:
    words = {
        "decided": "decided on validation",
        "hopeless": "given up on validation: not decidable with the seeds allowed",
        "seeds": "all seeds spent",
        "budget": "the share of the budget spent",
    }
    return "; ".join(f"{label}: {words[stop.why]}" for label, stop in stops.items())


def _unfinished(evidence: Evidence, wanted: Sequence[Wanted]) -> bool:
    found = (evidence.confirmations.get((key(m.assignment), i)) for m, i in wanted)
    return any(record is None or not record.state.finished for record in found)


def _queue(evidence: Evidence, wanted: Sequence[Wanted]) -> tuple[NewTraining, ...]:
    """Those of the wanted trainings that SQL does not hold yet."""
    new = [(m, i) for m, i in wanted if (key(m.assignment), i) not in evidence.confirmations]
    return tuple(_training(evidence, TrainingKind.CONFIRMATION, m, i) for m, i in new)


def _training(evidence: Evidence, kind: TrainingKind, member: Member, index: int) -> NewTraining:
    seeds = Seeds.of_confirmation(evidence.spec.seed, index, evidence.spec.confirm.splits)
    return NewTraining(kind, member.assignment, member.label, seeds, index)


# -- ablation -------------------------------------------------------------------------------------


def ablated_members(evidence: Evidence, winner: Member) -> tuple[Member, ...]:
    """The winner without dropout at one group of sites, for each group where it has any."""
    groups = evidence.groups or {path: (path,) for path in evidence.searched}
    members = [
        Member(f"without {name}", evidence.without_dropout(winner.assignment, paths))
        for name, paths in groups.items()
        if any(winner.assignment.rates.get(path, 0.0) > 0 for path in paths)
    ]
    return tuple(members) if len(members) > 1 else ()


def _ablate(evidence: Evidence, done: Plan) -> Plan:
    """Leave one group out, on the verdict seeds of the first look."""
    assert done.winner is not None
    assert done.design is not None
    wanted = [
        (member, index)
        for member in ablated_members(evidence, done.winner)
        for index in range(done.design.schedule[0])
    ]
    found = evidence.ablations
    new = [(m, i) for m, i in wanted if (key(m.assignment), i) not in found]
    queue = tuple(_training(evidence, TrainingKind.ABLATION, m, i) for m, i in new)
    waiting = any(not found[key(m.assignment), i].state.finished for m, i in wanted if not new)
    if not new and not waiting:
        return done
    return replace(done, queue=queue, decided=False, reason="leaving out one group at a time")


def ablation_pairs(
    evidence: Evidence, winner: Member, member: Member, seeds: int
) -> tuple[list[Record], list[Record]]:
    """Records of the winner and of an ablated member on their common verdict seeds."""
    ours = evidence.confirmed(winner.assignment, range(seeds))
    found = {i: evidence.ablations.get((key(member.assignment), i)) for i in ours}
    theirs = {i: record for i, record in found.items() if record is not None and usable(record)}
    both = sorted(theirs)
    return [ours[i] for i in both], [theirs[i] for i in both]
