"""What a syncer does while it holds the lease of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from droptune.mirror import runs
from droptune.mirror.lease import Lease
from droptune.mirror.links import Link
from droptune.mirror.models import Trained
from droptune.mirror.parent import Parent
from droptune.mirror.registry import Registry
from droptune.mirror.runs import Reference
from droptune.mirror.study import MirroredStudy
from droptune.mirror.tracking import Rejected, Tracking, single_try
from droptune.mirror.writer import RunWriter
from droptune.storage import Storage
from droptune.training import Record, State

Load = Callable[[Record], Trained | None]

CONNECTIONS = 4  # runs written at a time through a server: one alone mostly waits for answers


@dataclass(frozen=True)
class Written:
    """What a round wrote."""

    trainings: int = 0
    points: int = 0


class Tenure:
    """The runs of one study, as known from the links that were read when the lease was taken.

    Whoever finds the lease lost raises LeaseLost and writes nothing more.
    """

    def __init__(
        self,
        storage: Storage,
        tracking: Tracking,
        study: MirroredStudy,
        client: Any,
        lease: Lease,
    ) -> None:
        self._storage = storage
        self._lease = lease
        self._study = study
        self._connections = CONNECTIONS if tracking.is_server else 1  # a database has one writer
        self._links = {
            training_id: Link.from_json(data)
            for training_id, data in storage.mirror_links(study.id).items()
        }
        self.parent = Parent(client, tracking, study, storage, lease)
        self.parent.ensure()
        self.parent.take_over()
        self._registry = Registry(client, tracking, study, experiment_id=self.parent.experiment_id)
        self._writer = RunWriter(
            client,
            tracking,
            study,
            parent=self.parent,
            lease=lease,
            save=self._save,
        )

    def write(
        self,
        records: Sequence[Record],
        devices: Callable[[], Mapping[str, str]],
    ) -> Written:
        """Bring every training's run up to its record."""
        if self.parent.sweep_due:
            self._sweep(records)
            self.parent.swept()
        reference = runs.reference_of(records, self._study.objectives[0])
        work = [record for record in records if self._pending(record, reference)]
        known_devices = devices() if work else {}

        def write(record: Record) -> int:
            self._lease.check()
            return self._write(record, known_devices.get(record.worker or ""), reference)

        return Written(len(work), sum(self._each(write, work)))

    @property
    def set_aside(self) -> Mapping[int, str]:
        """The trainings (by id) that MLflow did not take, and why."""
        return {id_: link.failure for id_, link in self._links.items() if link.failure}

    def register(self, records: Mapping[str, Record], load: Load, describe: str) -> str | None:
        """Point aliases at trainings, exporting and registering them where that is not done.

        Returns why one of them is not registered, None where all are.
        """
        reason = None
        for alias, record in records.items():
            link = self._links.get(record.training.id)
            uid = runs.uid(self._study.uuid, record.training)
            if link is None or link.run_id is None or self.parent.registered.get(alias) == uid:
                continue
            trained = load(record)
            self._lease.check()
            if trained is None:
                reason = f"the weights of {record.training.name} are not in the checkpoint store"
                continue
            what = f"{record.training.name}, objective {record.value:.5g}. {describe}"
            self._registry.register(trained, link.run_id, alias, description=what)
            self.parent.remember_registered(alias, uid)
        return reason

    def _sweep(self, records: Sequence[Record]) -> None:
        """One run for each training: adopt what SQL does not know, delete what is too many."""
        wanted = {runs.uid(self._study.uuid, record.training): record for record in records}
        known = {link.run_id for link in self._links.values() if link.run_id is not None}
        kept: set[str] = set()
        # Runs that a link names come first: where there are two of one training, they stay.
        for found in sorted(self._writer.all_runs(), key=lambda found: found.run_id not in known):
            if found.uid in kept or found.uid not in wanted:
                self._writer.delete(found.run_id)
                continue
            kept.add(found.uid)
            self._writer.adopt(found)
            training = wanted[found.uid].training
            if found.run_id not in known:
                link = Link(training.id, training.attempt, found.started, run_id=found.run_id)
                self._save(link)

    def _pending(self, record: Record, reference: Reference | None) -> bool:
        link = self._links.get(record.training.id)
        if link is not None:
            return not link.covers(record, reference)
        if record.state is State.QUEUED:
            return False
        return record.training.assignment is not None or record.state.finished

    def _each(self, write: Callable[[Record], int], work: Sequence[Record]) -> list[int]:
        """The runs one by one or some at a time; the first failure leaves the rest for later."""
        with single_try(), ThreadPoolExecutor(self._connections) as pool:
            try:
                return list(pool.map(write, work))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _write(self, record: Record, device: str | None, reference: Reference | None) -> int:
        link = self._links.get(record.training.id)
        try:
            return self._writer.write(record, link, device=device, reference=reference)
        except Rejected as error:
            self.parent.verify()  # is it this run, or the whole study that is gone?
            self._set_aside(record, str(error))
            return 0

    def _set_aside(self, record: Record, reason: str) -> None:
        link = self._links.get(record.training.id) or Link.begin(record, datetime.now(UTC))
        self._save(replace(link, attempt=record.training.attempt, failure=reason))

    def _save(self, link: Link) -> None:
        self._lease.check()
        self._storage.put_mirror_link(self._study.id, link.training_id, link.to_json())
        self._links[link.training_id] = link
