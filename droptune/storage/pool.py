"""A pool that keeps nothing for long, so that hundreds of workers fit on one server.

A pool of the usual sort holds its connections for ever (110 workers lock PostgreSQL's default of
100 out), none at all pays for a new server process in every transaction. Workers talk in bursts
at the end of an interval: one connection lives through the burst and is closed after it.
"""

from __future__ import annotations

import threading
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry, Pool

LINGER_SECONDS = 0.25


class BurstPool(Pool):
    """Keeps the connection that was returned last for a quarter of a second."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._mutex = threading.Lock()
        self._kept: ConnectionPoolEntry | None = None
        self._closing: threading.Timer | None = None

    def _do_get(self) -> ConnectionPoolEntry:
        return self._take() or self._create_connection()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        closing = threading.Timer(LINGER_SECONDS, self._close_kept)
        closing.daemon = True
        with self._mutex:
            surplus, self._kept = self._kept, record
            if self._closing is not None:
                self._closing.cancel()
            self._closing = closing
        closing.start()
        if surplus is not None:
            surplus.close()

    def _take(self) -> ConnectionPoolEntry | None:
        with self._mutex:
            kept, self._kept = self._kept, None
            return kept

    def _close_kept(self) -> None:
        kept = self._take()
        if kept is not None:
            kept.close()

    def dispose(self) -> None:
        """Close the connection that is kept."""
        self._close_kept()

    def recreate(self) -> BurstPool:
        """An empty pool with the same options."""
        return BurstPool(
            self._creator,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )

    def status(self) -> str:
        """What is kept, for people."""
        return f"BurstPool, {'one connection' if self._kept else 'no connection'} kept"
