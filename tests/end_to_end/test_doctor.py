"""`droptune doctor` where something is wrong: one line each, and what to do."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing

import pytest
from crew import PROGRAM, make_study
from typer.testing import CliRunner

from droptune.cli import app
from droptune.storage import Storage, schema


def doctor(folder, *arguments, **environment):
    """Its exit status, and its lines by what they are about."""
    folder.mkdir(exist_ok=True)
    known = {"MLFLOW_TRACKING_URI": None, "DROPTUNE_STORAGE": None, **environment}
    before = os.getcwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, ["doctor", *arguments], env=known)
    finally:
        os.chdir(before)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = [line for line in result.output.splitlines() if line]
    assert all(line.startswith(("ok    ", "to do ")) for line in lines), result.output
    return result.exit_code, {line[6:].partition(":")[0]: line for line in lines}


def test_all_is_well(tmp_path):
    url = f"sqlite:///{tmp_path}/droptune.db"
    make_study(Storage.open(url, create=True), tmp_path)
    code, lines = doctor(tmp_path, "--worker", DROPTUNE_STORAGE=url)
    assert code == 0, lines
    assert list(lines) == ["versions", "database", "workers", "mlflow", "devices", "project",
                           "study 'study'", "checkpoints 'study'"]  # fmt: skip
    assert "1 study (1 to be trained)" in lines["database"]
    assert "will be made" in lines["mlflow"]
    assert not (tmp_path / "mlflow.db").exists()


def test_nothing_is_there_yet(tmp_path):
    code, lines = doctor(tmp_path)
    assert code == 1
    assert "No database file" in lines["database"]
    assert "droptune study create" in lines["database"]
    assert "workers" not in lines
    assert list(tmp_path.iterdir()) == []


def test_what_keeps_a_study_from_mlflow(tmp_path):
    url = f"sqlite:///{tmp_path}/droptune.db"
    storage = Storage.open(url, create=True)
    study = make_study(storage, tmp_path)
    storage.put_mirror_state(study.row.id, {"reason": "the server is away"})
    training = study.records()[0].training
    link = {"training_id": training.id, "attempt": 1, "started": 1, "failure": "no such run"}
    storage.put_mirror_link(study.row.id, training.id, link)
    code, lines = doctor(tmp_path, DROPTUNE_STORAGE=url)
    assert code == 1
    said = lines["mirror of 'study'"]
    assert "the server is away" in said
    assert f"did not take {training.name}: no such run" in said
    assert "droptune mirror rebuild study" in said


@pytest.mark.databases("postgresql", "mysql")
def test_an_empty_database_for_mlflow_stays_empty(empty_url, tmp_path):
    import sqlalchemy as sa

    studies = f"sqlite:///{tmp_path}/droptune.db"
    Storage.open(studies, create=True).close()
    code, lines = doctor(tmp_path, DROPTUNE_STORAGE=studies, MLFLOW_TRACKING_URI=empty_url)
    assert code == 0, lines
    assert "is empty; the first study that is mirrored makes its tables" in lines["mlflow"]
    assert sa.inspect(sa.create_engine(empty_url)).get_table_names() == []


def test_other_code_and_a_folder_that_cannot_be_written(tmp_path):
    url = f"sqlite:///{tmp_path}/droptune.db"
    make_study(Storage.open(url, create=True), tmp_path)
    (tmp_path / "program.py").write_text(f"{PROGRAM}\n# changed")
    code, lines = doctor(tmp_path, "--worker", "--project", str(tmp_path), DROPTUNE_STORAGE=url)
    assert code == 1
    assert "differs in program.py" in lines["study 'study'"]
    _, lines = doctor(tmp_path, "--worker", "--project", "/proc", DROPTUNE_STORAGE=url)
    assert lines["project"].startswith("to do project: /proc cannot be written")
    (tmp_path / ".droptune").write_text("a file where the folder should be")
    _, lines = doctor(tmp_path, "--worker", DROPTUNE_STORAGE=url)
    assert ".droptune/checkpoints cannot be written" in lines["checkpoints 'study'"]
    assert "{store: sql}" in lines["checkpoints 'study'"]


def test_a_folder_that_cannot_be_written_and_need_not(tmp_path):
    """A pod's image, where the studies' checkpoints are in SQL."""
    url = f"sqlite:///{tmp_path}/droptune.db"
    make_study(Storage.open(url, create=True), tmp_path, checkpoints="{store: sql}")
    _, lines = doctor(tmp_path, "--worker", "--project", "/proc", DROPTUNE_STORAGE=url)
    assert lines["project"] == "ok    project: /proc, where no study writes"


def test_where_checkpoints_lie_and_who_sees_them(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/droptune.db"
    storage = Storage.open(url, create=True)
    make_study(storage, tmp_path)
    make_study(storage, tmp_path, name="small", checkpoints="{store: sql}")
    _, lines = doctor(tmp_path, "--worker", DROPTUNE_STORAGE=url)
    assert "this machine only" in lines["checkpoints 'study'"]
    assert lines["checkpoints 'small'"].endswith("in the database")
    monkeypatch.setattr("droptune.storage.address.file_system", lambda folder: "lustre")
    _, lines = doctor(tmp_path, "--worker", DROPTUNE_STORAGE=url)
    assert lines["checkpoints 'study'"].endswith("on lustre (shared)")


@pytest.mark.databases("postgresql", "mysql")
def test_mlflow_in_the_same_database_is_told_before_it_writes_there(storage, url, tmp_path):
    code, lines = doctor(tmp_path, DROPTUNE_STORAGE=url, MLFLOW_TRACKING_URI=url)
    assert code == 1
    assert lines["database"].startswith("ok")
    assert "alembic_version" in lines["mlflow"]
    assert "another database" in lines["mlflow"]
    from sqlalchemy import inspect

    assert "experiments" not in inspect(storage.database.engine).get_table_names()


def test_a_database_that_is_mlflows(tmp_path):
    from droptune.mirror import Tracking

    url = f"sqlite:///{tmp_path}/mlflow.db"
    Tracking.resolve(url, "sqlite:///other.db").connect()
    code, lines = doctor(tmp_path, DROPTUNE_STORAGE=url, MLFLOW_TRACKING_URI=url)
    assert code == 1
    assert "holds MLflow's tables" in lines["database"]
    assert "give MLflow another file" in lines["mlflow"]


@pytest.mark.parametrize("kind", ["nobody", "silent"])
def test_a_dead_mlflow_server(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(sys.modules["droptune.cli.doctor"], "ANSWER_SECONDS", 0.5)
    url = f"sqlite:///{tmp_path}/droptune.db"
    Storage.open(url, create=True).close()
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        if kind == "nobody":
            server.close()
        address = f"http://127.0.0.1:{port}"
        code, lines = doctor(tmp_path, DROPTUNE_STORAGE=url, MLFLOW_TRACKING_URI=address)
    assert code == 1
    assert f"{address} does not answer" in lines["mlflow"]


@pytest.mark.databases("sqlite")
def test_an_older_schema_is_migrated_when_asked(storage, url, tmp_path, monkeypatch):
    import sqlalchemy as sa

    monkeypatch.setattr(schema, "KNOWN", ("0000", *schema.KNOWN))
    monkeypatch.setattr("droptune.storage.creation.migrate", lambda database: _set(storage, head))
    head = schema.HEAD
    _set(storage, "0000")
    code, lines = doctor(tmp_path, DROPTUNE_STORAGE=url)
    assert code == 1
    assert "run droptune doctor --fix" in lines["database"]
    code, lines = doctor(tmp_path, "--fix", DROPTUNE_STORAGE=url)
    assert f"migrated to {head}" in lines["database"]
    assert code == 0, lines
    with storage.database.engine.connect() as connection:
        query = sa.text(f"SELECT version_num FROM {schema.VERSION_TABLE}")
        assert connection.execute(query).scalar() == head


def _set(storage, revision):
    import sqlalchemy as sa

    with storage.database.engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '{revision}'"))


def test_a_password_is_never_printed(tmp_path):
    url = "postgresql://someone:hunter2@127.0.0.1:1/x"
    code, lines = doctor(
        tmp_path, DROPTUNE_STORAGE=url, MLFLOW_TRACKING_URI="mysql://a:hunter2@127.0.0.1:1/y"
    )
    assert code == 1
    assert "cannot be reached" in lines["database"]
    assert "hunter2" not in "".join(lines.values())
