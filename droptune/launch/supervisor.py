"""Processes kept alive: restarted with back-off, stopped together, never left behind."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from droptune.errors import ConfigurationError, DroptuneError, UsageError
from droptune.launch.marker import take_marker

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
FINAL = (0, ConfigurationError.exit_code)  # a restart is not needed, or cannot help
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
GRACE_SECONDS = 60.0  # to hand trainings back in, when the supervisor itself fails
FAULTS = (DroptuneError.exit_code, UsageError.exit_code, *(-number for number in CRASHES))


@dataclass(frozen=True)
class Patience:
    """How often a process is started again without progress, and after how many seconds."""

    restarts: int = 5
    first: float = 1.0
    longest: float = 60.0

    def delay(self, restart: int) -> float:
        """Seconds before the n-th restart in a row, from 1."""
        return float(min(self.longest, self.first * 2.0 ** (restart - 1)))


@dataclass
class Supervised:
    """One command and the process that runs it now.

    Its output goes to the end of `log`, or is the supervisor's own where that is None. The
    process touches `marker` when it gets on, which makes its restarts count from 0 again.
    `failure` is what it said when it failed last; `code` is its exit code when it will not be
    started again.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    log: Path | None
    marker: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    start_at: float = 0.0
    told: bool = False
    failure: str = ""
    code: int | None = None

    def start(self) -> int:
        """Start the process in a session of its own: a terminal's Ctrl-C is for the supervisor."""
        with self.log.open("ab") if self.log else nullcontext() as output:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )
        return self.process.pid

    def end(self) -> None:
        """Ask the process to end; not its children, such as data loaders, which it still needs."""
        if self.process is not None and not self.told:
            self.told = True
            self.process.terminate()

    def kill(self) -> None:
        """End the process and all that it started, at once."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The last line of the log, where a failure has its one line; without its time."""
        if self.log is None:
            return ""
        with self.log.open("rb") as log:
            log.seek(max(self.log.stat().st_size - 2000, 0))
            lines = log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return re.sub(r"^\d\d:\d\d:\d\d ", "", last)[:300]


class Supervisor:
    """Keeps processes running until each has ended for good.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR2 is passed on as SIGTERM and waited for; a second
    SIGINT kills. `run` has to be called in the main thread.
    """

    def __init__(self, workers: Sequence[Supervised], patience: Patience) -> None:
        self.workers = workers
        self.patience = patience
        self._signals_seen: list[int] = []
        self._told = False

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the workers."""
        return bool(self._signals_seen)

    @property
    def _impatient(self) -> bool:
        """Whether there was a second Ctrl-C."""
        return signal.SIGINT in self._signals_seen[1:]

    def run(self) -> tuple[int, ...]:
        """Exit codes of all workers (negative: killed by that signal), when the last has ended."""
        with self._signals() as wake:
            try:
                while any(worker.code is None for worker in self.workers):
                    self._sleep(wake)
                    for worker in self.workers:
                        self._look_after(worker)
                    self._tell()
            finally:
                self._end_all()
        return tuple(worker.code for worker in self.workers if worker.code is not None)

    def _look_after(self, worker: Supervised) -> None:
        """Start one worker that is due, or take note that it ended."""
        if worker.code is not None:
            return
        if worker.process is None:
            if self.interrupted:
                worker.code = 75
            elif time.monotonic() >= worker.start_at:
                log = f", log {_shown(worker.log)}" if worker.log else ""
                _say(f"{worker.name}: started, pid {worker.start()}{log}")
        elif (code := worker.process.poll()) is not None:
            worker.process = None
            self._ended(worker, code)
        elif self._impatient:
            worker.kill()
        elif self.interrupted:
            worker.end()

    def _ended(self, worker: Supervised, code: int) -> None:
        """Start it again later, or leave it."""
        if take_marker(worker.marker):
            worker.restarts, worker.failure = 0, ""
        before, worker.failure = worker.failure, worker.last_words() if code else ""
        reason = f" ({worker.failure})" if worker.failure else ""
        if code in FINAL or self.interrupted:
            worker.code = code
            _say(f"{worker.name}: ended with exit code {code}{reason}")
            return
        if code in FAULTS and worker.failure and worker.failure == before:
            worker.code = code
            again = "twice the same without a finished interval, so not started again"
            _say(f"{worker.name}: ended with exit code {code}{reason}; {again}")
            return
        if worker.restarts >= self.patience.restarts:
            worker.code = code
            count = f"{worker.restarts} restarts without a finished interval"
            _say(f"{worker.name}: ended with exit code {code}{reason}; given up after {count}")
            return
        worker.restarts += 1
        delay = self.patience.delay(worker.restarts)
        worker.start_at = time.monotonic() + delay
        again = f"restart {worker.restarts} of {self.patience.restarts} in {delay:g} s"
        _say(f"{worker.name}: ended with exit code {code}{reason}; {again}")

    def _sleep(self, wake: int) -> None:
        """Until a process ends, a signal arrives or a restart is due."""
        pending = [w.start_at for w in self.workers if w.code is None and w.process is None]
        longest = min((max(at - time.monotonic(), 0.0) for at in pending), default=5.0)
        if select.select([wake], [], [], min(longest, 5.0))[0]:
            os.read(wake, 4096)

    def _tell(self) -> None:
        """Say once which signal it was, after the workers were told."""
        if self.interrupted and not self._told:
            self._told = True
            name = signal.Signals(self._signals_seen[0]).name
            _say(f"{name}: the workers hand their trainings back (Ctrl-C again kills them)")

    def _end_all(self) -> None:
        """Where an error of our own leaves workers: let them hand back, then kill what is left."""
        left = [(worker, worker.process) for worker in self.workers if worker.process is not None]
        for worker, _ in left:
            worker.end()
        end = time.monotonic() + GRACE_SECONDS
        while any(process.poll() is None for _, process in left):
            if self._impatient or time.monotonic() > end:
                break
            time.sleep(0.1)
        for worker, process in left:
            worker.kill()
            process.wait()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Only take note: the loop is woken by the same signal and acts on it."""
        self._signals_seen.append(number)

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """Handlers in place; yields a file descriptor that any of their signals makes readable."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        wake_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        handlers = dict.fromkeys(heeded(STOPPING), self._on_signal)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        child_before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        try:
            yield reader
        finally:
            signal.signal(signal.SIGCHLD, child_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wake_before)
            os.close(reader)
            os.close(writer)


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Without SIGHUP where it is ignored: whoever says nohup wants to go on after a hang-up."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in numbers if not (ignored and number is signal.SIGHUP)]


def _say(line: str) -> None:
    """On stderr; its reader or its terminal may be gone, and the workers still have to be ended."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _shown(path: Path) -> Path:
    """Relative to the working directory where it lies below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _end_with_parent() -> Callable[[], None] | None:
    """Linux: ask the kernel to TERM the child when the supervisor dies without a word."""
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    PR_SET_PDEATHSIG = 1
    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
