"""Workers on this machine: one process per device, started again while work remains."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from droptune.errors import ConfigurationError, DroptuneError, LaunchError, WorkRemainsError
from droptune.launch.devices import VISIBLE, cores, own_gpus, present_gpus, select_gpus
from droptune.launch.job import JOB, Job, Record
from droptune.launch.launcher import Launcher
from droptune.launch.marker import MARKER
from droptune.launch.order import STORAGE, STORAGE_FILE, TRACKING, Order, shell_line, with_setup
from droptune.launch.supervisor import Patience, Supervised, Supervisor


@dataclass(frozen=True)
class Place:
    """Where one worker runs: its `--device`, and what it finds in its environment."""

    device: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class LocalLauncher(Launcher):
    """One process per GPU (or as many as asked for on the CPU), supervised until they end.

    What follows `--` on the command line goes to `droptune worker start`.
    """

    name: ClassVar[str] = "local"
    one_machine: ClassVar[bool] = True

    python: str = sys.executable

    def check(self, order: Order) -> None:
        super().check(order)
        self._places(order)

    def describe(self, order: Order) -> str:
        lines = [f"cd {shell_line([str(order.project)])}"]
        for index, place in enumerate(self._places(order)):
            settings = [f"{key}={value}" for key, value in place.environment.items()]
            log = shell_line([str(_log(order, index))])
            command = shell_line(["env", *settings, *self._command(order, place)])
            lines.append(f"{command} >> {log} 2>&1")
        restarts = f"{self.restarts} restarts without a finished interval"
        lines.append(f"# each is started again after a crash or exit code 75, at most {restarts}")
        return "\n".join(lines) + "\n"

    def submit(self, order: Order, record: Record) -> tuple[Job, ...]:
        """Start the workers and stay with them until the last has ended.

        Raises:
            WorkRemainsError: a signal ended them.
            ConfigurationError: every worker found that it can never work.
            DroptuneError: every worker was given up.
        """
        if not order.project.is_dir():
            raise LaunchError(f"{order.project} is no folder; give the project's with --project")
        places = self._places(order)
        order.make_folder()
        jobs = tuple(self._job(order, index) for index in range(len(places)))
        if not _within_another_job():
            record(jobs)
        workers = [self._supervised(order, k, p) for k, p in enumerate(places)]
        supervisor = Supervisor(workers, Patience(self.restarts))
        codes = supervisor.run()
        failures = dict.fromkeys(worker.failure for worker in workers if worker.failure)
        _judge(codes, order, " / ".join(failures), interrupted=supervisor.interrupted)
        return jobs

    def _places(self, order: Order) -> list[Place]:
        gpus = select_gpus(order.device, own_gpus(os.environ, present_gpus()))
        if gpus:
            return self._on_gpus(order, gpus)
        count = order.workers or 1
        if order.device == "mps" and count > 1:
            raise LaunchError("--device mps: this machine has one; start 1 worker")
        device = "cpu" if count > 1 else order.device
        return [Place(device, _threads(count))] * count

    def _on_gpus(self, order: Order, gpus: Sequence[str]) -> list[Place]:
        count = order.workers or len(gpus)
        if count > len(gpus):
            raise LaunchError(
                f"--workers {count}: a worker owns one device and there are {len(gpus)} GPUs "
                "here; a wider group uses a GPU better than a second worker"
            )
        threads = _threads(count)
        return [Place("cuda", {VISIBLE: gpu, **threads}) for gpu in gpus[:count]]

    def _command(self, order: Order, place: Place) -> tuple[str, ...]:
        stay = () if order.study is None else ("--until-done",)  # nobody waits for this device
        options = (*order.options, *stay)
        command = order.worker_command(self.python, str(order.project), place.device, options)
        return with_setup(self.setup, command)

    def _supervised(self, order: Order, index: int, place: Place) -> Supervised:
        marker = order.folder / f"{index}.finished"
        # SQL and MLflow are told by the environment: these processes are ours, nobody else's.
        own = {**place.environment, MARKER: str(marker), STORAGE: order.storage}
        if order.tracking:
            own[TRACKING] = order.tracking
        environment = {JOB: self._job(order, index).name, **os.environ, **own}
        environment.pop(STORAGE_FILE, None)
        return Supervised(
            name=f"worker {index}",
            command=self._command(order, place),
            environment=environment,
            folder=order.project,
            log=None if _within_another_job() else _log(order, index),
            marker=marker,
        )

    def _job(self, order: Order, index: int) -> Job:
        return Job(self.name, f"{order.tag[-11:]}/{index}", order.study, index)


def _log(order: Order, index: int) -> Path:
    return order.folder / f"worker-{index}.log"


def _within_another_job() -> bool:
    """Ray starts this launcher within its own job, which is recorded and shows the output."""
    return JOB in os.environ


def _threads(workers: int) -> dict[str, str]:
    """The cores shared out; what the user set stands."""
    given = os.environ.get("OMP_NUM_THREADS")
    return {"OMP_NUM_THREADS": given or str(max(cores() // workers, 1))}


def _judge(codes: Sequence[int], order: Order, failures: str, *, interrupted: bool) -> None:
    """One exit 0 says that nothing is left, whatever became of the others."""
    if 0 in codes:
        return
    if interrupted:
        raise WorkRemainsError("the workers handed their trainings back; start them again to go on")
    where = f"{f'{failures}; ' if failures else ''}see the logs in {order.folder}"
    if all(code in (2, ConfigurationError.exit_code) for code in codes):
        raise ConfigurationError(f"no worker can work here: {where}")
    raise DroptuneError(f"every worker was given up (exit codes {sorted(set(codes))}): {where}")
