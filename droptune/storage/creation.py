"""Makes, checks and migrates the tables of both: Optuna's (by Optuna) and droptune's (by alembic).

Sixteen processes that make the schema of one empty database at once kill each other in Optuna's
own code, so it is made under a lock: a file lock on SQLite, a lock in the server elsewhere.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from droptune.errors import StorageError
from droptune.storage import schema, trials
from droptune.storage.database import Database, engine_options

LOCK_SECONDS = 120
ELSEWHERE = "Say where it is with --storage, DROPTUNE_STORAGE or droptune.toml"
_LOCK = 0x64726F70  # "drop", for PostgreSQL


def check(database: Database) -> None:
    """Raise StorageError, in one line, unless both schemas are there and are ours."""
    shown = database.address.redacted
    path = database.address.path
    if path is not None and not path.exists():
        raise StorageError(
            f"No database file {path}. {ELSEWHERE}, or create a study: droptune study create FILE"
        )
    ours, optunas = _revisions(database)
    if not ours or not optunas:
        raise StorageError(
            f"No droptune study is in {shown} yet. {ELSEWHERE}, or create one: "
            "droptune study create FILE"
        )
    if ours not in schema.KNOWN:
        raise StorageError(
            f"{shown} was made by a newer droptune (its schema is {ours!r}, this one knows up to "
            f"{schema.HEAD!r}): pip install -U droptune"
        )
    if ours != schema.HEAD:
        raise StorageError(
            f"{shown} was made by an older droptune (its schema is {ours!r}, this one's is "
            f"{schema.HEAD!r}): stop its workers and run droptune doctor --fix"
        )


def create(database: Database) -> None:
    """Make what is missing of both schemas; harmless on a complete database."""
    ours, optunas = _revisions(database)
    if ours is None or optunas is None:
        with _lock(database):
            ours, optunas = _revisions(database)
            if optunas is None:
                _create_optuna(database)
            _log_ahead(database)
            if ours is None:
                migrate(database)
    check(database)


def upgrade(database: Database) -> list[str]:
    """Migrate an older droptune schema to this one; returns the revisions that were applied."""
    with _lock(database):
        ours, _ = _revisions(database)
        if ours is None or ours == schema.HEAD or ours not in schema.KNOWN:
            return []
        migrate(database)
        return list(schema.KNOWN[schema.KNOWN.index(ours) + 1 :])


def migrate(database: Database) -> None:
    """Run the migrations up to the newest."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    folder = Path(__file__).parent.parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    logging.getLogger("alembic").setLevel(logging.WARNING)

    def run(connection: sa.Connection) -> None:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    database.write(run)


def _create_optuna(database: Database) -> None:
    import optuna

    url = database.address.url.render_as_string(hide_password=False)
    try:
        made = optuna.storages.RDBStorage(
            url.replace("{", "{{").replace("}", "}}"),  # Optuna formats it
            engine_kwargs=engine_options(database.address),
        )
    except Exception as error:
        # Optuna raises RuntimeError, StorageInternalError or SQLAlchemy's own.
        raise StorageError(database.explain(error.__cause__ or error)) from error
    made.remove_session()
    made.engine.dispose()


def _log_ahead(database: Database) -> None:
    """SQLite: readers do not wait for the writer, and a commit does not wait for the disk."""
    if database.dialect != "sqlite":
        return
    try:
        connection = database.engine.raw_connection()
        connection.cursor().execute("PRAGMA journal_mode=WAL")
        connection.close()
    except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
        raise StorageError(database.explain(error)) from error


# -- what is there ------------------------------------------------------------------------------


def _revisions(database: Database) -> tuple[str | None, str | None]:
    """The revisions of droptune's and of Optuna's tables (None: not there).

    Raises StorageError when MLflow or another Optuna owns the tables.
    """
    path = database.address.path
    if path is not None and not path.exists():
        return None, None
    ours, optunas, tables = database.read(_versions)
    if optunas is None and {"experiments", "runs"} <= tables:
        optunas = "(none)"
    _refuse_others(database.address.redacted, optunas)
    return ours, optunas


def tables(connection: sa.Connection) -> set[str]:
    """The names of all tables, whoever's they are."""
    return set(sa.inspect(connection).get_table_names())


def _versions(connection: sa.Connection) -> tuple[str | None, str | None, set[str]]:
    there = tables(connection)
    found: list[str | None] = []
    for table in (schema.VERSION_TABLE, "alembic_version"):
        query = sa.select(sa.column("version_num", sa.String)).select_from(sa.table(table))
        found.append(connection.execute(query).scalar() if table in there else None)
    return found[0], found[1], there


def _refuse_others(shown: str, revision: str | None) -> None:
    """Refuse a database whose `alembic_version` is not this Optuna's."""
    if revision is None or revision == trials.REVISION:
        return
    if not revision.startswith("v"):
        raise StorageError(
            f"{shown} holds MLflow's tables, and MLflow and Optuna both need the table "
            f"alembic_version (its revision is {revision!r}): give them two databases (or two "
            "PostgreSQL schemas: ?options=-csearch_path%3Ddroptune)."
        )
    raise StorageError(
        f"{shown} has Optuna's schema {revision!r}, this droptune writes {trials.REVISION!r}: "
        "run optuna storage upgrade if it is older, pip install -U droptune if it is newer."
    )


# -- locks --------------------------------------------------------------------------------------


@contextmanager
def _lock(database: Database) -> Iterator[None]:
    """Held by one process at a time, and released when that process dies."""
    if database.dialect == "sqlite":
        with _file_lock(Path(str(database.address.path)).parent):
            yield
        return
    with _connection(database) as connection:
        if database.dialect == "postgresql":
            # Of the transaction, not of the session: a session is not kept behind pgbouncer.
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        else:
            connection.execute(sa.text(f"SET SESSION wait_timeout = {LOCK_SECONDS}"))
            name = f"droptune {database.address.url.database}"[:64]
            got = connection.execute(sa.select(sa.func.get_lock(name, LOCK_SECONDS))).scalar()
            if got != 1:
                raise StorageError(f"Another process keeps the lock {name!r} of the database.")
        yield
        connection.rollback()


@contextmanager
def _connection(database: Database) -> Iterator[sa.Connection]:
    try:
        connection = database.engine.connect()
    except sa.exc.SQLAlchemyError as error:
        raise StorageError(database.explain(error)) from error
    with connection:
        yield connection


@contextmanager
def _file_lock(folder: Path) -> Iterator[None]:
    """Locks the database's folder itself, so that no lock file stays behind."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError) as error:
        if not folder.is_dir():
            raise StorageError(f"No folder {folder} for the database.") from error
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
