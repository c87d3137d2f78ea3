"""The signals by which an engine, or a person, ends a worker."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from droptune.errors import WorkRemainsError
from droptune.launch.supervisor import heeded

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


class Signals:
    """The first signal asks for an end in good order, a second Ctrl-C ends the process at once
    (a `guest` in somebody's process raises KeyboardInterrupt there).

    `first` is the name of the first one, None before. `told` is called from the handler at every
    signal, between two bytecodes of the main thread: it must only set flags.
    """

    def __init__(self, told: Callable[[], None], *, guest: bool = False) -> None:
        self.first: str | None = None
        self._told = told
        self._guest = guest
        self._breaks = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handlers in place (in the main thread; others get no signals)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in heeded(ENDING)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """Within, a signal raises KeyboardInterrupt: for what takes long and holds nothing."""
        self._breaks = True
        try:
            if self.first is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._breaks = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.first is not None and number == signal.SIGINT:
            if self._guest:
                raise KeyboardInterrupt
            os._exit(WorkRemainsError.exit_code)
        self.first = self.first or signal.Signals(number).name
        self._told()
        if self._breaks:
            raise KeyboardInterrupt
