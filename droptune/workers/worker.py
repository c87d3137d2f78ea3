"""A worker: the process that claims trainings, trains them on its device and reports.

It serves the studies it was named (or every active one), hands its trainings back on a signal,
and says by its exit status whether work remains (`errors`).
"""

from __future__ import annotations

import logging
import math
import os
import random
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from droptune.errors import (
    ConfigurationError,
    DroptuneError,
    ProgramError,
    SiteError,
    SpecError,
    UnknownStudyError,
    WorkRemainsError,
)
from droptune.launch.devices import cores
from droptune.launch.job import JOB
from droptune.launch.marker import mark_interval
from droptune.launch.order import MIRROR
from droptune.mirror.syncer import Companion
from droptune.program.loading import load_program
from droptune.program.source import fingerprint
from droptune.storage import Storage, StudySummary, WorkerRow
from droptune.study import Study
from droptune.trainers.checkpoint import CheckpointStore
from droptune.trainers.fused import make_trainer
from droptune.trainers.memory import keep_freed_memory, return_freed_memory
from droptune.trainers.recipe import Recipe
from droptune.trainers.slot import Interrupted
from droptune.training import Seeds
from droptune.workers.beat import Beat
from droptune.workers.device import describe_device, find_device, set_threads
from droptune.workers.group import CHECKPOINT_SECONDS, Group, blame
from droptune.workers.signals import Signals
from droptune.workers.turns import Turns

log = logging.getLogger("droptune.worker")

BEATS = 6  # in the time that a lease lasts
POLL_SECONDS = 1.0  # between two looks for work, three times as long after a while
LOOK_SECONDS = 3.0  # between two looks at other studies while one is trained
LAST_SECONDS = 5.0  # how long a worker that ends waits for an absent database
PATIENCE_SECONDS = 600.0  # and any other, where nothing else is asked for


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker works; `root` is the project that programs are loaded from.

    `width` None measures it; `until_done` ends the worker when its studies are done. It also ends
    when nothing was claimable for `idle_seconds`: what others train may bring more to train when
    it ends. Without names and `until_done` it serves all studies and never ends. Where it is a
    `guest` in somebody's process, a second Ctrl-C does not end that.
    """

    root: Path
    storage: str = field(repr=False)  # the database's URL, for the process that mirrors
    device: str = "auto"
    width: int | None = None
    until_done: bool = False
    threads: int | None = None
    allow_drift: bool = False
    tracking: str | None = None
    idle_seconds: float = math.inf
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    guest: bool = False


class Worker:
    """One process, one device, the studies of one database."""

    def __init__(self, storage: Storage, options: WorkerOptions) -> None:
        self.storage = storage
        self.options = options
        self.device = find_device(options.device)
        self.id = 0
        self._names: Sequence[str] = ()
        self._signals = Signals(self._hurry, guest=options.guest)
        self._turns = Turns()
        self._beat: Beat | None = None
        self._beside, self._mirrors = ExitStack(), False
        self._group: Group | None = None
        self._studies: dict[int, Study] = {}
        self._refused: dict[int, str] = {}
        self._drifted: dict[str, list[str]] = {}
        self._spent: dict[int, float] = {}  # device seconds by study, of groups that are gone
        self._has_turn, self._look_at = True, 0.0

    def run(self, names: Sequence[str]) -> None:
        """Work until nothing is left; WorkRemainsError where a signal ended it before."""
        for name in names:
            self.storage.study(name)  # an unknown name is refused at once
        self._names = names
        with self._signals.handled(), self._registered(), self._beside:
            self._serve()
            if self._signals.first:
                raise WorkRemainsError(
                    f"ended by {self._signals.first}; its trainings wait for the next worker"
                )

    def _mirror(self, study: Study) -> None:
        """Start a process beside this one that copies to MLflow, once a study wants it."""
        wanted = study.spec.mlflow.mirror == "worker" and os.environ.get(MIRROR) != "none"
        if wanted and not self._mirrors:
            self._mirrors = True
            storage, tracking = self.options.storage, self.options.tracking
            companion = Companion(
                self._names,
                storage_url=storage,
                tracking_uri=tracking,
                hurried=lambda: self._signals.first is not None,
            )
            self._beside.enter_context(companion)

    # -- which study -----------------------------------------------------------------------------

    def _serve(self) -> None:
        idle_since, worked = time.monotonic(), False
        while not self._signals.first:
            studies = self._next_studies()
            idle = time.monotonic() - idle_since
            if any(self._work_on(summary) for summary in studies):
                idle_since, worked = time.monotonic(), True
            elif self._nothing_left(studies, idle):
                if not worked:
                    self._say_why_nothing()
                return
            else:
                pause = POLL_SECONDS * (1.0 if idle < 30 else 3.0)
                time.sleep(pause * random.uniform(0.5, 1.5))

    def _next_studies(self) -> list[StudySummary]:
        """The studies to serve, whose turn it is first."""
        self.storage.requeue_stale()
        found = [
            summary
            for summary in self.storage.studies()
            if (not self._names or summary.name in self._names)
            and summary.status == "active"
            and summary.phase != "done"
            and summary.id not in self._refused
        ]
        return self._turns.order(found, self._others()) if len(found) > 1 else found

    def _others(self) -> list[WorkerRow]:
        return [row for row in self.storage.list_workers() if row.id != self.id]

    def _nothing_left(self, studies: Sequence[StudySummary], idle: float) -> bool:
        """Whether to end: nothing to serve, or nothing claimable for a while."""
        service = not self._names and not self.options.until_done
        if studies:
            return not service and idle > self.options.idle_seconds
        if self._refused and not service:
            raise ConfigurationError("; ".join(self._refused.values()))
        return not service

    def _say_why_nothing(self) -> None:
        for summary in self.storage.studies():
            name = shlex.quote(summary.name)
            if summary.name in self._names and summary.status == "stopped":
                log.info("%s is stopped; to go on: droptune study resume %s", summary.name, name)
            elif summary.name in self._names and summary.phase == "done":
                log.info("%s is done; its answer: droptune study best %s", summary.name, name)

    def _keeps_turn(self, study_id: int) -> bool:
        """Whether to claim more of the study; looks at the others every few seconds."""
        if len(self._names) != 1 and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_SECONDS
            self._has_turn = not any(
                self.storage.progress(rival.id).claimable
                for rival in self._turns.rivals(study_id, self._next_studies(), self._others())
            )
        return self._has_turn

    # -- one study -------------------------------------------------------------------------------

    def _work_on(self, summary: StudySummary) -> bool:
        """Train this study while something of it is claimable (and it is its turn).

        True where something was trained, or there is now something to train.
        """
        try:
            study = self._open(summary)
            if not self.storage.progress(study.row.id).claimable:
                return study.advance()
            return self._train(self._group_of(study)) or study.advance()
        except UnknownStudyError:  # deleted
            self._studies.pop(summary.id, None)
        except ConfigurationError as error:
            self._refused[summary.id] = str(error)
            log.error("%s", error)
        except KeyboardInterrupt:
            if self._signals.first is None:
                raise
        return False

    def _open(self, summary: StudySummary) -> Study:
        study = self._studies.get(summary.id)
        if study is None or study.row.uuid != summary.uuid:
            study = self._studies[summary.id] = self._read(summary.name)
        elif study.row.budget != summary.budget:
            study.refresh()
        return study

    def _read(self, name: str) -> Study:
        try:
            return Study.open(self.storage, name)
        except SpecError as error:  # of another version: this one can never train it
            raise ConfigurationError(
                f"study {name!r}: {error}; it was made by another droptune than this "
                f"{version('droptune')}: install the same here"
            ) from error

    def _train(self, group: Group) -> bool:
        """Interval after interval; after its turn a group is not refilled and runs out.

        True where anything was trained.
        """
        trained, study_id = False, group.study.row.id
        self._turns.begin()
        self._has_turn = True
        try:
            while group.step(refill=self._keeps_turn(study_id)):
                trained = True
                self._tell()
            group.sweep()
        except Interrupted:
            group.hand_back()
            self._part()
        except ConfigurationError:
            group.hand_back()
            self._part()
            raise
        except BaseException:
            with suppress(Exception):
                group.save()
            raise
        self._turns.end(study_id)
        return trained

    def _tell(self) -> None:
        """After an interval: say that there is progress, and what it cost where that is limited."""
        if self.storage.away.is_set():
            return
        mark_interval()
        assert self._group is not None
        budget = self._group.study.row.budget
        limited = budget.device_seconds is not None or budget.deadline is not None
        if limited and self._beat is not None:  # it is overrun by one interval at most
            self._beat.now()

    def _group_of(self, study: Study) -> Group:
        """The group of this study; one program is in memory at a time."""
        if self._group is not None and self._group.study is study:
            return self._group
        self._part()
        with self._signals.breaking():
            self._group = self._form(study)
        if self._signals.first:  # that came too late to break, and too early to be told the group
            self._group.stop()
        return self._group

    def _form(self, study: Study) -> Group:
        """An empty group for the study, or why there cannot be one (exit codes 75 and 78)."""
        try:
            return self._make_group(study)
        except (ProgramError, SiteError, SpecError) as error:
            raise ConfigurationError(
                f"study {study.name!r}: {error}; programs are loaded from {self.options.root} "
                "(another one: --project DIR)"
            ) from error
        except DroptuneError:
            raise
        except Exception as error:
            raise blame(error, study.name, self.device) from error

    def _make_group(self, study: Study) -> Group:
        """Load the program, check its code, read the data, measure the width; claim nothing."""
        root, spec, width = self.options.root, study.spec, self.options.width
        self._use_threads(spec.training.threads)
        keep_freed_memory()
        self._check_code(study)
        program = load_program(spec.program, root)
        recipe = Recipe.of(program, study.sites, spec, self.device)
        recipe.feed(Seeds.of_trial(study.row.seed, 0).split)
        self._mirror(study)
        trainer, store = make_trainer(recipe, study, width), CheckpointStore.of(study, root)
        log.info("%s: width %d on %s", study.name, trainer.width, self.device)
        every = self.options.checkpoint_seconds
        return Group(study, self.id, trainer, store, checkpoint_seconds=every)

    def _use_threads(self, wanted: int | str) -> None:
        asked = self.options.threads or (wanted if isinstance(wanted, int) else None)
        here = socket.gethostname()
        alive = [w for w in self.storage.list_workers() if w.host == here and w.state == "alive"]
        set_threads(asked, cores(), len(alive))

    def _check_code(self, study: Study) -> None:
        """Refuse a study whose code is not what this worker has."""
        drift = study.drift(fingerprint(study.spec.program, self.options.root))
        files = ", ".join(drift)
        if drift and not self.options.allow_drift:
            raise ConfigurationError(
                f"study {study.name!r}: the code here differs in {files}; bring the same "
                "code, or train all the same with --allow-drift"
            )
        if drift:
            log.warning("%s: training with code that differs in %s", study.name, files)
            self._drifted[study.name] = drift

    def _part(self) -> None:
        """Let the group go, with the program and all that it has in memory."""
        group, self._group = self._group, None
        if group is not None:
            study_id = group.study.row.id
            self._spent[study_id] = self._spent.get(study_id, 0.0) + group.device_seconds
            group.close()
            del group
            return_freed_memory()

    # -- registration, beats, signals ----------------------------------------------------------

    @contextmanager
    def _registered(self) -> Iterator[None]:
        self.id = self.storage.register_worker(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=describe_device(self.device),
            info=self._info(),
        )
        seconds = self.storage.lease_seconds / BEATS
        self._beat = Beat(self._renew, seconds, self.storage.away)
        try:
            yield
        finally:
            self._beat.end()
            self._end()

    def _end(self) -> None:
        """Let go of everything, in bounded time: what SQL is not told, leases running out tell."""
        self._hurry()
        self._part()
        try:
            self._renew()
            self.storage.end_worker(self.id)
        except DroptuneError as error:
            log.warning("%s", error)

    def _info(self) -> dict[str, object]:
        job = os.environ.get(JOB) or engine_job(os.environ)
        return {"job": job} | ({"drift": self._drifted} if self._drifted else {})

    def _renew(self) -> None:
        """Renew leases, and take over those that ran out.

        Ends the group where its study was stopped, or its device hours or deadline are used up.
        """
        spent, group = dict(self._spent), self._group  # in this order: see `_part`
        held: list[int] = []
        if group is not None:
            study_id = group.study.row.id
            spent[study_id] = spent.get(study_id, 0.0) + group.device_seconds
            held = [training.id for training in group.holding()]
        orders = self.storage.beat(self.id, held, info=self._info(), device_seconds=spent)
        if group is not None and group.study.row.id in orders.stopped | orders.spent:
            group.stop()
        self.storage.requeue_stale()

    def _hurry(self) -> None:
        """The worker is about to end: break what it trains, and wait for nothing long."""
        self.storage.patience = min(self.storage.patience, LAST_SECONDS)
        if self._group is not None:
            self._group.stop()


def engine_job(environment: Mapping[str, str]) -> str | None:
    """The job that Slurm, Kubernetes or Ray knows this process by."""
    if "SLURM_JOB_ID" in environment:
        array = environment.get("SLURM_ARRAY_JOB_ID")
        task = environment.get("SLURM_ARRAY_TASK_ID")
        return f"slurm {array}_{task}" if array else f"slurm {environment['SLURM_JOB_ID']}"
    for engine, variable in (("ray", "RAY_JOB_ID"), ("kubernetes", "POD_NAME")):
        if variable in environment:
            return f"{engine} {environment[variable]}"
    return None
