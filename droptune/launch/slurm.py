"""Workers as one Slurm array; each task asks for its own requeue while work remains."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from droptune.errors import LaunchError
from droptune.launch.job import Job, Record
from droptune.launch.launcher import Launcher, need_program, render, run_engine
from droptune.launch.order import STORAGE, Order, shell_line


@dataclass(frozen=True)
class SlurmLauncher(Launcher):
    """An sbatch array of one task per worker, one GPU per task unless `--device cpu`.

    `options` are given to sbatch before those of the command line; `python` is the interpreter
    as the nodes see it, `storage_file` a file with the database URL as the nodes see it.
    """

    name: ClassVar[str] = "slurm"

    options: tuple[str, ...] = ()
    python: str = sys.executable
    storage_file: str = ""

    def check(self, order: Order) -> None:
        super().check(order)
        if set("%\\") & set(str(order.project)):
            raise LaunchError(
                f"slurm reads % and \\ in the path of a log as its own, so every job would fail "
                f"without a word: move the project from {order.project}"
            )

    def describe(self, order: Order) -> str:
        line = shell_line(self._command(order))
        return f"# {line}\n# with this script:\n{self.script(order)}"

    def submit(self, order: Order, record: Record) -> tuple[Job, ...]:
        need_program("sbatch", "start this on a login node of the cluster")
        order.make_folder()
        if not self.storage_file:
            order.write_storage_file()
        self._script_path(order).write_text(self.script(order))
        # The URL goes by file: sbatch would keep a copy of the environment in its own state.
        environment = {key: value for key, value in os.environ.items() if key != STORAGE}
        output = run_engine(self._command(order), env=environment, cwd=order.folder)
        array = output.strip().split(";")[0]
        workers = range(order.workers or 1)
        jobs = tuple(Job(self.name, f"{array}_{k}", order.study, k) for k in workers)
        record(jobs)
        return jobs

    def script(self, order: Order) -> str:
        """The batch script."""
        device = "cuda" if order.on_gpu else order.device
        return render(
            "slurm.sh.j2",
            job_name=order.job_name,
            workers=order.workers or 1,
            gpu=order.on_gpu,
            folder=order.folder,
            project=order.project,
            storage_file=self.storage_file or order.planned_storage_file,
            tracking=order.open_tracking(),
            setup=self.setup,
            restarts=self.restarts,
            command=order.worker_command(self.python, str(order.project), device),
        )

    def _script_path(self, order: Order) -> Path:
        return order.folder / "worker.sbatch"

    def _command(self, order: Order) -> tuple[str, ...]:
        script = str(self._script_path(order))
        return ("sbatch", "--parsable", *self.options, *order.options, script)
