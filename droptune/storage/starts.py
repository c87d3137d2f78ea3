"""New trials of the search: numbered, leased, linked to Optuna's and counted, all at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from droptune.storage import schema, trials
from droptune.storage.database import Database
from droptune.storage.queue import count_taken, new_row
from droptune.training import Seeds, State, Training, TrainingKind


@dataclass(frozen=True)
class Lease:
    """Who claims: all that it takes is found again under its ticket."""

    worker_id: int
    ticket: str
    seconds: float

    def columns(self, at: float) -> dict[str, Any]:
        return {
            "state": State.RUNNING.value,
            "worker_id": self.worker_id,
            "ticket": self.ticket,
            "lease_until": at + self.seconds,
        }


def start_new(
    database: Database,
    connection: sa.Connection,
    study: sa.Row[Any],
    lease: Lease,
    count: int,
) -> list[Training]:
    """Start trials with the study's next numbers, in both sets of tables."""
    rows = [
        new_row(
            study,
            kind=TrainingKind.SEARCH,
            label="",
            number=number,
            trial_id=None,
            seeds=Seeds.of_trial(study.seed, number),
            at=study.at,
        )
        | lease.columns(study.at)
        | {"lease_epoch": 1, "started_at": study.at}
        for number in range(study.next_number, study.next_number + count)
    ]
    if database.dialect == "postgresql":
        ids = _start_at_once(connection, study, rows)
    else:
        ids = _start(database, connection, study, rows)
    return [_started(row, training_id) for row, training_id in zip(rows, ids, strict=True)]


def _start(
    database: Database,
    connection: sa.Connection,
    study: sa.Row[Any],
    rows: Sequence[dict[str, Any]],
) -> list[int]:
    """Insert running trials and count them; returns the ids of the trainings."""
    numbers = [row["number"] for row in rows]
    trial_ids = trials.add_trials(connection, study.optuna_id, numbers, State.RUNNING, study.at)
    linked = [row | {"trial_id": i} for row, i in zip(rows, trial_ids, strict=True)]
    taken = len(rows) * study.intervals
    count_taken(connection, study.id, numbers=len(rows), intervals=taken)
    return database.insert(connection, schema.trainings, linked)


def _start_at_once(
    connection: sa.Connection, study: sa.Row[Any], rows: Sequence[Mapping[str, Any]]
) -> list[int]:
    """As `_start`, in one message: on PostgreSQL all others wait behind this lock meanwhile."""
    names = ", ".join(name for name in rows[0] if name != "trial_id")
    statement = sa.text(f"""
        WITH new AS (
            SELECT * FROM json_populate_recordset(NULL::droptune_trainings, CAST(:rows AS json))
        ), added AS (
            INSERT INTO trials (study_id, number, state, datetime_start)
            SELECT :optuna_id, number, 'RUNNING', :start FROM new ORDER BY number
            RETURNING trial_id, number
        ), counted AS (
            UPDATE droptune_studies
            SET next_number = next_number + :count,
                intervals_taken = intervals_taken + :count * intervals
            WHERE id = :id
        )
        INSERT INTO droptune_trainings ({names}, trial_id)
        SELECT {names}, added.trial_id FROM new JOIN added USING (number) ORDER BY number
        RETURNING id, number
    """)
    values = {
        "rows": json.dumps([*rows]),
        "optuna_id": study.optuna_id,
        "start": trials.optuna_time(study.at),
        "count": len(rows),
        "id": study.id,
    }
    ids = {row.number: row.id for row in connection.execute(statement, values)}
    return [ids[row["number"]] for row in rows]


def _started(row: Mapping[str, Any], training_id: int) -> Training:
    """The value of a row that was just inserted."""
    return Training(
        id=training_id,
        study_id=row["study_id"],
        kind=TrainingKind(row["kind"]),
        number=row["number"],
        label=row["label"],
        assignment=None,
        seeds=Seeds(row["weights_seed"], row["data_seed"], row["split_seed"]),
        seed_index=None,
        intervals=row["intervals"],
        attempt=row["attempt"],
        lease_epoch=row["lease_epoch"],
    )
