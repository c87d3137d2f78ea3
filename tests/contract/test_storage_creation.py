"""The tables: made once by whoever comes first, checked by all, migrated on request."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from test_storage import create

import droptune.migrations
from droptune.errors import StorageError
from droptune.storage import Storage, schema, trials

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["droptune.storage", "optuna.storages", "alembic.command", "psycopg", "pymysql"]
)


def engine_of(url):
    return sa.create_engine(url, poolclass=sa.NullPool)


def tables_of(url):
    return set(sa.inspect(engine_of(url)).get_table_names())


def set_version(url, table, value):
    with engine_of(url).begin() as connection:
        chosen = sa.table(table, sa.column("version_num"))
        connection.execute(chosen.update().values(version_num=value))


def refusal(url, **options):
    with pytest.raises(StorageError) as refused:
        Storage.open(url, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- making ------------------------------------------------------------------------------------


def open_and_create(url, name):
    study = create(Storage.open(url, create=True), name)
    return study.name


def test_sixteen_processes_meet_on_an_empty_database(empty_url):
    names = [f"study {i}" for i in range(16)]
    with processes.Pool(16) as pool:
        made = pool.starmap(open_and_create, [(empty_url, name) for name in names])
    assert made == names
    assert {study.name for study in Storage.open(empty_url).studies()} == set(names)


def create_or_refuse(url):
    try:
        return create(Storage.open(url), "one").uuid
    except StorageError as refused:
        return str(refused)


def test_of_eight_processes_one_creates_the_study(url):
    with processes.Pool(8) as pool:
        results = pool.map(create_or_refuse, [url] * 8)
    (study,) = Storage.open(url).studies()
    refused = [r for r in results if r != Storage.open(url).study("one").uuid]
    assert len(refused) == 7
    assert all("already in" in r or "'one'" in r for r in refused), refused
    assert study.name == "one"


def test_an_empty_database_says_how_to_begin(empty_url):
    assert "droptune study create" in refusal(empty_url)
    if empty_url.startswith("sqlite"):
        assert not Path(empty_url.removeprefix("sqlite:///")).exists()


def test_making_twice_is_harmless(empty_url):
    Storage.open(empty_url, create=True).close()
    before = tables_of(empty_url)
    Storage.open(empty_url, create=True).close()
    assert tables_of(empty_url) == before


def test_optunas_own_tables_are_joined(empty_url):
    import optuna

    optuna.create_study(study_name="old", storage=empty_url)
    storage = Storage.open(empty_url, create=True)
    create(storage, "new")
    assert optuna.get_all_study_names(empty_url) == ["old", "new"]
    assert [study.name for study in storage.studies()] == ["new"]
    if empty_url.startswith("sqlite"):
        with storage.database.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_only_droptunes_own_tables_are_added(empty_url):
    import optuna

    optuna.storages.RDBStorage(empty_url)
    optunas = tables_of(empty_url)
    Storage.open(empty_url, create=True).close()
    assert all(name.startswith("droptune_") for name in tables_of(empty_url) - optunas)


# -- migrations --------------------------------------------------------------------------------


def test_the_migrations_make_what_the_code_expects(empty_url):
    Storage.open(empty_url, create=True).close()
    ours = {"version_table": schema.VERSION_TABLE}

    def is_ours(item, name, kind, reflected, other):
        return kind != "table" or name.startswith("droptune_")

    with engine_of(empty_url).connect() as connection:
        context = MigrationContext.configure(
            connection, opts=ours | {"include_object": is_ours, "compare_type": True}
        )
        assert compare_metadata(context, schema.metadata) == []


def test_the_known_revisions_are_the_migrations():
    config = Config()
    config.set_main_option("script_location", str(Path(droptune.migrations.__file__).parent))
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [schema.HEAD]
    oldest_first = [r.revision for r in script.walk_revisions()][::-1]
    assert tuple(oldest_first) == schema.KNOWN


def test_the_optuna_revision_is_optunas():
    import optuna

    storage = optuna.storages.RDBStorage("sqlite://")
    assert storage.get_head_version() == trials.REVISION


def test_a_newer_droptune_is_refused(url):
    set_version(url, schema.VERSION_TABLE, "9999")
    try:
        assert "newer droptune" in refusal(url)
        assert "newer droptune" in refusal(url, create=True)
    finally:
        set_version(url, schema.VERSION_TABLE, schema.HEAD)


def test_an_older_droptune_is_migrated_on_request(empty_url, monkeypatch):
    Storage.open(empty_url, create=True).close()
    assert Storage.upgrade(empty_url) == []
    set_version(empty_url, schema.VERSION_TABLE, "0000")
    monkeypatch.setattr(schema, "KNOWN", ("0000", *schema.KNOWN))
    assert "droptune doctor --fix" in refusal(empty_url)
    applied = []
    monkeypatch.setattr("droptune.storage.creation.migrate", lambda database: applied.append(1))
    assert Storage.upgrade(empty_url) == list(schema.KNOWN[1:])
    assert applied == [1]


@pytest.mark.parametrize(
    ("revision", "said"), [("v3.0.0.d", "storage upgrade"), ("v9.0.0.a", "-U")]
)
def test_another_optuna_is_refused(empty_url, revision, said):
    Storage.open(empty_url, create=True).close()
    set_version(empty_url, "alembic_version", revision)
    assert said in refusal(empty_url)
    assert said in refusal(empty_url, create=True)


# -- foreign databases -------------------------------------------------------------------------


def make_mlflow(url):
    """MLflow's own tables, made by MLflow in a process of its own; returns its exit code."""
    program = (
        "import sys; from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore;"
        "SqlAlchemyStore(sys.argv[1], sys.argv[2])"
    )
    environment = os.environ | {"GIT_PYTHON_REFRESH": "quiet"}
    line = [sys.executable, "-c", program, url, "/tmp"]
    return subprocess.run(line, capture_output=True, env=environment, timeout=280).returncode


@pytest.mark.slow
@pytest.mark.databases("sqlite")
def test_mlflows_database_is_refused(empty_url):
    assert make_mlflow(empty_url) == 0
    before = tables_of(empty_url)
    for create_it in (False, True):
        said = refusal(empty_url, create=create_it)
        assert "MLflow" in said
        assert "two databases" in said
    assert tables_of(empty_url) == before


@pytest.mark.slow
@pytest.mark.databases("sqlite")
def test_mlflow_in_droptunes_database_is_explained(empty_url):
    """MLflow itself fails there; where it wrote its revision nevertheless, droptune says so."""
    storage = Storage.open(empty_url, create=True)
    create(storage)
    assert make_mlflow(empty_url) != 0
    assert [study.name for study in Storage.open(empty_url).studies()] == ["digits"]
    set_version(empty_url, "alembic_version", "dc11669786a5")
    assert "MLflow" in refusal(empty_url)


@pytest.mark.databases("sqlite")
def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, not a database at all" * 100)
    assert "not a database" in refusal(f"sqlite:///{path}", create=True)
    assert path.read_text().startswith("these are my notes")
    assert "No folder" in refusal(f"sqlite:///{tmp_path}/missing/x.db", create=True)
    assert not (tmp_path / "missing").exists()


@pytest.mark.databases("postgresql", "mysql")
def test_a_wrong_password_is_one_line(server):
    address = server.admin.set(username="nobody", password="s3cret", database="test")
    given = address.render_as_string(hide_password=False)
    for patience in (0.0, 30.0):  # not worth waiting for
        said = refusal(given, create=True, patience=patience)
        assert "nobody" in said
        assert "s3cret" not in said


@pytest.mark.databases("postgresql", "mysql")
def test_a_database_that_is_not_there_is_one_line(server):
    address = server.admin.set(database="droptune_no_such")
    given = address.render_as_string(hide_password=False)
    assert "droptune_no_such" in refusal(given, create=True, patience=30.0)
