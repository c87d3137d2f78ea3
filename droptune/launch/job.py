"""What an engine started: one job for one worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

JOB = "DROPTUNE_JOB"  # in a worker's environment: the name of its job


@dataclass(frozen=True)
class Job:
    """One worker as its engine knows it; `worker` counts from 0 within one launch."""

    launcher: str
    id: str
    study: str | None
    worker: int

    @property
    def name(self) -> str:
        """`slurm 4711_3`: the worker registers under the same name."""
        return f"{self.launcher} {self.id}"


Record = Callable[[Sequence[Job]], None]
