"""The verdict in words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from droptune.verdict.comparison import Comparison
from droptune.verdict.confirmation import AT_WINNERS_LR
from droptune.verdict.evidence import Evidence
from droptune.verdict.member import Member, lead
from droptune.verdict.statistics import Difference, paired
from droptune.verdict.wording import (
    better_word,
    change,
    difference,
    how_found,
    interval,
    learning_rate,
    level,
    metric_name,
    worse_word,
)

Found = Mapping[str, Comparison]


def headline(evidence: Evidence, outcome: str, found: Found) -> str:
    """The answer in one sentence."""
    first = found.get("none", found.get(AT_WINNERS_LR))
    if first is None:
        return "No verdict on dropout: no training without it ended well on fresh seeds."
    if outcome == "better":
        return f"Dropout helps: {_by(evidence, first)} than without dropout{_fairly(first)}."
    if outcome == "worse":
        best = f"the best {how_found(evidence.records)}"
        return f"Dropout hurts: even {best} has {_by(evidence, first)}{_than_none(first)}."
    if outcome == "learning_rate":
        return _learning_rates(evidence, first, found[AT_WINNERS_LR])
    return (
        f"No detectable difference: dropout {_effect(evidence, first)}{_fairly(first)}; "
        f"{_detectable(evidence, first.difference)}."
    )


def _learning_rates(evidence: Evidence, own: Comparison, twin: Comparison) -> str:
    """Better than no dropout at its own learning rate, but not at the winner's."""
    seen = f"{_by(evidence, own)} than without dropout at its own learning rate"
    if twin.outcome == "worse":
        return (
            f"The gain is the learning rate's, not dropout's: {seen}, but with the winner's "
            f"learning rate for both dropout makes it worse (by {_change(evidence, twin)})."
        )
    return (
        f"The gain may be the learning rate's, not dropout's: {seen}, but with the winner's "
        f"learning rate for both no difference is detected (dropout {_effect(evidence, twin)})."
    )


def _detectable(evidence: Evidence, found: Difference) -> str:
    """What would have been seen, or why nothing can be."""
    if found.seeds < 2:
        return "one pair of trainings cannot tell it from chance"
    if not found.bounded:
        return "all seeds agree to the last digit, so chance cannot be judged"
    size = difference(evidence.objective.metric, found.detectable, found.detectable)
    return f"a difference of {size} or more would have been detected"


def _fairly(first: Comparison) -> str:
    return (
        ", each at its own best learning rate"
        if first.against == "none"
        else (", at the same learning rate")
    )


def _than_none(first: Comparison) -> str:
    return f" than no dropout{_fairly(first)}"


def _by(evidence: Evidence, one: Comparison) -> str:
    """`test NLL 0.274 nats lower [0.251, 0.297]`."""
    name, word = metric_name(evidence.objective.metric), _word(evidence, one.difference.mean)
    size, ends = _size(evidence, one)
    return f"{one.data} {name} {size} {word} {ends}"


def _change(evidence: Evidence, one: Comparison) -> str:
    """`−0.019 nats [−0.043, +0.004]`: what dropout does to the metric itself."""
    found = one.difference
    ends = sorted((evidence.sign * found.low, evidence.sign * found.high))
    return change(evidence.objective.metric, evidence.sign * found.mean, *ends)


def _word(evidence: Evidence, gain: float) -> str:
    return better_word(evidence.objective) if gain > 0 else worse_word(evidence.objective)


def winners_lr_sentence(evidence: Evidence, found: Found) -> str:
    """The line that tells dropout's part from the learning rate's."""
    own, twin = found.get("none"), found.get(AT_WINNERS_LR)
    if twin is None or own is None:
        return ""
    seen = _between(evidence, own, twin)
    if seen is None:
        return ""
    metric, part = evidence.objective.metric, evidence.sign * seen.mean
    half = min(seen.high - seen.mean, (twin.difference.high - twin.difference.low) / 2)
    there, here = learning_rate(own.assignment.lr), learning_rate(twin.assignment.lr)
    return (
        f"With the winner's learning rate ({here}) for both, dropout {_effect(evidence, twin)}; "
        f"without dropout, that learning rate instead of {there} "
        f"{'raises' if part > 0 else 'lowers'} it by {difference(metric, part, half)}."
    )


def _between(evidence: Evidence, own: Comparison, twin: Comparison) -> Difference | None:
    """The second member over the first, on the seeds of both; None where those are none."""
    gains, others = (dict(zip(one.seeds, one.each, strict=True)) for one in (own, twin))
    common = [seed for seed in gains if seed in others]
    if not common or own.data != twin.data:
        return None
    each = np.array([gains[seed] - others[seed] for seed in common])
    return paired(each, overlap=evidence.overlap)


def _effect(evidence: Evidence, one: Comparison) -> str:
    """`lowers test NLL by 0.098 nats [0.078, 0.118]`, or how it changes it."""
    name = f"{one.data} {metric_name(evidence.objective.metric)}"
    if one.outcome == "undetected":
        return f"changes {name} by {_change(evidence, one)}"
    verb = "lowers" if _word(evidence, one.difference.mean) == "lower" else "raises"
    return f"{verb} {name} by {' '.join(_size(evidence, one))}"


def _size(evidence: Evidence, one: Comparison) -> tuple[str, str]:
    """`0.274 nats` and `[0.251, 0.297]`: how large a difference is, without signs."""
    metric, found = evidence.objective.metric, one.difference
    low, high = (found.low, found.high) if found.mean > 0 else (-found.high, -found.low)
    return difference(metric, found.mean, (high - low) / 2), interval(metric, low, high)


def baseline_sentence(evidence: Evidence, one: Comparison) -> str:
    """The winner against the author's rates, or against 0.5."""
    whom = "the author's rates" if one.against == "author" else evidence.name(one.against)
    if one.outcome == "better":
        return f"Better than {whom}: {_by(evidence, one)}."
    if one.outcome == "worse":
        return f"Worse than {whom}: {_by(evidence, one)}."
    return (
        f"The {evidence.name('winner')} is not told apart from {whom}: it "
        f"{_effect(evidence, one)}; {_detectable(evidence, one.difference)}."
    )


def scaling_sentence(evidence: Evidence, scaled: Comparison | None) -> str:
    """What is left of the difference after temperature scaling."""
    if scaled is None:
        return ""
    said = f"dropout {_effect(evidence, scaled)}{_fairly(scaled)}"
    return f"After temperature scaling of both, {said}."


def provisional_headline(evidence: Evidence, winner: Member | None, none: Member | None) -> str:
    """What the search alone says, labelled as unconfirmed."""
    if winner is None or winner.promised is None:
        return "NOT CONFIRMED: no trial with dropout has completed."
    metric = evidence.objective.metric
    best = f"NOT CONFIRMED: the leading trial with dropout has {metric_name(metric)} "
    best += level(metric, winner.promised)
    if none is None or none.promised is None:
        return f"{best}; no trial without dropout has completed."
    ahead = lead(evidence, winner, none)
    size = difference(metric, ahead, abs(ahead) / 3)
    return (
        f"{best}, {size} {_word(evidence, ahead)} than the leading one without "
        f"({level(metric, none.promised)}); one training each, so chance is not excluded."
    )


def provisional_reason(evidence: Evidence, choice: str, ahead: float, chance: float) -> str:
    """Why these rates before confirmation; `ahead`: by how much dropout leads no dropout."""
    if choice != "none":
        who = {"author": "the author's rates lead", "half": f"{evidence.name('half')} leads"}
        return f"{who.get(choice, 'dropout leads')} the search; not confirmed"
    if ahead <= 0:
        return "no dropout leads the search; not confirmed"
    size = difference(evidence.objective.metric, chance, chance)
    return (
        "no dropout costs nothing, and dropout leads the search by no more than two trainings "
        f"differ by chance (about {size}); not confirmed"
    )


def none_reason(evidence: Evidence, one: Comparison, *, beaten: bool) -> str:
    """Why no dropout, and this learning rate; `beaten`: author's rates or 0.5 beat the winner."""
    whose = "its own best" if one.against == "none" else "the winner's"
    none = f"no dropout, at {whose} learning rate,"
    if beaten:
        return f"{none} leads {_winner(evidence)}, by more than any other baseline does"
    if one.outcome == "worse":
        return f"{none} is better"
    return f"{none} does as well, and costs nothing"


def recommendation_reason(evidence: Evidence, choice: str, outcome: str) -> str:
    """Why dropout, and these rates."""
    if choice == "author":
        return f"the author's rates beat {_winner(evidence)}; they are not tested against none"
    if choice == "half":
        half = evidence.name("half")
        return f"{half} beats {_winner(evidence)}; it is not tested against none"
    if outcome == "undetected":
        return "the best guess: it leads, but the lead is not proven"
    if outcome == "none":
        return f"the best dropout {how_found(evidence.records)}; no dropout failed on fresh seeds"
    return "the smallest rates within one standard error of the best, confirmed on fresh seeds"


def _winner(evidence: Evidence) -> str:
    return f"the dropout that was {how_found(evidence.records)}"
