"""Studies with their queues: what is to be trained is known before any worker comes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from droptune.errors import StorageError
from droptune.storage import schema, trials
from droptune.storage.database import Database, clock
from droptune.storage.studies import (
    Budget,
    StudyRow,
    check_name,
    find_study,
    insert_study,
    lock_study,
    optuna_name,
)
from droptune.training import NewTraining, Seeds, State, TrainingKind

Params = Mapping[str, tuple[float, str]]  # name -> (Optuna's internal value, distribution JSON)


class Queue:
    """The part of Storage that adds trainings."""

    database: Database

    def create_study(
        self,
        name: str,
        *,
        spec: Mapping[str, Any],
        sites: Sequence[Any],
        directions: Sequence[str],
        meta: Mapping[str, Any],
        intervals: int,
        seed: int,
        queue: Sequence[NewTraining] = (),
        params: Sequence[Params | None] | None = None,
        budget: Budget | None = None,
    ) -> StudyRow:
        """Create a study with its queue; StorageError when the name is taken.

        `params` are Optuna's values of the queued trials, in the order of `queue`.
        """
        check_name(name)
        assert directions, "a study has an objective"
        key = str(uuid.uuid4())

        def work(connection: sa.Connection) -> StudyRow:
            found = find_study(connection, name)
            if found is not None and found.uuid == key:
                return found  # committed before, but the reply was lost
            taken = optuna_name(connection, name)
            if taken is not None or found is not None:
                raise StorageError(self._taken(name, taken, found is not None))
            row = insert_study(
                connection, name, key=key, spec=spec, sites=sites, directions=directions, meta=meta,
                intervals=intervals, seed=seed, budget=budget or Budget(),
            )  # fmt: skip
            self._add(connection, row, queue, params, key)
            made = find_study(connection, name)
            assert made is not None
            return made

        return self.database.write(work)

    def _taken(self, name: str, taken: str | None, ours: bool) -> str:
        where = self.database.address.redacted
        if ours:
            return f"A study {name!r} is already in {where}: choose another --name."
        if taken != name:
            return (
                f"{where} does not tell {name!r} from its study {taken!r}: choose another --name."
            )
        return f"{where} holds a study {name!r} made by Optuna alone: choose another --name."

    def enqueue(
        self,
        study_id: int,
        queue: Sequence[NewTraining],
        *,
        params: Sequence[Params | None] | None = None,
    ) -> list[int]:
        """Queue trainings; returns the ids of those that were added.

        What has a seed index is added once: the same (kind, label, seed index, assignment) is
        left out when it is there, so that several workers may plan the same confirmations.
        """
        batch = str(uuid.uuid4())

        def work(connection: sa.Connection) -> list[int]:
            row = lock_study(connection, study_id)
            if row is None:
                raise StorageError(f"The study {study_id} was deleted.")
            if not _has_batch(connection, study_id, batch):
                self._add(connection, row, queue, params, batch)
            t = schema.trainings.c
            mine = sa.select(t.id).where(t.study_id == study_id, t.batch == batch)
            return list(connection.execute(mine.order_by(t.id)).scalars())

        return self.database.write(work)

    def _add(
        self,
        connection: sa.Connection,
        study: sa.Row[Any],
        queue: Sequence[NewTraining],
        params: Sequence[Params | None] | None,
        batch: str,
    ) -> None:
        """Insert queued trainings; trials among them get their numbers now."""
        at = clock(connection)
        there = _seeded(connection, study.id)
        pairs = list(zip(queue, params or [None] * len(queue), strict=True))
        pairs = [pair for pair in pairs if _identity(pair[0]) not in there]
        count = sum(new.kind.is_trial for new, _ in pairs)
        numbers = range(study.next_number, study.next_number + count)
        ids = trials.add_trials(connection, study.optuna_id, numbers, State.QUEUED, at)
        left = iter(zip(numbers, ids, strict=True))
        given, labels, queued = {}, {}, []
        for new, values in pairs:
            number, trial_id = next(left) if new.kind.is_trial else (None, None)
            queued.append(_queued_row(study, new, number, trial_id, at) | {"batch": batch})
            if trial_id is not None:
                given[trial_id] = values or {}
                labels[trial_id] = {"kind": new.kind.value, "label": new.label}
        if queued:
            connection.execute(schema.trainings.insert(), queued)
        trials.set_params(connection, given)
        trials.label_trials(connection, labels)
        reserved = sum(row["intervals"] for row in queued if row["number"] is not None)
        count_taken(connection, study.id, numbers=count, intervals=reserved)


def _has_batch(connection: sa.Connection, study_id: int, batch: str) -> bool:
    t = schema.trainings.c
    query = sa.select(t.id).where(t.study_id == study_id, t.batch == batch).limit(1)
    return connection.execute(query).first() is not None


def _seeded(connection: sa.Connection, study_id: int) -> set[tuple[Any, ...]]:
    t = schema.trainings.c
    query = sa.select(t.kind, t.label, t.seed_index, t.assignment).where(
        t.study_id == study_id, t.seed_index.is_not(None)
    )
    return {tuple(row) for row in connection.execute(query)}


def _identity(new: NewTraining) -> tuple[Any, ...]:
    """As `_seeded` tells trainings apart: a label alone may stand for a new winner."""
    return (new.kind.value, new.label, new.seed_index, json.dumps(new.assignment.to_json()))


def _queued_row(
    study: sa.Row[Any], new: NewTraining, number: int | None, trial_id: int | None, at: float
) -> dict[str, Any]:
    if new.seeds is not None:
        seeds = new.seeds
    elif number is not None:
        seeds = Seeds.of_trial(study.seed, number)
    else:
        seeds = Seeds.of_confirmation(study.seed, new.seed_index or 0)
    row = new_row(
        study, kind=new.kind, label=new.label, number=number, trial_id=trial_id, seeds=seeds, at=at
    )
    return row | {
        "assignment": json.dumps(new.assignment.to_json()),
        "seed_index": new.seed_index,
        "intervals": new.intervals or study.intervals,
    }


def new_row(
    study: sa.Row[Any],
    *,
    kind: TrainingKind,
    label: str,
    number: int | None,
    trial_id: int | None,
    seeds: Seeds,
    at: float,
) -> dict[str, Any]:
    return {
        "study_id": study.id,
        "kind": kind.value,
        "number": number,
        "trial_id": trial_id,
        "label": label,
        "priority": 0,
        "weights_seed": seeds.weights,
        "data_seed": seeds.data,
        "split_seed": seeds.split,
        "intervals": study.intervals,
        "intervals_done": 0,
        "attempt": 1,
        "lease_epoch": 0,
        "state": State.QUEUED.value,
        "queued_at": at,
    }


def count_taken(connection: sa.Connection, study_id: int, *, numbers: int, intervals: int) -> None:
    s = schema.studies.c
    connection.execute(
        schema.studies.update()
        .where(s.id == study_id)
        .values(next_number=s.next_number + numbers, intervals_taken=s.intervals_taken + intervals)
    )
