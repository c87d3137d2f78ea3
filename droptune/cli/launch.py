"""`droptune launch`: start workers here or on an engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from droptune.cli.options import StorageOption, command, config, open_storage
from droptune.cli.width import WidthOption
from droptune.errors import LaunchError

if TYPE_CHECKING:
    from droptune.launch import Launcher, Order, Record
    from droptune.spec.config import Config
    from droptune.storage import StudyRow

app = typer.Typer(no_args_is_help=True)

HELP = {
    "local": """Start one worker per device of this machine and stay with them; Ctrl-C ends them.

    What follows `--` goes to `droptune worker start`.
    """,
    "slurm": """Submit workers as one Slurm array, a GPU each; what follows `--` goes to sbatch.

    For example: droptune launch slurm digits --workers 50 -- --partition=gpu --time=4:00:00
    """,
    "kubernetes": """Apply workers as one Kubernetes Job; what follows `--` goes to kubectl.

    The image and the rest are lines of [launch.kubernetes] in droptune.toml. --dry-run prints
    YAML that `kubectl apply -f -` takes.
    """,
    "ray": """Submit workers as Ray jobs; what follows `--` goes to `ray job submit`.

    For example: droptune launch ray digits --workers 8 -- --address=http://head:8265
    """,
}

NameArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME", help="The study; only `local` can do without: every active one."
    ),
]
EngineArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- OPTIONS", help="The engine's own options, passed on verbatim."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=1, help="How many; local: default one per GPU."),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N,…]|mps",
        help="What to train on; an engine assigns a GPU to each worker unless this is cpu.",
    ),
]
ProjectOption = Annotated[
    Path | None, typer.Option("--project", metavar="DIR", help="The folder with the programs.")
]
RestartsOption = Annotated[
    int | None,
    typer.Option(
        "--restarts",
        metavar="N",
        min=0,
        help="How often a worker may be started again without a finished interval in between.",
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be started; start nothing.")
]


def _command(launcher_name: str) -> Callable[..., None]:
    """The command of one launcher; all take the same options."""

    def launch(
        name: NameArgument = None,
        engine: EngineArgument = None,
        workers: WorkersOption = None,
        device: DeviceOption = "auto",
        width: WidthOption = "auto",
        project: ProjectOption = None,
        restarts: RestartsOption = None,
        dry_run: DryRunOption = False,
        storage: StorageOption = None,
    ) -> None:
        from droptune.launch import Order, make_launcher

        if name is not None and name.startswith("-"):  # options without a study before them
            engine, name = [name, *(engine or ())], None
        settings = config(storage)
        table = dict(settings.launch.get(launcher_name, {}))
        if restarts is not None:
            table["restarts"] = restarts
        launcher = make_launcher(launcher_name, table, settings.storage)
        order = Order(
            study=name,
            project=(project or settings.root).resolve(),
            storage=settings.storage,
            workers=workers,
            device=device,
            width=width,
            storage_file=_storage_file(storage),
            tracking=_tracking(settings, launcher),
            options=tuple(engine or ()),
        )
        launcher.check(order)
        if dry_run:
            print(launcher.describe(order), end="")
        else:
            _submit(launcher, order, storage)

    return launch


for _name, _help in HELP.items():
    app.command(_name, help=_help)(_command(_name))


def _submit(launcher: Launcher, order: Order, storage: str | None) -> None:
    jobs = launcher.submit(order, _recorder(launcher, order, storage))
    if launcher.name == "local":
        return
    names = jobs[0].name if len(jobs) == 1 else f"{jobs[0].name} to {jobs[-1].name}"
    print(f"submitted {len(jobs)} {'worker' if len(jobs) == 1 else 'workers'}: {names}")
    print("`droptune worker list` shows them; `droptune study stop` ends them on any engine")


def _recorder(launcher: Launcher, order: Order, storage: str | None) -> Record:
    """Writes job ids to SQL; refuses a study that cannot be trained before anything is started."""
    from droptune.launch.job import JOB
    from droptune.launch.recorded import Recorder

    if JOB in os.environ:  # within another engine's job, which is recorded
        return lambda jobs: None
    database = open_storage(storage)
    if order.study is not None:
        study = database.study(order.study)
        if not launcher.one_machine:
            _refuse_ended(study)
    return Recorder(database, order.tag)


def _refuse_ended(study: StudyRow) -> None:
    """An engine would find devices for workers that end at once."""
    if study.status == "stopped":
        resume = command("study", "resume", study.name)
        raise LaunchError(f"study {study.name!r} is stopped, so its workers would end: {resume}")
    if study.phase == "done":
        raise LaunchError(f"study {study.name!r} is done: nothing of it is left to train")


def _storage_file(flag: str | None) -> Path | None:
    """The user's own file with the database URL, where the URL did come from it."""
    path = os.environ.get("DROPTUNE_STORAGE_FILE")
    if flag is not None or "DROPTUNE_STORAGE" in os.environ or not path:
        return None
    return Path(path).resolve()


def _tracking(settings: Config, launcher: Launcher) -> str | None:
    """MLflow's address for the workers; a file on this machine is none for others."""
    address = settings.tracking
    if launcher.one_machine:
        return address
    if address and "://" in address and not address.startswith(("sqlite:", "file:")):
        return address
    typer.echo(
        "MLflow's store is a file here, so workers elsewhere will not mirror: run "
        "`droptune mirror sync` here, or set MLFLOW_TRACKING_URI to a server",
        err=True,
    )
    return None
