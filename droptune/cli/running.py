"""Training a study on this machine: workers, one live panel, MLflow, and the answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from droptune.cli import panel
from droptune.cli.options import config
from droptune.errors import WorkRemainsError

if TYPE_CHECKING:
    from droptune.study import Study


def run_here(
    study: Study,
    root: Path,
    file: Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    width: str = "auto",
    confirm: bool = True,
) -> None:
    """Train until the study is done, then mirror the rest and print the answer."""
    from droptune import answer

    if study.spec.confirm.enabled != confirm:
        study.reconfigure(confirm=replace(study.spec.confirm, enabled=confirm))
    if study.phase() == "stopped":
        study.storage.update_study(study.row.id, status="active")
    if study.phase() != "done":
        _train_here(study, root, file, device, workers, width)
    finish_mirror(study)
    print(f"\n{answer.text(study)}\n")
    print(f"lines for your script: droptune study best {study.name} --code")
    print(f"report:                droptune study report {study.name}")
    if study.spec.mlflow.mirror != "none":
        print(f"in MLflow:             droptune mirror ui {study.name}")


def _train_here(
    study: Study, root: Path, file: Path, device: str, workers: int | None, width: str
) -> None:
    from droptune.launch.devices import cores, own_gpus, present_gpus, select_gpus
    from droptune.launch.local import LocalLauncher
    from droptune.launch.order import Order

    settings = config(study.storage.database.address.url.render_as_string(hide_password=False))
    gpus = select_gpus(device, own_gpus(os.environ, present_gpus()))
    order = Order(
        study.name,
        root,
        settings.storage,
        workers=workers or (None if gpus else cores()),
        device=device,
        width=width,
        tracking=settings.tracking,
    )
    try:
        with _watching(study):
            LocalLauncher().submit(order, lambda jobs: None)
    except WorkRemainsError:
        raise WorkRemainsError(
            f"stopped; nothing is lost, go on with: droptune study run {file}"
        ) from None


@contextmanager
def _watching(study: Study) -> Iterator[None]:
    """Show the study from a thread of its own: workers are supervised in the main thread."""
    ended = threading.Event()
    from droptune.study import Study as Opened

    watched = Opened.open(study.storage, study.name)
    thread = threading.Thread(target=panel.watch, args=(watched, ended.is_set), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)


def finish_mirror(study: Study) -> None:
    """Bring MLflow up to date; what fails is said and left to `droptune mirror sync`."""
    if study.spec.mlflow.mirror != "worker":
        return
    from droptune.mirror import Mirror, Tracking

    settings = config()
    mirror = Mirror(
        study.storage, study.name, Tracking.resolve(settings.tracking, settings.storage)
    )
    result = mirror.sync_once(refresh=True)
    if result.reason:
        print(f"MLflow is behind ({result.reason}); later: droptune mirror sync {study.name}")
    mirror.release()
