"""The thread on which a worker's leases hang."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from droptune.errors import DroptuneError

log = logging.getLogger("droptune.worker")


class Beat:
    """Calls `work` every so many seconds from a thread of its own, whatever becomes of a call.

    `away` is set while the database, which `work` talks to, cannot be reached.
    """

    def __init__(self, work: Callable[[], None], seconds: float, away: threading.Event) -> None:
        self._work = work
        self._seconds = seconds
        self._away = away
        self._wake, self._done = threading.Event(), threading.Event()
        self._ended = False
        threading.Thread(target=self._run, daemon=True, name="beat").start()

    def _run(self) -> None:
        while not self._ended:
            self._wake.wait(self._seconds)
            self._wake.clear()
            if self._ended:
                return
            try:
                self._work()
            except DroptuneError as error:
                log.warning("no beat: %s", error)
            except Exception:  # nothing may end this thread: the leases hang on it
                log.exception("no beat")
            self._done.set()

    def now(self) -> None:
        """Beat, and wait for it; not for an absent database."""
        self._done.clear()
        self._wake.set()
        while not self._done.wait(0.2) and not self._away.is_set():
            pass

    def end(self) -> None:
        """Beat no more. A call that waits for the database is left alone."""
        self._ended = True
        self._wake.set()
