"""Training a study on this machine: workers, one live panel, MLflow, and the answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from droptune.cli import panel
from droptune.cli.options import command, config, same_command
from droptune.cli.output import GONE
from droptune.errors import DroptuneError, UnknownStudyError, WorkRemainsError

if TYPE_CHECKING:
    from droptune.launch.order import Order
    from droptune.mirror import Mirror, SyncResult, Tracking
    from droptune.study import Study

PATIENCE_SECONDS = 20.0  # for a server that is away for a moment, or busy


def check_devices(device: str, workers: int | None) -> None:
    """Refuse what this machine does not have, as `launch local` does, before a study is made."""
    from droptune.launch.local import LocalLauncher
    from droptune.launch.order import Order

    LocalLauncher().check(Order(None, Path.cwd(), "", workers=workers, device=device))


def run_here(
    study: Study,
    root: Path,
    *,
    storage: str | None = None,
    device: str = "auto",
    workers: int | None = None,
    width: str = "auto",
) -> None:
    """Train until the study is done, then mirror the rest and print the answer.

    `storage` is the flag that the user gave: commands to paste repeat it.
    """
    from droptune import answer

    tracking = _tracking(study)  # an address that cannot be used is refused before training
    if study.phase() == "stopped":
        print(f"study {study.name!r} was stopped; going on")
        study.storage.update_study(study.row.id, status="active")
    if study.phase() == "done":
        print(f"study {study.name!r} is done: nothing to train")
    else:
        _train_here(study, root, tracking, storage, device, workers, width)
    if tracking is not None:
        finish_mirror(study, tracking, root, storage)
    if study.phase() == "stopped":
        print(f"study {study.name!r} was stopped; go on with: {same_command(storage)}")
        return
    print(f"\n{answer.text(study)}\n")
    for what, words in _next(study).items():
        print(f"{what:<23}{command(*words, storage=storage)}")


def _next(study: Study) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {
        "lines for your script:": ("study", "best", study.name, "--code"),
        "report:": ("study", "report", study.name),
    }
    if study.spec.mlflow.mirror != "none":
        found["in MLflow:"] = ("mirror", "ui", study.name)
    return found


def _tracking(study: Study) -> Tracking | None:
    """The MLflow that this study is mirrored to, by us and by our workers; None: by nobody here."""
    if study.spec.mlflow.mirror != "worker":
        return None
    from droptune.mirror import Tracking

    settings = config(_url(study))
    return Tracking.resolve(settings.tracking, settings.storage)


def _url(study: Study) -> str:
    return study.storage.database.address.url.render_as_string(hide_password=False)


def _train_here(
    study: Study,
    root: Path,
    tracking: Tracking | None,
    storage: str | None,
    device: str,
    workers: int | None,
    width: str,
) -> None:
    from droptune.launch.devices import cores, own_gpus, present_gpus, select_gpus
    from droptune.launch.order import Order

    gpus = select_gpus(device, own_gpus(os.environ, present_gpus()))
    order = Order(
        study.name,
        root,
        _url(study),
        workers=workers or (None if gpus or device == "mps" else cores()),
        device=device,
        width=width,
        tracking=None if tracking is None else tracking.uri,
    )
    try:
        _supervise(study, order)
    except WorkRemainsError:
        raise WorkRemainsError(
            f"stopped; nothing is lost, go on with: {same_command(storage)}"
        ) from None
    except UnknownStudyError:
        raise DroptuneError(f"study {study.name!r} was deleted while it was trained") from None


def _supervise(study: Study, order: Order) -> None:
    from droptune.launch.local import LocalLauncher

    with _watching(study):
        LocalLauncher().submit(order, lambda jobs: None)
    study.refresh()


@contextmanager
def _watching(study: Study) -> Iterator[None]:
    """Show the study from a thread of its own: workers are supervised in the main thread."""
    ended = threading.Event()
    from droptune.study import Study as Opened

    watched = Opened.open(study.storage, study.name)
    thread = threading.Thread(target=_watch, args=(watched, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=5)


def _watch(study: Study, ended: threading.Event) -> None:
    """Where nobody can read any more, end the workers as when a terminal is closed."""
    try:
        panel.watch(study, ended.is_set)
    except OSError as error:
        if error.errno not in GONE:
            raise
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGHUP)


def finish_mirror(study: Study, tracking: Tracking, root: Path, storage: str | None = None) -> None:
    """Bring MLflow up to date; what fails is said and left to `droptune mirror sync`."""
    from droptune.mirror.opening import open_mirror

    print(f"writing what is missing to MLflow ({tracking.redacted}) …", flush=True)
    mirror = open_mirror(study, tracking, root)
    result = _last_rounds(mirror)
    later = command("mirror", "sync", study.name, storage=storage)
    if not result.holder:
        print(f"another process is writing to MLflow; see later: {later}")
    elif result.reason:
        print(f"MLflow is behind ({result.reason}); later: {later}")
    for training_id, reason in result.set_aside.items():
        print(f"MLflow did not take training {training_id} ({reason})")
    mirror.release()


def _last_rounds(mirror: Mirror) -> SyncResult:
    """Rounds until one is whole, the server refuses us, or patience is at an end."""
    began, pause = time.monotonic(), 0.5
    result = mirror.sync_once(refresh=True)
    while result.reason and not result.refused:
        if time.monotonic() - began + pause > PATIENCE_SECONDS:
            break
        time.sleep(pause)
        pause *= 2
        result = mirror.sync_once(refresh=True)
    return result
