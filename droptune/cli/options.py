"""Options that many commands share, and what they open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from droptune.spec.config import Config
    from droptune.storage import Storage
    from droptune.study import Study

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
    print(json.dumps(data, indent=2, default=str, allow_nan=False))
