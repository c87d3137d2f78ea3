"""Workers in SQL: who is there, until when they hold what they train, and what they spent."""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from droptune.errors import StorageError
from droptune.storage import schema
from droptune.storage.budget import limit_reached
from droptune.storage.claims import requeue, training_of
from droptune.storage.database import Database, clock, now
from droptune.storage.studies import as_time, counters
from droptune.training import State, Training


@dataclass(frozen=True)
class Orders:
    """What SQL answers a worker's beat.

    `lost`: trainings (ids) that are no longer this worker's. `stopped`: studies (ids) whose
    trainings are to be handed back; `spent`: studies whose device hours or deadline are used up,
    so that nothing of them may train beyond its current interval.
    """

    lost: frozenset[int] = frozenset()
    stopped: frozenset[int] = frozenset()
    spent: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Holding:
    """What a worker trains, and how far it is."""

    study: str
    training: Training
    intervals_done: int


@dataclass(frozen=True)
class WorkerRow:
    """A worker as SQL knows it; `state` is `alive`, `silent` (no beat in time) or `ended`."""

    id: int
    host: str
    pid: int
    device: str
    version: str
    info: dict[str, Any]
    started: datetime
    beat: datetime
    state: str
    holds: tuple[Holding, ...] = ()


class Workers:
    """The part of Storage that knows workers."""

    database: Database
    lease_seconds: float

    def register_worker(
        self, *, host: str, pid: int, device: str, info: Mapping[str, Any] | None = None
    ) -> int:
        """Add a worker; returns its id.

        Raises StorageError on SQLite where the file lies on a network file system or a worker of
        another machine is alive: neither locks nor write-ahead logs hold across machines.
        """
        self._refuse_network()
        token, machine = str(uuid.uuid4()), machine_id()
        row = {
            "token": token,
            "host": host[:255],
            "machine": machine,
            "pid": pid,
            "device": device[:255],
            "version": version("droptune"),
            "info": json.dumps(dict(info or {})),
        }

        def work(connection: sa.Connection) -> int:
            w = schema.workers.c
            mine = sa.select(w.id).where(w.token == token)
            there = connection.execute(mine).scalar()
            if there is not None:
                return int(there)
            at = clock(connection)
            if self.database.dialect == "sqlite":
                self._refuse_elsewhere(connection, host[:255], machine, at)
            times = {"started_at": at, "beat_at": at, "lease_until": at + self.lease_seconds}
            connection.execute(schema.workers.insert(), row | times)
            return int(connection.execute(mine).scalar_one())

        return self.database.write(work)

    def _refuse_network(self) -> None:
        kind = self.database.address.network_file_system()
        if kind is not None:
            raise StorageError(
                f"{self.database.address.redacted} lies on a network file system ({kind}), where "
                "SQLite loses data: use a local folder, or PostgreSQL for several machines."
            )

    def _refuse_elsewhere(
        self, connection: sa.Connection, host: str, machine: str, at: float
    ) -> None:
        w = schema.workers.c
        elsewhere = (w.machine != machine, w.host != host)  # not this one before it was restarted
        alive = (*elsewhere, w.ended_at.is_(None), w.lease_until > at)
        other = connection.execute(sa.select(w.host).where(*alive).limit(1)).scalar()
        if other is not None:
            raise StorageError(
                f"A worker on {other} uses {self.database.address.redacted}, and SQLite serves "
                "one machine only: use PostgreSQL or MySQL for several."
            )

    def beat(
        self,
        worker_id: int,
        training_ids: Sequence[int],
        *,
        info: Mapping[str, Any] | None = None,
        device_seconds: Mapping[int, float] | None = None,
    ) -> Orders:
        """Renew the leases of all that a worker trains (one statement); returns its orders.

        `device_seconds` is, per study id, all that this worker has spent on it so far.
        """
        t, w = schema.trainings.c, schema.workers.c
        until = now() + self.lease_seconds
        mine = (t.id.in_(list(training_ids)), t.worker_id == worker_id, t.state == State.RUNNING)
        spent = [
            {"worker_id": worker_id, "study_id": study_id, "device_seconds": seconds}
            for study_id, seconds in (device_seconds or {}).items()
        ]
        changed = {} if info is None else {"info": json.dumps(dict(info))}

        def work(connection: sa.Connection) -> Orders:
            if training_ids:
                renewing = schema.trainings.update().where(*mine).values(lease_until=until)
                connection.execute(renewing)
            living = schema.workers.update().where(w.id == worker_id)
            connection.execute(living.values(beat_at=now(), lease_until=until, **changed))
            self.database.put(connection, schema.usage, spent, ("worker_id", "study_id"))
            held = connection.execute(sa.select(t.id, t.study_id).where(*mine)).all()
            return _orders(connection, training_ids, held)

        return self.database.write(work)

    def end_worker(self, worker_id: int) -> None:
        """The worker ends in good order; whatever it still holds is queued again."""

        def work(connection: sa.Connection) -> None:
            t, w = schema.trainings.c, schema.workers.c
            held = sa.select(t.id, t.trial_id).where(
                t.worker_id == worker_id, t.state == State.RUNNING
            )
            found = connection.execute(held.order_by(t.id).with_for_update())
            requeue(connection, {row.id: row for row in found})
            ending = schema.workers.update().where(w.id == worker_id)
            connection.execute(ending.values(ended_at=now()))

        self.database.write(work)

    def list_workers(self, *, ended: bool = False) -> list[WorkerRow]:
        """Workers with what each trains; those that ended only where asked for."""

        def work(connection: sa.Connection) -> list[WorkerRow]:
            at, w, t, s = clock(connection), schema.workers.c, schema.trainings.c, schema.studies.c
            query = sa.select(schema.workers).order_by(w.id)
            rows = connection.execute(query if ended else query.where(w.ended_at.is_(None))).all()
            running = (
                sa.select(schema.trainings, s.name.label("study"))
                .join(schema.studies, s.id == t.study_id)
                .where(t.state == State.RUNNING)
                .order_by(t.id)
            )
            holds: dict[int, list[Holding]] = {}
            for row in connection.execute(running):
                holding = Holding(row.study, training_of(row), row.intervals_done)
                holds.setdefault(row.worker_id, []).append(holding)
            return [_worker_row(row, tuple(holds.get(row.id, ())), at) for row in rows]

        return self.database.read(work)

    def remember_width(self, device: str, fingerprint: str, width: Mapping[str, Any]) -> None:
        """Keep what was measured for this device (its name) and program."""

        def work(connection: sa.Connection) -> None:
            row = {
                "device": device[:255],
                "fingerprint": fingerprint[:128],
                "width": json.dumps(dict(width)),
                "measured_at": clock(connection),
            }
            self.database.put(connection, schema.widths, [row], ("device", "fingerprint"))

        self.database.write(work)

    def recall_width(self, device: str, fingerprint: str) -> dict[str, Any] | None:
        """What `remember_width` kept, or None."""
        c = schema.widths.c
        query = sa.select(c.width).where(
            c.device == device[:255], c.fingerprint == fingerprint[:128]
        )
        text = self.database.read(lambda connection: connection.execute(query).scalar())
        return None if text is None else dict(json.loads(text))


def machine_id() -> str:
    """One boot of one kernel: equal in all containers of a machine, other on every other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"[:64]


def _orders(connection: sa.Connection, training_ids: Sequence[int], held: Sequence[Any]) -> Orders:
    ids = {row.study_id for row in held}
    query = counters().where(schema.studies.c.id.in_(list(ids)))
    studies = connection.execute(query).all() if ids else []
    return Orders(
        lost=frozenset(training_ids) - {row.id for row in held},
        stopped=frozenset(row.id for row in studies if row.status != "active"),
        spent=frozenset(row.id for row in studies if limit_reached(connection, row)),
    )


def _worker_row(row: sa.Row[Any], holds: tuple[Holding, ...], at: float) -> WorkerRow:
    state = "alive" if row.lease_until >= at else "silent"
    return WorkerRow(
        id=row.id,
        host=row.host,
        pid=row.pid,
        device=row.device,
        version=row.version,
        info=json.loads(row.info),
        started=as_time(row.started_at),
        beat=as_time(row.beat_at),
        state=state if row.ended_at is None else "ended",
        holds=holds,
    )
