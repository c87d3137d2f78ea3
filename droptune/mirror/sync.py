"""Writing a study to MLflow: idempotent, late, and never twice.

SQL is the truth. One syncer per study holds a lease; whatever it does can be repeated after a
crash at any point and changes nothing the second time: runs are found again by their tag
`droptune.uid`, points carry times frozen in SQL, and a training's watermark moves only after
MLflow has answered.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from droptune.errors import ProgramError, SiteError
from droptune.mirror import runs
from droptune.mirror.answer import Answer, trials
from droptune.mirror.lease import Lease, LeaseLost
from droptune.mirror.registry import CHALLENGER, CHAMPION
from droptune.mirror.study import MirroredStudy
from droptune.mirror.tenure import Load, Tenure, Written
from droptune.mirror.tracking import MirrorError, Refused, Tracking
from droptune.spec.objective import Objective
from droptune.storage import Storage, StudyRow
from droptune.training import Record

Artifacts = Callable[[StudyRow, Sequence[Record]], Mapping[str, bytes]]

LEASE_SECONDS = 60.0
_REGISTER_SECONDS = 600.0  # between two registrations of the best so far
_REFRESH_SHARE = 20  # a refresh may take a twentieth of the time
_REFRESH_SECONDS = 30.0  # between two refreshes of the study's own run while trainings come in


@dataclass(frozen=True)
class SyncResult:
    """What one round did.

    `holder` is False where another syncer has the lease. `reason` says why the round stopped
    early; `refused` that the server said no to us (401, 403). `set_aside` maps training ids to
    why MLflow did not take them, `unregistered` says why the best model is not registered.
    `doubtful` means that a run may have been made twice: a later round will see.
    """

    holder: bool
    trainings: int = 0
    points: int = 0
    set_aside: Mapping[int, str] = field(default_factory=dict)
    unregistered: str | None = None
    doubtful: bool = False
    reason: str | None = None
    refused: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "complete": self.complete}

    @property
    def complete(self) -> bool:
        """Whether MLflow now shows all that SQL had."""
        return self.holder and self.reason is None


class Mirror:
    """Copies one study from SQL to MLflow.

    `extras` gives more files for the study's own run by path (figures, reports), `load` a
    trained model of which the weights are kept (without it no model is registered), `owner` names
    the holder of the lease.
    MLflow is imported by the first round that has the lease. Not for a training thread: one call
    can block for some 20 seconds.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        tracking: Tracking,
        *,
        owner: str | None = None,
        extras: Artifacts = lambda row, records: {},
        load: Load | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._storage = storage
        self._row = storage.study(name)
        self._tracking = tracking
        owner = owner or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._lease = Lease(storage, self._row.id, owner, lease_seconds)
        self._extras = extras
        self._load = load
        self._registered_at = float("-inf")
        self._unregistered: str | None = None
        self._refresh_at = float("-inf")
        self._stale = True  # the study's own run
        self._records: dict[int, Record] = {}
        self._cursor = 0
        self._told: str | None = ""  # nothing known of what SQL says
        self._client: Any = None
        self._tenure: Tenure | None = None

    def sync_once(self, *, refresh: bool = False) -> SyncResult:
        """Write what SQL has and MLflow has not; takes the lease where it is free.

        `refresh` brings the study's own run up to date even if that was done a moment ago.
        """
        if not self._lead():
            return SyncResult(holder=False)
        try:
            with self._lease.kept():
                written = self._round(refresh)
        except LeaseLost:
            return SyncResult(holder=False)
        except MirrorError as error:
            return self._stopped(error)
        self._tell(None)
        assert self._tenure is not None
        return SyncResult(
            holder=True,
            trainings=written.trainings,
            points=written.points,
            set_aside=self._tenure.set_aside,
            unregistered=self._unregistered,
            doubtful=self._tenure.parent.sweep_pending,
        )

    def rebuild(self) -> SyncResult:
        """Write everything anew: into an empty MLflow, or over what is there (which is kept).

        Runs that are there are found by their tags; the same points and params change nothing.
        """
        if not self._lead():
            return SyncResult(holder=False)
        self._storage.forget_mirror_links(self._row.id)
        self._storage.put_mirror_state(self._row.id, {"sweep_at": 0})
        self._tenure, self._stale = None, True
        return self.sync_once(refresh=True)

    def release(self) -> None:
        """Let another one be the syncer."""
        if self._tenure is not None and self._lease.held:
            with suppress(LeaseLost):
                self._tenure.parent.leave()
        self._lease.release()
        self._tenure = None

    def _lead(self) -> bool:
        held = self._lease.held
        if not self._lease.take() or not held:
            self._tenure = None  # another one may have written in between
        return self._lease.held

    def _round(self, refresh: bool) -> Written:
        row = self._storage.study(self._row.name)
        self._stale |= (row.phase, row.status) != (self._row.phase, self._row.status)
        self._row = row
        records = self._read()
        tenure = self._begun()
        written = tenure.write(records, self._devices)
        self._stale |= written.trainings > 0
        if refresh or (self._stale and time.monotonic() >= self._refresh_at):
            self._refresh(tenure, records, refresh or row.phase != "searching")
        return written

    def _refresh(self, tenure: Tenure, records: Sequence[Record], now: bool) -> None:
        """The study's own run and its model; seldom where drawing its figures takes long, and not
        where it shows all this already."""
        began = time.monotonic()
        verdict = self._storage.get_verdict(self._row.id)
        answer = Answer.of(verdict, done=self._row.phase == "done")
        seen = _seen(self._row, records, verdict)
        if tenure.parent.shown != seen:
            artifacts = self._extras(self._row, records)
            tenure.parent.refresh(MirroredStudy.of(self._row), records, answer, artifacts)
            tenure.parent.remember_shown(seen)
        took = time.monotonic() - began
        self._refresh_at = time.monotonic() + max(_REFRESH_SECONDS, _REFRESH_SHARE * took)
        self._stale = False
        self._register(tenure, records, answer, now=now)

    def _register(
        self, tenure: Tenure, records: Sequence[Record], answer: Answer, *, now: bool
    ) -> None:
        """Keep the registered model: seldom while the best of the search still changes."""
        if self._load is None:
            return
        if not now and time.monotonic() - self._registered_at < _REGISTER_SECONDS:
            return
        self._registered_at = time.monotonic()
        objective = MirroredStudy.of(self._row).objectives[0]
        describe = answer.line(self._row.name, records, objective)
        chosen = models_to_register(records, answer, objective)
        try:
            self._unregistered = tenure.register(chosen, self._load, describe)
        except (ProgramError, SiteError) as error:  # its program cannot be loaded here
            self._unregistered = str(error)

    def _read(self) -> list[Record]:
        """All records; those that had ended before are not read again."""
        changed, self._cursor = self._storage.changes(self._row.id, self._cursor)
        ended = {id_: record for id_, record in self._records.items() if record.state.finished}
        self._records = ended | {record.training.id: record for record in changed}
        return list(self._records.values())

    def _devices(self) -> dict[str, str]:
        workers = self._storage.list_workers(ended=True)
        return {f"{worker.host}:{worker.pid}": worker.device for worker in workers}

    def _begun(self) -> Tenure:
        if self._client is None:
            self._client = self._tracking.connect()
        if self._tenure is None:
            study = MirroredStudy.of(self._row)
            self._tenure = Tenure(self._storage, self._tracking, study, self._client, self._lease)
        return self._tenure

    def _stopped(self, error: MirrorError) -> SyncResult:
        self._tell(str(error))
        refused = isinstance(error, Refused)
        if refused:
            self.release()
        return SyncResult(holder=True, reason=str(error), refused=refused)

    def _tell(self, reason: str | None) -> None:
        """Leave the reason in SQL, where `study show` finds it; what another one has is its own."""
        if self._told != reason and self._lease.held:
            state = self._storage.mirror_state(self._row.id)
            self._storage.put_mirror_state(self._row.id, {**state, "reason": reason})
            self._told = reason


def _seen(row: StudyRow, records: Sequence[Record], verdict: Mapping[str, Any] | None) -> str:
    """A hash of all that is shown of a study: what an attempt has measured does not change."""
    trainings = sorted(
        (r.training.id, r.training.attempt, r.state.value, r.intervals_done) for r in records
    )
    study = version("droptune"), row.phase, row.status, row.spec, row.meta
    content = json.dumps([*study, trainings, verdict], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def models_to_register(
    records: Sequence[Record], answer: Answer, objective: Objective
) -> dict[str, Record]:
    """Which training each alias belongs to now: the search's best, and what is confirmed."""
    best = runs.best_of(trials(records), objective)
    found = {CHALLENGER: best, CHAMPION: answer.champion(records, objective)}
    return {alias: record for alias, record in found.items() if record is not None}
