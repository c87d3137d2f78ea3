"""`tune`: a whole study from Python, in this process."""

from __future__ import annotations

from pathlib import Path

from droptune.preparation import prepare
from droptune.program.source import project_root
from droptune.spec.config import Config
from droptune.spec.spec import StudySpec
from droptune.storage import Storage
from droptune.study import Study
from droptune.workers.worker import PATIENCE_SECONDS, Worker, WorkerOptions


def tune(
    file: str | Path,
    *,
    storage: str | None = None,
    device: str = "auto",
    width: int | None = None,
) -> Study:
    """Create or continue the study of a study file and train it here until it is done.

    `storage` is a database URL (default: as on the command line), `device` as
    `droptune worker start --device`, `width` the number of fused trainings (default: measured).
    Raises the errors of `droptune.errors`; WorkRemainsError after Ctrl-C, when calling it again
    goes on.
    """
    path = Path(file).resolve()
    root = project_root(path)
    settings = Config.find(Path.cwd(), storage=storage)
    prepared = prepare(StudySpec.load(path), root)
    opened = Storage.open(settings.storage, create=True)
    study, _ = Study.create(opened, prepared)
    opened.patience = PATIENCE_SECONDS
    options = WorkerOptions(
        root=root,
        storage=settings.storage,
        device=device,
        width=width,
        until_done=True,
        tracking=settings.tracking,
        guest=True,
    )
    Worker(opened, options).run([study.name])
    return Study.open(opened, study.name)
