"""Options that many commands share, what they open, and what they print."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from droptune.errors import UsageError

if TYPE_CHECKING:
    from droptune.spec.config import Config
    from droptune.storage import Storage
    from droptune.study import Study

PIPED_WIDTH = 160  # columns of a table that no terminal limits

StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="Database URL without a password; default: DROPTUNE_STORAGE, droptune.toml, "
        "sqlite:///droptune.db.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ProjectOption = Annotated[
    Path | None,
    typer.Option("--project", metavar="DIR", help="Programs are loaded from below it only."),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The study's name.")]


def config(storage: str | None = None) -> Config:
    from droptune.spec.config import Config

    return Config.find(Path.cwd(), storage=storage)


def open_storage(url: str | None, *, create: bool = False) -> Storage:
    from droptune.storage import Storage

    return Storage.open(config(url).storage, create=create)


def open_study(name: str, url: str | None) -> Study:
    from droptune.study import Study

    return Study.open(open_storage(url), name)


def print_json(data: Any) -> None:
    """Print JSON; numbers that it cannot say (a diverged trial's NaN) become null."""
    print(json.dumps(_finite(data), indent=2, default=str, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def display(what: Any, piped_width: int = PIPED_WIDTH) -> None:
    """Print a table or a panel as wide as the terminal is, or as COLUMNS says.

    What is piped is not cut at 80 columns, and its lines end in no blanks.
    """
    from rich.console import Console

    screen = Console()
    if screen.is_terminal:
        screen.print(what)
        return
    if "COLUMNS" not in os.environ:
        screen.width = piped_width
    with screen.capture() as captured:
        screen.print(what)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def writing(path: Path, instead: str = "give another file with -o") -> Iterator[None]:
    """Refuse a file or folder that cannot be written, in one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); {instead}") from error


# -- commands to paste ----------------------------------------------------------------------------


def command(*words: str, storage: str | None = None) -> str:
    """A command that finds the same studies: with the --storage that this one was given."""
    given = ["--storage", _without_secrets(storage)] if storage else []
    return shlex.join([_program(), *words, *given])


def same_command(storage: str | None) -> str:
    """The command that is running, as it was typed."""
    words: Sequence[str] = sys.argv[1:]
    if storage:
        words = [word.replace(storage, _without_secrets(storage)) for word in words]
    return shlex.join([_program(), *words])


def _program() -> str:
    """`droptune`, or where it is when it is not on PATH."""
    called = sys.argv[0]
    here = Path(called).name == "droptune" and shutil.which("droptune") is None
    return called if here else "droptune"


def _without_secrets(storage: str) -> str:
    from droptune.storage.address import Address

    return Address.parse(storage).scrub(storage)
