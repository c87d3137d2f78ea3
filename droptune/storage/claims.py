"""Who may train what. Every method is one transaction.

A training is QUEUED, then RUNNING under a lease of one worker, then finished. Each claim raises
its lease epoch, and every write of a worker names the epoch that it holds: whoever was believed
dead and returns late finds its writes refused. A study's counters (numbers, budget, order of
ends) change only under a lock on the study's row, and all its workers wait for each other there:
as few statements as can be come after it. A claim locks the study, then trainings that nobody has;
an end locks trainings that its worker has, and the study last.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from droptune.storage import schema, trials
from droptune.storage.budget import first_reached, limit_reached, tickets_left, time_used
from droptune.storage.database import Database, now
from droptune.storage.queue import Params
from droptune.storage.starts import Lease, start_new
from droptune.storage.studies import counters, lock_study
from droptune.training import Assignment, Seeds, State, Training, TrainingKind

LEASE_SECONDS = 60.0
Held = dict[int, Any]  # rows of droptune_trainings by id, locked


@dataclass(frozen=True)
class Progress:
    """What is left of a study: nothing, when `idle`.

    `tickets` is the number of trials that may still be started (None: no limit); `spent` says
    which limit of the whole study (device hours, deadline) is reached, after which nothing starts;
    `share` is how much of such a limit is used, from 0 to 1.
    """

    status: str
    phase: str
    queued: int
    running: int
    tickets: int | None
    spent: str | None
    share: float = 0.0

    @property
    def claimable(self) -> bool:
        if self.status != "active" or self.spent:
            return False
        return self.queued > 0 or (self.phase == "searching" and self.tickets != 0)

    @property
    def idle(self) -> bool:
        return not self.claimable and self.running == 0


class Claims:
    """The part of Storage that hands out trainings."""

    database: Database
    lease_seconds: float

    def claim(
        self, study_id: int, worker_id: int, limit: int, *, ticket: str | None = None
    ) -> list[Training]:
        """Up to `limit` trainings for a worker: the queue first, then new trials of the search.

        New trials come with `assignment=None` and need `assign`. A second call with the same
        `ticket` returns what the first one took.
        """
        lease = Lease(worker_id, ticket or str(uuid.uuid4()), self.lease_seconds)
        again = ticket is not None

        def work(connection: sa.Connection) -> list[Training]:
            nonlocal again
            study = lock_study(connection, study_id, _waiting(study_id))
            if study is None or study.status != "active":
                return []
            taken = _taken_under(connection, study, lease) if again else []
            again = True  # from here on a commit may succeed without its reply
            if taken or limit_reached(connection, study) or limit < 1:
                return taken
            queued = _take_queued(connection, study, lease, limit) if study.waiting else []
            new = min(limit - len(queued), tickets_left(study, limit))
            if new < 1 or study.phase != "searching":
                return queued
            return queued + start_new(self.database, connection, study, lease, new)

        return self.database.write(work)

    def assign(
        self,
        trainings: Sequence[Training],
        assignments: Sequence[Assignment],
        params: Sequence[Params],
    ) -> list[Training]:
        """Write what the sampler chose; returns the trainings, assigned, whose lease holds."""
        given = dict(zip((t.id for t in trainings), assignments, strict=True))
        named = dict(zip((t.id for t in trainings), params, strict=True))

        def work(connection: sa.Connection) -> list[Training]:
            held = lock_held(connection, trainings)
            t = schema.trainings
            statement = t.update().where(t.c.id == sa.bindparam("of"))
            rows = [{"of": i, "assignment": json.dumps(given[i].to_json())} for i in held]
            if rows:
                connection.execute(statement, rows)
            of_trials = {r.trial_id: named[i] for i, r in held.items() if r.trial_id is not None}
            trials.set_params(connection, of_trials)
            return [replace(t, assignment=given[t.id]) for t in trainings if t.id in held]

        return self.database.write(work)

    def release(self, trainings: Sequence[Training]) -> None:
        """Hand trainings back: QUEUED again under their own numbers, first in their turn."""

        def work(connection: sa.Connection) -> None:
            requeue(connection, lock_held(connection, trainings))

        self.database.write(work)

    def requeue_stale(self) -> list[int]:
        """Queue again every training whose lease ran out; returns their ids.

        The late worker is fenced off: the lease epoch is raised. After an absence of the
        database nobody is called late before all had time to return.
        """
        t = schema.trainings.c
        stale = (
            sa.select(t.id, t.trial_id)
            .where(t.state == State.RUNNING, t.lease_until < now())
            .order_by(t.id)
        )

        def work(connection: sa.Connection) -> list[int]:
            found = {row.id: row for row in connection.execute(stale.with_for_update())}
            requeue(connection, found)
            return list(found)

        def due(connection: sa.Connection) -> bool:
            if connection.execute(stale.limit(1)).first() is None:
                return False
            return self.database.present_seconds(connection) >= self.lease_seconds / 2

        return self.database.write(work) if self.database.read(due) else []

    def restart(self, training: Training) -> Training:
        """A new attempt from nothing: all that the old one measured is forgotten."""

        def work(connection: sa.Connection) -> Training:
            t = schema.trainings.c
            row = lock_held(connection, [training], attempts=False).get(training.id)
            if row is None or row.attempt > training.attempt + 1:
                return training  # the lease is lost: the next write says so
            attempt = training.attempt + 1
            measured = schema.measurements.c.training_id == training.id
            connection.execute(schema.measurements.delete().where(measured))
            if row.trial_id is not None:
                trials.forget_intermediates(connection, row.trial_id)
            connection.execute(
                schema.trainings.update()
                .where(t.id == training.id)
                .values(attempt=attempt, intervals_done=0)
            )
            return replace(training, attempt=attempt)

        return self.database.write(work)

    def progress(self, study_id: int) -> Progress:
        """What is left to be started and trained in a study."""

        def work(connection: sa.Connection) -> Progress:
            query = counters().where(schema.studies.c.id == study_id)
            row = connection.execute(query).one_or_none()
            return _progress(connection, row)

        return self.database.read(work)

    def move_on(self, study_id: int, phase: str, *, to: str) -> bool:
        """Change the phase where nothing is left in it; False where that is so no more.

        Whoever queues trainings or raises the budget meanwhile is not passed over.
        """
        tried = False

        def work(connection: sa.Connection) -> bool:
            nonlocal tried
            row = lock_study(connection, study_id)
            left = _progress(connection, row)
            if left.phase != phase or not left.idle:
                return tried and left.phase == to
            tried = True  # from here on a commit may succeed without its reply
            chosen = schema.studies.c.id == study_id
            connection.execute(schema.studies.update().where(chosen).values(phase=to))
            return True

        return self.database.write(work)


def _progress(connection: sa.Connection, row: sa.Row[Any] | None) -> Progress:
    if row is None:
        return Progress("stopped", "done", 0, 0, 0, "deleted")
    t = schema.trainings.c
    counts = sa.select(t.state, sa.func.count()).where(
        t.study_id == row.id, t.state.in_([State.QUEUED, State.RUNNING])
    )
    of_state = {each[0]: each[1] for each in connection.execute(counts.group_by(t.state))}
    used = time_used(connection, row)
    return Progress(
        status=row.status,
        phase=row.phase,
        queued=of_state.get(State.QUEUED, 0),
        running=of_state.get(State.RUNNING, 0),
        tickets=tickets_left(row, None),
        spent=first_reached(used),
        share=min(max(used.values(), default=0.0), 1.0),
    )


def lock_held(
    connection: sa.Connection, trainings: Sequence[Training], *, attempts: bool = True
) -> Held:
    """Lock the rows of these trainings and return those that are still held as given.

    A row's `at` is the database's time.
    """
    t = schema.trainings.c
    epochs = {training.id: training for training in trainings}
    query = (
        sa.select(t.id, t.study_id, t.trial_id, t.kind, t.attempt, t.lease_epoch,
                  t.intervals, t.intervals_done, now().label("at"))
        .where(t.id.in_(list(epochs)), t.state == State.RUNNING)
        .order_by(t.id)
        .with_for_update()
    )  # fmt: skip
    return {
        row.id: row
        for row in connection.execute(query)
        if row.lease_epoch == epochs[row.id].lease_epoch
        and (not attempts or row.attempt == epochs[row.id].attempt)
    }


def training_of(row: sa.Row[Any]) -> Training:
    """The value of a row of `droptune_trainings`."""
    return Training(
        id=row.id,
        study_id=row.study_id,
        kind=TrainingKind(row.kind),
        number=row.number,
        label=row.label,
        assignment=None if row.assignment is None else _assignment(row.assignment),
        seeds=Seeds(row.weights_seed, row.data_seed, row.split_seed),
        seed_index=row.seed_index,
        intervals=row.intervals,
        attempt=row.attempt,
        lease_epoch=row.lease_epoch,
    )


def _assignment(text: str) -> Assignment:
    return Assignment.from_json(json.loads(text))


def requeue(connection: sa.Connection, rows: Held) -> None:
    if not rows:
        return
    t = schema.trainings.c
    connection.execute(
        schema.trainings.update()
        .where(t.id.in_(list(rows)))
        .values(
            state=State.QUEUED.value,
            lease_epoch=t.lease_epoch + 1,
            lease_until=None,
            worker_id=None,
            ticket=None,
        )
    )
    trials.queue_trials(connection, [r.trial_id for r in rows.values() if r.trial_id is not None])


def _waiting(study_id: int) -> sa.Label[bool]:
    """Whether a study has queued trainings (as it was when the statement began)."""
    t = schema.trainings.c
    queued = sa.exists().where(t.study_id == study_id, t.state == State.QUEUED)
    return queued.label("waiting")


def _take_queued(
    connection: sa.Connection, study: sa.Row[Any], lease: Lease, limit: int
) -> list[Training]:
    t, at = schema.trainings.c, study.at
    first = (
        sa.select(t.id, t.trial_id)
        .where(t.study_id == study.id, t.state == State.QUEUED)
        .order_by(t.priority, t.id)
        .limit(limit)
        .with_for_update()
    )
    chosen = connection.execute(first).all()
    if not chosen:
        return []
    connection.execute(
        schema.trainings.update()
        .where(t.id.in_([row.id for row in chosen]))
        .values(
            lease_epoch=t.lease_epoch + 1,
            started_at=sa.func.coalesce(t.started_at, at),
            **lease.columns(at),
        )
    )
    trials.start_trials(connection, [r.trial_id for r in chosen if r.trial_id is not None], at)
    return _taken_under(connection, study, lease)


def _taken_under(connection: sa.Connection, study: sa.Row[Any], lease: Lease) -> list[Training]:
    t = schema.trainings.c
    query = sa.select(schema.trainings).where(
        t.study_id == study.id,
        t.state == State.RUNNING,
        t.worker_id == lease.worker_id,
        t.ticket == lease.ticket,
    )
    rows = connection.execute(query.order_by(t.priority, t.id))
    return [training_of(row) for row in rows]
