"""The command line. A command parses, calls one library function and prints.

Every module here imports typer and rich only; whatever is heavy is imported by the command
that needs it, so that `--help` and the listing commands answer at once.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import typer

from droptune.cli import launch, mirror, study, trial, worker
from droptune.cli.demo import demo
from droptune.cli.doctor import doctor
from droptune.cli.output import drop_unread
from droptune.cli.sites import sites
from droptune.errors import DroptuneError

app = typer.Typer(
    name="droptune",
    help="Which dropout rate at each layer, with which learning rate, and is it real?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(sites)
app.command()(doctor)
app.add_typer(study.app, name="study", help="Create, run, watch and read studies.")
app.add_typer(worker.app, name="worker", help="Start a worker here, list those of the database.")
app.add_typer(trial.app, name="trial", help="Look at one trial, or train it again.")
app.add_typer(launch.app, name="launch", help="Start workers here, or on a cluster's engine.")
app.add_typer(mirror.app, name="mirror", help="Bring MLflow up to date with SQL, and open it.")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"droptune {version('droptune')}")
        raise typer.Exit()


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of a failure."),
    _version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    if debug:
        os.environ["DROPTUNE_DEBUG"] = "1"


def main() -> None:
    """Run the command; a failure is one line on stderr and an exit code of the errors' tree."""
    try:
        _run()
    finally:
        drop_unread()


def _run() -> None:
    try:
        app()
    except DroptuneError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        where = "run again with `droptune --debug …` for the traceback"
        _fail(f"unexpected {type(error).__name__}: {_one_line(error)}; {where}", 1)


def _fail(message: str, exit_code: int) -> None:
    with suppress(OSError, ValueError):  # the exit code counts, whether or not anybody reads
        if os.environ.get("DROPTUNE_DEBUG"):
            import traceback

            traceback.print_exc()
        print(f"droptune: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
