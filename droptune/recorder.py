"""What happens at the end of an interval, off the training thread.

A recorder owns one thread, which does what it is given in order: write the group's measurements
in one transaction and ask the pruner once for the whole group, or write how trainings ended. The
decision on interval e comes back at boundary e + 1, so that results never depend on how fast the
database was. Only while the database is away does training run ahead: what was measured waits in
order (and, for a worker that dies, in its checkpoints), and decisions come when it is back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from droptune.training import Measurement, Training

Items = Sequence[tuple[Training, Measurement]]


@dataclass(frozen=True)
class Decision:
    """What SQL and the pruner say of a group after one interval (training ids).

    `reasons` is what to store with trainings that are pruned, or are audited instead.
    """

    lost: frozenset[int] = frozenset()
    pruned: frozenset[int] = frozenset()
    failed: Mapping[int, str] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)

    def __or__(self, other: Decision) -> Decision:
        return Decision(
            self.lost | other.lost,
            self.pruned | other.pruned,
            {**self.failed, **other.failed},
            {**self.reasons, **other.reasons},
        )


class Recorder:
    """Does one piece of work after the other, in order, in its own thread.

    `away` is set by whoever talks to the database while it cannot be reached.
    """

    def __init__(self, away: threading.Event) -> None:
        self._away = away
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: deque[Future[Decision]] = deque()
        self._decided = Decision()
        self._broken: BaseException | None = None

    def add(self, work: Callable[[], Decision]) -> None:
        """Hand over the next piece of work; after one that failed none is done any more."""
        self._pending.append(self._thread.submit(self._do, work))

    def _do(self, work: Callable[[], Decision]) -> Decision:
        if self._broken is not None:
            raise self._broken
        try:
            return work()
        except BaseException as error:
            self._broken = error
            raise

    def decisions(self) -> Decision:
        """What was decided on all that was handed over before, each decision once."""
        self.flush()
        decided, self._decided = self._decided, Decision()
        return decided

    def flush(self) -> bool:
        """Wait until all is done; False where the database is away, and something is left.

        What went wrong in the thread is raised here.
        """
        while self._pending:
            while not wait([self._pending[0]], timeout=0.2).done:
                if self._away.is_set():
                    return False
            self._decided |= self._pending.popleft().result()
        return True

    def close(self) -> None:
        """End the thread, after what it does just now; what waits behind that is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
