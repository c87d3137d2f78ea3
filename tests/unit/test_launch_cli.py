"""`droptune launch`: from the command line to the launcher and into SQL."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from fake_worker import make_fake_python, starts
from typer.testing import CliRunner

from droptune.cli.launch import HELP, app
from droptune.cli.worker import app as workers_app
from droptune.errors import LaunchError, UnknownStudyError, UsageError
from droptune.launch import LAUNCHERS
from droptune.launch.recorded import forget_jobs, recorded_jobs
from droptune.storage import Storage

SECRET = "postgresql://tuner:hunter2@db.example.org/trials"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder to stand in; `droptune.toml` names a fake worker for `local`."""
    for name in [name for name in os.environ if name.startswith(("DROPTUNE_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    python = make_fake_python(tmp_path / "fake", "0")
    folder = tmp_path / "project"
    folder.mkdir()
    configuration = f'[launch.local]\npython = "{python}"\n[launch.kubernetes]\nimage = "w:1"\n'
    (folder / "droptune.toml").write_text(configuration)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def study(project, monkeypatch):
    """A study in a SQLite file."""
    monkeypatch.setenv("DROPTUNE_STORAGE", f"sqlite:///{project}/trials.db")
    storage = Storage.open(os.environ["DROPTUNE_STORAGE"], create=True)
    storage.create_study(
        "digits", spec={}, sites=[], directions=["minimize"], meta={}, intervals=1, seed=0
    )
    return storage


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text('#!/bin/sh\necho "$@" >> "$NOTES"\necho 4711\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


def run(*arguments: str):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_every_launcher_has_a_command():
    assert set(HELP) == set(LAUNCHERS)
    assert {command.name for command in app.registered_commands} == set(LAUNCHERS)


def test_local_workers_run_and_their_jobs_are_in_sql(study, tmp_path):
    result = run("local", "digits", "--workers", "2", "--device", "cpu", "--", "--threads", "1")
    assert result.exit_code == 0
    found = starts(tmp_path / "fake")
    assert {start["storage"] for start in found} == {os.environ["DROPTUNE_STORAGE"]}
    assert all("--threads" in start["argv"] for start in found)
    jobs = recorded_jobs(study)
    assert sorted(job.name for job in jobs) == sorted(start["job"] for start in found)
    forget_jobs(study, "another")
    assert recorded_jobs(study) == jobs
    forget_jobs(study, "digits")
    assert recorded_jobs(study) == []


def test_an_unknown_study_is_refused_before_anything_starts(study, tmp_path):
    with pytest.raises(UnknownStudyError, match="digit"):
        run("local", "digit", "--device", "cpu")
    assert starts(tmp_path / "fake") == []


def test_a_dry_run_needs_no_database_and_shows_no_secret(project, monkeypatch):
    monkeypatch.setenv("DROPTUNE_STORAGE", SECRET)
    for name in LAUNCHERS:
        said = run(name, "digits", "--dry-run", "--device", "cpu", "--workers", "3").output
        assert "digits" in said
        assert "hunter2" not in said
    assert not (project / "droptune-launch").exists()


def test_sqlite_is_refused_on_a_cluster(study):
    with pytest.raises(LaunchError, match="slurm starts workers on other machines"):
        run("slurm", "digits", "--workers", "2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "stopped"}, "is stopped, .*: droptune study resume digits$"),
        ({"phase": "done"}, "is done: nothing of it is left to train$"),
    ],
)
def test_no_devices_are_asked_for_where_workers_would_end_at_once(
    project, sbatch, postgres_study, change, message
):
    postgres_study.update_study(postgres_study.study("digits").id, **change)
    with pytest.raises(LaunchError, match=message):
        run("slurm", "digits", "--workers", "50")
    assert not sbatch.exists()
    assert recorded_jobs(postgres_study) == []


def test_slurm_from_end_to_end_of_the_command(project, sbatch, postgres_study):
    result = run("slurm", "digits", "--workers", "2", "--", "--partition=gpu", "--time=1:00:00")
    assert result.stdout.splitlines()[0] == "submitted 2 workers: slurm 4711_0 to slurm 4711_1"
    assert sbatch.read_text().startswith("--parsable --partition=gpu --time=1:00:00 /")
    assert [job.name for job in recorded_jobs(postgres_study)] == ["slurm 4711_0", "slurm 4711_1"]
    host = {"host": "node-1", "pid": 7, "device": "cuda:0"}
    worker = postgres_study.register_worker(**host, info={"job": "slurm 4711_0"})
    shown = listed("list").splitlines()
    assert [line.split()[:7] for line in shown[1:]] == [
        [str(worker), "node-1", "7", "cuda:0", "slurm", "4711_0", "alive"],
        ["slurm", "4711_1", "submitted", "digits"],
    ]
    _, waiting = json.loads(listed("list", "--json"))
    assert waiting == {"job": "slurm 4711_1", "study": "digits", "state": "submitted"}
    study = postgres_study.study("digits")
    postgres_study.update_study(study.id, status="stopped")
    assert "4711_1" not in listed("list")


def listed(*arguments):
    return CliRunner().invoke(workers_app, list(arguments), env={"COLUMNS": "200"}).output


@pytest.fixture
def postgres_study(postgresql, monkeypatch):
    url = postgresql.create().render_as_string(hide_password=False)
    monkeypatch.setenv("DROPTUNE_STORAGE", url)
    storage = Storage.open(url, create=True)
    storage.create_study(
        "digits", spec={}, sites=[], directions=["minimize"], meta={}, intervals=1, seed=0
    )
    yield storage
    storage.close()


def test_a_file_with_the_url_is_handed_on(project, tmp_path, monkeypatch):
    file = tmp_path / "url"
    file.write_text(SECRET + "\n")
    monkeypatch.setenv("DROPTUNE_STORAGE_FILE", str(file))
    assert f"DROPTUNE_STORAGE_FILE={file}\n" in run("slurm", "digits", "--dry-run").output
    flag = run("slurm", "digits", "--dry-run", "--storage", "postgresql://other/x").output
    assert str(file) not in flag


def test_mlflow_on_a_file_is_not_offered_to_other_machines(project, monkeypatch):
    monkeypatch.setenv("DROPTUNE_STORAGE", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    result = run("slurm", "digits", "--dry-run")
    assert "MLFLOW_TRACKING_URI=" not in result.stdout
    assert "export DROPTUNE_MIRROR=none" in result.stdout
    assert "workers elsewhere will not mirror" in result.stderr
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # then it would be a file on the nodes
    result = run("slurm", "digits", "--dry-run")
    assert "export DROPTUNE_MIRROR=none" in result.stdout
    assert "workers elsewhere will not mirror" in result.stderr
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    result = run("slurm", "digits", "--dry-run")
    assert "export MLFLOW_TRACKING_URI=http://mlflow:5000\n" in result.stdout
    assert "DROPTUNE_MIRROR" not in result.output


def test_restarts_and_lines_of_the_file(project, monkeypatch):
    monkeypatch.setenv("DROPTUNE_STORAGE", SECRET)
    with (project / "droptune.toml").open("a") as file:
        file.write('[launch.slurm]\nsetup = ["module load cuda"]\nrestarts = 7\n')
    assert "-gt 7 ]" in run("slurm", "digits", "--dry-run").output
    said = run("slurm", "digits", "--dry-run", "--restarts", "0").output
    assert "-gt 0 ]" in said
    assert "\nmodule load cuda\n" in said


@pytest.mark.parametrize("name", [n for n, cls in LAUNCHERS.items() if not cls.one_machine])
def test_engines_need_the_name_of_a_study(project, monkeypatch, name):
    monkeypatch.setenv("DROPTUNE_STORAGE", SECRET)
    with pytest.raises(LaunchError, match=f"{name} needs the NAME of a study"):
        run(name, "--dry-run")
    with pytest.raises(LaunchError, match=f"{name} needs the NAME of a study"):
        run(name, "--dry-run", "--", "--partition=gpu")


def test_options_may_follow_where_no_study_is_named(study):
    said = run("local", "--dry-run", "--device", "cpu", "--workers", "1", "--", "--until-done")
    assert said.output.count("--until-done") == 1
    assert "digits" not in said.output


@pytest.mark.parametrize("name", [n for n, cls in LAUNCHERS.items() if not cls.one_machine])
@pytest.mark.parametrize("device", ["cup", "mps", "cuda:0,2"])
def test_engines_take_the_devices_that_they_can_assign(project, monkeypatch, name, device):
    monkeypatch.setenv("DROPTUNE_STORAGE", SECRET)
    with pytest.raises(LaunchError, match=f"^--device {device}: {name} assigns devices") as caught:
        run(name, "digits", "--device", device, "--dry-run")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("width", ["abc", "0", "-1", "1.5", "²", ""])
@pytest.mark.parametrize("command", LAUNCHERS)
def test_a_width_is_refused_where_it_is_typed(project, monkeypatch, command, width):
    monkeypatch.setenv("DROPTUNE_STORAGE", SECRET)
    with pytest.raises(UsageError, match=f"^--width {width}: possible are auto, 1, 2, 3, …$"):
        run(command, "digits", "--device", "cpu", "--width", width, "--dry-run")


def test_a_worker_refuses_a_width_too(project):
    with pytest.raises(UsageError, match="--width abc: possible are"):
        CliRunner().invoke(workers_app, ["start", "--width", "abc"], catch_exceptions=False)


def test_local_devices_are_refused_before_a_job_is_recorded(study):
    with pytest.raises(LaunchError, match="--device cup: possible are auto, cpu, mps, cuda"):
        run("local", "digits", "--device", "cup")
    assert recorded_jobs(study) == []


def test_the_command_line_answers_without_torch(project):
    program = (
        "import sys; from typer.testing import CliRunner; from droptune.cli.launch import app\n"
        "CliRunner().invoke(app, ['slurm', 'digits', '--dry-run', '--storage', 'postgresql://h/d'])\n"
        "print([m for m in ('torch', 'mlflow', 'optuna', 'sqlalchemy') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert output == b"[]\n"
