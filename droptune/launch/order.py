"""What is to be started: one worker command, some number of times."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex

from droptune.errors import LaunchError

STORAGE = "DROPTUNE_STORAGE"
STORAGE_FILE = "DROPTUNE_STORAGE_FILE"
TRACKING = "MLFLOW_TRACKING_URI"
IDLE = "DROPTUNE_IDLE_SECONDS"
MIRROR = "DROPTUNE_MIRROR"  # "none" where workers have no MLflow server: a file is for one machine

FOLDER = "droptune-launch"


def _tag() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{token_hex(2)}"


@dataclass(frozen=True)
class Order:
    """What is to be started.

    `study` None means every active study, for ever; a study's workers end when it is done.
    `workers` None means one for each device (local) or one. `storage` is the whole database
    URL: it reaches workers through a file or a secret, never through a command line.
    `storage_file` is a file that holds it already. `options` go to the engine verbatim. `tag`
    tells this launch from others.
    """

    study: str | None
    project: Path
    storage: str = field(repr=False)
    workers: int | None = None
    device: str = "auto"
    width: str = "auto"
    storage_file: Path | None = None
    tracking: str | None = field(default=None, repr=False)
    options: tuple[str, ...] = ()
    tag: str = field(default_factory=_tag)

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise LaunchError(f"--workers {self.workers}: at least 1")
        if "\0" in f"{self.study}{self.project}":
            raise LaunchError("a study's name and its paths cannot hold a NUL character")

    @property
    def slug(self) -> str:
        """The study's name in letters that every engine takes: a-z, 0-9 and single dashes."""
        plain = (
            unicodedata.normalize("NFKD", self.study or "all").encode("ascii", "ignore").decode()
        )
        words = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
        return words[:30].rstrip("-") or "study"

    @property
    def job_name(self) -> str:
        """A name for the engine, unique to this launch (at most 51 letters)."""
        return f"droptune-{self.slug}-{self.tag[-11:]}"

    @property
    def folder(self) -> Path:
        """Where this launch writes: scripts, logs, the file with the URL."""
        return self.project / FOLDER / f"{self.slug}-{self.tag}"

    @property
    def on_gpu(self) -> bool:
        """Whether an engine has to assign a GPU to each worker."""
        return self.device != "cpu"

    def worker_command(
        self, python: str, project: str, device: str, options: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """The command of one worker, which ends where nothing is claimable for a while: others
        may want its device. Holds no secret.
        """
        command = [python, "-m", "droptune", "worker", "start"]
        command += ["--project", project, "--device", device]
        if self.width != "auto":
            command += ["--width", self.width]
        return (*command, *options, *self.named())

    def named(self) -> tuple[str, ...]:
        """The last words of a command for one study; () for all."""
        return () if self.study is None else ("--", self.study)

    def open_tracking(self) -> str | None:
        """The MLflow server's address where it may be seen by others.

        Raises:
            LaunchError: it holds a user or password.
        """
        if self.tracking and "@" in self.tracking.partition("://")[2].partition("/")[0]:
            raise LaunchError(
                f"{TRACKING} holds a user or password, which the engine would show: "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the workers instead"
            )
        return self.tracking

    @property
    def planned_storage_file(self) -> Path:
        """The file that workers read the database URL from; may have to be written first."""
        return self.storage_file or self.folder / "storage-url"

    def make_folder(self) -> None:
        """Make the folder, readable by its owner only and unseen by git."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.folder.parent / ".gitignore").write_text("*\n")

    def write_storage_file(self) -> None:
        """Write the database URL where `planned_storage_file` says, unless it is there."""
        if self.storage_file is None:
            self.make_folder()
            path = self.planned_storage_file
            path.touch(mode=0o600)
            path.write_text(self.storage + "\n")


def with_setup(setup: Sequence[str], command: Sequence[str]) -> tuple[str, ...]:
    """`command`, after the lines of `setup` in the same shell (which stops at a failing line)."""
    if not setup:
        return tuple(command)
    script = "\n".join(["set -e", *setup, 'set +e; exec "$@"'])
    return ("bash", "-c", script, "droptune", *command)


def shell_line(command: Sequence[str]) -> str:
    """`command` as one would type it."""
    return shlex.join(command)
