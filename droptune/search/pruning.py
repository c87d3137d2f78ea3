"""Stop trainings that will clearly not be the best, without betting against slow learners.

Strong dropout learns slowly and wins late, so ranks at an early interval mislead: on the recorded
Fashion-MNIST grid the rank correlation of the validation NLL at epochs 5 and 60 is -0.89. They do
inform a *prediction*. At a few checkpoints every running training's final value is predicted by a
Gaussian process from what it has shown so far and from its rates and learning rate, learned on
the trainings that ran to the end. It is pruned where even the optimistic end of the prediction is
worse than the best that completed. Nothing is pruned before some trainings have completed and
leaving each of them out shows that the others predict it. Measurements: `docs/pruning.md`.

`decide` is a pure function; `FairPruning` applies it to a study's records, `FairPruner` is the
same for anybody's own Optuna code, and `make_pruner` knows Optuna's own pruners by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field
from scipy.stats import t as student

from droptune.errors import SpecError, nearest
from droptune.search.judgement import (
    Decision,
    Judgement,
    NoPruning,
    Pruner,
    completed_trials,
    failures,
)
from droptune.search.optuna_pruning import OPTUNA, OptunaPruning
from droptune.search.prediction import (
    PILOTS,
    SEEN,
    Array,
    Prediction,
    Trace,
    direction_signs,
    points,
    predict,
    spread_over_ranks,
    traces,
)
from droptune.spec.document import Strict, checked
from droptune.training import Assignment, Record, derive_seed

if TYPE_CHECKING:
    from droptune.spec.objective import Objective
    from droptune.spec.spec import StudySpec

__all__ = [
    "Decision",
    "FairPruner",
    "FairPruning",
    "Judgement",
    "NoPruning",
    "Pruner",
    "Rules",
    "decide",
    "is_audited",
    "make_pruner",
]

LEAST_INTERVALS = 8
COUNTED = ("accuracy", "error", "precision", "recall", "f1")  # metrics that count right and wrong
TIE = 0.5  # of such a metric's jumps from interval to interval: a lead of less is none
Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Rules(Strict):
    """When a training may be pruned.

    checkpoints: shares of the budget at which decisions are taken
    pilots: completed trials before the first decision
    level: one-sided level of the prediction's optimistic end (Student's t)
    reliable: largest leave-one-out error, as a share of the final values' standard deviation
    audit: share of the trials that are finished even where they would be pruned
    seen: completed trials that the prediction learns from, at most
    """

    checkpoints: tuple[Share, ...] = (0.1, 0.2, 0.33, 0.5)
    pilots: Annotated[int, Field(ge=3)] = PILOTS
    level: Share = 0.99
    reliable: Annotated[float, Field(gt=0)] = 0.9
    audit: Annotated[float, Field(ge=0, le=1)] = 0.05
    seen: Annotated[int, Field(ge=PILOTS)] = SEEN

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Rules:
        """From a study file's options; SpecError for one that is unknown or cannot be."""
        try:
            return checked(cls, options)
        except SpecError as error:
            raise SpecError(f"pruner fair: {error}") from None

    def at(self, intervals: int) -> tuple[int, ...]:
        """The intervals at which decisions are taken; none where there are too few."""
        if intervals < LEAST_INTERVALS:
            return ()
        return tuple(sorted({max(1, round(share * intervals)) for share in self.checkpoints}))


DEFAULT = Rules()


def decide(
    completed: Sequence[Trace],
    running: Sequence[Trace],
    intervals: int,
    takes: Sequence[str],
    rules: Rules = DEFAULT,
    *,
    counted: Sequence[bool] = (),
) -> dict[int, Decision]:
    """One decision for every running training that is at a checkpoint and can be predicted.

    takes: "last" or "best" per objective; counted: whether it counts right and wrong (accuracy)

    With several objectives, one is pruned where some completed training is better in all of them
    than the optimistic ends of its predictions. The order of the members is without effect, and
    so is who else runs.
    """
    decisions: dict[int, Decision] = {}
    for interval in rules.at(intervals):
        asked = [c for c in running if c.intervals == interval and not c.protected]
        predictions = predict(
            completed, asked, interval, takes, counted, pilots=rules.pilots, seen=rules.seen
        )
        if predictions and all(p.error < rules.reliable for p in predictions):
            decisions |= _compare(completed, asked, interval, predictions, rules)
    return decisions


def _compare(
    completed: Sequence[Trace],
    asked: Sequence[Trace],
    interval: int,
    predictions: tuple[Prediction, ...],
    rules: Rules,
) -> dict[int, Decision]:
    factor = float(student.ppf(rules.level, min(len(completed), rules.seen) - 2))
    reached = np.stack([c.values for c in completed if c.values is not None])  # [n, objectives]
    warped = np.column_stack([p.warp(reached[:, j]) for j, p in enumerate(predictions)])
    optimistic = np.column_stack([p.mean - factor * p.sd + TIE * p.jumps for p in predictions])
    ends = [p.warp.back(p.mean, p.sd) for p in predictions]
    decisions = {}
    for i, trace in enumerate(asked):
        margins = (optimistic[i] - warped).min(1)  # > 0: clearly worse in every objective
        rival = int(np.argmax(margins))
        worse = bool(margins[rival] > 0)
        decisions[trace.key] = Decision(
            prune=worse and not trace.audited,
            interval=interval,
            predicted=tuple(float(mean[i]) for mean, _ in ends),
            sd=tuple(float(sd[i]) for _, sd in ends),
            best=tuple(float(value) for value in reached[rival]),
            audited=worse and trace.audited,
        )
    return decisions


def is_audited(seed: int, number: int | None, share: float) -> bool:
    """Whether this trial is among those that are finished even where they would be pruned."""
    return derive_seed(seed, "audit", number or 0) < share * 2**63


@dataclass(frozen=True)
class FairPruning:
    """`decide` on a study's records; `seed` is the study's, `chance` an untrained model's loss."""

    objectives: tuple[Objective, ...]
    intervals: int
    seed: int = 0
    rules: Rules = DEFAULT
    chance: float | None = None

    @property
    def note(self) -> str:
        if self.rules.at(self.intervals):
            return ""
        return (
            f"no pruning: {self.intervals} intervals are too few to predict from, "
            f"at least {LEAST_INTERVALS} are needed (a shorter `interval:` makes more)"
        )

    def judge(self, records: Sequence[Record], ids: set[int]) -> Judgement:
        keys = [objective.key for objective in self.objectives]
        failed = failures(records, ids, keys, self.chance)
        asked = [r for r in records if r.training.id in ids - set(failed) and self._is_due(r)]
        if not asked:
            return Judgement(failed=failed)
        completed = self._compared(completed_trials(records))
        among = [r for r in records if r.training.kind.is_trial]
        known = traces(completed + asked, self.objectives, self.intervals, self._is_audited, among)
        decided = decide(
            [c for c in known if c.values is not None],
            [c for c in known if c.values is None],
            self.intervals,
            [objective.take for objective in self.objectives],
            self.rules,
            counted=[o.metric.removeprefix("mc_") in COUNTED for o in self.objectives],
        )
        decisions = {key: self._in_own_directions(d) for key, d in decided.items()}
        pruned = frozenset(key for key, decision in decisions.items() if decision.prune)
        return Judgement(pruned, failed, decisions)

    def _compared(self, completed: list[Record]) -> list[Record]:
        """Enough of very many, the best among them."""
        values = [r.values[0] if r.values else np.inf for r in completed]
        signed = direction_signs(self.objectives)[0] * np.array(values)
        return spread_over_ranks(completed, signed.tolist(), 4 * self.rules.seen)

    def _is_due(self, record: Record) -> bool:
        at_checkpoint = record.intervals_done in self.rules.at(self.intervals)
        return at_checkpoint and record.training.kind.is_trial and not record.state.finished

    def _is_audited(self, record: Record) -> bool:
        return is_audited(self.seed, record.training.number, self.rules.audit)

    def _in_own_directions(self, decision: Decision) -> Decision:
        signs = direction_signs(self.objectives)
        predicted, best = signs * decision.predicted, signs * decision.best
        return replace(decision, predicted=tuple(predicted.tolist()), best=tuple(best.tolist()))


def make_pruner(spec: StudySpec, intervals: int, chance: float | None = None) -> Pruner:
    """The pruner of a study file: `fair`, `none`, or one of Optuna's by name.

    chance: the training loss of an untrained model, where it is known

    Raises SpecError for an unknown name or option, and for Optuna's with several objectives.
    """
    name, options = spec.pruner.name, spec.pruner.options
    if name == "none":
        return NoPruning(tuple(objective.key for objective in spec.objectives), chance)
    if name == "fair":
        rules = Rules.of(options)
        return FairPruning(tuple(spec.objectives), intervals, spec.seed, rules, chance)
    if name not in OPTUNA:
        raise SpecError(f"unknown pruner {name!r}{nearest(name, [*OPTUNA, 'fair', 'none'])}")
    if len(spec.objectives) > 1:
        raise SpecError(f"pruner {name} knows one objective only; use `pruner: fair` or none")
    return OptunaPruning(name, options, spec.objectives[0], intervals, chance)


class FairPruner(optuna.pruners.BasePruner):
    """The fair pruner for anybody's own Optuna code with one objective.

        pruner = FairPruner(n_steps=60, rates=["p1", "p2"])
        study = optuna.create_study(direction="minimize", pruner=pruner)

    n_steps: how many reports a trial makes that runs to the end
    rates: the parameters that are dropout rates; all others count too, positive numbers by
        their logarithm
    take: "last" where the objective returns its last report, "best" where it returns its best
    counted: whether the objective counts right and wrong, as accuracy does

    Trials with the user attribute `baseline` are never pruned. It is stateless: each call reads
    the completed trials and decides for one. What only droptune's own loop can do: decide once
    for a whole group, in whatever order; start with baselines spread over rates and learning
    rate to learn from; several objectives; and the audit.
    """

    def __init__(
        self,
        n_steps: int,
        rates: Sequence[str] = (),
        *,
        take: str = "last",
        counted: bool = False,
        rules: Rules = DEFAULT,
    ) -> None:
        if n_steps < LEAST_INTERVALS:
            raise ValueError(f"n_steps={n_steps}: at least {LEAST_INTERVALS} to predict from")
        if take not in ("last", "best"):
            raise ValueError(f"take={take!r}: possible are 'last' and 'best'")
        self._n_steps, self._rates, self._take, self._rules = n_steps, set(rates), take, rules
        self._counted = counted

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether this trial ends here."""
        if len(trial.intermediate_values) not in self._rules.at(self._n_steps):
            return False
        others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        trials = [*(t for t in others if len(t.intermediate_values) >= self._n_steps), trial]
        sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
        rows = points([self._assignment(t) for t in trials])
        made = [_trial_trace(t, row, sign) for t, row in zip(trials, rows, strict=True)]
        known = [trace for trace in made if trace is not None]
        decisions = decide(
            [c for c in known if c.values is not None],
            [c for c in known if c.values is None],
            self._n_steps,
            [self._take],
            self._rules,
            counted=[self._counted],
        )
        return any(decision.prune for decision in decisions.values())

    def _assignment(self, trial: FrozenTrial) -> Assignment:
        rates = {name: max(0.0, p) for name, p in trial.params.items() if name in self._rates}
        others = {
            name: value if isinstance(value, int | float) else str(value)
            for name, value in trial.params.items()
            if name not in rates
        }
        return Assignment(rates, lr=1.0, values=others)


def _trial_trace(trial: FrozenTrial, point: Array, sign: float) -> Trace | None:
    steps = sorted(trial.intermediate_values)
    curves = sign * np.array([[trial.intermediate_values[step] for step in steps]])
    value = trial.value if trial.state is TrialState.COMPLETE else None
    if not np.isfinite(curves).all() or not math.isfinite(value or 0.0):
        return None
    values = None if value is None else np.array([sign * value])
    return Trace(trial.number, curves, point, values, bool(trial.user_attrs.get("baseline")))
