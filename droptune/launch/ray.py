"""Workers as Ray jobs, through Ray's own command line; ray is not imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from droptune.launch.job import JOB, Job, Record
from droptune.launch.launcher import Launcher, need_program, run_engine
from droptune.launch.order import (
    IDLE,
    MIRROR,
    STORAGE,
    STORAGE_FILE,
    TRACKING,
    Order,
    shell_line,
    with_setup,
)


@dataclass(frozen=True)
class RayLauncher(Launcher):
    """One `ray job submit` for each worker, one GPU per job unless `--device cpu`.

    Ray starts no job again and shows a job's environment, so the job is a `droptune launch
    local` of one worker, and the database URL comes from `storage_file`: a file as the nodes see
    it (default: one below the project, which then has to be on a shared path). `python` and
    `project` are as the nodes see them. `options` are given to Ray before those of the command
    line.
    """

    name: ClassVar[str] = "ray"

    cpus: int = 1
    python: str = "python"
    project: str = ""
    storage_file: str = ""
    options: tuple[str, ...] = ()

    def describe(self, order: Order) -> str:
        workers = range(order.workers or 1)
        return "".join(f"{shell_line(self._command(order, worker))}\n" for worker in workers)

    def submit(self, order: Order, record: Record) -> tuple[Job, ...]:
        need_program("ray", "pip install 'droptune[ray]'")
        commands = [self._command(order, worker) for worker in range(order.workers or 1)]
        if not self.storage_file:
            order.write_storage_file()
        environment = {key: value for key, value in os.environ.items() if key != STORAGE}
        jobs: list[Job] = []
        for worker, command in enumerate(commands):
            run_engine(command, env=environment)
            job = Job(self.name, self._id(order, worker), order.study, worker)
            record([job])
            jobs.append(job)
        return tuple(jobs)

    def _command(self, order: Order, worker: int) -> tuple[str, ...]:
        gpu = ("--entrypoint-num-gpus=1",) if order.on_gpu else ()
        return (
            *("ray", "job", "submit", "--no-wait"),
            f"--submission-id={self._id(order, worker)}",
            f"--entrypoint-num-cpus={self.cpus}",
            *gpu,
            *self.options,
            *order.options,
            "--",
            *self._entry_point(order, worker),
        )

    def _entry_point(self, order: Order, worker: int) -> tuple[str, ...]:
        """What Ray runs on a node: the lines of `setup`, then a supervised worker."""
        settings = {
            JOB: f"{self.name} {self._id(order, worker)}",
            STORAGE_FILE: self.storage_file or str(order.planned_storage_file),
            "OMP_NUM_THREADS": str(self.cpus),
            IDLE: os.environ.get(IDLE, "600"),  # or it would stay until the study is done
        }
        if tracking := order.open_tracking():
            settings[TRACKING] = tracking
        else:
            settings[MIRROR] = "none"
        device = "cuda" if order.on_gpu else order.device
        command = ["env", *(f"{key}={value}" for key, value in settings.items())]
        command += [self.python, "-m", "droptune", "launch", "local", "--workers", "1"]
        command += ["--device", device, "--project", self.project or str(order.project)]
        command += ["--restarts", str(self.restarts), "--width", order.width]
        return with_setup(self.setup, (*command, *order.named()))

    def _id(self, order: Order, worker: int) -> str:
        return f"{order.job_name}-{worker}"
