"""Writing one training's run: found or created, filled, ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from droptune.mirror import runs
from droptune.mirror.lease import Lease
from droptune.mirror.links import Link
from droptune.mirror.parent import Parent
from droptune.mirror.runs import Point, Reference
from droptune.mirror.study import MirroredStudy
from droptune.mirror.tracking import Away, Tracking, plain_errors
from droptune.training import Record

_BATCH = 900  # points per request; MLflow takes 1000 metrics, params and tags in all
_PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class Found:
    """A run that MLflow has."""

    run_id: str
    uid: str
    started: int
    parent: str | None


class RunWriter:
    """Writes runs of one experiment through one client, with explicit run ids only.

    `save` stores a link in SQL; it is called before a run is created and after MLflow has
    answered, never in between. Several threads may write, each its own run, within `single_try`.
    Raises MirrorErrors.
    """

    def __init__(
        self,
        client: Any,
        tracking: Tracking,
        study: MirroredStudy,
        *,
        parent: Parent,
        lease: Lease,
        save: Callable[[Link], None],
    ) -> None:
        self._client = client
        self._tracking = tracking
        self._study = study
        self._parent = parent
        self._lease = lease
        self._save = save

    def write(
        self, record: Record, link: Link | None, *, device: str | None, reference: Reference | None
    ) -> int:
        """Bring the training's run up to the record; returns how many points were written.

        `reference` is what `gain` is measured against, once all baselines are finished.
        """
        if link is not None and link.attempt != record.training.attempt:
            self.delete_all(record, link)
            link = None
        tags = self._tags(record, device)
        known = link is not None  # where it is not, the run is created with these tags
        link = self._ensure_run(record, link, tags)
        points = list(self._points(record, link, reference))
        self._log(record, link, points, tags if known else {})
        if record.state.finished and link.state != record.state.value:
            self._end(record, link)
        self._save(self._arrived(record, link, reference))
        return len(points)

    def _tags(self, record: Record, device: str | None) -> dict[str, str]:
        study = self._study
        found = runs.tags(record, study_name=study.name, study_uuid=study.uuid, device=device)
        return {**found, _PARENT: self._parent.run_id}

    # -- the run ------------------------------------------------------------------------------

    def _ensure_run(self, record: Record, link: Link | None, tags: Mapping[str, str]) -> Link:
        if link is not None and link.run_id is not None:
            return link
        if link is None:  # nobody has ever tried: no need to look for it
            link = Link.begin(record, datetime.now(UTC))
            self._save(link)
        else:
            found = self.find(tags[runs.UID])
            if found:
                return replace(link, run_id=found[0])
        return replace(link, run_id=self._create(record, link, tags))

    def _create(self, record: Record, link: Link, tags: Mapping[str, str]) -> str:
        self._lease.check()
        try:
            with plain_errors(self._tracking):
                run = self._client.create_run(
                    self._parent.experiment_id,
                    start_time=link.started,
                    tags=dict(tags),
                    run_name=record.training.name,
                )
        except Away:  # the server may have created it all the same, or may still do so
            self._parent.sweep_later()
            raise
        return str(run.info.run_id)

    def find(self, uid: str) -> list[str]:
        """The runs with this `droptune.uid`, oldest first."""
        with plain_errors(self._tracking):
            found = self._client.search_runs(
                [self._parent.experiment_id], filter_string=f"tags.`{runs.UID}` = '{uid}'"
            )
        return [
            run.info.run_id
            for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
        ]

    def all_runs(self) -> list[Found]:
        """All runs of the study but its own, oldest first."""
        wanted = f"tags.`droptune.study_uuid` = '{self._study.uuid}'"
        found, page = [], None
        with plain_errors(self._tracking):
            while page is None or page.token:
                page = self._client.search_runs(
                    [self._parent.experiment_id],
                    filter_string=wanted,
                    max_results=1000,
                    page_token=page.token if page else None,
                )
                found += [r for r in page if r.info.run_id != self._parent.run_id]
        found.sort(key=lambda run: (run.info.start_time, run.info.run_id))
        return [
            Found(
                run_id=run.info.run_id,
                uid=run.data.tags.get(runs.UID, ""),
                started=int(run.info.start_time),
                parent=run.data.tags.get(_PARENT),
            )
            for run in found
        ]

    def adopt(self, found: Found) -> None:
        """Make it a child of the study's run, if it was another one's."""
        if found.parent != self._parent.run_id:
            with plain_errors(self._tracking):
                self._client.set_tag(found.run_id, _PARENT, self._parent.run_id)

    def delete_all(self, record: Record, link: Link) -> None:
        """Delete every run of the attempt that the link speaks of."""
        stale = replace(record.training, attempt=link.attempt)
        for run_id in {*self.find(runs.uid(self._study.uuid, stale)), link.run_id} - {None}:
            self.delete(str(run_id))

    def delete(self, run_id: str) -> None:
        from mlflow.exceptions import MlflowException

        with plain_errors(self._tracking):
            try:
                self._client.delete_run(run_id)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise  # those two: it is gone already

    # -- its contents -------------------------------------------------------------------------

    def _points(self, record: Record, link: Link, reference: Reference | None) -> Iterable[Point]:
        objectives = self._study.objectives
        if record.state.finished and link.state != record.state.value:
            yield from runs.final_points(record, objectives, time=self._end_time(record, link))
        yield from runs.curve_points(record, objectives, started=link.started, after=link.intervals)
        if reference is not None and reference.value != link.gain:
            time = self._end_time(record, link)
            yield from runs.gain_points(record, objectives[0], reference, time=time)

    def _log(
        self, record: Record, link: Link, points: list[Point], tags: Mapping[str, str]
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        assignment = record.training.assignment
        params = runs.params(assignment) if assignment and link.state is None else {}
        changed = tags if link.state != record.state.value else {}
        metrics = iter([Metric(p.key, p.value, p.time, p.step) for p in points])
        entities = {
            "params": [Param(key, value) for key, value in params.items()],
            "tags": [RunTag(key, value) for key, value in changed.items()],
        }
        with plain_errors(self._tracking):
            while batch := list(islice(metrics, _BATCH)):
                self._client.log_batch(link.run_id, metrics=batch, synchronous=True, **entities)
                entities = {}
            if any(entities.values()):
                self._client.log_batch(link.run_id, synchronous=True, **entities)

    def _end(self, record: Record, link: Link) -> None:
        with plain_errors(self._tracking):
            self._client.set_terminated(
                link.run_id, runs.status(record.state), end_time=self._end_time(record, link)
            )

    def _end_time(self, record: Record, link: Link) -> int:
        if record.ended is not None:
            return max(runs.milliseconds(record.ended), link.started)
        return max([link.started, *runs.interval_times(record, link.started)])

    def _arrived(self, record: Record, link: Link, reference: Reference | None) -> Link:
        return replace(
            link,
            intervals=record.intervals_done,
            state=record.state.value,
            gain=None if reference is None or record.value is None else reference.value,
        )
