"""The Ray launcher: the commands it gives to Ray's own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_worker import make_fake_python, starts

from droptune.errors import DroptuneError, LaunchError
from droptune.launch import Order, make_launcher
from droptune.launch.ray import RayLauncher

URL = "postgresql://somebody:hunter2@db/trials"
HOSTILE = "-x \"q\" 'a' $(touch gone) `id` \\ é😀\n;"

# Ray joins the words after `--` into one shell line and runs it in a shell
RAY = """
import json, os, shlex, sys
if os.environ.get("REFUSE") and os.path.exists(os.environ["NOTES"]):
    sys.exit("ConnectionError: Failed to connect to Ray at address: http://head:8265.")
split = sys.argv.index("--")
kept = sorted(name for name in os.environ if name.startswith("DROPTUNE_"))
note = {"options": sys.argv[1:split], "line": shlex.join(sys.argv[split + 1:]), "kept": kept}
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(note) + "\\n")
"""


@pytest.fixture
def ray(tmp_path, monkeypatch):
    """A stand-in for ray on PATH; returns a function that reads what it was given."""
    program = tmp_path / "bin" / "ray"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable} -IS\n{RAY}")
    program.chmod(0o755)
    notes = tmp_path / "notes"
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("NOTES", str(notes))
    for name in ("DROPTUNE_STORAGE", "DROPTUNE_STORAGE_FILE", "DROPTUNE_JOB"):
        monkeypatch.delenv(name, raising=False)
    return lambda: [json.loads(line) for line in notes.read_text().splitlines()]


def order(tmp_path, **values):
    project = tmp_path / "pro ject's $HOME"
    project.mkdir(exist_ok=True)
    return Order(**{"study": "digits", "project": project, "storage": URL, **values})


def test_one_job_for_each_worker(tmp_path, ray, monkeypatch):
    monkeypatch.setenv("DROPTUNE_STORAGE", URL)
    given = order(tmp_path, workers=3, options=("--address=http://head:8265",))
    recorded = []
    jobs = RayLauncher(cpus=2, options=("--no-wait",)).submit(given, recorded.extend)
    assert [job.name for job in recorded] == [f"ray {given.job_name}-{k}" for k in range(3)]
    assert recorded == list(jobs)
    assert ray()[0]["options"] == [
        *("job", "submit", "--no-wait", f"--submission-id={given.job_name}-0"),
        *("--entrypoint-num-cpus=2", "--entrypoint-num-gpus=1"),
        *("--no-wait", "--address=http://head:8265"),
    ]
    assert all(note["kept"] == [] for note in ray())


def test_the_secret_goes_by_file(tmp_path, ray):
    given = order(tmp_path)
    RayLauncher().submit(given, lambda jobs: None)
    file = given.folder / "storage-url"
    assert file.read_text() == f"{URL}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "hunter2" not in json.dumps(ray()) + RayLauncher().describe(given)


def test_the_file_that_the_nodes_have_is_named(tmp_path, ray):
    RayLauncher(storage_file="/run/secrets/url").submit(order(tmp_path), lambda jobs: None)
    assert "DROPTUNE_STORAGE_FILE=/run/secrets/url" in ray()[0]["line"]
    assert not (tmp_path / "pro ject's $HOME" / "droptune-launch").exists()


def test_the_line_runs_in_a_shell_whatever_the_names_are(tmp_path, ray):
    """What Ray's shell starts is `droptune launch local` with these words."""
    given = order(tmp_path, study=HOSTILE, width="8", tracking="http://mlflow:5000")
    fake = tmp_path / "fake"
    python = str(make_fake_python(fake, "0"))
    setup = ("export CUDA_VISIBLE_DEVICES=3", "true # it's a comment")
    RayLauncher(python=python, setup=setup, restarts=2).submit(given, lambda jobs: None)
    subprocess.run(ray()[0]["line"], shell=True, check=True, cwd=tmp_path)
    (start,) = starts(fake)
    assert start["argv"] == [
        *("-m", "droptune", "launch", "local", "--workers", "1", "--device", "cuda"),
        *("--project", str(given.project), "--restarts", "2", "--width", "8", "--", HOSTILE),
    ]
    assert start["job"] == f"ray {given.job_name}-0"
    assert start["storage"] == URL
    assert start["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert start["CUDA_VISIBLE_DEVICES"] == "3"
    assert start["DROPTUNE_IDLE_SECONDS"] == "600"
    assert list(Path(tmp_path).rglob("gone")) == []


def test_without_an_mlflow_server_its_workers_mirror_nothing(tmp_path, ray):
    fake = tmp_path / "fake"
    RayLauncher(python=str(make_fake_python(fake, "0"))).submit(order(tmp_path), lambda jobs: None)
    subprocess.run(ray()[0]["line"], shell=True, check=True, cwd=tmp_path)
    assert starts(fake)[0]["DROPTUNE_MIRROR"] == "none"


def test_cpu_workers_ask_for_no_gpu(tmp_path):
    said = RayLauncher().describe(order(tmp_path, device="cpu", workers=2))
    assert len(said.splitlines()) == 2
    assert "gpu" not in said
    assert "--device cpu" in said


def test_jobs_that_were_submitted_before_a_failure_are_recorded(tmp_path, ray, monkeypatch):
    monkeypatch.setenv("REFUSE", "the second")
    recorded = []
    with pytest.raises(DroptuneError, match=r"ray job failed .*Failed to connect"):
        RayLauncher().submit(order(tmp_path, workers=2), recorded.extend)
    assert len(recorded) == 1


def test_without_ray_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="ray is not on PATH: pip install"):
        RayLauncher().submit(order(tmp_path), lambda jobs: None)


def test_sqlite_is_refused():
    with pytest.raises(LaunchError, match="ray starts workers on other machines"):
        make_launcher("ray", {}, "sqlite:///droptune.db")
