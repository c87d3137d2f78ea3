"""The interface of all launchers: `describe` what would be started, and `submit` it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Self

from droptune.errors import DroptuneError, LaunchError, nearest
from droptune.launch.job import Job, Record
from droptune.launch.order import Order, shell_line


@dataclass(frozen=True)
class Launcher(ABC):
    """Starts workers on one engine and is gone.

    The fields are the engine's lines in `droptune.toml`. `setup` holds shell lines that run
    before each worker; `restarts` is how often a worker is started again without having
    finished an interval.
    """

    name: ClassVar[str]
    one_machine: ClassVar[bool] = False  # workers stay here, so SQLite will do

    setup: tuple[str, ...] = ()
    restarts: int = 5

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Self:
        """The launcher that `[launch.<name>]` in droptune.toml describes.

        Raises:
            LaunchError: an unknown key, or a value of the wrong type.
        """
        types = {f.name: str(f.type) for f in fields(cls)}
        for key in table:
            if key not in types:
                where = f"droptune.toml: [launch.{cls.name}] has no key {key!r}"
                raise LaunchError(f"{where}{nearest(key, types)}")
        return cls(**{key: cls._value(key, types[key], value) for key, value in table.items()})

    @classmethod
    def _value(cls, key: str, kind: str, value: Any) -> Any:
        """One value of the table, as the type its field is declared with."""
        if kind == "tuple[str, ...]":
            if isinstance(value, list) and all(isinstance(line, str) for line in value):
                return tuple(value)
            expected = "a list of strings"
        elif kind == "int":
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
            expected = "a whole number"
        else:
            if isinstance(value, str):
                return value
            expected = "a string"
        given = f"droptune.toml: [launch.{cls.name}] {key} = {value!r}"
        raise LaunchError(f"{given} is not {expected}")

    def check(self, order: Order) -> None:
        """Refuse an order that this engine cannot take; called before the other two.

        Raises:
            LaunchError: it names no study, and nobody here could end its workers; or a device
                that no engine assigns.
        """
        if self.one_machine:
            return
        if order.device not in ("auto", "cuda", "cpu"):
            raise LaunchError(
                f"--device {order.device}: {self.name} assigns devices, so possible are auto, "
                "cuda (both: a GPU for each worker) and cpu"
            )
        if order.study is None:
            raise LaunchError(
                f"{self.name} needs the NAME of a study: its workers end when that is done"
            )

    @abstractmethod
    def describe(self, order: Order) -> str:
        """What `submit` would do, as text that can be read and run; writes nothing."""

    @abstractmethod
    def submit(self, order: Order, record: Record) -> tuple[Job, ...]:
        """Start the workers and hand their jobs to `record`.

        Raises:
            LaunchError: the engine is not there, or refuses.
        """


def need_program(name: str, remedy: str) -> None:
    """Refuse to go on without an engine's own command line tool.

    Raises:
        LaunchError: it is not installed.
    """
    if shutil.which(name) is None:
        raise LaunchError(
            f"{name} is not on PATH: {remedy}, or see what would be submitted with --dry-run"
        )


def run_engine(command: Sequence[str], **options: Any) -> str:
    """Output of an engine's own command line tool.

    Raises:
        DroptuneError: it failed; the message holds its last line.
    """
    result: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip() or "nothing said").splitlines()[-1]
        line = shell_line(command[:2])
        raise DroptuneError(f"{line} failed with exit code {result.returncode}: {said}")
    return result.stdout


def _yaml(value: Any) -> str:
    """A string or a list of strings on one line of YAML, whatever characters they hold."""
    import yaml

    text = yaml.safe_dump(value, default_style='"', default_flow_style=True, width=1 << 30)
    return str(text).strip()


@cache
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("droptune.launch", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell scripts and YAML: values pass `quote` and `yaml`
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    environment.filters["yaml"] = _yaml
    return environment


def render(template: str, **values: Any) -> str:
    """The package's template of that name, filled in; a missing value is an error."""
    return str(_templates().get_template(template).render(**values))
