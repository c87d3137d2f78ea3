"""The mirror of a study with all that droptune knows of it: verdict, tables, trained models."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from droptune.mirror.models import Trained
from droptune.mirror.models import load as load_trained
from droptune.mirror.sync import Mirror
from droptune.mirror.tracking import Tracking
from droptune.storage import StudyRow
from droptune.training import Record, State

if TYPE_CHECKING:
    from droptune.study import Study

log = logging.getLogger("droptune.mirror")


def open_mirror(study: Study, tracking: Tracking, root: Path) -> Mirror:
    """The mirror of a study whose program lies under the project's root."""

    def extras(row: StudyRow, records: Sequence[Record]) -> dict[str, bytes]:
        verdict = study.storage.get_verdict(row.id)
        return {**_tables(records), **_shown(study, records), **_verdict_file(verdict)}

    return Mirror(study.storage, study.name, tracking, extras=extras, load=_loader(study, root))


def _shown(study: Study, records: Sequence[Record]) -> dict[str, bytes]:
    """Figures (SVG) and the report (HTML, nothing from elsewhere); {} where none can be drawn."""
    if not any(record.state is State.COMPLETE for record in records):
        return {}
    from droptune.figures import draw, svg
    from droptune.report.report import render

    try:
        study.refresh()  # the plan may have changed since it was opened
        evidence = study.evidence()
        verdict = study.judge()
        found = {f"figures/{name}.svg": svg(f) for name, f in draw(evidence, verdict).items()}
        return {**found, "report.html": render(evidence, verdict).encode()}
    except Exception as error:  # a figure that cannot be drawn must not hold up the rest
        log.warning("no figures for MLflow: %s: %s", type(error).__name__, error)
        log.debug("where it came from", exc_info=True)
        return {}


def _verdict_file(verdict: Mapping[str, Any] | None) -> dict[str, bytes]:
    return {"verdict.json": json.dumps(verdict, indent=2).encode()} if verdict else {}


def _loader(study: Study, root: Path) -> Callable[[Record], Trained | None]:
    def load(record: Record) -> Trained | None:
        from droptune.trainers.checkpoint import CheckpointStore

        kept = CheckpointStore.of(study, root).load_weights(record.training.id)
        if kept is None:
            return None
        return load_trained(record, kept[0], reference=study.spec.program, root=root)

    return load


def _tables(records: Sequence[Record]) -> dict[str, bytes]:
    """Every measurement as one flat table."""
    from droptune.export import write

    with tempfile.TemporaryDirectory(prefix="droptune-") as folder:
        path = Path(folder, "measurements.csv")
        write(records, path)
        return {"tables/measurements.csv": path.read_bytes()}
