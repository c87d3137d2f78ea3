"""Jobs that were submitted, remembered in SQL beside the workers that they become."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import asdict
from typing import Protocol

from droptune.launch.job import Job

_PREFIX = "launch/"


class Blobs(Protocol):
    """The part of Storage that keeps bytes under names."""

    def put_blob(self, name: str, content: bytes) -> None: ...
    def get_blob(self, name: str) -> bytes | None: ...
    def delete_blob(self, name: str) -> None: ...
    def blob_names(self, prefix: str = "") -> list[str]: ...


class Recorder:
    """What a launcher hands its jobs to: writes those of one launch under its tag."""

    def __init__(self, blobs: Blobs, tag: str) -> None:
        self._blobs = blobs
        self._name = f"{_PREFIX}{tag}"
        self._jobs: list[Job] = []

    def __call__(self, jobs: Sequence[Job]) -> None:
        self._jobs += jobs
        content = json.dumps([asdict(job) for job in self._jobs])
        self._blobs.put_blob(self._name, content.encode())


def recorded_jobs(blobs: Blobs) -> list[Job]:
    """Jobs of all launches, the newest launch last; a job's `name` is its worker's `job`."""
    contents = [blobs.get_blob(name) for name in blobs.blob_names(_PREFIX)]
    return [Job(**job) for content in contents if content for job in json.loads(content)]


def waiting_jobs(blobs: Blobs, studies: Container[str], known: Container[str]) -> list[Job]:
    """Jobs of engines, for these studies, whose names (`known`: workers' jobs) are no worker's yet.

    Their engine knows whether they wait, start, or were cancelled before they began.
    """
    jobs = [job for job in recorded_jobs(blobs) if job.launcher != "local"]
    return [job for job in jobs if job.study in studies and job.name not in known]


def forget_jobs(blobs: Blobs, study: str) -> None:
    """Remove the launches of a study that is deleted."""
    for name in blobs.blob_names(_PREFIX):
        jobs = json.loads(blobs.get_blob(name) or b"[]")
        if any(job["study"] == study for job in jobs):
            blobs.delete_blob(name)
