"""Why a study may have been too weak to tell, and what would make it stronger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from droptune.training import Record, State, TrainingKind
from droptune.verdict.comparison import Comparison, test_scores
from droptune.verdict.confirmation import AT_WINNERS_LR, Plan, pairs
from droptune.verdict.evidence import Evidence, usable
from droptune.verdict.findings import mean_curve, values_at_objective
from droptune.verdict.statistics import Difference, binomial_error, paired
from droptune.verdict.surface import find_inputs
from droptune.verdict.wording import counted, difference, metric_name

COUNTED = ("accuracy", "error")  # metrics that are shares of examples
COARSE = (*COUNTED, "precision", "recall", "f1")  # metrics that see only right or wrong
TELLS_MORE = ("nll", "brier", "mse")  # metrics that see more than right or wrong


def hints(evidence: Evidence, plan: Plan, compared: Sequence[Comparison]) -> tuple[str, ...]:
    """What limits this study, most important first; empty where nothing does."""
    return (
        *_not_confirmed(evidence, plan),
        *_first_of_several(evidence),
        *_fixed_sites(evidence),
        *_validation_too_small(evidence),
        *_metric_cannot_tell(evidence, plan, compared),
        *_too_few_seeds(evidence, compared),
        *_budget_too_short(evidence, plan),
        *_no_test_set(evidence, plan, compared),
        *_failures(evidence),
        *_not_scored(evidence, plan),
        *_small_search(evidence),
    )


def _not_confirmed(evidence: Evidence, plan: Plan) -> Iterator[str]:
    if not evidence.spec.confirm.enabled:
        yield f"{plan.reason}; confirm now with: `droptune study confirm {evidence.spec.name}`"
    elif not plan.decided:
        yield f"confirmation is not finished: {plan.reason}"
    elif plan.winner is None:
        yield f"nothing was confirmed: {plan.reason}"


def _first_of_several(evidence: Evidence) -> Iterator[str]:
    first, *others = (metric_name(objective.metric) for objective in evidence.spec.objectives)
    if others:
        yield (
            f"the verdict is about {first}, the first objective: what it costs in "
            f"{' and '.join(others)} is for you to weigh, on the Pareto front"
        )


def _fixed_sites(evidence: Evidence) -> Iterator[str]:
    """That "no dropout" and "everywhere" are said of the searched sites alone."""
    of_rate: dict[float, list[str]] = {}
    for path, rate in evidence.fixed.items():
        of_rate.setdefault(rate, []).append(path)
    known = [f"{_named(paths)} at {rate:g}" for rate, paths in of_rate.items()]
    if known:
        yield (
            "fixed sites keep their rates everywhere, also where this says no dropout: "
            + ", ".join(known)
        )


def _named(paths: Sequence[str]) -> str:
    return " and ".join(paths) if len(paths) < 3 else f"{paths[0]} and {len(paths) - 1} more"


def _primary(compared: Sequence[Comparison]) -> Comparison | None:
    found = {one.against: one for one in compared}
    return found.get("none", found.get(AT_WINNERS_LR))


def _validation_too_small(evidence: Evidence) -> Iterator[str]:
    metric, size = evidence.objective.metric, evidence.sizes.get("validation")
    values = sorted((r.value or 0.0 for r in evidence.trials), reverse=evidence.sign > 0)
    if metric not in COUNTED or not size or len(values) < 8:
        return
    error = binomial_error(values[0], size)
    spread = abs(values[len(values) // 4 - 1] - values[0])
    if math.sqrt(2) * error > spread / 2:
        yield (
            f"validation cannot tell which of the better rates are best: {size} examples measure "
            f"{metric} to ± {100 * error:.2f} points (one standard error), and the best quarter of "
            f"all trials lies within {100 * spread:.2f} points; use a larger validation set or "
            "objective nll"
        )


def _metric_cannot_tell(
    evidence: Evidence, plan: Plan, compared: Sequence[Comparison]
) -> Iterator[str]:
    first = _primary(compared)
    if first is None or first.outcome != "undetected" or plan.winner is None:
        return
    if evidence.objective.metric not in COARSE:
        return
    other = next((m for m in plan.compared if m.label == first.against), None)
    if other is None:
        return
    _, ours, theirs = pairs(evidence, plan.winner, other, evidence.spec.confirm.max_seeds)
    for metric in TELLS_MORE:
        a = values_at_objective(ours, f"val/{metric}")
        b = values_at_objective(theirs, f"val/{metric}")
        if metric == evidence.objective.metric or len(a) < 2 or len(a) != len(b):
            continue
        seen = paired(np.array(b) - np.array(a), overlap=evidence.overlap)
        if seen.outcome == "undetected":
            continue
        direction = "lower" if seen.mean > 0 else "higher"
        yield (
            f"{metric_name(evidence.objective.metric)} cannot tell, but validation "
            f"{metric_name(metric)} can: it is "
            f"{difference(metric, seen.mean, seen.high - seen.mean)} {direction} with dropout on "
            f"the same trainings; if probabilities matter to you, take objective {metric}"
        )
        return


def _too_few_seeds(evidence: Evidence, compared: Sequence[Comparison]) -> Iterator[str]:
    first = _primary(compared)
    if first is None or first.outcome != "undetected":
        return
    found = first.difference
    metric = evidence.objective.metric
    if found.example_error > found.seed_error:
        yield (
            f"the {found.examples} test examples limit the comparison more than the "
            f"{found.seeds} seeds do: a larger test set would help, more seeds would not"
        )
    elif first.stopped == "decided" and first.data == "test":
        yield (
            f"validation was sure of a difference after {found.seeds} seeds, the test set is not: "
            "a new study with a larger confirm.min_seeds would tell more"
        )
    elif first.stopped in ("budget", "seeds") and abs(found.mean) > found.error:
        needed = _seeds_for(abs(found.mean), found, evidence.overlap)
        seen = difference(metric, found.mean, found.error)
        more = f"droptune study confirm {evidence.spec.name} --max-seeds {needed}"
        yield (
            f"no number of seeds on the same data would show the {seen} seen here: it needs more "
            "data"
            if needed is None
            else f"about {needed} seeds would show a true difference of the {seen} seen here: "
            f"`{more}` queues them"
        )


def _seeds_for(effect: float, seen: Difference, overlap: float) -> int | None:
    """Seeds that show an effect with 80 % power (normal approximation plus two)."""
    variance = seen.seed_error**2 / (1 / seen.seeds + overlap)
    left = (effect / (1.96 + 0.84)) ** 2 / variance - overlap
    return max(math.ceil(1 / left) + 2, seen.seeds + 1) if left > 0 else None


def _budget_too_short(evidence: Evidence, plan: Plan) -> Iterator[str]:
    records = _winners(evidence, plan)
    curves = [
        r.curves[evidence.objective.key] for r in records if evidence.objective.key in r.curves
    ]
    if not curves or min(len(curve) for curve in curves) < 8:
        return
    curve = evidence.sign * mean_curve(curves)
    n = len(curve)
    tail = curve[-max(n // 5, 3) :]
    earlier = curve[-2 * len(tail) : -len(tail)]
    gained = float(tail.mean() - earlier.mean())
    spread = float(np.std(np.diff(curve[n // 2 :])))
    if gained > max(spread, 1e-12) and gained > 0.05 * float(curve.max() - curve[0]):
        yield (
            f"the winner was still improving after {n} intervals: longer training may be better "
            "and may ask for more dropout; the rates hold for this length only"
        )


def _winners(evidence: Evidence, plan: Plan) -> list[Record]:
    if plan.winner is not None:
        seeds = range(evidence.spec.confirm.max_seeds)
        confirmed = list(evidence.confirmed(plan.winner.assignment, seeds).values())
        if confirmed:
            return confirmed
    return [max(evidence.trials, key=evidence.benefit)] if evidence.trials else []


def _no_test_set(evidence: Evidence, plan: Plan, compared: Sequence[Comparison]) -> Iterator[str]:
    if not plan.decided or not any(one.data == "validation" for one in compared):
        return
    same = evidence.spec.confirm.splits == "same"
    folds = "`confirm: {splits: folds}` would help where droptune splits off the validation data"
    metric = metric_name(evidence.objective.metric)
    test_set = evidence.sizes.get("test")
    why = f"{metric} was not measured on the test set" if test_set else "there is no test set"
    yield (
        f"{why}: the intervals are from the validation set that the search has used, hence "
        "optimistic" + (f"; {folds}" if same else "")
    )


def _failures(evidence: Evidence) -> Iterator[str]:
    confirmations = [r for r in evidence.records if r.training.kind is TrainingKind.CONFIRMATION]
    failed = [r for r in confirmations if r.state.finished and not usable(r)]
    if failed:
        labels = sorted({r.training.label for r in failed})
        yield (
            f"{len(failed)} of {len(confirmations)} confirmations failed "
            f"({', '.join(labels)}: {failed[0].reason or 'no finite objective'}); their pairs "
            "are left out"
        )


def _not_scored(evidence: Evidence, plan: Plan) -> Iterator[str]:
    """Confirmations without a finite score on the test set, where others have one."""
    metric = evidence.objective.metric
    ended = [r for r in evidence.confirmations.values() if usable(r)]
    lost = [r for r in ended if test_scores(evidence, r, metric) is None]
    if plan.decided and 0 < len(lost) < len(ended):
        labels = ", ".join(sorted({r.training.label for r in lost}))
        yield (
            f"{metric_name(metric)} is not finite on the test set for {len(lost)} of "
            f"{counted(len(ended), 'confirmation')} ({labels}); their pairs are left out"
        )


def _small_search(evidence: Evidence) -> Iterator[str]:
    finished = [r for r in evidence.records if r.training.kind.is_trial and r.state.finished]
    failed = sum(1 for r in finished if r.state is State.FAIL)
    if failed * 5 > len(finished):
        yield f"{failed} of {len(finished)} trials failed: the range of lr may reach too high"
    if not evidence.trials:
        return
    rates = max(sum(1 for one in find_inputs(evidence, evidence.trials) if one.paths), 1)
    if len(evidence.trials) < 5 * (rates + 1):
        share = ", or groups of sites that share a rate," if rates > 1 else ""
        many = len(evidence.trials)
        yield (
            f"{counted(many, 'completed trial')} {'is' if many == 1 else 'are'} few for "
            f"{counted(rates, 'rate')} and an lr: more trials{share} would find better ones"
        )
