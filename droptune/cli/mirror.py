"""`droptune mirror`: bring MLflow up to date with SQL, write it anew, open it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from droptune.cli.options import JsonOption, NameArgument, StorageOption, config, print_json
from droptune.errors import DroptuneError, UsageError

if TYPE_CHECKING:
    from droptune.mirror import Mirror, SyncResult, Tracking
    from droptune.storage import Storage
    from droptune.study import Study

app = typer.Typer(no_args_is_help=True)

TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking",
        metavar="URL",
        help="MLflow's address; default: MLFLOW_TRACKING_URI, droptune.toml, mlflow.db beside "
        "the study's database.",
    ),
]
_DRAIN_SECONDS = 120.0
_LEASE_PATIENCE_SECONDS = 70.0  # a little longer than a lease


@app.command()
def sync(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="None: every study.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until stopped (SIGTERM, Ctrl-C).")
    ] = False,
    until_input_closes: Annotated[bool, typer.Option("--until-input-closes", hidden=True)] = False,
    json: JsonOption = False,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Write to MLflow what SQL has and MLflow has not; safe to repeat, safe to interrupt.

    Where another process is mirroring a study, it is left to that one. Exit status 1 where
    something could not be written, with the reason.
    """
    opened, where, root = _open(storage, tracking)
    make = partial(_mirror, opened, where, root)
    if follow:
        _follow(opened, make, names or [], companion=until_input_closes)
        return
    chosen = names or [each.name for each in opened.studies() if _mirrored(opened, each.name)]
    mirrors = {name: make(name) for name in chosen}  # a name is refused before anything is written
    results = {}
    for name, mirror in mirrors.items():
        results[name] = mirror.sync_once(refresh=True)
        mirror.release()
    _report(results, json=json)


@app.command()
def rebuild(
    name: NameArgument,
    json: JsonOption = False,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Write a study anew from SQL: into an empty MLflow, or over what is there (which is kept).

    Where another process is mirroring it, wait for that one to end; exit status 1 where it does
    not within about a minute.
    """
    mirror = _mirror(*_open(storage, tracking), name)
    result = _rebuilt(mirror, name)
    mirror.release()
    _report({name: result}, json=json)


def _rebuilt(mirror: Mirror, name: str) -> SyncResult:
    """Rebuild it when the lease is free: that of a process that was killed runs out."""
    give_up = time.monotonic() + _LEASE_PATIENCE_SECONDS
    result = mirror.rebuild()
    if not result.holder:
        print("another process is mirroring it; waiting until that has ended …", file=sys.stderr)
    while not result.holder:
        if time.monotonic() > give_up:
            raise DroptuneError(
                f"study {name!r} was not rebuilt, another process is mirroring it: stop its "
                "workers first, or try again in a minute"
            )
        time.sleep(1.0)
        result = mirror.rebuild()
    return result


@app.command()
def ui(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The study to open; None: the newest.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="Port to listen on.")] = 5000,
    allowed_hosts: Annotated[
        str,
        typer.Option(
            "--allowed-hosts", metavar="HOST,…", help="More host names it answers to, with commas."
        ),
    ] = "",
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Start an MLflow server with the right options and print the link that opens on the runs.

    Where MLflow is a server already, only the link is printed.
    """
    from droptune.mirror.server import Server

    opened, where, _ = _open(storage, tracking)
    name = opened.study(name).name if name else _newest(opened)
    if where.is_server:
        _print_links(opened, name, where.uri)
        return
    hosts = tuple(part.strip() for part in allowed_hosts.split(",") if part.strip())
    server = Server(where, host, port, hosts)
    where.connect()  # the schema, under a lock, before a server touches it
    print(f"starting MLflow for {where.redacted} …", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it takes the server with it
    process = server.start(log=sys.stderr.fileno())
    try:
        _print_links(opened, name, server.address)
        process.wait()
    except KeyboardInterrupt:
        pass
    finally:
        from droptune.mirror.server import stop

        stop(process)


def _open(storage: str | None, tracking: str | None) -> tuple[Storage, Tracking, Path]:
    from droptune.mirror import Tracking
    from droptune.storage import Storage

    settings = config(storage)
    where = Tracking.resolve(tracking or settings.tracking, settings.storage)
    return Storage.open(settings.storage), where, settings.root


def _mirror(storage: Storage, tracking: Tracking, root: Path, name: str) -> Mirror:
    from droptune.mirror.opening import open_mirror
    from droptune.study import Study

    if not _mirrored(storage, name):
        raise UsageError(
            f"study {name!r} is kept out of MLflow (mlflow: mirror: none): write worker or "
            "external there in its study file, and run `droptune study create FILE` again"
        )
    study = Study.open(storage, name)
    return open_mirror(study, tracking, study.project(root))


def _mirrored(storage: Storage, name: str) -> bool:
    return bool(storage.study(name).spec["mlflow"]["mirror"] != "none")


def _newest(storage: Storage) -> str | None:
    found = sorted(storage.studies(), key=lambda summary: summary.created)
    return found[-1].name if found else None


def _print_links(storage: Storage, name: str | None, base: str) -> None:
    from droptune.mirror.views import links

    found = links(storage, name, base) if name is not None else {}
    for what, address in (found or {"experiments": f"{base}/#/experiments"}).items():
        print(f"{what:<12} {address}", flush=True)
    if name is not None and not found:
        print(f"{name} is not mirrored yet: droptune mirror sync {name}", flush=True)


def unusable(study: Study, storage: str | None) -> Iterator[str]:
    """Why no MLflow can be where it is configured to be, in a line."""
    from droptune.mirror import Tracking

    settings = config(storage)
    try:
        if study.spec.mlflow.mirror != "none":
            Tracking.resolve(settings.tracking, settings.storage)
    except UsageError as error:
        yield f"nothing is mirrored from here: {error}"


def behind(storage: Storage, name: str) -> Iterator[str]:
    """What keeps a study from being in MLflow, as SQL remembers it: a line each."""
    from droptune.mirror import set_aside
    from droptune.study import Study

    study = Study.open(storage, name)
    reason = storage.mirror_state(study.row.id).get("reason")
    if reason:
        yield f"MLflow is behind: {reason}"
    if refused := set_aside(storage, study.row.id):
        names = {record.training.id: record.training.name for record in study.records()}
        for training_id, why in refused.items():
            who = names.get(training_id, f"training {training_id}")
            yield f"MLflow did not take {who}: {why}; again with: droptune mirror rebuild {name}"


def _report(results: dict[str, SyncResult], *, json: bool) -> None:
    if json:
        print_json({name: result.to_json() for name, result in results.items()})
    else:
        for name, result in results.items():
            print(f"{name}: {_sentence(result)}")
    if any(result.reason for result in results.values()):
        raise typer.Exit(1)


def _sentence(result: SyncResult) -> str:
    if not result.holder:
        return "another process is mirroring it"
    if result.reason:
        return f"not mirrored: {result.reason}"
    text = f"{result.trainings} trainings and {result.points} points written, all is there"
    if result.unregistered:
        text += f"\n  no model registered: {result.unregistered}"
    for training_id, reason in result.set_aside.items():
        text += f"\n  training {training_id} set aside: {reason}"
    return text


def _follow(
    storage: Storage, make: Callable[[str], Mirror], names: Sequence[str], *, companion: bool
) -> None:
    from droptune.mirror.syncer import Syncer

    if companion:
        os.nice(5)  # the worker trains beside it
    syncer = Syncer(
        _followed(storage, names, companion=companion),
        make,
        tell=lambda name, result: print(f"{name}: {_sentence(result)}", flush=True),
    )
    syncer.follow(_stop_event(companion=companion))
    if not syncer.drain(_DRAIN_SECONDS):
        raise typer.Exit(1)


def _followed(
    storage: Storage, names: Sequence[str], *, companion: bool
) -> Callable[[], Sequence[str]]:
    """The studies to mirror now: those that are being worked on, and whose mirror it is."""
    ours = ("worker",) if companion else ("worker", "external")

    def followed() -> Sequence[str]:
        return [
            summary.name
            for summary in storage.studies()
            if (not names or summary.name in names)
            and (names or (summary.status == "active" and summary.phase != "done"))
            and storage.study(summary.name).spec["mlflow"]["mirror"] in ours
        ]

    return followed


def _stop_event(*, companion: bool) -> threading.Event:
    """Set by SIGTERM, Ctrl-C, and for a companion when its worker is gone."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    if companion:

        def watch() -> None:
            while os.read(sys.stdin.fileno(), 4096):
                pass
            stopped.set()

        threading.Thread(target=watch, daemon=True).start()
    return stopped
