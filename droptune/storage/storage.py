"""The one door to the database."""

from __future__ import annotations

import threading
from typing import Self

from droptune.storage import creation
from droptune.storage.address import Address
from droptune.storage.claims import LEASE_SECONDS, Claims
from droptune.storage.database import Database
from droptune.storage.ledger import Ledger
from droptune.storage.measurements import Measurements
from droptune.storage.queue import Queue
from droptune.storage.results import Results
from droptune.storage.studies import Studies
from droptune.storage.workers import Workers


class Storage(Studies, Queue, Claims, Measurements, Workers, Ledger, Results):
    """Studies, trainings, measurements, workers and what the mirror knows, in one SQL database.

    Every method is one transaction and may be called from any thread. While the database cannot
    be reached, `away` is set and calls wait up to `patience` seconds (see `Database`).
    """

    def __init__(self, database: Database, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self.database = database
        self.lease_seconds = lease_seconds

    @property
    def redacted(self) -> str:
        """The database's URL as people may see it."""
        return self.database.address.redacted

    @property
    def away(self) -> threading.Event:
        """Set while the database cannot be reached."""
        return self.database.away

    @property
    def patience(self) -> float:
        """Seconds that a call waits for an absent database; may be changed, also while waiting."""
        return self.database.patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        self.database.patience = seconds

    def close(self) -> None:
        """Close the connections that are kept open."""
        self.database.engine.dispose()

    @classmethod
    def open(
        cls,
        url: str,
        *,
        create: bool = False,
        patience: float = 0.0,
        lease_seconds: float = LEASE_SECONDS,
    ) -> Self:
        """Open a database (with `create`: make its tables first); StorageError in one line."""
        standing = lease_seconds / 2  # who is frozen loses its locks before its leases
        database = Database(Address.parse(url), patience=patience, standing_seconds=standing)
        (creation.create if create else creation.check)(database)
        return cls(database, lease_seconds=lease_seconds)

    @staticmethod
    def upgrade(url: str) -> list[str]:
        """Migrate droptune's tables to this version; returns the revisions that were applied."""
        return creation.upgrade(Database(Address.parse(url)))
