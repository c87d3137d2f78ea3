"""Where the database and MLflow are, and how workers are launched: `droptune.toml`.

    storage = "postgresql://tuner@db.example/droptune"
    tracking = "http://mlflow.example:5000"

    [launch.slurm]
    setup = ["module load cuda"]

A flag counts before the environment, the environment before the file, the file before the
default.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from droptune.errors import SpecError, nearest
from droptune.program.source import project_root

FILE = "droptune.toml"
DEFAULT_STORAGE = "sqlite:///droptune.db"
_KEYS = ("storage", "tracking", "launch")


@dataclass(frozen=True)
class Config:
    """What holds for all studies of a project.

    `root` is the project's folder; `tracking` MLflow's address, None where nothing says one;
    `launch` the lines of each engine, which the launchers check.
    """

    root: Path
    storage: str = field(repr=False)  # may hold a password
    tracking: str | None = field(default=None, repr=False)
    launch: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    file: Path | None = None

    @classmethod
    def find(
        cls,
        start: Path,
        *,
        storage: str | None = None,
        tracking: str | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> Config:
        """The configuration that holds in a folder; `storage` and `tracking` are flags.

        The environment's are DROPTUNE_STORAGE, DROPTUNE_STORAGE_FILE (a file that holds the URL,
        for passwords) and MLFLOW_TRACKING_URI. Relative SQLite files in droptune.toml are
        relative to it, others to the working directory. Raises SpecError in one line.
        """
        file = _above(start.resolve())
        lines = {} if file is None else _read(file)
        return cls(
            root=project_root(start.resolve()),
            storage=storage
            or environment.get("DROPTUNE_STORAGE")
            or _from_file(environment.get("DROPTUNE_STORAGE_FILE"))
            or lines.get("storage")
            or DEFAULT_STORAGE,
            tracking=tracking or environment.get("MLFLOW_TRACKING_URI") or lines.get("tracking"),
            launch=lines.get("launch", {}),
            file=file,
        )


def _above(folder: Path) -> Path | None:
    candidates = (parent / FILE for parent in (folder, *folder.parents))
    return next((path for path in candidates if path.is_file()), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        lines = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{file}: {error}") from error
    for key, value in lines.items():
        if key not in _KEYS:
            raise SpecError(f"{file}: unknown key {key}{nearest(key, _KEYS)}")
        wanted = dict if key == "launch" else str
        if not isinstance(value, wanted):
            raise SpecError(f"{file}: {key} must be a {'table' if wanted is dict else 'string'}")
    for name, table in lines.get("launch", {}).items():
        if not isinstance(table, dict):
            raise SpecError(f"{file}: launch.{name} must be a table: [launch.{name}]")
    return {k: _beside(file, v) if isinstance(v, str) else v for k, v in lines.items()}


def _beside(file: Path, url: str) -> str:
    """A relative SQLite file, relative to the configuration; ~ is the home folder everywhere."""
    scheme, separator, path = url.partition("///")
    relative = scheme.startswith("sqlite") and path and path[0] not in "/:~"
    if not separator or not relative:
        return url
    name, question, options = path.partition("?")
    return f"{scheme}///{(file.parent / name).as_posix()}{question}{options}"


def _from_file(path: str | None) -> str | None:
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SpecError(
            f"DROPTUNE_STORAGE_FILE={path}: {error.strerror}; it must hold the database URL"
        ) from error
