"""`droptune doctor`: each line says ok, or what to do."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.error import HTTPError
from urllib.request import urlopen

import typer

from droptune.cli.mirror import behind
from droptune.cli.options import ProjectOption, StorageOption, config
from droptune.errors import DroptuneError
from droptune.verdict.wording import counted

if TYPE_CHECKING:
    from droptune.mirror import Tracking
    from droptune.spec.config import Config
    from droptune.storage import Storage

SHOWN = ("droptune", "torch", "optuna", "sqlalchemy", "alembic", "mlflow")
ANSWER_SECONDS = 5.0  # within which a server has to answer
LEAST_SPACE = 2**28  # bytes
QUICK = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

Check = Callable[[], str]


def doctor(
    worker: Annotated[
        bool, typer.Option("--worker", help="Check what a worker needs on this machine too.")
    ] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Migrate the database.")] = False,
    project: ProjectOption = None,
    storage: StorageOption = None,
) -> None:
    """Check versions, database, workers and MLflow; exit 1 where something has to be done.

    Trainings that dead workers left behind are queued again.
    """
    settings = config(storage)
    failed = not _say("versions", _versions)
    opened: list[Storage] = []
    failed |= not _say("database", lambda: _database(settings, opened, fix=fix))
    if opened:
        failed |= not _say("workers", lambda: _workers(opened[0]))
    failed |= not _say("mlflow", lambda: _mlflow(settings))
    for name, lines in _behind(opened):
        failed |= not _say(f"mirror of {name!r}", partial(_refuse, lines))
    if worker:
        root = (project or settings.root).resolve()
        failed |= not _say("devices", _devices)
        names = _served(opened)
        failed |= not _say("project", lambda: _project(opened, names, root))
        for name in names:
            failed |= not _say(f"study {name!r}", partial(_code, opened[0], name, root))
            failed |= not _say(
                f"checkpoints {name!r}", partial(_checkpoints, opened[0], name, root)
            )
    if failed:
        raise typer.Exit(1)


def _say(name: str, check: Check) -> bool:
    """Print the one line of a check; False where something has to be done."""
    try:
        print(f"ok    {name}: {check()}")
        return True
    except DroptuneError as error:
        reason = str(error)
    except Exception as error:  # a check must never keep the others from being made
        reason = f"{type(error).__name__}: {error}"
    print(f"to do {name}: {' '.join(reason.split())}")
    return False


def _versions() -> str:
    wrong = [text for text in map(_unmet, requires("droptune") or ()) if text]
    if wrong:
        raise DroptuneError(f"{', '.join(wrong)}: pip install --upgrade droptune")
    known = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    return f"{known}, Python {platform.python_version()}"


def _unmet(line: str) -> str | None:
    """What is wrong with one requirement (`optuna<6,>=5`); extras are nobody's business."""
    from packaging.requirements import Requirement

    wanted = Requirement(line)
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return None
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f"{wanted.name} is not installed"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name} {found} is not {wanted.specifier}"


# -- SQL ------------------------------------------------------------------------------------------


def _database(settings: Config, opened: list[Storage], *, fix: bool) -> str:
    from droptune.storage import Storage

    migrated = Storage.upgrade(settings.storage) if fix else []
    storage = Storage.open(settings.storage)
    opened.append(storage)
    studies = storage.studies()
    active = sum(s.status == "active" and s.phase != "done" for s in studies)
    steps = f", migrated to {migrated[-1]}" if migrated else ""
    many = "1 study" if len(studies) == 1 else f"{len(studies)} studies"
    return f"{storage.redacted}, {many} ({active} to be trained){steps}"


def _workers(storage: Storage) -> str:
    requeued = storage.requeue_stale()
    alive = [row for row in storage.list_workers() if row.state == "alive"]
    again = f", {counted(len(requeued), 'lost training')} queued again" if requeued else ""
    return f"{len(alive)} alive{again}"


# -- MLflow ---------------------------------------------------------------------------------------


def _mlflow(settings: Config) -> str:
    from droptune.mirror import Tracking

    tracking = Tracking.resolve(settings.tracking, settings.storage)
    file = tracking.database
    if file is not None and not file.exists():
        folder = "" if file.parent.is_dir() else f" and its folder {file.parent}"
        return f"{tracking.redacted}{folder} will be made by the first study that is mirrored"
    if tracking.is_server:
        _ask(tracking)
    elif _is_empty(tracking):
        return f"{tracking.redacted} is empty; the first study that is mirrored makes its tables"
    os.environ.update({name: value for name, value in QUICK.items() if name not in os.environ})
    tracking.connect()
    return f"{tracking.redacted} answers"


def _behind(opened: list[Storage]) -> Iterator[tuple[str, str]]:
    """The studies of which something is not in MLflow, and what."""
    for storage in opened:
        for summary in storage.studies():
            if lines := list(behind(storage, summary.name)):
                yield summary.name, " / ".join(lines)


def _refuse(reason: str) -> str:
    raise DroptuneError(reason)


def _ask(tracking: Tracking) -> None:
    """Whether anybody is there, before MLflow's client tries for minutes."""
    try:
        with urlopen(f"{tracking.uri}/health", timeout=ANSWER_SECONDS):
            pass
    except HTTPError:
        pass  # it answers; what it says is the client's to explain
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DroptuneError(
            f"{tracking.redacted} does not answer ({reason}): start it, or correct "
            "MLFLOW_TRACKING_URI; studies run without it and are mirrored later"
        ) from None


def _is_empty(tracking: Tracking) -> bool:
    """Whether a database of MLflow's, which answers, has no tables yet.

    Its own client would try for minutes.
    """
    from droptune.storage.address import Address
    from droptune.storage.creation import tables
    from droptune.storage.database import Database

    return not Database(Address.parse(tracking.uri)).read(tables)


# -- this machine ---------------------------------------------------------------------------------


def _devices() -> str:
    import torch

    from droptune.launch.devices import cores, own_gpus, present_gpus

    gpus = own_gpus(os.environ, present_gpus())
    if gpus and not torch.cuda.is_available():
        raise DroptuneError(
            f"{len(gpus)} GPUs are assigned and torch {torch.__version__} cannot use them: "
            "install a CUDA build of torch, or check the driver"
        )
    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(found) or 'no GPU'}, {cores()} cores"


def _project(opened: list[Storage], names: list[str], root: Path) -> str:
    """Whether it can be written; an image cannot, and need not where SQL has all checkpoints."""
    if names and all(_checkpoint_folder(opened[0], name, root) is None for name in names):
        return f"{root}, where no study writes"
    with _writable(root):
        free = shutil.disk_usage(root).free
    if free < LEAST_SPACE:
        raise DroptuneError(f"{root} has {free / 2**20:.0f} MB left: checkpoints need more")
    return f"{root} can be written, {free / 2**30:.0f} GB free"


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        with tempfile.TemporaryFile(dir=folder):
            yield
    except OSError as error:
        raise DroptuneError(
            f"{folder} cannot be written ({error.strerror}): use --project"
        ) from None


def _served(opened: list[Storage]) -> list[str]:
    """The studies that a worker would train."""
    found = opened[0].studies() if opened else []
    return [s.name for s in found if s.status == "active" and s.phase != "done"]


def _code(storage: Storage, name: str, root: Path) -> str:
    from droptune.program.source import fingerprint
    from droptune.study import Study

    study = Study.open(storage, name)
    drift = study.drift(fingerprint(study.spec.program, root))
    if drift:
        raise DroptuneError(
            f"the code in {root} differs in {', '.join(drift)}: bring the same code, "
            "or start workers with --allow-drift"
        )
    return f"{study.spec.program} is what the study was created with"


def _checkpoints(storage: Storage, name: str, root: Path) -> str:
    """Whether checkpoints can be written, and who sees them."""
    from droptune.storage.address import NETWORK_FILE_SYSTEMS, file_system

    wanted = _checkpoint_folder(storage, name, root)
    if wanted is None:
        return "in the database"
    there = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            kind = file_system(there.resolve()) or "an unknown file system"
    except OSError as error:
        raise DroptuneError(
            f"{wanted} cannot be written ({error.strerror}): trainings that move or lose their "
            "worker begin again; mend it, or set checkpoints: {store: sql}"
        ) from None
    seen = "shared" if kind in NETWORK_FILE_SYSTEMS else "seen by this machine only, if no volume"
    return f"{wanted} can be written, on {kind} ({seen})"


def _checkpoint_folder(storage: Storage, name: str, root: Path) -> Path | None:
    from droptune.study import Study
    from droptune.trainers.checkpoint import checkpoint_directory

    return checkpoint_directory(Study.open(storage, name), root)
