"""Models in MLflow: logged to their run, registered once, found by alias.

`challenger` is the best model of the search so far; `champion` only what confirmation
recommends, which may be the model without dropout.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from droptune.mirror import runs
from droptune.mirror.models import Exported, Trained, export
from droptune.mirror.study import MirroredStudy
from droptune.mirror.tracking import Rejected, Tracking, plain_errors
from droptune.training import Record

CHALLENGER = "challenger"
CHAMPION = "champion"
_DESCRIPTION = (
    "Dropout rates tuned by droptune. `champion`: what confirmation on fresh seeds recommends, "
    "which may be no dropout. `challenger`: the best of the search so far, not confirmed."
)


class Registry:
    """The registered model of one study (or of several that share it). Raises MirrorErrors."""

    def __init__(
        self, client: Any, tracking: Tracking, study: MirroredStudy, *, experiment_id: str
    ) -> None:
        self._client = client
        self._tracking = tracking
        self._study = study
        self._experiment_id = experiment_id

    def version_of(self, record: Record) -> str | None:
        """The version that this training already is, if it is one."""
        wanted = runs.uid(self._study.uuid, record.training)
        with plain_errors(self._tracking):
            found = self._client.search_model_versions(f"name = '{self._study.model_name}'")
        return next((str(v.version) for v in found if v.tags.get(runs.UID) == wanted), None)

    def register(self, trained: Trained, run_id: str, alias: str, *, description: str) -> str:
        """Make the training a version of the model, unless it is one, and point the alias at it.

        Returns the version.
        """
        self._ensure_model()
        version = self.version_of(trained.record)
        if version is None:
            version = self._new_version(trained, run_id, description)
        self.point(alias, version)
        return version

    def point(self, alias: str, version: str) -> None:
        with plain_errors(self._tracking):
            self._client.set_registered_model_alias(self._study.model_name, alias, version)

    def _ensure_model(self) -> None:
        name = self._study.model_name
        try:
            with plain_errors(self._tracking):
                self._client.create_registered_model(name, description=_DESCRIPTION)
        except Rejected as error:
            if "exist" not in str(error).lower():
                raise

    def _new_version(self, trained: Trained, run_id: str, description: str) -> str:
        model_id = self._logged(trained.record)
        if model_id is None:
            model_id = self._log(trained, run_id)
        source = f"models:/{model_id}"
        with plain_errors(self._tracking), _patience():
            if not self._tracking.is_server:  # MLflow would look for it in its default database
                source = self._client.get_logged_model(model_id).artifact_location
            version = self._client.create_model_version(
                self._study.model_name,
                source,
                run_id=run_id,
                model_id=model_id,
                tags=self._tags(trained.record),
                description=description,
            )
        return str(version.version)

    def _logged(self, record: Record) -> str | None:
        """The training's complete logged model; unfinished ones (of a syncer that died) go."""
        wanted = runs.uid(self._study.uuid, record.training)
        complete = None
        with plain_errors(self._tracking):
            for model in self._client.search_logged_models(
                [self._experiment_id], filter_string=f"tags.`{runs.UID}` = '{wanted}'"
            ):
                if str(model.status) == "READY":
                    complete = str(model.model_id)
                else:
                    self._client.delete_logged_model(model.model_id)
        return complete

    def _log(self, trained: Trained, run_id: str) -> str:
        from mlflow.entities import LoggedModelOutput

        record = trained.record
        assignment = record.training.assignment
        with plain_errors(self._tracking):
            model = self._client.create_logged_model(
                self._experiment_id,
                name=runs.clean_key(record.training.name).replace(" ", "-"),
                source_run_id=run_id,
                tags=self._tags(record),
                params=runs.params(assignment) if assignment else None,
            )
        with tempfile.TemporaryDirectory(prefix="droptune-") as folder:
            exported = export(
                trained, Path(folder, "model"), model_id=model.model_id, run_id=run_id
            )
            with plain_errors(self._tracking), _patience():
                self._client.log_model_artifacts(model.model_id, str(exported.folder))
        with plain_errors(self._tracking):
            self._describe(model.model_id, run_id, record, exported)
            self._client.finalize_logged_model(model.model_id, "READY")
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        return str(model.model_id)

    def _describe(self, model_id: str, run_id: str, record: Record, exported: Exported) -> None:
        """The model's metrics, and why it cannot be served, if so."""
        from mlflow.entities import Metric

        if exported.reason is not None:
            tags = {"droptune.why_no_pt2": exported.reason[:500]}
            self._client.set_logged_model_tags(model_id, tags)
        if record.ended is None or record.value is None:
            return
        points = runs.final_points(
            record, self._study.objectives, time=runs.milliseconds(record.ended)
        )
        metrics = [Metric(p.key, p.value, p.time, p.step, model_id=model_id) for p in points]
        self._client.log_batch(run_id, metrics=metrics, synchronous=True)

    def _tags(self, record: Record) -> dict[str, str]:
        return {
            "droptune.training": record.training.name,
            "droptune.study": self._study.name,
            runs.UID: runs.uid(self._study.uuid, record.training),
        }


@contextmanager
def _patience() -> Iterator[None]:
    """Uploads may take longer than calls."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = "300"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
