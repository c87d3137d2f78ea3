"""What a training looks like as an MLflow run: pure functions of what SQL knows.

Everything here is deterministic: the same record gives the same strings, times and points for
ever, so that writing them again changes nothing in MLflow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from droptune import progress
from droptune.spec.objective import Objective
from droptune.training import Assignment, Record, State, Training, TrainingKind

UID = "droptune.uid"
_KEY_LENGTH = 250
_VALUE_LENGTH = 500

COLOURS = {
    State.COMPLETE: "#2272b4",  # blue
    State.PRUNED: "#a9b4be",  # grey: ended early, nothing went wrong
    State.FAIL: "#c82d4c",  # red
    State.RUNNING: "#e0a030",
    State.QUEUED: "#e0a030",
}
BASELINE_COLOUR = "#2e8b57"  # green
CONFIRMATION_COLOUR = "#7a5195"  # purple


@dataclass(frozen=True)
class Reference:
    """The best baseline's objective, and since when (milliseconds) it has been known.

    That is when the last queued baseline had ended, or a better trial with a baseline's rates.
    """

    value: float
    time: int


@dataclass(frozen=True)
class Point:
    """One value of one metric; `time` in milliseconds since 1970."""

    key: str
    value: float
    time: int
    step: int


def better_by(objective: Objective, first: float, second: float) -> float:
    """By how much `first` is better than `second` (negative: worse)."""
    return second - first if objective.direction == "minimize" else first - second


def uid(study_uuid: str, training: Training) -> str:
    """What identifies the run of one attempt of one training, whoever creates it."""
    return f"{study_uuid}/{training.id}/{training.attempt}"


def status(state: State) -> str:
    """MLflow's status. PRUNED is FINISHED: MLflow draws KILLED with the red cross of a failure."""
    if not state.finished:
        return "RUNNING"
    return "FAILED" if state is State.FAIL else "FINISHED"


def colour(kind: TrainingKind, state: State) -> str:
    if state is State.COMPLETE and kind is TrainingKind.BASELINE:
        return BASELINE_COLOUR
    if state is State.COMPLETE and not kind.is_trial:
        return CONFIRMATION_COLOUR
    return COLOURS[state]


def tags(record: Record, *, study_name: str, study_uuid: str, device: str | None) -> dict[str, str]:
    """The tags of a training's run, without the parent's."""
    training = record.training
    found: dict[str, object] = {
        UID: uid(study_uuid, training),
        "droptune.study": study_name,
        "droptune.study_uuid": study_uuid,
        "droptune.role": "trial" if training.kind.is_trial else training.kind.value,
        "droptune.kind": training.kind.value,
        "droptune.label": training.label,
        "droptune.training": training.id,
        "droptune.attempt": training.attempt,
        "droptune.number": training.number,
        "droptune.seed.weights": training.seeds.weights,
        "droptune.seed.data": training.seeds.data,
        "droptune.seed.split": training.seeds.split,
        "droptune.worker": record.worker,
        "droptune.device": device,
        "droptune.reason": record.reason,
        "droptune.state": record.state.value,
        "mlflow.runColor": colour(training.kind, record.state),
        "mlflow.source.name": "droptune",
    }
    return {key: _short(str(value)) for key, value in found.items() if value not in (None, "")}


def params(assignment: Assignment) -> dict[str, str]:
    """The params of a training: `lr`, `dropout/<site>`, `dropout_mean`, and what else it has."""
    found = {"lr": f"{assignment.lr:.6g}", "dropout_mean": f"{assignment.mean_rate:.4f}"}
    values = {"schedule": "constant", **assignment.values}
    found |= {key: _param(value) for key, value in values.items()}
    found |= {f"dropout/{path}": f"{rate:.4f}" for path, rate in assignment.rates.items()}
    return dict(zip(clean_keys(found), found.values(), strict=True))


def _param(value: float | str) -> str:
    if isinstance(value, bool | str):
        return _short(str(value))
    return f"{value:.6g}"


def curve_points(
    record: Record, objectives: Sequence[Objective], *, started: int, after: int
) -> Iterator[Point]:
    """The points of the intervals after the `after`-th, objectives first.

    Times are the training's own clock: its start plus the seconds its intervals took. Values
    that are not finite are no points: MLflow stores infinity as 1.8e308, which ruins a chart.
    """
    curves = {key: curve for key, curve in record.curves.items() if not key.startswith("test/")}
    order = sorted(curves, key=lambda key: _rank(key, objectives))
    names = dict(zip(order, clean_keys(order), strict=True))
    times = interval_times(record, started)
    for interval in range(after + 1, record.intervals_done + 1):
        for key in order:
            value = curves[key][interval - 1] if interval <= len(curves[key]) else math.nan
            if math.isfinite(value):
                yield Point(names[key], float(value), times[interval - 1], interval)


def _rank(key: str, objectives: Sequence[Objective]) -> tuple[int, str]:
    if key in [objective.key for objective in objectives]:
        return 0, key
    order = ("val/", "train/")
    return next((i for i, start in enumerate(order, 1) if key.startswith(start)), 3), key


def interval_times(record: Record, started: int) -> list[int]:
    """When each interval ended, in milliseconds: a function of the recorded seconds alone."""
    seconds = record.curves.get("time/seconds", ())
    times, now = [], started
    for i in range(record.intervals_done):
        took = seconds[i] if i < len(seconds) and math.isfinite(seconds[i]) else 0.0
        now += max(1, round(took * 1000))  # strictly later: "latest" stays the last interval
        times.append(now)
    return times


def final_points(record: Record, objectives: Sequence[Objective], *, time: int) -> Iterator[Point]:
    """The summary of a finished training: `objective`, `best/…`, `test/…` or `pruned_at`.

    Pruned trainings have no `objective`, so that they come last on a leaderboard.
    """
    done = record.intervals_done
    if record.state is State.COMPLETE and record.values:
        yield from _objective_points(record.values, objectives, time)
        yield from _best_points(record, time)
    if record.state is State.PRUNED:
        yield Point("pruned_at", float(done), time, 0)
    for key, curve in sorted(record.curves.items()):
        if key.startswith("test/") and curve and math.isfinite(curve[-1]):
            yield Point(clean_key(key), float(curve[-1]), time, done)


def _objective_points(
    values: Sequence[float], objectives: Sequence[Objective], time: int
) -> Iterator[Point]:
    found = {"objective": values[0]}
    if len(objectives) > 1:
        found |= {
            f"objective/{clean_key(objective.key)}": value
            for objective, value in zip(objectives, values, strict=False)
        }
    for key, value in found.items():
        if math.isfinite(value):
            yield Point(key, float(value), time, 0)


def reference_of(records: Sequence[Record], objective: Objective) -> Reference | None:
    """What `gain` is measured against; None while a baseline has not finished."""
    queued = [r for r in records if r.training.kind is TrainingKind.BASELINE]
    known = progress.baselines(records, str(objective.direction)).values()
    best = best_of([record for record in known if record is not None], objective)
    if best is None or best.value is None or not all(r.state.finished for r in queued):
        return None
    ended = [milliseconds(r.ended) for r in (*queued, best) if r.ended is not None]
    return Reference(best.value, max(ended, default=0))


def gain_points(
    record: Record, objective: Objective, reference: Reference, *, time: int
) -> Iterator[Point]:
    """`gain`: by how much a complete training is better than the best baseline."""
    if record.value is None:
        return
    gain = better_by(objective, record.value, reference.value)
    if math.isfinite(gain):
        yield Point("gain", gain, max(time, reference.time), 0)


def _best_points(record: Record, time: int) -> Iterator[Point]:
    best = record.best_interval
    if best is None:
        return
    yield Point("best/interval", float(best), time, 0)
    for key, curve in sorted(record.curves.items()):
        if key.startswith("val/") and best <= len(curve) and math.isfinite(curve[best - 1]):
            yield Point(clean_key(f"best/{key[4:]}"), float(curve[best - 1]), time, 0)


def best_of(records: Iterable[Record], objective: Objective) -> Record | None:
    """The complete training with the best objective (NaN never wins); the first of equals."""
    return progress.best(list(records), str(objective.direction))


def milliseconds(moment: datetime) -> int:
    """Milliseconds since 1970; a time without zone is UTC, as the database gives it."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def clean_key(key: str) -> str:
    """The key with only what MLflow takes in keys: letters, digits, `_ - . : / ` and spaces."""
    key = re.sub(r"[^\w.\- :/]", "_", re.sub(r"\[([^\]]*)\]", r".\1", key))
    parts = [part.strip() for part in key.split("/")]
    key = "/".join(part for part in parts if part not in ("", ".", ".."))
    return (key or "_")[:_KEY_LENGTH]


def clean_keys(keys: Iterable[str]) -> list[str]:
    """Clean keys, in order and all different: a second `a.0` (from `a[0]`) becomes `a.0-2`."""
    cleaned: list[str] = []
    taken: set[str] = set()
    for key in keys:
        clean, number = clean_key(key), 1
        while clean in taken:
            number += 1
            clean = f"{clean_key(key)[: _KEY_LENGTH - 6]}-{number}"
        taken.add(clean)
        cleaned.append(clean)
    return cleaned


def renamed(keys: Iterable[str]) -> Mapping[str, str]:
    """Which keys had to change for MLflow, and to what."""
    originals = list(keys)
    pairs = zip(originals, clean_keys(originals), strict=True)
    return {key: clean for key, clean in pairs if key != clean}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _VALUE_LENGTH else f"{line[: _VALUE_LENGTH - 1]}…"
