"""Optuna's pruners by name, on the records of a study."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from droptune.errors import SpecError, nearest
from droptune.search.judgement import Judgement, failures
from droptune.training import Record, State, TrainingKind

if TYPE_CHECKING:
    from droptune.spec.objective import Objective

ENDS = {State.COMPLETE: TrialState.COMPLETE, State.PRUNED: TrialState.PRUNED}


@dataclass(frozen=True)
class Known:
    """One of Optuna's pruners, what droptune presets, and where it may first prune."""

    make: Callable[..., optuna.pruners.BasePruner]
    first: Callable[[Mapping[str, Any]], int]
    presets: Callable[[int], dict[str, Any]] = lambda _intervals: {}


def _after_warmup(options: Mapping[str, Any]) -> int:
    return int(options.get("n_warmup_steps", 0)) + 1


def _first_rung(options: Mapping[str, Any]) -> int:
    given = options.get("min_resource", 1)
    return given if isinstance(given, int) else 1


OPTUNA = {
    "median": Known(optuna.pruners.MedianPruner, _after_warmup),
    "percentile": Known(
        optuna.pruners.PercentilePruner, _after_warmup, lambda _: {"percentile": 25.0}
    ),
    "sha": Known(optuna.pruners.SuccessiveHalvingPruner, _first_rung),
    "hyperband": Known(optuna.pruners.HyperbandPruner, _first_rung, lambda n: {"max_resource": n}),
    "patient": Known(
        optuna.pruners.PatientPruner,
        lambda options: int(options["patience"]) + 1,
        lambda n: {
            "wrapped_pruner": optuna.pruners.MedianPruner(),
            "patience": max(1, n // 5),
        },
    ),
}


class OptunaPruning:
    """One of Optuna's pruners on a study in memory that follows the records.

    Finished trials enter first, then the running ones, each in the order of their numbers, since
    SHA and Hyperband depend on the order. Baselines take part and are never pruned.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        objective: Objective,
        intervals: int,
        chance: float | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        known = OPTUNA[name]
        options = {**known.presets(intervals), **options}
        self._key, self._chance = objective.key, chance
        _try(name, options)
        self._study = optuna.create_study(
            study_name=name, direction=objective.direction, pruner=_make(name, options)
        )
        self._trials: dict[int, optuna.Trial] = {}
        self._reported: dict[int, int] = {}
        self._ended: set[int] = set()
        first = known.first(options)
        self.note = (
            ""
            if first > intervals / 3
            else (
                f"pruner {name} may prune from interval {first} of {intervals}, where ranks under "
                "dropout mislead (docs/pruning.md); `pruner: fair` predicts instead"
            )
        )

    def judge(self, records: Sequence[Record], ids: set[int]) -> Judgement:
        failed = failures(records, ids, (self._key,), self._chance)
        trials = [r for r in records if r.training.kind.is_trial]
        trials.sort(key=lambda r: (not r.state.finished, r.training.number or 0))
        told = {r.training.id for r in trials if self._follow(r) and r.training.id in ids}
        kept = {r.training.id for r in trials if r.training.kind is TrainingKind.BASELINE}
        return Judgement(frozenset(told - kept - set(failed)), failed)

    def _follow(self, record: Record) -> bool:
        """Report what is new of a record; whether it would be pruned after the last of it."""
        key = record.training.id
        if key in self._ended or (record.state.finished and not record.curves):
            return False
        if key not in self._trials:
            self._trials[key] = self._study.ask()
        prune = self._report(key, record.curves.get(self._key, ()))
        if record.state.finished:
            self._end(record)
        return prune

    def _report(self, key: int, curve: Sequence[float]) -> bool:
        trial, prune = self._trials[key], False
        for interval in range(self._reported.get(key, 0) + 1, len(curve) + 1):
            trial.report(curve[interval - 1], interval)
            prune = trial.should_prune()
        self._reported[key] = len(curve)
        return prune

    def _end(self, record: Record) -> None:
        state = ENDS.get(record.state, TrialState.FAIL)
        value = record.value if state is TrialState.COMPLETE else None
        self._study.tell(self._trials[record.training.id], value, state=state)
        self._ended.add(record.training.id)


def _make(name: str, options: Mapping[str, Any]) -> optuna.pruners.BasePruner:
    make = OPTUNA[name].make
    known = set(inspect.signature(make).parameters)
    for option in set(options) - known:
        raise SpecError(f"pruner {name} has no option {option!r}{nearest(option, known)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return make(**options)
    except (TypeError, ValueError) as error:
        raise _refused(name, options, error) from error


def _try(name: str, options: Mapping[str, Any]) -> None:
    """Ask it once: some look at their options only then."""
    trial = optuna.create_study(study_name=name, pruner=_make(name, options)).ask()
    trial.report(0.0, 1)
    try:
        trial.should_prune()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _refused(name, options, error) from error


def _refused(name: str, options: Mapping[str, Any], error: Exception) -> SpecError:
    given = "".join(f", {key} {value!r}" for key, value in options.items())
    return SpecError(f"pruner {name}{given}: {error}")
