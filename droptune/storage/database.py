"""One engine: transactions that wait for locks, survive an absent database, and fail in one line.

SQLite writes begin IMMEDIATE (a deferred transaction that starts to write later fails at once
under WAL instead of waiting). PostgreSQL and MySQL run READ COMMITTED on connections that are
closed after each burst of transactions: hundreds of workers then hold no more than a few. There
the server itself ends a transaction that stands still: a worker that was frozen in the middle of
one, or cut off, keeps no row locked for long.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from droptune.errors import DatabaseAwayError, StorageError, WorkRemainsError
from droptune.storage.address import Address
from droptune.storage.pool import BurstPool

T = TypeVar("T")
Row = Mapping[str, Any]

BUSY_SECONDS = 60.0  # how long a SQLite writer waits for the others
LONGEST_PAUSE = 5.0  # between two attempts to reach an absent database
STANDING_SECONDS = 30.0  # how long a transaction that writes may wait for its client


class now(FunctionElement[float]):  # reads as SQL
    """The database's clock: seconds since 1970 (UTC) as a double."""

    type = sa.Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(element: now, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql_now(element: now, compiler: Any, **options: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(now, "mysql")
def _mysql_now(element: now, compiler: Any, **options: Any) -> str:
    return "(UNIX_TIMESTAMP(SYSDATE(6)) + 0e0)"  # sessions run in UTC: no folded hours


class Trouble(StrEnum):
    """What a failed statement means for its transaction."""

    CONFLICT = "conflict"  # others hold the lock: run it again
    CLASH = "clash"  # others wrote the same row: run it again, it will see theirs
    AWAY = "away"  # the database cannot be reached or written: run it again later
    ERROR = "error"


RETRIES: dict[Trouble, float] = {
    Trouble.CONFLICT: 20,
    Trouble.CLASH: 3,
    Trouble.AWAY: math.inf,  # `patience` ends it
    Trouble.ERROR: 0,
}


class Database:
    """Runs functions of a connection as transactions.

    A function may run several times (lock conflicts, a lost connection, a commit whose reply was
    lost), so it must come to the same end when its first run was committed. `away` is set while
    the database cannot be reached; after `patience` seconds of that a call gives up: with
    WorkRemainsError where patience was asked for, with DatabaseAwayError at once where it was not.
    A server ends a transaction whose client says nothing for `standing_seconds`; SQLite cannot.
    """

    def __init__(
        self,
        address: Address,
        *,
        patience: float = 0.0,
        standing_seconds: float = STANDING_SECONDS,
    ) -> None:
        self.address = address
        self.patience = patience
        self.away = threading.Event()
        self._returned = -math.inf  # when (monotonic) the last absence ended
        self.engine = _engine(address, standing_seconds)
        self._writing = self.engine.execution_options(droptune_writes=True)

    @property
    def dialect(self) -> str:
        return self.address.dialect

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in one transaction that only reads."""
        return self._run(self.engine, work)

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in one transaction and commit it."""
        return self._run(self._writing, work)

    def _run(self, engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
        met, since = Counter[Trouble](), time.monotonic()
        while True:
            try:
                with engine.begin() as connection:
                    result = work(connection)
                self._reached()
                return result
            except (sa.exc.SQLAlchemyError, OSError) as error:
                trouble = self._trouble(error)
                met[trouble] += 1
                if _stood_still(error):
                    since = time.monotonic()  # this process was frozen, and waited for nobody
                waited = time.monotonic() - since
                too_long = trouble is Trouble.CONFLICT and waited > 2 * BUSY_SECONDS
                if met[trouble] > RETRIES[trouble] or too_long:
                    raise StorageError(self.explain(error)) from error
                if trouble is Trouble.AWAY:
                    self._wait(error, met[trouble], waited)
                else:
                    time.sleep(random.uniform(0, 0.01 * 2 ** min(met[trouble], 6)))

    def _reached(self) -> None:
        if self.away.is_set():
            self._returned = time.monotonic()
            self.away.clear()

    def present_seconds(self, connection: sa.Connection) -> float:
        """For how long everybody could reach the database, as far as it can be known."""
        seconds = time.monotonic() - self._returned
        if self.dialect == "postgresql":
            started = sa.func.pg_postmaster_start_time()
            query = sa.select(sa.extract("epoch", sa.func.clock_timestamp() - started))
            return min(seconds, float(connection.execute(query).scalar_one()))
        if self.dialect == "mysql":
            status = connection.execute(sa.text("SHOW GLOBAL STATUS LIKE 'Uptime'")).one()
            return min(seconds, float(status[1]))
        return seconds

    def _wait(self, error: Exception, absences: int, waited: float) -> None:
        """Sleep before the next attempt, or give up."""
        self.away.set()
        if self.patience <= 0:
            raise DatabaseAwayError(self.explain(error)) from error
        if waited >= self.patience:
            raise WorkRemainsError(
                f"{self.explain(error)} Waited {waited:.0f} s. Nothing is lost: start the worker "
                "again when the database is back."
            ) from error
        pause = min(0.1 * 2**absences, LONGEST_PAUSE, max(self.patience - waited, 0.05))
        time.sleep(pause * random.uniform(0.5, 1.0))

    def explain(self, error: BaseException) -> str:
        """The failure in one line without secrets."""
        cause = getattr(error, "orig", None) or error
        words = self.address.scrub(str(cause)).rstrip(".")
        away = "cannot be written" if self.dialect == "sqlite" else "cannot be reached"
        verb = away if self._trouble(error) is Trouble.AWAY else "refused"
        return f"The database {self.address.redacted} {verb}: {words}."

    def _trouble(self, error: BaseException) -> Trouble:
        if isinstance(error, sa.exc.DBAPIError):
            if _stood_still(error):
                return Trouble.CONFLICT
            cause = error.orig
            if error.connection_invalidated:
                return Trouble.AWAY
            if isinstance(error, sa.exc.IntegrityError):
                return Trouble.CLASH
            classify = {"sqlite": _sqlite_trouble, "mysql": _mysql_trouble}
            return classify.get(self.dialect, _postgresql_trouble)(cause)
        if isinstance(error, (sa.exc.TimeoutError, OSError)):
            missing = isinstance(error, FileNotFoundError)  # a certificate that the URL names
            return Trouble.ERROR if missing else Trouble.AWAY
        return Trouble.ERROR

    # -- statements that differ between databases ----------------------------------------------

    def insert_new(
        self, connection: sa.Connection, table: sa.Table, rows: Sequence[Row], unique: Sequence[str]
    ) -> None:
        """Insert the rows whose `unique` columns are not there yet; keep what is there."""
        if not rows:
            return
        if self.dialect == "mysql":
            keep = {unique[0]: table.c[unique[0]]}
            connection.execute(mysql.insert(table).on_duplicate_key_update(keep), rows)
        else:
            insert = sqlite.insert if self.dialect == "sqlite" else postgresql.insert
            connection.execute(insert(table).on_conflict_do_nothing(index_elements=unique), rows)

    def insert(self, connection: sa.Connection, table: sa.Table, rows: Sequence[Row]) -> list[int]:
        """Insert the rows; returns their keys, in order."""
        key = next(iter(table.primary_key))
        if self.dialect != "mysql":
            inserting = table.insert().returning(key, sort_by_parameter_order=True)
            return list(connection.execute(inserting, rows).scalars())
        added = (connection.execute(table.insert(), row).inserted_primary_key for row in rows)
        return [keys[0] for keys in added if keys is not None]

    def put(
        self, connection: sa.Connection, table: sa.Table, rows: Sequence[Row], unique: Sequence[str]
    ) -> None:
        """Insert the rows, or replace the other columns of those that are there."""
        if not rows:
            return
        if self.dialect == "mysql":
            changing = mysql.insert(table)
            new = {k: changing.inserted[k] for k in rows[0] if k not in unique}
            connection.execute(changing.on_duplicate_key_update(new), rows)
            return
        insert = sqlite.insert if self.dialect == "sqlite" else postgresql.insert
        replacing = insert(table)
        new = {k: replacing.excluded[k] for k in rows[0] if k not in unique}
        connection.execute(
            replacing.on_conflict_do_update(index_elements=list(unique), set_=new), rows
        )


def clock(connection: sa.Connection) -> float:
    """The database's clock now, in seconds since 1970."""
    return float(connection.execute(sa.select(now())).scalar_one())


# -- engines ------------------------------------------------------------------------------------


def _engine(address: Address, standing_seconds: float) -> sa.Engine:
    options = engine_options(address)
    if address.dialect == "sqlite":
        engine = sa.create_engine(address.url, **options)
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    elif address.dialect == "postgresql":
        options["isolation_level"] = "AUTOCOMMIT"  # the driver itself begins no transaction
        engine = sa.create_engine(address.url, **options)
        sa.event.listen(engine, "begin", _begin_postgresql(standing_seconds))
    else:
        engine = sa.create_engine(address.url, **options)
        sa.event.listen(engine, "connect", _prepare_mysql(standing_seconds))
    return engine


def engine_options(address: Address) -> dict[str, Any]:
    """What `create_engine` gets for this database; the URL's own query comes first."""
    if address.dialect == "sqlite":
        connect: dict[str, Any] = {"timeout": BUSY_SECONDS, "check_same_thread": False}
        return {"connect_args": connect, "pool_size": 2, "max_overflow": 8}
    if address.dialect == "postgresql":
        connect = {
            "connect_timeout": 10,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 60_000,
        }
        fixed: dict[str, Any] = {"prepare_threshold": None}  # or pgbouncer loses statements
    else:
        connect = {"connect_timeout": 10, "read_timeout": 90, "write_timeout": 90}
        fixed = {"charset": "utf8mb4"}
    given = {key: value for key, value in connect.items() if key not in address.url.query}
    return {
        "poolclass": BurstPool,
        "isolation_level": "READ COMMITTED",
        "connect_args": given | fixed,
    }


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # sqlite3 itself begins no transaction
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("droptune_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(standing_seconds: float) -> Callable[[sa.Connection], None]:
    """Of the transaction, not of the session: pgbouncer keeps none; and in the same message."""
    begin = "BEGIN ISOLATION LEVEL READ COMMITTED"
    bound = f"SET LOCAL idle_in_transaction_session_timeout = {round(1000 * standing_seconds)}"

    def listener(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("droptune_writes")
        connection.exec_driver_sql(f"{begin}; {bound}" if writes else begin)

    return listener


def _prepare_mysql(standing_seconds: float) -> Callable[[Any, Any], None]:
    seconds = max(round(standing_seconds), 1)

    def listener(connection: Any, record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET SESSION time_zone = '+00:00', wait_timeout = {seconds}")

    return listener


# -- what a driver's error means ----------------------------------------------------------------


def _sqlite_trouble(cause: BaseException | None) -> Trouble:
    words = str(cause)
    if "locked" in words:
        return Trouble.CONFLICT
    full = "disk is full" in words or "disk I/O error" in words
    return Trouble.AWAY if full else Trouble.ERROR


def _mysql_trouble(cause: BaseException | None) -> Trouble:
    code = cause.args[0] if cause is not None and cause.args else None
    if code in (1020, 1205, 1213):
        return Trouble.CONFLICT
    lost = isinstance(code, int) and 2000 <= code < 2100
    if lost and "CERTIFICATE_VERIFY_FAILED" in str(cause):
        return Trouble.ERROR
    return Trouble.AWAY if lost or code in _MYSQL_AWAY else Trouble.ERROR


def _stood_still(error: BaseException) -> bool:
    """Whether the server ended the transaction since nothing was heard from this process."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) == _STOOD_STILL


def _postgresql_trouble(cause: BaseException | None) -> Trouble:
    state = getattr(cause, "sqlstate", None)
    if state is not None:
        if state in ("40001", "40P01", "55P03"):
            return Trouble.CONFLICT
        return Trouble.AWAY if state.startswith(_POSTGRESQL_AWAY) else Trouble.ERROR
    if type(cause).__name__ not in ("OperationalError", "ConnectionTimeout", "InterfaceError"):
        return Trouble.ERROR
    # A refused connection has no state. All but these pass: starting up, recovering, full.
    words = str(cause)
    return Trouble.ERROR if any(word in words for word in _FOR_GOOD) else Trouble.AWAY


_FOR_GOOD = (
    "authentication failed", "does not exist", "no password", "no pg_hba.conf entry",
    "permission denied", "not permitted", "certificate", "does not support SSL",
)  # fmt: skip
_STOOD_STILL = "25P03"  # idle_in_transaction_session_timeout: PostgreSQL ended the transaction
# Lost, full of clients, stopping or starting, disk full, read-only while another takes over.
_POSTGRESQL_AWAY = ("08", "53300", "53100", "57P01", "57P02", "57P03", "25006")
_MYSQL_AWAY = (
    0, 1021, 1040, 1053, 1077, 1114, 1158, 1159, 1160, 1161, 1203, 1290, 1836,
)  # fmt: skip
