"""The mirror at work: rounds for every study, back-off, and a process of its own.

A worker does not mirror in its own process: importing MLflow alone takes 2 s and 100 MB, and
its requests would share the interpreter with training. It starts `droptune mirror sync --follow`
beside itself, which ends when the worker's end of its standard input closes, however that ends.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from droptune.errors import DroptuneError, UnknownStudyError
from droptune.mirror.sync import Mirror, SyncResult

log = logging.getLogger("droptune.mirror")

PERIOD = 3.0  # seconds between rounds
REFUSED = 300.0  # seconds before a server that said no is asked again
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0
_VAIN = 10.0  # seconds of rounds that fail, after which a drain leaves the rest to a later syncer


@dataclass
class _Schedule:
    """When a study's mirror is due."""

    mirror: Mirror
    due: float = 0.0
    pause: float = _FIRST_PAUSE
    last: SyncResult | None = None


class Syncer:
    """Keeps the mirrors of some studies up to date.

    `names` says which studies there are now, `make` opens the mirror of one; `tell` is called
    with (study, result) after every round that wrote something or changed its mind.
    """

    def __init__(
        self,
        names: Callable[[], Sequence[str]],
        make: Callable[[str], Mirror],
        *,
        tell: Callable[[str, SyncResult], None] | None = None,
        period: float = PERIOD,
    ) -> None:
        self._names = names
        self._make = make
        self._tell = tell or _log
        self._period = period
        self._schedules: dict[str, _Schedule] = {}

    def follow(self, stopped: threading.Event) -> None:
        """Go round until `stopped` is set."""
        while not stopped.is_set():
            self._find_studies()
            for name in list(self._schedules):
                if not stopped.is_set() and time.monotonic() >= self._schedules[name].due:
                    self._round(name)
            stopped.wait(self._period)

    def drain(self, seconds: float) -> bool:
        """A last round for every study, what is left of the first ones within the time.

        Where MLflow is away it ends early. Returns whether MLflow has everything now (as far as
        it is ours to write).
        """
        end = time.monotonic() + seconds
        self._find_studies()
        left, worked = set(self._schedules), time.monotonic()
        while left and time.monotonic() < min(end, worked + _VAIN):
            for name in sorted(left):
                result = self._round(name, refresh=True)
                if result is None or not result.holder or (result.complete and not result.doubtful):
                    left.discard(name)
                if result is None or result.reason is None:
                    worked = time.monotonic()
            if left:
                time.sleep(min(self._period, max(0.0, end - time.monotonic())))
        for schedule in self._schedules.values():
            schedule.mirror.release()
        return not left

    def _find_studies(self) -> None:
        try:
            names = self._names()
            for name in names:
                if name not in self._schedules:
                    self._schedules[name] = _Schedule(self._make(name))
        except DroptuneError as error:  # the database is away
            log.warning("%s", error)
            return
        for name in set(self._schedules) - set(names):
            self._finish(name)

    def _finish(self, name: str) -> None:
        """A study that is not to be followed any more: all of it once, then let it go."""
        if time.monotonic() < self._schedules[name].due:
            return
        result = self._round(name, refresh=True)
        if result is not None and (result.complete or not result.holder):
            self._schedules.pop(name).mirror.release()

    def _round(self, name: str, *, refresh: bool = False) -> SyncResult | None:
        schedule = self._schedules[name]
        try:
            result = schedule.mirror.sync_once(refresh=refresh)
        except UnknownStudyError:
            del self._schedules[name]
            return None
        except DroptuneError as error:
            result = SyncResult(holder=True, reason=str(error))
        before = schedule.last.reason if schedule.last else None
        if result.trainings or result.reason != before:
            self._tell(name, result)
        schedule.last = result
        self._plan(schedule, result)
        return result

    def _plan(self, schedule: _Schedule, result: SyncResult) -> None:
        now = time.monotonic()
        if result.reason is None:
            schedule.due, schedule.pause = now + self._period, _FIRST_PAUSE
        elif result.refused:
            schedule.due = now + REFUSED
        else:
            schedule.due = now + schedule.pause
            schedule.pause = min(2 * schedule.pause, _LONGEST_PAUSE)


def _log(name: str, result: SyncResult) -> None:
    if result.reason is not None:
        log.warning("mirror of %s: %s", name, result.reason)
    else:
        log.info("mirror of %s: %d trainings, %d points", name, result.trainings, result.points)


class Companion:
    """A process that mirrors while a worker trains: `with Companion(…):` around the work.

    It holds one end of a pipe; when the worker closes the other (or dies), it writes what is
    left and ends. Addresses go by the environment: they may hold passwords. `hurried` says that
    nobody is to wait for it any longer.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        storage_url: str,
        tracking_uri: str | None = None,
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        self._command = [sys.executable, "-m", "droptune", "mirror", "sync", *names]
        self._command += ["--follow", "--until-input-closes"]
        self._environment = {"DROPTUNE_STORAGE": storage_url}
        if tracking_uri is not None:
            self._environment["MLFLOW_TRACKING_URI"] = tracking_uri
        self._hurried = hurried
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Companion:
        environment: Mapping[str, str] = {**os.environ, **self._environment}
        self._process = subprocess.Popen(
            self._command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the worker; this one drains first
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(wait=60.0 if kind is None else 0.0)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def close(self, *, wait: float) -> bool:
        """Let it finish; True when it has ended (within `wait` seconds) with all written."""
        process, self._process = self._process, None
        if process is None:
            return True
        assert process.stdin is not None
        process.stdin.close()
        end = time.monotonic() + wait
        while process.poll() is None and time.monotonic() < end and not self._hurried():
            time.sleep(0.1)
        return process.poll() == 0  # otherwise it goes on by itself, for a bounded time
