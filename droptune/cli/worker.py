"""`droptune worker`: processes that claim, train and report."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from droptune.cli.options import (
    JsonOption,
    ProjectOption,
    StorageOption,
    command,
    config,
    display,
    open_storage,
    print_json,
)
from droptune.cli.width import WidthOption
from droptune.errors import ConfigurationError, DatabaseAwayError
from droptune.launch.order import IDLE
from droptune.verdict.wording import counted

if TYPE_CHECKING:
    from droptune.launch.job import Job
    from droptune.storage import Storage, WorkerRow

app = typer.Typer(no_args_is_help=True)
log = logging.getLogger("droptune.worker")

SUBMITTED = "submitted"  # a job that its engine has not started, or will never start
PATIENCE = "DROPTUNE_PATIENCE"
LEASE = "DROPTUNE_LEASE_SECONDS"
CHECKPOINT = "DROPTUNE_CHECKPOINT_SECONDS"
LEAST_LEASE = 1.0  # with shorter ones, trainings are taken from workers that are alive
SECONDS = {PATIENCE: 600.0, LEASE: 60.0, CHECKPOINT: 30.0, IDLE: 600.0}


@app.command()
def start(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="None: every active study.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda[:N]|mps", help="Where to train.")
    ] = "auto",
    width: WidthOption = "auto",
    until_done: Annotated[
        bool, typer.Option("--until-done", help="Stay until nothing is left to train, then end.")
    ] = False,
    project: ProjectOption = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", min=1, help="torch threads; default: cores / workers."
        ),
    ] = None,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Train although the code is not the study's.")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Claim trainings, train them, report, until nothing is left (or for ever without NAME).

    Exit status: 0 nothing is left or the study was stopped, 75 work remains (start it again),
    78 it can never work here. A signal makes it hand its trainings back; a second Ctrl-C ends it
    at once.

    Seconds, in the environment: DROPTUNE_PATIENCE (600) is how long it trains on and waits while
    the database is away, DROPTUNE_IDLE_SECONDS (600; with --until-done: for ever) how long it
    stays where nothing can be claimed, DROPTUNE_LEASE_SECONDS (60) when others take over what it
    trained after its death, DROPTUNE_CHECKPOINT_SECONDS (30) how often it saves.

    DROPTUNE_MIRROR=none keeps it from writing to MLflow; `droptune launch` sets it where workers
    on other machines have no MLflow server.
    """
    from droptune.launch.devices import present_gpus, restrict_devices

    restrict_devices(os.environ, len(present_gpus()))  # before torch is imported
    from droptune.workers.worker import Worker, WorkerOptions

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    settings, seconds = config(storage), read_seconds(os.environ, until_done=until_done)
    options = WorkerOptions(
        device=device,
        width=None if width == "auto" else int(width),
        until_done=until_done,
        root=(project or settings.root).resolve(),
        storage=settings.storage,
        threads=threads,
        allow_drift=allow_drift,
        tracking=settings.tracking,
        idle_seconds=seconds[IDLE],
        checkpoint_seconds=seconds[CHECKPOINT],
    )
    opened = open_patiently(settings.storage, patience=seconds[PATIENCE], lease=seconds[LEASE])
    Worker(opened, options).run(names or [])


def read_seconds(environment: Mapping[str, str], *, until_done: bool = False) -> dict[str, float]:
    """The worker's times, or ConfigurationError where one is no number of seconds.

    One that stays until its studies are done ends idle only where that is asked for.
    """
    found = {}
    for name, default in SECONDS.items():
        text = environment.get(name) or str(default)
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = -1.0
        least = LEAST_LEASE if name == LEASE else 0.0
        if not least <= found[name] < float("inf"):
            raise ConfigurationError(
                f"{name}={text}: give a number of seconds from {least:g} on, e.g. {default:g}"
            )
    if until_done and not environment.get(IDLE):
        found[IDLE] = math.inf
    return found


def open_patiently(url: str, *, patience: float, lease: float) -> Storage:
    """The database; a worker may be started before it."""
    from droptune.storage import Storage

    try:
        opened = Storage.open(url, lease_seconds=lease)
        opened.patience = patience
    except DatabaseAwayError as error:
        log.warning("%s Waiting up to %.0f s.", error, patience)
        opened = Storage.open(url, patience=patience, lease_seconds=lease)
    return opened


@app.command("list")
def list_(json: JsonOption = False, storage: StorageOption = None) -> None:
    """List the workers that have not ended, and the jobs of engines that are no workers yet."""
    opened = open_storage(storage)
    workers = [worker for worker in opened.list_workers() if _is_shown(worker)]
    jobs = _submitted(opened)
    if json:
        waiting = [{"job": job.name, "study": job.study, "state": SUBMITTED} for job in jobs]
        print_json([*map(asdict, workers), *waiting])
        return
    if not workers and not jobs:
        print(f"no workers; start one: {command('worker', 'start', storage=storage)}")
        return
    from rich.table import Table

    head = ("worker", "host", "pid", "device", "job", "state", "trains", "last beat")
    table = Table(*head, box=None)
    for w in workers:
        name = w.info.get("job") or ""
        beat = f"{w.beat.astimezone():%H:%M:%S}"
        table.add_row(str(w.id), w.host, str(w.pid), w.device, name, w.state, _trains(w), beat)
    for job in jobs:
        table.add_row("", "", "", "", job.name, SUBMITTED, job.study, "")
    display(table)


def _submitted(storage: Storage) -> list[Job]:
    """Jobs that engines were given for studies that are trained, and that are no workers yet."""
    from droptune.launch.recorded import waiting_jobs

    studies = {s.name for s in storage.studies() if s.status == "active" and s.phase != "done"}
    known = {str(worker.info.get("job")) for worker in storage.list_workers(ended=True)}
    return waiting_jobs(storage, studies, known)


def _is_shown(worker: WorkerRow) -> bool:
    """Not those that died long ago and hold nothing any more."""
    lately = datetime.now(UTC) - worker.beat < timedelta(hours=1)
    return worker.state == "alive" or bool(worker.holds) or lately


def _trains(worker: WorkerRow) -> str:
    slots: dict[str, int] = {}
    for holding in worker.holds:
        slots[holding.study] = slots.get(holding.study, 0) + 1
    return ", ".join(f"{study}: {counted(count, 'slot')}" for study, count in slots.items())
