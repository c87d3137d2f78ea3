"""How far each training has been mirrored, as SQL remembers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from droptune.mirror.runs import Reference, milliseconds
from droptune.storage import Storage
from droptune.training import Record


@dataclass(frozen=True)
class Link:
    """Which run mirrors one attempt of a training, and what of it has arrived.

    A link is stored before its run is created (`run_id` None), so that a syncer that dies in
    between is followed by one that looks for the run first. `started` (milliseconds) is frozen
    then: it is the base of all the run's times. `failure` sets the training aside.
    """

    training_id: int
    attempt: int
    started: int
    run_id: str | None = None
    intervals: int = 0
    state: str | None = None
    gain: float | None = None
    failure: str | None = None

    def covers(self, record: Record, reference: Reference | None) -> bool:
        """Whether nothing of the record is left to write."""
        if self.attempt != record.training.attempt:
            return False
        if self.failure is not None:
            return True
        wanted = reference.value if reference is not None and record.value is not None else None
        return (
            self.state == record.state.value
            and self.intervals >= record.intervals_done
            and self.gain == wanted
        )

    @classmethod
    def begin(cls, record: Record, now: datetime) -> Link:
        started = record.started or now
        return cls(record.training.id, record.training.attempt, milliseconds(started))

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Link:
        return cls(**data)


def set_aside(storage: Storage, study_id: int) -> dict[int, str]:
    """The trainings (ids) that MLflow did not take, and why, as SQL remembers it."""
    links = [Link.from_json(data) for data in storage.mirror_links(study_id).values()]
    return {link.training_id: link.failure for link in links if link.failure}
