"""Where the database is: the URL as given, as SQLAlchemy wants it, and as people may see it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from droptune.errors import StorageError, nearest

DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mysql+pymysql",
}
NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "orangefs",
    "glusterfs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.gcsfuse", "fuse.s3fs",
}  # fmt: skip
_PORTS = {"postgresql": 5432, "mysql": 3306}
_THIS_HOST = ("localhost", "127.0.0.1", "::1")
_SCHEMA = re.compile(r"search_path=(\w+)")
_SECRET = "pass|pwd|secret|token|credential"
_SECRET_KEY = re.compile(_SECRET, re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"(\w*(?:{_SECRET})\w*=)[^&\s]+", re.IGNORECASE)


@dataclass(frozen=True)
class Address:
    """A database URL with its driver, and the same without secrets."""

    url: sa.URL = field(repr=False)
    redacted: str

    @classmethod
    def parse(cls, given: str) -> Address:
        """Read a URL; raises StorageError (one line, no secrets) when it cannot be used."""
        try:
            url = sa.make_url(given)
        except (sa.exc.ArgumentError, ValueError):
            raise StorageError(_not_a_url(given)) from None
        if "@" in (url.host or ""):  # what follows the first @ of a password
            raise StorageError(f"{mask(given)!r} has more than one @: write %40 in a password.")
        scheme = url.drivername.partition("+")[0]
        if scheme not in DRIVERS:
            raise StorageError(
                f"{redact(url)} names the database {scheme!r}"
                f"{nearest(scheme, ('sqlite', 'postgresql', 'mysql'))}."
            )
        url = url.set(drivername=DRIVERS[scheme])
        if scheme == "sqlite":
            url = _sqlite(url)
        return cls(url, redact(url))

    @property
    def dialect(self) -> str:
        """`sqlite`, `postgresql` or `mysql`."""
        return self.url.get_backend_name()

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database."""
        return Path(str(self.url.database)) if self.dialect == "sqlite" else None

    @property
    def place(self) -> tuple[object, ...]:
        """Where the tables are: two addresses of one place share them."""
        if self.path is not None:
            return (self.path.resolve(),)
        host = str(self.url.host or self.url.query.get("host", "")).lower()
        schema = _SCHEMA.search(str(self.url.query.get("options", "")))
        return (
            self.dialect,
            "" if host in _THIS_HOST else host,
            self.url.port or _PORTS[self.dialect],
            self.url.database,
            schema[1] if schema else "public",
        )

    def scrub(self, message: str) -> str:
        """The message on one line and without this URL's secrets."""
        for secret in _secrets(self.url):
            message = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", message)
        return " ".join(message.split())

    def network_file_system(self) -> str | None:
        """The type of the network file system that a SQLite file lies on, if it does."""
        if self.path is None:
            return None
        kind = file_system(self.path.resolve().parent)
        return kind if kind in NETWORK_FILE_SYSTEMS else None


def same_tables(one: str, other: str) -> bool:
    """Whether two URLs lead to the same tables; one that cannot be used leads to none."""
    try:
        return Address.parse(one).place == Address.parse(other).place
    except StorageError:
        return False


def redact(url: sa.URL) -> str:
    """The URL as text, with `***` for the password and for every secret in the query."""
    hidden = {k: "***" if _SECRET_KEY.search(k) else v for k, v in url.query.items()}
    text = url.set(query=hidden).render_as_string(hide_password=True)
    shown = text.replace("%2A%2A%2A", "***")
    for driver in ("+pysqlite", "+psycopg", "+pymysql"):
        shown = shown.replace(driver, "", 1)
    return shown


def mask(given: str) -> str:
    """What may be no URL at all, without user and password: nothing before its last @."""
    before, at, after = given.rpartition("@")
    scheme = re.match(r"[\w+.-]+(?::(?://)?|//)", before)
    hidden = f"{scheme[0] if scheme else ''}***" if at else ""
    return f"{hidden}{at}{mask_options(after)}"


def mask_options(text: str) -> str:
    """The text without the secrets in URLs' queries."""
    return _SECRET_OPTION.sub(r"\1***", text)


def _secrets(url: sa.URL) -> list[str]:
    values = [str(v) for k, v in url.query.items() if _SECRET_KEY.search(k)]
    if url.password is not None:
        values.append(str(url.password))
        values.append(url.render_as_string(hide_password=False).split("@")[0].split(":")[-1])
    return [value for value in values if value]


def _sqlite(url: sa.URL) -> sa.URL:
    if not url.database or url.database == ":memory:" or url.query.get("mode") == "memory":
        raise StorageError(
            "A SQLite database in memory cannot be shared between workers. "
            "Name a file: sqlite:///droptune.db"
        )
    return url.set(database=str(Path(url.database).expanduser().absolute()))


def _not_a_url(given: str) -> str:
    shown = mask(given)
    a_file = given and "://" not in given and "@" not in given
    hint = f" Did you mean sqlite:///{shown} ?" if a_file else ""
    return (
        f"{shown!r} is not a database URL. Possible: sqlite:///FILE, "
        f"postgresql://USER:PASSWORD@HOST/NAME, mysql://USER:PASSWORD@HOST/NAME.{hint}"
    )


def file_system(folder: Path) -> str | None:
    """The type of the mount that holds `folder` (Linux; None elsewhere)."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    best, kind = "", None
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        if folder.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind
