"""The study's place in MLflow: its experiment and its own run, the parent of all others."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from droptune.mirror import runs
from droptune.mirror.answer import Answer
from droptune.mirror.explorer import page
from droptune.mirror.lease import Lease
from droptune.mirror.note import files, note, settings, summary
from droptune.mirror.study import MirroredStudy
from droptune.mirror.tracking import (
    Away,
    Missing,
    Rejected,
    Tracking,
    plain_errors,
    single_try,
)
from droptune.mirror.views import experiment_tags
from droptune.storage import Storage
from droptune.training import Record

_DOUBT = 60_000  # milliseconds after which a creation that got no answer can no longer arrive


class Parent:
    """Keeps the experiment and the parent run of one study.

    SQL remembers its ids and hashes of what was written (the storage's state of the mirror).
    Raises MirrorErrors.
    """

    def __init__(
        self,
        client: Any,
        tracking: Tracking,
        study: MirroredStudy,
        storage: Storage,
        lease: Lease,
    ) -> None:
        self._client = client
        self._tracking = tracking
        self._study = study
        self._storage = storage
        self._lease = lease
        self._state = dict(storage.mirror_state(study.id))
        self._remembering = threading.Lock()

    @property
    def experiment_id(self) -> str:
        return str(self._state["experiment_id"])

    @property
    def run_id(self) -> str:
        return str(self._state["run_id"])

    # -- other runs of the study ----------------------------------------------------------------

    @property
    def sweep_pending(self) -> bool:
        """Whether MLflow may have runs of the study that SQL does not know."""
        return self._state.get("sweep_at") is not None

    @property
    def sweep_due(self) -> bool:
        return self.sweep_pending and _now() >= int(self._state["sweep_at"])

    def sweep_later(self) -> None:
        """A run may turn up within the next minute, without anybody knowing its id."""
        self._remember(sweep_at=_now() + _DOUBT)

    def swept(self) -> None:
        self._remember(sweep_at=None)

    def take_over(self) -> None:
        """Say who writes now; where the last one did not say goodbye, it may still be writing."""
        if self._state.get("holder") not in (None, self._lease.owner):
            self.sweep_later()
        self._remember(holder=self._lease.owner)

    def leave(self) -> None:
        self._remember(holder=None)

    @property
    def registered(self) -> dict[str, str]:
        """Which training (its uid) each alias was pointed at."""
        return dict(self._state.get("registered", {}))

    def remember_registered(self, alias: str, uid: str) -> None:
        self._remember(registered=self.registered | {alias: uid})

    @property
    def shown(self) -> str | None:
        """Of what the run was last brought up to date (the syncer's hash)."""
        return self._state.get("shown")

    def remember_shown(self, seen: str) -> None:
        self._remember(shown=seen)

    @property
    def uid(self) -> str:
        return f"{self._study.uuid}/parent"

    # -- being there --------------------------------------------------------------------------

    def ensure(self) -> None:
        """Find or create the experiment and the parent run; verify them where SQL knows them."""
        if "run_id" in self._state:
            self.verify()
            return
        self._remember(experiment_id=self._experiment(), mlflow=self._tracking.version())
        found = self.find()
        if found:  # where SQL has forgotten it, it has forgotten others
            self._remember(sweep_at=0)
        self._remember(run_id=found[0] if found else self._create())

    def _remember(self, **changes: Any) -> None:
        self._lease.check()
        with self._remembering:
            self._state = {**self._storage.mirror_state(self._study.id), **changes}
            self._storage.put_mirror_state(self._study.id, self._state)

    def verify(self) -> None:
        """Raise Away (with the way out) unless MLflow has the study's run."""
        where, name = self._tracking.redacted, self._study.name
        way_out = f"`droptune mirror rebuild {name}` writes everything anew"
        try:
            with plain_errors(self._tracking):
                run = self._client.get_run(self.run_id)
        except Missing as error:
            message = f"MLflow at {where} does not have this study (another one, or emptied?)"
            raise Away(f"{message}: {way_out}") from error
        if run.info.lifecycle_stage != "active":
            raise Away(f"the study's run was deleted in MLflow at {where}: {way_out}")

    def _experiment(self) -> str:
        name = self._study.experiment_name
        with plain_errors(self._tracking):
            found = self._client.get_experiment_by_name(name)
            if found is None:
                return self._create_experiment(name)
        if found.lifecycle_stage != "active":
            raise Away(
                f"experiment {name!r} is deleted in MLflow at {self._tracking.redacted}: restore "
                "it, free the name with `mlflow gc`, or give another `mlflow: experiment:`"
            )
        return str(found.experiment_id)

    def _create_experiment(self, name: str) -> str:
        location = self._tracking.artifact_location(name)
        try:
            with plain_errors(self._tracking):
                created = self._client.create_experiment(name, artifact_location=location)
            return str(created)
        except Rejected:  # another study's syncer was quicker
            with plain_errors(self._tracking):
                return str(self._client.get_experiment_by_name(name).experiment_id)

    def find(self) -> list[str]:
        """The parent runs of this study, oldest first."""
        with plain_errors(self._tracking):
            found = self._client.search_runs(
                [self.experiment_id], filter_string=f"tags.`{runs.UID}` = '{self.uid}'"
            )
        return [
            run.info.run_id
            for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
        ]

    def _create(self) -> str:
        study = self._study
        tags = {
            runs.UID: self.uid,
            "droptune.study": study.name,
            "droptune.study_uuid": study.uuid,
            "droptune.role": "study",
            "mlflow.source.name": "droptune",
        }
        self._lease.check()
        try:
            with plain_errors(self._tracking), single_try():
                run = self._client.create_run(
                    self.experiment_id, tags=tags, run_name=f"study {study.name}"
                )
        except Away:
            self.sweep_later()
            raise
        return str(run.info.run_id)

    # -- what it shows ------------------------------------------------------------------------

    def refresh(
        self,
        study: MirroredStudy,
        records: Sequence[Record],
        answer: Answer,
        artifacts: Mapping[str, bytes],
    ) -> None:
        """Write note, metrics and artifacts as far as they have changed."""
        self._study = study
        self._write_settings()
        self._write_note(records, answer)
        self._write_summary(records)
        self._write_views(records, answer)
        self._write_status()
        explorer = {"explore.html": page(self._study, records, answer).encode()}
        self._write_artifacts({**files(self._study, records), **explorer, **artifacts})

    def _write_settings(self) -> None:
        """Params and the data set: once, they cannot change."""
        from mlflow.entities import Param

        if self._state.get("settings"):
            return
        params = [Param(key, value) for key, value in settings(self._study).items()]
        with plain_errors(self._tracking):
            self._client.log_batch(self.run_id, params=params, synchronous=True)
            self._client.log_inputs(self.run_id, datasets=[self._data()])
        self._remember(settings=True)

    def _data(self) -> Any:
        """The program's data as MLflow's data set: how many examples each part has."""
        from mlflow.entities import Dataset, DatasetInput

        meta, program = self._study.meta, str(self._study.spec.get("program", ""))
        source = json.dumps({"program": program, "files": meta.get("fingerprint", {})})
        samples = json.dumps(meta.get("samples", {}))
        return DatasetInput(
            Dataset(
                name=PurePosixPath(program.partition(":")[0]).stem or self._study.name,
                digest=_hash(f"{source}{samples}".encode()),
                source_type="program",
                source=source,
                profile=samples,
            )
        )

    def _write_note(self, records: Sequence[Record], answer: Answer) -> None:
        text = note(self._study, records, answer)
        if self._state.get("note") == _hash(text.encode()):
            return
        with plain_errors(self._tracking):
            self._client.set_tag(self.run_id, "mlflow.note.content", text)
        self._remember(note=_hash(text.encode()))

    def _write_summary(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        values = dict(summary(self._study, records))
        if self._state.get("summary") == values:
            return
        now = _now()
        step = sum(record.state.finished for record in records)
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        with plain_errors(self._tracking):
            self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        self._remember(summary=values)

    def _write_artifacts(self, artifacts: Mapping[str, bytes]) -> None:
        known = dict(self._state.get("artifacts", {}))
        wanted = {clean_path(path): content for path, content in artifacts.items()}
        changed = {p: c for p, c in wanted.items() if known.get(p) != _hash(c)}
        if not changed:
            return
        with tempfile.TemporaryDirectory(prefix="droptune-") as folder:
            for path, content in changed.items():
                file = Path(folder, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            with plain_errors(self._tracking):
                self._client.log_artifacts(self.run_id, folder)
        known |= {path: _hash(content) for path, content in changed.items()}
        self._remember(artifacts=known)

    def _write_views(self, records: Sequence[Record], answer: Answer) -> None:
        known = dict(self._state.get("views", {}))
        line = answer.line(self._study.name, records, self._study.objectives[0])
        for key, value in experiment_tags(self._study, records, line).items():
            if known.get(key) != _hash(value.encode()):
                with plain_errors(self._tracking):
                    self._client.set_experiment_tag(self.experiment_id, key, value)
                known[key] = _hash(value.encode())
        if known != self._state.get("views", {}):
            self._remember(views=known)

    def _write_status(self) -> None:
        wanted = "FINISHED" if self._study.over else "RUNNING"
        if self._state.get("status", "RUNNING") == wanted:
            return
        with plain_errors(self._tracking):
            if wanted == "FINISHED":
                self._client.set_terminated(self.run_id, wanted)
            else:  # continued
                self._client.update_run(self.run_id, wanted)
        self._remember(status=wanted)


def _now() -> int:
    return runs.milliseconds(datetime.now(UTC))


def clean_path(path: str) -> str:
    """An artifact path that stays inside the run's folder and that every store takes."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", ".", "..")]
    return "/".join(runs.clean_key(part).replace(":", "_") for part in parts) or "_"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
