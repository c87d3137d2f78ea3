"""Where MLflow is, how a client is made, and what its errors mean in one line."""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from droptune.errors import DroptuneError, StorageError, UsageError
from droptune.storage.address import DRIVERS, Address, mask, mask_options, same_tables

# A call must not block for minutes: MLflow's own defaults wait 247 s for a server that is down.
# The syncer repeats whatever failed, so one quick retry per call is enough.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}


class MirrorError(DroptuneError):
    """MLflow did not do what was asked; SQL still has everything."""


class Refused(MirrorError):
    """The server knows us and says no (401, 403): trying again at once is of no use."""


class Away(MirrorError):
    """The server cannot be reached or is broken at the moment: try again later."""


class Rejected(MirrorError):
    """This one request is not acceptable (an invalid value, a deleted run): set it aside."""


class Missing(Rejected):
    """What the request speaks of is not there."""


@dataclass(frozen=True)
class Tracking:
    """The MLflow that a study is mirrored to.

    `artifacts` is the absolute folder for artifacts where droptune writes to a database itself;
    None where a server decides.
    """

    uri: str
    artifacts: Path | None = None

    @classmethod
    def resolve(cls, configured: str | None, storage_url: str) -> Tracking:
        """The configured address, or `mlflow.db` beside the study's database (else here).

        Raises UsageError, in one line, where MLflow cannot be there.
        """
        if configured is None:
            configured = f"sqlite:///{_beside(storage_url) / 'mlflow.db'}"
        found = cls._read(configured)
        if same_tables(found.uri, storage_url):
            raise UsageError(_shared(found))
        return found

    @classmethod
    def _read(cls, configured: str) -> Tracking:
        scheme = configured.partition("://")[0].partition("+")[0]
        if scheme in ("http", "https"):
            if "@" in urlsplit(configured).netloc:
                raise UsageError(
                    f"MLflow address {mask(configured)}: user and password belong into "
                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
                )
            return cls(configured.rstrip("/"))
        if scheme == "sqlite":
            path = _sqlite_path(configured)
            if path is None:
                raise UsageError(
                    f"MLflow address {mask(configured)!r} has no file: give sqlite:///FILE or a "
                    "server"
                )
            return cls(f"sqlite:///{path}", path.parent / "mlartifacts")
        if scheme in (*DRIVERS, "mssql"):
            return cls(_with_driver(configured), Path.cwd() / "mlartifacts")
        raise UsageError(
            f"MLflow address {mask(configured)!r} cannot be used: give http(s)://…, sqlite:///FILE "
            "or a database URL (MLflow's file store is gone since 3.13)"
        )

    @property
    def database(self) -> Path | None:
        """The SQLite file, where there is one."""
        return _sqlite_path(self.uri)

    @property
    def is_server(self) -> bool:
        return self.uri.startswith("http")

    @property
    def redacted(self) -> str:
        """The address without password, for people's eyes."""
        return redact(self.uri)

    def artifact_location(self, experiment: str) -> str | None:
        """Where an experiment's artifacts go; None: the server decides."""
        if self.artifacts is None:
            return None
        name = re.sub(r"[^\w.-]+", "-", experiment)
        return (self.artifacts / name).as_uri()

    def version(self) -> str:
        """The MLflow version that serves the UI: the server's, or ours for a database."""
        import mlflow

        if not self.is_server:
            return str(mlflow.__version__)
        try:
            with urlopen(f"{self.uri}/version", timeout=10) as answer:
                return str(answer.read(40).decode())
        except (OSError, ValueError):
            return ""  # unknown: links then use nothing that depends on it

    def connect(self) -> Any:
        """An MlflowClient that has reached its store (creating the schema of an empty database)."""
        set_environment()
        from mlflow import MlflowClient

        registry = os.environ.get("MLFLOW_REGISTRY_URI")
        with plain_errors(self), _first_contact(self):
            client = MlflowClient(tracking_uri=self.uri, registry_uri=registry or self.uri)
            client.search_experiments(max_results=1)
        return client


def set_environment() -> None:
    """MLflow's settings for a syncer, as far as the user has not chosen other ones."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"  # loses points at exit


@contextmanager
def single_try() -> Iterator[None]:
    """No retries in MLflow's HTTP client: a repeated `create_run` leaves ghost runs.

    It holds for the whole process: around threads, not in them.
    """
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def plain_errors(tracking: Tracking) -> Iterator[None]:
    """MLflow's and the network's exceptions as one of ours, one line each."""
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MirrorError:
        raise
    except MlflowException as error:
        raise _explained(error, tracking) from error
    except (requests.RequestException, OSError, TimeoutError) as error:
        if isinstance(getattr(error, "filename", None), str):
            raise Away(f"MLflow's file {error.filename}: {error.strerror}") from error
        raise _unreachable(str(error), tracking) from error
    except Exception as error:
        if tracking.is_server or not type(error).__module__.startswith(("sqlalchemy", "alembic")):
            raise
        line = redact(str(error)).splitlines()[0]
        raise Away(f"MLflow's database {tracking.redacted}: {line}") from error


def _explained(error: Any, tracking: Tracking) -> MirrorError:
    code, text = str(error.error_code), redact(str(error))
    if "Invalid Host header" in text:
        return Refused(
            f"MLflow at {tracking.redacted} refuses this host name: start the server with "
            f"--allowed-hosts {urlsplit(tracking.uri).netloc.rpartition('@')[2]}"
        )
    if code == "UNAUTHENTICATED" or "error code 401" in text:
        return Refused(
            f"MLflow at {tracking.redacted} asks who we are (401): set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if code == "PERMISSION_DENIED" or "error code 403" in text:
        return Refused(
            f"MLflow at {tracking.redacted} does not let {_user()} write (403): "
            "ask for EDIT permission on the experiment"
        )
    if "out-of-date database schema" in text:
        return Away(
            f"MLflow's database {tracking.redacted} has another MLflow's tables: back it up, then "
            f"`mlflow db upgrade {tracking.redacted}`"
        )
    if code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
        return Missing(_one_line(text))
    if code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"):
        return Rejected(_one_line(text))
    return _unreachable(text, tracking)


def _unreachable(text: str, tracking: Tracking) -> Away:
    where = f"MLflow at {tracking.redacted}"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return Away(
            f"{where}: its TLS certificate is not trusted here: set "
            "MLFLOW_TRACKING_SERVER_CERT_PATH to the authority's certificate"
        )
    if "SSLError" in text or "SSL:" in text:
        return Away(f"{where} does not speak TLS as asked: is it http:// instead of https://?")
    if "NameResolutionError" in text or "getaddrinfo" in text:
        return Away(f"{where}: no such host name")
    if "Connection refused" in text or "NewConnectionError" in text:
        return Away(f"{where}: nobody listens there")
    if "timed out" in text or "Timeout" in text:
        return Away(f"{where} does not answer in time")
    return Away(f"{where}: {_one_line(text)}")


def redact(text: str) -> str:
    """The text without passwords in URLs."""
    return mask_options(re.sub(r"(\w+://[^\s/:@]*):\S+@", r"\1:***@", text))


def _user() -> str:
    return os.environ.get("MLFLOW_TRACKING_USERNAME", "this user")


def _one_line(text: str) -> str:
    line = " ".join(text.partition("(Background on this error")[0].split())
    return line if len(line) <= 300 else f"{line[:297]}…"


def _beside(storage_url: str) -> Path:
    path = _sqlite_path(storage_url)
    return path.parent if path else Path.cwd()


def _sqlite_path(url: str) -> Path | None:
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", url)
    if match is None or match[1] == ":memory:":
        return None
    return Path(match[1]).expanduser().resolve()


def _shared(tracking: Tracking) -> str:
    """Why MLflow cannot have the studies' database, and what to give it."""
    another = "another database with MLFLOW_TRACKING_URI"
    if tracking.database is not None:
        another = "another file, for example sqlite:///mlflow.db"
    elif tracking.uri.startswith("postgresql"):
        another += ", or another schema, made first: ?options=-csearch_path%3Dmlflow"
    return (
        f"{tracking.database or tracking.redacted} is the studies' database and cannot be MLflow's "
        f"too (both own the table alembic_version): give MLflow {another}"
    )


def _with_driver(url: str) -> str:
    """The same with the driver that droptune installs, by a name that MLflow knows."""
    if url.startswith("mssql"):
        return url  # nothing of droptune's
    try:
        return Address.parse(url).url.render_as_string(hide_password=False)
    except StorageError as error:
        raise UsageError(f"MLflow address: {error}") from None


@contextmanager
def _first_contact(tracking: Tracking) -> Iterator[None]:
    """One process at a time creates MLflow's tables: it does so unlocked, and 7 of 8 fail."""
    database = tracking.database
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            _create(database, artifacts=str(tracking.artifacts))
        with sqlite3.connect(database) as connection:  # readers then never block the writer
            connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
        yield


def _create(database: Path, *, artifacts: str) -> None:
    """A database with MLflow's tables, all or nothing: MLflow cannot go on with some of them."""
    from mlflow.store.tracking import sqlalchemy_store

    stores: Any = sqlalchemy_store
    for left in database.parent.glob(f"{database.name}.new-*"):  # by a process that was killed
        left.unlink()
    # Another name for each try: MLflow keeps a connection to every database that it has seen.
    new = database.with_name(f"{database.name}.new-{time.time_ns()}")
    stores.SqlAlchemyStore(f"sqlite:///{new}", artifacts).engine.dispose()
    new.rename(database)
