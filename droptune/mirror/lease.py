"""The right to mirror a study: one syncer at a time, for as long as it renews it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from droptune.errors import DroptuneError
from droptune.storage import Storage


def _clock() -> float:
    """Seconds that go on while the machine sleeps, as the lease in SQL does."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class LeaseLost(Exception):
    """Another syncer holds the lease now; it goes on from the links in SQL."""


class Lease:
    """A lease in SQL, renewed by a thread while a round runs.

    It is lost by not being renewed for `seconds`, or by another one having it.
    """

    def __init__(self, storage: Storage, study_id: int, owner: str, seconds: float) -> None:
        self._storage = storage
        self._study_id = study_id
        self.owner = owner
        self._seconds = seconds
        self._until = float("-inf")  # by our own clock, counted from before the renewal
        self._renewing = threading.Lock()

    @property
    def held(self) -> bool:
        return _clock() < self._until

    def take(self) -> bool:
        """Take or renew it; False while another one has it."""
        with self._renewing:
            asked = _clock()
            if self._storage.acquire_mirror_lease(self._study_id, self.owner, self._seconds):
                self._until = asked + self._seconds
            else:
                self._until = float("-inf")
            return self.held

    def check(self) -> None:
        """Raise LeaseLost unless the lease is ours."""
        if not self.held:
            raise LeaseLost

    def release(self) -> None:
        if self.held:
            self._until = float("-inf")
            self._storage.release_mirror_lease(self._study_id, self.owner)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew it from a thread for as long as the block runs."""
        done = threading.Event()
        thread = threading.Thread(target=self._renew, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _renew(self, done: threading.Event) -> None:
        while not done.wait(self._seconds / 3):
            try:
                if not self.take():
                    return
            except DroptuneError:
                pass  # the database is away: the lease runs out unless it is back in time
