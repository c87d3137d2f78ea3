"""How far a study is, and what is best so far: pure functions of its records."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from droptune.spec.objective import Objective
from droptune.training import Record, State, TrainingKind


@dataclass(frozen=True)
class Progress:
    """The state of a study at one moment.

    `counts` are trials by state, `running` is how many trainings of any kind run; `confirmations`
    are (finished, queued and running ones too); `baselines` maps each label to the best trial
    with its rates, whoever proposed it; `per_minute` counts trainings that ended in the last
    minutes; `seconds_left`, None while unknown, is for what is queued and the rest of the search.
    `intervals` is what the study has cost so far.
    """

    counts: Mapping[State, int]
    running: int
    total: int | None
    confirmations: tuple[int, int]
    best: Record | None
    baselines: Mapping[str, Record | None]
    per_minute: float
    seconds_left: float | None
    intervals: int
    device_seconds: float

    @property
    def finished(self) -> int:
        return sum(count for state, count in self.counts.items() if state.finished)


def measure(
    records: Sequence[Record], direction: str, total: int | None, now: datetime
) -> Progress:
    """Sum up the records of a study; `total` is its budget of trials, if it has one."""
    trials = [r for r in records if r.training.kind.is_trial]
    others = [r for r in records if not r.training.kind.is_trial]
    counts = Counter(r.state for r in trials)
    per_minute = _per_minute(records, now)
    remaining = _remaining(trials, others, total)
    return Progress(
        counts={state: counts[state] for state in State},
        running=sum(r.state is State.RUNNING for r in records),
        total=total,
        confirmations=(sum(r.state.finished for r in others), len(others)),
        best=best(trials, direction),
        baselines=baselines(trials, direction),
        per_minute=per_minute,
        seconds_left=60 * remaining / per_minute if remaining and per_minute else None,
        intervals=sum(r.intervals_done for r in records),
        device_seconds=sum(math.fsum(r.curves.get("time/seconds", ())) for r in records),
    )


def best(records: Sequence[Record], direction: str) -> Record | None:
    """The COMPLETE record with the best first finite objective; the earlier wins a tie."""
    complete = [r for r in records if r.state is State.COMPLETE and _finite(r.value)]
    sign = 1 if direction == "minimize" else -1
    return min(complete, key=lambda r: (sign * (r.value or 0.0), r.training.id), default=None)


def front(records: Sequence[Record], objectives: Sequence[Objective]) -> list[Record]:
    """The Pareto front: COMPLETE trials that no other equals or betters in every objective.

    The best in the first objective comes first; of equal ones the earliest stands for all.
    """
    signs = [1 if objective.direction == "minimize" else -1 for objective in objectives]

    def signed(record: Record) -> tuple[float, ...]:
        return tuple(sign * v for sign, v in zip(signs, record.values or (), strict=True))

    complete = [
        r
        for r in records
        if r.state is State.COMPLETE
        and r.training.kind.is_trial
        and r.values
        and all(map(_finite, r.values))
    ]
    found: list[Record] = []
    for record in sorted(complete, key=lambda r: (signed(r), r.training.id)):
        values = signed(record)  # whoever betters it came before
        if not any(all(map(operator.le, signed(other), values)) for other in found):
            found.append(record)
    return found


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def baselines(records: Sequence[Record], direction: str) -> dict[str, Record | None]:
    """Each baseline's best trial by label: the best with its rates, whoever proposed it."""
    trials = [r for r in records if r.training.kind.is_trial]
    return {
        label: best([r for r in trials if _rates(r) == rates], direction)
        for label, rates in _baseline_rates(trials).items()
    }


def _baseline_rates(trials: Sequence[Record]) -> dict[str, Mapping[str, float] | None]:
    queued = (r for r in trials if r.training.kind is TrainingKind.BASELINE)
    return {record.training.label: _rates(record) for record in queued}


def _rates(record: Record) -> Mapping[str, float] | None:
    assignment = record.training.assignment
    return None if assignment is None else assignment.rates


def _per_minute(records: Sequence[Record], now: datetime) -> float:
    ends = [r.ended for r in records if r.ended is not None]
    if not ends:
        return 0.0
    first = min(r.started for r in records if r.started is not None)
    window = min(timedelta(minutes=5), max(now - first, timedelta(seconds=1)))
    recent = sum(end >= now - window for end in ends)
    return 60 * recent / window.total_seconds()


def _remaining(trials: Sequence[Record], others: Sequence[Record], total: int | None) -> int:
    open_others = sum(not r.state.finished for r in others)
    finished = sum(r.state.finished for r in trials)
    return open_others + (max(total - finished, 0) if total is not None else 0)
