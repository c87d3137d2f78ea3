"""URLs as people write them: what they become, what is refused, and what is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from droptune.errors import StorageError
from droptune.storage import Storage
from droptune.storage.address import NETWORK_FILE_SYSTEMS, Address, file_system, same_tables
from droptune.storage.database import engine_options


@pytest.mark.parametrize(
    ("given", "driver"),
    [
        ("sqlite:///x.db", "sqlite+pysqlite"),
        ("postgresql://h/d", "postgresql+psycopg"),
        ("postgres://h/d", "postgresql+psycopg"),
        ("postgresql+psycopg2://h/d", "postgresql+psycopg"),
        ("mysql://h/d", "mysql+pymysql"),
        ("mariadb://h/d", "mysql+pymysql"),
    ],
)
def test_drivers_are_chosen(given, driver):
    assert Address.parse(given).url.drivername == driver


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://u:s3cret@h:5/d", "postgresql://u:***@h:5/d"),
        ("postgresql://u:s3cret%40s%2Fs@h/d", "postgresql://u:***@h/d"),
        ("postgres://h/d?password=s3cret&user=u", "postgresql://h/d?password=***&user=u"),
        ("mysql://u:s3cret@h/d?passwd=s3cret&ssl_ca=x", "mysql://u:***@h/d?passwd=***&ssl_ca=x"),
        ("postgresql://h/d?sslpassword=s3cret", "postgresql://h/d?sslpassword=***"),
    ],
)
def test_secrets_are_never_shown(given, shown):
    address = Address.parse(given)
    assert address.redacted == shown
    assert "s3cret" not in repr(address)
    scrubbed = address.scrub(f"could not use {given}:\n refused")
    assert "s3cret" not in scrubbed
    assert "\n" not in scrubbed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("droptune.db", "Did you mean sqlite:///droptune.db"),
        ("", "not a database URL"),
        ("postgresql//u:s3cret@h/d", "not a database URL"),
        ("oracle://u:s3cret@h/d", "possible: mysql, postgresql, sqlite"),
        ("postgrespl://u:s3cret@h/d", "did you mean 'postgresql'"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("postgresql://h:port/d", "not a database URL"),
        ("postgresql:u:s3cret@h/d", r"'postgresql:\*\*\*@h/d' is not a database URL"),
        ("postgresql://u:p/s3cret@h:port/d", r"'postgresql://\*\*\*@h:port/d' is not"),
        ("postgresql://u:p@s3cret@h/d", r"'postgresql://\*\*\*@h/d' has .* %40"),
        ("postgresql://h:port/d?sslpassword=s3cret&a=b", r"sslpassword=\*\*\*&a=b' is not"),
        ("s3cret@h/d", r"'\*\*\*@h/d' is not"),
    ],
)
def test_what_is_no_url_is_refused_in_one_line(given, said):
    with pytest.raises(StorageError, match=said) as refused:
        Address.parse(given)
    assert "s3cret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_relative_file_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Address.parse("sqlite:///a/b.db").path == tmp_path / "a/b.db"
    assert Address.parse(f"sqlite:///{tmp_path}/c.db").path == tmp_path / "c.db"


def test_the_urls_own_options_are_kept():
    address = Address.parse("postgresql://h/d?connect_timeout=3&sslmode=require")
    assert address.url.query["sslmode"] == "require"
    options = engine_options(address)["connect_args"]
    assert "connect_timeout" not in options
    assert options["prepare_threshold"] is None
    assert options["tcp_user_timeout"] == 60_000


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("postgresql://u:a@h/d", "postgres://v:b@H:5432/d?sslmode=require", True),
        ("postgresql://h/d", "postgresql://h:5433/d", False),
        ("postgresql://h/d", "postgresql://h/e", False),
        ("postgresql://h/d", "postgresql://i/d", False),
        ("postgresql://h/d", "postgresql://h/d?options=-csearch_path%3Dmlflow", False),
        ("postgresql://h/d", "postgresql://h/d?options=-csearch_path%3Dpublic", True),
        ("postgresql:///d?host=/run/one", "postgresql:///d?host=/run/two", False),
        ("postgresql:///d", "postgresql://localhost/d", True),
        ("mysql://h/d", "mariadb+pymysql://h:3306/d", True),
        ("mysql://localhost/d", "mysql://127.0.0.1/d", True),
        ("mysql://h/d", "mysql://h:3307/d", False),
        ("mysql://h/d", "postgresql://h/d", False),
        ("sqlite:///a/../x.db", "sqlite:///x.db?timeout=5", True),
        ("sqlite:///x.db", "sqlite:///y.db", False),
        ("http://h", "http://h", False),
    ],
)
def test_addresses_that_share_their_tables(one, other, same):
    assert same_tables(one, other) is same


def test_a_file_system_is_recognised(tmp_path):
    kind = file_system(tmp_path)
    if Path("/proc/self/mountinfo").exists():
        assert kind is not None
        assert file_system(Path("/proc/self")) == "proc"
    assert Address.parse(f"sqlite:///{tmp_path}/x.db").network_file_system() is None
    assert "nfs4" in NETWORK_FILE_SYSTEMS
    assert Address.parse("mysql://h/d").network_file_system() is None


@pytest.mark.parametrize(
    "database", ["postgresql://u:s3cret@127.0.0.1:1/d", "mysql://u:s3cret@127.0.0.1:1/d"]
)
def test_an_unreachable_server_is_one_line(database):
    with pytest.raises(StorageError, match="cannot be reached") as refused:
        Storage.open(database, create=True)
    assert "s3cret" not in str(refused.value)
    assert "\n" not in str(refused.value)
