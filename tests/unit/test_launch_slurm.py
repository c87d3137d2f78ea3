"""The Slurm launcher: its script as text, and run by bash with stand-ins for Slurm's clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_worker import events, make_fake_python, starts

from droptune.errors import DroptuneError, LaunchError
from droptune.launch import Order, make_launcher
from droptune.launch.slurm import SlurmLauncher

URL = "postgresql://somebody:hunter2@db/trials"
EXAMPLE = Path(__file__).parents[2] / "docker" / "slurm" / "worker.sbatch"
HOSTILE = "-x \"q\" 'a' $(touch gone) `id` \\ é😀\n#SBATCH --array=0-999\n;"

CLIENTS = {
    # srun hands its signals to the step, as Slurm does
    "srun": """
import json, os, subprocess, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(["srun", *sys.argv[1:]]) + "\\n")
code = subprocess.run(sys.argv[3:]).returncode
sys.exit(code if code >= 0 else 128 - code)
""",
    "squeue": """
import os
print(os.environ.get("REASON", "None"))
""",
    "scontrol": """
import json, os, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\\n")
""",
    "sbatch": """
import json, os, sys
if os.environ.get("REFUSE"):
    sys.exit("sbatch: error: Batch job submission failed: Invalid qos specification")
url = {key: os.environ[key] for key in os.environ if key.startswith("DROPTUNE_")}
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps(["sbatch", *sys.argv[1:], os.getcwd(), url]) + "\\n")
print("4711;cluster")
""",
}


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Stand-ins for Slurm's clients on PATH; returns the file that they write their notes to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, program in CLIENTS.items():
        (folder / name).write_text(f"#!{sys.executable} -IS\n{program}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    for name in [name for name in os.environ if name.startswith("DROPTUNE_")]:
        monkeypatch.delenv(name)
    return tmp_path / "notes"


def notes(path: Path) -> list[list]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def order(tmp_path, **values):
    project = tmp_path / "pro ject's $HOME"
    project.mkdir(exist_ok=True)
    return Order(**{"study": "digits", "project": project, "storage": URL, **values})


def run_script(tmp_path, given: Order, launcher: SlurmLauncher, **environment):
    """What Slurm does with the script: run it with the variables of task 3 of array 4711."""
    given.make_folder()
    given.write_storage_file()
    variables = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "4711"}
    script = given.folder / "worker.sbatch"
    script.write_text(launcher.script(given))
    return subprocess.Popen(
        ["bash", script],
        cwd=given.folder,
        env={**os.environ, **variables, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(tmp_path, plan, launcher=None, **values):
    """Exit code of the script, what it asked Slurm for, and its words on stderr."""
    python = str(make_fake_python(tmp_path / "fake", *plan))
    settings = launcher or SlurmLauncher()
    process = run_script(tmp_path, order(tmp_path, **values), replace(settings, python=python))
    _, said = process.communicate(timeout=60)
    asked = [note for note in notes(tmp_path / "notes") if note[0] == "scontrol"]
    return process.returncode, asked, said


REQUEUE = ["scontrol", "requeue", "4711_3"]


def test_the_example_is_what_the_launcher_writes():
    """docker/slurm/worker.sbatch, to be read by people, is the recorded text."""
    given = Order(
        study="digits",
        project=Path("/shared/project"),
        storage=URL,
        workers=4,
        tracking="http://mlflow.example.org:5000",
        tag="20260101-120000-abcd",
    )
    launcher = SlurmLauncher(
        setup=("module load cuda", "source /shared/venv/bin/activate"),
        python="/shared/venv/bin/python",
    )
    assert launcher.script(given) == EXAMPLE.read_text()


def test_a_cpu_worker_asks_for_no_gpu(tmp_path):
    script = SlurmLauncher().script(order(tmp_path, device="cpu"))
    assert "--gres" not in script
    assert "--device cpu" in script
    assert "#SBATCH --gres=gpu:1\n" in SlurmLauncher().script(order(tmp_path))


def test_the_environment_of_the_worker(tmp_path, clients):
    finish(tmp_path, ["0"], tracking="http://mlflow:5000")
    (start,) = starts(tmp_path / "fake")
    assert start["storage"] == URL
    assert start["job"] == "slurm 4711_3"
    assert start["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert start["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
    assert start["folder"] == str(tmp_path / "pro ject's $HOME")
    assert "DROPTUNE_MIRROR" not in start


def test_without_an_mlflow_server_workers_mirror_nothing(tmp_path, clients):
    finish(tmp_path, ["0"])
    assert starts(tmp_path / "fake")[0]["DROPTUNE_MIRROR"] == "none"


def test_hostile_names_and_paths_are_words_only(tmp_path, clients):
    code, asked, _ = finish(tmp_path, ["0"], study=HOSTILE, width="8")
    (start,) = starts(tmp_path / "fake")
    assert code == 0
    assert asked == []
    assert start["argv"][-4:] == ["--width", "8", "--", HOSTILE]
    assert list(tmp_path.rglob("gone")) == []


def test_directives_hold_nothing_that_was_given(tmp_path):
    script = SlurmLauncher().script(order(tmp_path, study=HOSTILE, workers=3))
    head = script.split("\n\n")[0].splitlines()
    assert [line for line in head if "--array" in line] == ["#SBATCH --array=0-2"]
    assert all(line.startswith("#") and line.isascii() for line in head)


@pytest.mark.parametrize("action", ["75", "1", "137"])
def test_while_work_remains_the_task_is_requeued_by_its_own_name(tmp_path, clients, action):
    code, asked, _ = finish(tmp_path, [action])
    assert code == int(action)
    assert asked == [REQUEUE]  # never by 4711, which would mean every task of the array


@pytest.mark.parametrize("action", ["0", "78"])
def test_an_end_for_good_is_not_requeued(tmp_path, clients, action):
    code, asked, _ = finish(tmp_path, [action])
    assert code == int(action)
    assert asked == []


def test_it_gives_up_after_restarts_without_an_interval(tmp_path, clients):
    given = order(tmp_path)
    launcher = SlurmLauncher(python=str(make_fake_python(tmp_path / "fake", "1")), restarts=2)
    asked = []
    for _ in range(3):
        process = run_script(tmp_path, given, launcher)
        _, said = process.communicate(timeout=60)
        asked.append(len([note for note in notes(clients) if note[0] == "scontrol"]))
    assert asked == [1, 2, 2]
    assert said == "droptune: 2 restarts without a finished interval: giving up\n"


def test_a_finished_interval_renews_its_patience(tmp_path, clients):
    plan = ["75", "interval:75", "75", "75", "75"]
    given = order(tmp_path)
    launcher = SlurmLauncher(python=str(make_fake_python(tmp_path / "fake", *plan)), restarts=2)
    asked = []
    for _ in plan:
        run_script(tmp_path, given, launcher).communicate(timeout=60)
        asked.append(len([note for note in notes(clients) if note[0] == "scontrol"]))
    assert asked == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(("reason", "requeued"), [("None", False), ("TimeLimit", True)])
def test_ended_by_slurm_it_asks_only_when_out_of_time(tmp_path, clients, reason, requeued):
    """TERM for the whole job: scancel and preemption on one side, the time limit on the other."""
    python = str(make_fake_python(tmp_path / "fake", "wait"))
    given = order(tmp_path)
    process = run_script(tmp_path, given, SlurmLauncher(python=python), REASON=reason)
    deadline = time.monotonic() + 60
    while not starts(tmp_path / "fake") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    os.kill(starts(tmp_path / "fake")[0]["pid"], signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert events(tmp_path / "fake") == ["TERM 1", "exit 75 1"]
    assert (REQUEUE in notes(clients)) is requeued


def test_setup_lines_run_before_and_a_failing_one_ends_the_job(tmp_path, clients):
    good = SlurmLauncher(setup=("export MLFLOW_TRACKING_URI=from-setup",))
    bad = SlurmLauncher(setup=("false",))
    assert finish(tmp_path, ["0"], good)[0] == 0
    assert starts(tmp_path / "fake")[0]["MLFLOW_TRACKING_URI"] == "from-setup"
    assert finish(tmp_path, ["0"], bad)[:2] == (1, [])


def test_submitting(tmp_path, clients, monkeypatch):
    monkeypatch.setenv("DROPTUNE_STORAGE", URL)
    given = order(tmp_path, workers=3, options=("--partition=gpu", "--comment=a b"))
    recorded = []
    jobs = SlurmLauncher(options=("--qos=long",)).submit(given, recorded.extend)
    assert [job.name for job in jobs] == ["slurm 4711_0", "slurm 4711_1", "slurm 4711_2"]
    assert recorded == list(jobs)
    script = str(given.folder / "worker.sbatch")
    ((_, *command, folder, environment),) = notes(clients)
    assert command == ["--parsable", "--qos=long", "--partition=gpu", "--comment=a b", script]
    assert folder == str(given.folder)
    assert environment == {}  # no secret in the environment that Slurm keeps
    storage = given.folder / "storage-url"
    assert storage.read_text() == f"{URL}\n"
    assert storage.stat().st_mode & 0o777 == 0o600
    assert given.folder.stat().st_mode & 0o777 == 0o700


def test_a_file_that_holds_the_url_already_is_used(tmp_path, clients):
    file = tmp_path / "url file"
    given = order(tmp_path, storage_file=file)
    SlurmLauncher().submit(given, lambda jobs: None)
    assert not (given.folder / "storage-url").exists()
    assert f"export DROPTUNE_STORAGE_FILE='{file}'\n" in SlurmLauncher().script(given)
    elsewhere = SlurmLauncher(storage_file="/etc/droptune/url").script(given)
    assert "export DROPTUNE_STORAGE_FILE=/etc/droptune/url\n" in elsewhere


@pytest.mark.parametrize("name", ["50% off", "back\\slash"])
def test_a_path_that_slurm_takes_for_a_pattern_is_refused(tmp_path, name):
    """Seen on Slurm 22.05: the job fails before its first line, and nothing is logged."""
    with pytest.raises(LaunchError, match="move the project from"):
        SlurmLauncher().check(order(tmp_path, project=tmp_path / name))


def test_a_refusal_is_told_in_its_own_words(tmp_path, clients, monkeypatch):
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(DroptuneError, match="exit code 1: sbatch: error: Batch job"):
        SlurmLauncher().submit(order(tmp_path), lambda jobs: pytest.fail("nothing started"))


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="sbatch is not on PATH: start this on a login node"):
        SlurmLauncher().submit(order(tmp_path), lambda jobs: None)


def test_no_secret_is_in_a_description(tmp_path):
    assert "hunter2" not in SlurmLauncher().describe(order(tmp_path))


def test_sqlite_is_refused():
    with pytest.raises(LaunchError, match="slurm starts workers on other machines"):
        make_launcher("slurm", {}, "sqlite:///droptune.db")
