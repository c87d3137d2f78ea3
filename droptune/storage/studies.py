"""Studies in SQL: made once, found by name, changed only in what may change."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import sqlalchemy as sa

from droptune.errors import StorageError, UnknownStudyError, nearest
from droptune.storage import schema, trials
from droptune.storage.database import Database, clock, now
from droptune.training import State, TrainingKind

LONGEST_NAME = 500
STATUSES = ("active", "stopped")
PHASES = ("searching", "confirming", "done")
SHORT = [column for column in schema.studies.c if column.name not in ("spec", "sites", "meta")]


@dataclass(frozen=True)
class Budget:
    """What a study may spend; None means no limit. The first limit reached ends it.

    `trials` counts every trial that was started (baselines included); `intervals` counts trained
    intervals of trials, a trial's maximum being reserved while it runs; `device_seconds` counts
    what workers report; nothing starts after `deadline`.
    """

    trials: int | None = None
    intervals: int | None = None
    device_seconds: float | None = None
    deadline: datetime | None = None


@dataclass(frozen=True)
class StudyRow:
    """A study as SQL knows it. `intervals` is what one training of the search trains."""

    id: int
    optuna_id: int
    name: str
    uuid: str
    status: str
    phase: str
    spec: dict[str, Any]
    sites: list[Any]
    meta: dict[str, Any]
    created: datetime
    directions: tuple[str, ...]
    seed: int
    intervals: int
    budget: Budget


@dataclass(frozen=True)
class StudySummary:
    """A line of `study list`: `trials` counts baselines and the search, `others` the rest."""

    id: int
    name: str
    uuid: str
    status: str
    phase: str
    priority: int
    trials: Mapping[State, int]
    others: Mapping[State, int]
    best: float | None
    created: datetime
    directions: tuple[str, ...]
    budget: Budget

    @property
    def running(self) -> int:
        """How many trainings of any kind are being trained."""
        return self.trials[State.RUNNING] + self.others[State.RUNNING]


def check_name(name: str) -> None:
    """Raise StorageError unless the name can be kept by every database and shown on one line."""
    if not name.strip() or name != name.strip():
        raise StorageError(f"A study's name cannot be empty or padded with spaces: {name!r}.")
    if len(name) > LONGEST_NAME:
        raise StorageError(
            f"The study's name has {len(name)} characters, {LONGEST_NAME} are possible."
        )
    if not all(character.isprintable() for character in name):
        raise StorageError(f"A study's name cannot hold control characters: {name!r}.")


class Studies:
    """The part of Storage that knows studies."""

    database: Database

    def study(self, name: str) -> StudyRow:
        """The study of that name, or UnknownStudyError with the names that are near."""

        def work(connection: sa.Connection) -> StudyRow:
            row = _find(connection, name)
            if row is None:
                raise UnknownStudyError(self._unknown(connection, name))
            return _study_row(row)

        return self.database.read(work)

    def studies(self) -> list[StudySummary]:
        """All studies, the oldest first, with counts and the best value so far."""

        def work(connection: sa.Connection) -> list[StudySummary]:
            found = connection.execute(counters().order_by(schema.studies.c.id)).all()
            counts = connection.execute(_count_query()).all()
            return [_summary(row, [c for c in counts if c.study_id == row.id]) for row in found]

        return self.database.read(work)

    def update_study(
        self,
        study_id: int,
        *,
        status: str | None = None,
        phase: str | None = None,
        spec: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
        if_phase: str | None = None,
    ) -> bool:
        """Change what is given, in one transaction; False when the study is not in `if_phase`.

        Trials that wait beyond a new `budget` are taken back; what has begun is trained to its end.
        `if_phase` lets one of many workers move the study on: the others get False.
        """
        assert status in (None, *STATUSES), status
        assert phase in (None, *PHASES), phase
        changed: dict[str, Any] = {"status": status, "phase": phase}
        changed["spec"] = None if spec is None else json.dumps(spec)
        changed["meta"] = None if meta is None else json.dumps(meta)
        changed = {key: value for key, value in changed.items() if value is not None}
        if spec is not None:
            changed["priority"] = int(spec.get("priority") or 0)
        changed |= {} if budget is None else _budget_columns(budget)

        tried = False

        def work(connection: sa.Connection) -> bool:
            nonlocal tried
            row = lock_study(connection, study_id)
            if row is None or if_phase not in (None, row.phase):
                return tried and row is not None and row.phase == phase
            tried = True  # from here on a commit may succeed without its reply
            if changed:
                chosen = schema.studies.c.id == study_id
                connection.execute(schema.studies.update().where(chosen).values(changed))
            if budget is not None:
                _take_back(connection, row, budget)
            return True

        return self.database.write(work)

    def delete_study(self, name: str) -> list[int]:
        """Remove a study from both sets of tables; returns the ids of its trainings."""

        gone: list[int] | None = None

        def work(connection: sa.Connection) -> list[int]:
            nonlocal gone
            row = _find(connection, name)
            if row is None and gone is not None:
                return gone  # committed before, but the reply was lost
            if row is None:
                raise UnknownStudyError(self._unknown(connection, name))
            t = schema.trainings.c
            of_study = sa.select(t.id).where(t.study_id == row.id)
            connection.execute(of_study.order_by(t.id).with_for_update())  # in the order of ends
            lock_study(connection, row.id)
            gone = list(connection.execute(of_study).scalars())
            for table in (schema.measurements, schema.scores):
                connection.execute(table.delete().where(table.c.training_id.in_(of_study)))
            for table in (
                schema.trainings, schema.verdicts, schema.links, schema.mirrors, schema.usage,
            ):  # fmt: skip
                connection.execute(table.delete().where(table.c.study_id == row.id))
            connection.execute(schema.studies.delete().where(schema.studies.c.id == row.id))
            trials.delete_study(connection, row.optuna_id)
            return gone

        return self.database.write(work)

    def _unknown(self, connection: sa.Connection, name: str) -> str:
        names = list(connection.execute(sa.select(schema.studies.c.name)).scalars())
        where = self.database.address.redacted
        if not names:
            return (
                f"No study {name!r}: {where} has none; say where it is with --storage or in "
                "droptune.toml, or create it: droptune study create FILE"
            )
        return (
            f"No study {name!r} in {where}{nearest(name, names)}; another database: --storage "
            "or droptune.toml."
        )


def insert_study(
    connection: sa.Connection,
    name: str,
    *,
    key: str,
    spec: Mapping[str, Any],
    sites: Sequence[Any],
    directions: Sequence[str],
    meta: Mapping[str, Any],
    intervals: int,
    seed: int,
    budget: Budget,
) -> sa.Row[Any]:
    """Insert one study into both sets of tables; returns droptune's row, which stays locked."""
    optuna_id = trials.add_study(connection, name, directions)
    mark = {"droptune": {"uuid": key, "version": version("droptune")}}
    trials.set_study_attributes(connection, optuna_id, mark)
    values = {
        "optuna_id": optuna_id,
        "name": name,
        "uuid": key,
        "status": "active",
        "phase": "searching",
        "priority": int(spec.get("priority") or 0),
        "seed": seed,
        "intervals": intervals,
        "directions": json.dumps(list(directions)),
        "spec": json.dumps(spec),
        "sites": json.dumps(list(sites)),
        "meta": json.dumps(meta),
        "next_number": 0,
        "intervals_taken": 0,
        "finished": 0,
        "created_at": clock(connection),
    }
    connection.execute(schema.studies.insert(), values | _budget_columns(budget))
    row = _find(connection, name)
    assert row is not None
    return row


def _take_back(connection: sa.Connection, study: sa.Row[Any], budget: Budget) -> None:
    """Delete the queued trials that a budget has no place for, the last ones first.

    Only what is behind all that has begun, so that numbers stay contiguous. `study` is locked.
    """
    t, s = schema.trainings.c, schema.studies.c
    begun = sa.select(sa.func.coalesce(sa.func.max(t.number), -1)).where(
        t.study_id == study.id, t.started_at.is_not(None)
    )
    last = connection.execute(begun).scalar_one()
    waiting = sa.select(t.id, t.trial_id, t.intervals).where(
        t.study_id == study.id, t.number > last
    )
    count, taken = study.next_number, study.intervals_taken
    gone: dict[int, int] = {}  # training: Optuna's trial
    for row in connection.execute(waiting.order_by(t.number.desc()).with_for_update()):
        if count <= _most(budget.trials) and taken <= _most(budget.intervals):
            break
        count, taken = count - 1, taken - row.intervals
        gone[row.id] = row.trial_id
    if not gone:
        return
    trials.delete_trials(connection, list(gone.values()))
    connection.execute(schema.trainings.delete().where(t.id.in_(list(gone))))
    counted = {"next_number": count, "intervals_taken": taken}
    connection.execute(schema.studies.update().where(s.id == study.id).values(counted))


def _most(limit: int | None) -> float:
    return math.inf if limit is None else limit


def lock_study(
    connection: sa.Connection, study_id: int, *beside: sa.ColumnElement[Any]
) -> sa.Row[Any] | None:
    """The study's row, locked until the transaction ends: its counters may then change.

    The row's `at` is the database's time; `beside` are more columns, of other tables.
    """
    query = counters().add_columns(*beside).where(schema.studies.c.id == study_id)
    return connection.execute(query.with_for_update()).one_or_none()


def counters() -> sa.Select[Any]:
    """The studies' rows with the database's time `at`, without the texts that may be long."""
    return sa.select(*SHORT, now().label("at"))


def optuna_name(connection: sa.Connection, name: str) -> str | None:
    """The name of the Optuna study that the database takes for `name` (MySQL: in any case)."""
    query = sa.select(trials.studies.c.study_name).where(trials.studies.c.study_name == name)
    return connection.execute(query).scalar()


def find_study(connection: sa.Connection, name: str) -> StudyRow | None:
    row = _find(connection, name)
    return None if row is None else _study_row(row)


def _find(connection: sa.Connection, name: str) -> sa.Row[Any] | None:
    query = sa.select(schema.studies).where(schema.studies.c.name == name)
    return connection.execute(query).one_or_none()


def _study_row(row: sa.Row[Any]) -> StudyRow:
    return StudyRow(
        id=row.id,
        optuna_id=row.optuna_id,
        name=row.name,
        uuid=row.uuid,
        status=row.status,
        phase=row.phase,
        spec=json.loads(row.spec),
        sites=json.loads(row.sites),
        meta=json.loads(row.meta),
        created=as_time(row.created_at),
        directions=tuple(json.loads(row.directions)),
        seed=row.seed,
        intervals=row.intervals,
        budget=_budget(row),
    )


def _count_query() -> sa.Select[Any]:
    t = schema.trainings.c
    best = (sa.func.min(t.objective).label("low"), sa.func.max(t.objective).label("high"))
    columns = (t.study_id, t.kind, t.state)
    return sa.select(*columns, sa.func.count().label("many"), *best).group_by(*columns)


def _summary(row: sa.Row[Any], counts: Sequence[sa.Row[Any]]) -> StudySummary:
    directions = tuple(json.loads(row.directions))
    of_trials, others = dict.fromkeys(State, 0), dict.fromkeys(State, 0)
    best: list[float] = []
    for group in counts:
        is_trial = TrainingKind(group.kind).is_trial
        (of_trials if is_trial else others)[State(group.state)] += group.many
        if is_trial and group.state == State.COMPLETE and group.low is not None:
            best.append(group.low if directions[0] == "minimize" else group.high)
    choose = min if directions[0] == "minimize" else max
    return StudySummary(
        id=row.id,
        name=row.name,
        uuid=row.uuid,
        status=row.status,
        phase=row.phase,
        priority=row.priority,
        trials=of_trials,
        others=others,
        best=choose(best) if best and len(directions) == 1 else None,
        created=as_time(row.created_at),
        directions=directions,
        budget=_budget(row),
    )


def _budget(row: sa.Row[Any]) -> Budget:
    deadline = row.budget_deadline
    return Budget(
        trials=row.budget_trials,
        intervals=row.budget_intervals,
        device_seconds=row.budget_device_seconds,
        deadline=None if deadline is None else as_time(deadline),
    )


def _budget_columns(budget: Budget) -> dict[str, Any]:
    deadline = budget.deadline
    return {
        "budget_trials": budget.trials,
        "budget_intervals": budget.intervals,
        "budget_device_seconds": budget.device_seconds,
        "budget_deadline": None if deadline is None else deadline.timestamp(),
    }


def as_time(seconds: float) -> datetime:
    """The database's seconds as an aware time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def finite(value: float) -> float | None:
    """The value where every database can hold it, else None."""
    return value if math.isfinite(value) else None
