"""What trainings measured and how they ended. Every method is one transaction."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from droptune.storage import schema, trials
from droptune.storage.claims import Held, lock_held, training_of
from droptune.storage.database import Database, now
from droptune.storage.studies import as_time, finite
from droptune.training import Measurement, Record, State, Training, TrainingKind

Items = Sequence[tuple[Training, Measurement]]


@dataclass(frozen=True, eq=False)
class Ending:
    """How a training ended, for `finish_all`."""

    training: Training
    state: State
    values: Sequence[float] | None = None
    reason: str | None = None
    best_interval: int | None = None


class Measurements:
    """The part of Storage that keeps results."""

    database: Database
    lease_seconds: float

    def record(self, items: Items, objective_keys: Sequence[str]) -> set[int]:
        """Write what a group measured; returns the ids of trainings whose lease is lost.

        The first values written for an interval stay. With one objective they are Optuna's
        intermediate values too (step = interval). The leases of what is written are renewed.
        """
        held_by = {training.id: training for training, _ in items}

        def work(connection: sa.Connection) -> set[int]:
            held = lock_held(connection, list(held_by.values()))
            kept = [(t, m) for t, m in items if t.id in held]
            if kept:
                self._write_measurements(connection, kept, held)
                if len(objective_keys) == 1:
                    self._write_intermediates(connection, kept, held, objective_keys[0])
                self._write_progress(connection, held)
            return set(held_by) - set(held)

        return self.database.write(work) if items else set()

    def _write_measurements(self, connection: sa.Connection, items: Items, held: Held) -> None:
        rows = [
            {
                "training_id": training.id,
                "attempt": training.attempt,
                "interval": measurement.interval,
                "measured_at": held[training.id].at,
                "measured": _to_text(measurement.values),
            }
            for training, measurement in items
        ]
        self.database.insert_new(
            connection, schema.measurements, rows, ("training_id", "attempt", "interval")
        )

    def _write_intermediates(
        self,
        connection: sa.Connection,
        items: Items,
        held: Held,
        key: str,
    ) -> None:
        rows = [
            trials.intermediate_row(held[t.id].trial_id, m.interval, float(m.values[key]))
            for t, m in items
            if held[t.id].trial_id is not None and key in m.values
        ]
        self.database.insert_new(connection, trials.intermediate_values, rows, ("trial_id", "step"))

    def _write_progress(self, connection: sa.Connection, held: Held) -> None:
        t, m = schema.trainings.c, schema.measurements.c
        mine = sa.and_(m.training_id == t.id, m.attempt == t.attempt)
        done = sa.select(sa.func.max(m.interval)).where(mine).scalar_subquery()
        renewing = schema.trainings.update().where(t.id.in_(list(held)))
        until = now() + self.lease_seconds
        connection.execute(renewing.values(intervals_done=done, lease_until=until))

    def finish(
        self,
        training: Training,
        state: State,
        *,
        values: Sequence[float] | None = None,
        reason: str | None = None,
        best_interval: int | None = None,
    ) -> bool:
        """End a training in both sets of tables; False when its lease is lost.

        COMPLETE needs one value per objective, none of them NaN.
        """
        ending = Ending(training, state, values, reason, best_interval)
        return training.id not in self.finish_all([ending])

    def finish_all(self, endings: Sequence[Ending]) -> set[int]:
        """End several trainings of one study at once; returns the ids whose lease is lost."""
        for ending in endings:
            _check(ending)
        if not endings:
            return set()
        study_id = endings[0].training.study_id
        assert all(ending.training.study_id == study_id for ending in endings)

        def work(connection: sa.Connection) -> set[int]:
            held = lock_held(connection, [ending.training for ending in endings])
            ended = [e for e in endings if e.training.id in held]
            _end(connection, study_id, ended, held)
            lost = [e for e in endings if e.training.id not in held]
            return {e.training.id for e in lost} - _ended_before(connection, lost)

        return self.database.write(work)

    def records(
        self,
        study_id: int,
        *,
        kinds: Iterable[TrainingKind] | None = None,
        states: Iterable[State] | None = None,
        ids: Iterable[int] | None = None,
    ) -> list[Record]:
        """All trainings of a study (or those of some kinds, states, ids) with their curves."""
        t = schema.trainings.c
        chosen: list[sa.ColumnElement[bool]] = [t.study_id == study_id]
        if kinds is not None:
            chosen.append(t.kind.in_([kind.value for kind in kinds]))
        if states is not None:
            chosen.append(t.state.in_([state.value for state in states]))
        if ids is not None:
            chosen.append(t.id.in_(list(ids)))
        return self.database.read(lambda connection: _records(connection, sa.and_(*chosen)))

    def changes(self, study_id: int, cursor: int = 0) -> tuple[list[Record], int]:
        """What ended after `cursor`, and all that runs or waits; and the cursor for next time.

        Ends are numbered under the study's lock, so nothing that ended is ever passed over.
        """
        t = schema.trainings.c
        study = t.study_id == study_id
        unfinished = sa.and_(study, t.state.in_([State.QUEUED.value, State.RUNNING.value]))
        ended = sa.and_(study, t.finish_order > cursor)

        def work(connection: sa.Connection) -> tuple[list[Record], int]:
            # In this order: what ends between the two is in both, and its end counts.
            found = {r.training.id: r for r in _records(connection, unfinished)}
            newest = sa.select(sa.func.max(t.finish_order)).where(ended)
            last = connection.execute(newest).scalar()
            if last is None:
                return list(found.values()), cursor
            new = sa.and_(ended, t.finish_order <= last)
            found |= {r.training.id: r for r in _records(connection, new)}
            return [found[i] for i in sorted(found)], last

        return self.database.read(work)


def _check(ending: Ending) -> None:
    if not ending.state.finished:
        raise ValueError(f"{ending.state} is not the end of a training")
    if ending.state is State.COMPLETE and (
        not ending.values or any(math.isnan(value) for value in ending.values)
    ):
        raise ValueError(f"a COMPLETE training needs values that are numbers: {ending.values}")


def _end(connection: sa.Connection, study_id: int, endings: Sequence[Ending], held: Held) -> None:
    """Write ends, Optuna's too, and give back what the budget had reserved for them."""
    if not endings:
        return
    t, s = schema.trainings.c, schema.studies.c
    of_trials = {e: held[e.training.id] for e in endings if held[e.training.id].trial_id}
    at = held[endings[0].training.id].at
    trials.end_trials(connection, _optuna_values(connection, of_trials), at)
    refund = sum(row.intervals - row.intervals_done for row in of_trials.values())
    counted = {"finished": s.finished + len(endings), "intervals_taken": s.intervals_taken - refund}
    # From here on the others of this study wait, so nothing is read back.
    connection.execute(schema.studies.update().where(s.id == study_id).values(counted))
    finished = sa.select(s.finished).where(s.id == study_id).scalar_subquery()
    ending = schema.trainings.update().where(t.id == sa.bindparam("of"))
    rows = [_end_row(e, at) | {"before": k} for k, e in enumerate(reversed(endings))]
    connection.execute(ending.values(finish_order=finished - sa.bindparam("before")), rows)


def _end_row(ending: Ending, at: float) -> dict[str, Any]:
    values = None if ending.values is None else [float(v) for v in ending.values]
    return {
        "of": ending.training.id,
        "state": ending.state.value,
        "reason": ending.reason,
        "objective": None if not values else finite(values[0]),
        "objectives": None if values is None else json.dumps(values),
        "best_interval": ending.best_interval,
        "ended_at": at,
        "lease_until": None,
    }


def _optuna_values(
    connection: sa.Connection, endings: Mapping[Ending, Any]
) -> dict[int, tuple[State, Sequence[float]]]:
    """What Optuna shows: the values, or a pruned trial's last one (as `Study.tell` does)."""
    pruned = [row.trial_id for e, row in endings.items() if e.state is State.PRUNED]
    last = trials.last_intermediates(connection, pruned)  # none with several objectives
    shown: dict[int, tuple[State, Sequence[float]]] = {}
    for ending, row in endings.items():
        values = [float(v) for v in ending.values or ()] if ending.state is State.COMPLETE else []
        if row.trial_id in last:
            values = [last[row.trial_id]]
        shown[row.trial_id] = (ending.state, values)
    return shown


def _ended_before(connection: sa.Connection, endings: Sequence[Ending]) -> set[int]:
    """Those that ended so under this very lease: a repeated call after a lost reply."""
    if not endings:
        return set()
    t = schema.trainings.c
    of = {ending.training.id: ending for ending in endings}
    query = sa.select(t.id, t.state, t.lease_epoch).where(t.id.in_(list(of)))
    return {
        row.id
        for row in connection.execute(query)
        if row.state == of[row.id].state and row.lease_epoch == of[row.id].training.lease_epoch
    }


# -- reading ------------------------------------------------------------------------------------


def _records(connection: sa.Connection, chosen: sa.ColumnElement[bool]) -> list[Record]:
    t, m, w = schema.trainings.c, schema.measurements.c, schema.workers.c
    query = (
        sa.select(schema.trainings, w.host, w.pid)
        .outerjoin(schema.workers, t.worker_id == w.id)
        .where(chosen)
        .order_by(t.id)
    )
    rows = connection.execute(query).all()
    measured = (
        sa.select(m.training_id, m.interval, m.measured)
        .join(schema.trainings, sa.and_(t.id == m.training_id, t.attempt == m.attempt))
        .where(chosen)
        .order_by(m.training_id, m.interval)
    )
    of: dict[int, list[tuple[int, str]]] = {}
    for training_id, interval, text in connection.execute(measured):
        of.setdefault(training_id, []).append((interval, text))
    return [_record(row, of.get(row.id, [])) for row in rows]


def _record(row: sa.Row[Any], measured: Sequence[tuple[int, str]]) -> Record:
    return Record(
        training=training_of(row),
        state=State(row.state),
        reason=row.reason,
        curves=_curves(measured),
        values=None if row.objectives is None else tuple(json.loads(row.objectives)),
        best_interval=row.best_interval,
        started=None if row.started_at is None else as_time(row.started_at),
        ended=None if row.ended_at is None else as_time(row.ended_at),
        worker=None if row.host is None else f"{row.host}:{row.pid}",
    )


def _curves(measured: Sequence[tuple[int, str]]) -> dict[str, tuple[float, ...]]:
    """One tuple per key over the intervals 1, 2, …; NaN where an interval lacks the key."""
    if not measured:
        return {}
    rows = [_from_text(text) for _, text in measured]
    keys = rows[0].keys()
    if measured[-1][0] == len(rows) and all(row.keys() == keys for row in rows):
        return {key: tuple([row[key] for row in rows]) for key in keys}
    at = {interval: row for (interval, _), row in zip(measured, rows, strict=True)}
    every = dict.fromkeys(key for row in rows for key in row)
    intervals = range(1, measured[-1][0] + 1)
    return {k: tuple(at.get(i, {}).get(k, math.nan) for i in intervals) for k in every}


def _to_text(values: Mapping[str, float]) -> str:
    """JSON that every database can read: what is no finite number becomes `"nan"`, `"-inf"`."""
    floats = {key: float(value) for key, value in values.items()}
    try:
        return json.dumps(floats, allow_nan=False)
    except ValueError:
        return json.dumps({k: v if math.isfinite(v) else str(v) for k, v in floats.items()})


def _from_text(text: str) -> dict[str, float]:
    values: dict[str, float] = json.loads(text)
    if "nan" in text or "inf" in text:
        return {key: float(value) for key, value in values.items()}
    return values
