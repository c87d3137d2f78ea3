"""The local launcher, with real processes in place of workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_worker import events, make_fake_python, starts

from droptune.errors import ConfigurationError, DroptuneError, LaunchError, WorkRemainsError
from droptune.launch import Order
from droptune.launch.local import LocalLauncher
from droptune.launch.supervisor import Patience

URL = "postgresql://somebody:hunter2@db/trials"

LISTING = """\
GPU 0: NVIDIA A100 (UUID: GPU-aaaa)
GPU 1: NVIDIA A100 (UUID: GPU-bbbb)
GPU 2: NVIDIA A100 (UUID: GPU-cccc)
"""


@pytest.fixture(autouse=True)
def no_engine_around(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "DROPTUNE_JOB", "DROPTUNE_STORAGE_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fast(monkeypatch):
    """Restarts without waiting for seconds."""
    monkeypatch.setattr(Patience, "delay", lambda self, restart: 0.01)


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A machine with three GPUs, as nvidia-smi tells it."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def order(tmp_path, **values):
    project = tmp_path / "pro ject's"
    project.mkdir(exist_ok=True)
    return Order(**{"study": "digits", "project": project, "storage": URL, **values})


def launch(tmp_path, *plan, launcher=None, **values):
    """Run to the end; jobs and the launch's order."""
    python = str(make_fake_python(tmp_path / "fake", *plan))
    given = order(tmp_path, **{"device": "cpu", **values})
    recorded = []
    settings = launcher or {}
    LocalLauncher(python=python, **settings).submit(given, recorded.extend)
    return given, recorded


def test_a_worker_that_finds_nothing_left_ends_the_launch(tmp_path):
    given, jobs = launch(tmp_path, "0")
    (start,) = starts(tmp_path / "fake")
    assert start["argv"] == [
        *("-m", "droptune", "worker", "start", "--project", str(given.project)),
        *("--device", "cpu", "--until-done", "--", "digits"),
    ]
    assert start["storage"] == URL
    assert start["folder"] == str(given.project)
    assert [job.name for job in jobs] == [start["job"]]
    assert start["job"].startswith("local ")


def test_no_secret_is_in_a_command_line_or_a_description(tmp_path):
    given, _ = launch(tmp_path, "0")
    (start,) = starts(tmp_path / "fake")
    assert "hunter2" not in " ".join(start["argv"])
    assert "hunter2" not in LocalLauncher().describe(given) + repr(given)


def test_cpu_workers_share_the_cores_and_log_apart(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("droptune.launch.local.cores", lambda: 8)
    given, jobs = launch(tmp_path, "0", workers=3)
    found = starts(tmp_path / "fake")
    assert [start["OMP_NUM_THREADS"] for start in found] == ["2", "2", "2"]
    assert len({start["job"] for start in found}) == len(jobs) == 3
    logs = sorted(path.name for path in given.folder.glob("*.log"))
    assert logs == ["worker-0.log", "worker-1.log", "worker-2.log"]


def test_exit_75_and_crashes_are_started_again(tmp_path, fast, capsys):
    launch(tmp_path, "75", "1", "0")
    assert events(tmp_path / "fake") == ["exit 75 1", "exit 1 2", "exit 0 3"]
    said = capsys.readouterr().err
    assert "ended with exit code 75 (last words of start 1); restart 1 of 5" in said


def test_it_gives_up_after_restarts_without_an_interval(tmp_path, fast, capsys):
    with pytest.raises(
        DroptuneError,
        match=r"given up \(exit codes \[1\]\): last words of start 3; see the logs in /",
    ):
        launch(tmp_path, "1", launcher={"restarts": 2})
    assert len(starts(tmp_path / "fake")) == 3
    assert "given up after 2 restarts without a finished interval" in capsys.readouterr().err


@pytest.mark.parametrize("code", [1, 2])
def test_the_same_failure_twice_is_not_tried_a_third_time(tmp_path, fast, capsys, code):
    with pytest.raises(DroptuneError, match="last a bug; see the logs in /"):
        launch(tmp_path, f"same:{code}")
    assert len(starts(tmp_path / "fake")) == 2
    assert "(last a bug); twice the same" in capsys.readouterr().err


def test_a_failure_of_its_surroundings_may_come_twice(tmp_path, fast):
    launch(tmp_path, "same:75", "same:75", "same:75", "0")
    launch(tmp_path / "other", "same:1", "interval:1", "same:1", "0")


def test_a_finished_interval_renews_its_patience(tmp_path, fast):
    plan = ["75", "interval:75", "75", "interval:75", "75", "0"]
    launch(tmp_path, *plan, launcher={"restarts": 2})
    assert len(starts(tmp_path / "fake")) == 6


def test_a_configuration_error_is_not_started_again(tmp_path):
    with pytest.raises(ConfigurationError, match="no worker can work here"):
        launch(tmp_path, "78")
    assert len(starts(tmp_path / "fake")) == 1


def test_delays_grow_to_a_limit():
    patience = Patience(first=1.0, longest=60.0)
    assert [patience.delay(n) for n in (1, 2, 3, 7, 100)] == [1.0, 2.0, 4.0, 60.0, 60.0]


def test_setup_lines_run_before_the_worker(tmp_path):
    setup = ["export OMP_NUM_THREADS=7", "touch prepared"]
    given, _ = launch(tmp_path, "0", launcher={"setup": tuple(setup)})
    assert starts(tmp_path / "fake")[0]["OMP_NUM_THREADS"] == "7"
    assert (given.project / "prepared").exists()


def test_a_failing_setup_line_keeps_the_worker_from_starting(tmp_path, fast):
    with pytest.raises(DroptuneError, match="given up"):
        launch(tmp_path, "0", launcher={"setup": ("false", "touch prepared"), "restarts": 1})
    assert starts(tmp_path / "fake") == []


def test_hostile_names_arrive_unchanged(tmp_path):
    name = '-rf "$(touch gone)" \'é😀\n;'
    launch(tmp_path, "0", study=name, launcher={"setup": ("true",)})
    assert starts(tmp_path / "fake")[0]["argv"][-2:] == ["--", name]


def test_options_after_two_dashes_go_to_the_worker(tmp_path):
    launch(tmp_path, "0", options=("--threads", "3"), width="8")
    argv = starts(tmp_path / "fake")[0]["argv"]
    assert argv[-7:] == ["--width", "8", "--threads", "3", "--until-done", "--", "digits"]


def test_one_worker_per_gpu_by_its_id(tmp_path, gpus):
    launch(tmp_path, "0", device="auto")
    found = starts(tmp_path / "fake")
    visible = sorted(start["CUDA_VISIBLE_DEVICES"] for start in found)
    assert visible == ["GPU-aaaa", "GPU-bbbb", "GPU-cccc"]
    assert all("cuda" in start["argv"] for start in found)


def test_chosen_gpus(tmp_path, gpus):
    launch(tmp_path, "0", device="cuda:2,0")
    visible = {start["CUDA_VISIBLE_DEVICES"] for start in starts(tmp_path / "fake")}
    assert visible == {"GPU-aaaa", "GPU-cccc"}


def test_gpus_that_somebody_assigned_are_passed_on_as_they_are(tmp_path, gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,MIG-77")
    launch(tmp_path, "0", device="cuda")
    visible = {start["CUDA_VISIBLE_DEVICES"] for start in starts(tmp_path / "fake")}
    assert visible == {"1", "MIG-77"}


def test_more_workers_than_gpus_are_refused(tmp_path, gpus):
    with pytest.raises(LaunchError, match="--workers 4: a worker owns one device and there are 3"):
        launch(tmp_path, "0", device="auto", workers=4)


def test_nvidia_smi_is_asked_once(tmp_path, gpus):
    program, asked = tmp_path / "bin" / "nvidia-smi", tmp_path / "asked"
    program.write_text(program.read_text().replace("cat", f"echo >> '{asked}'; cat", 1))
    LocalLauncher().check(order(tmp_path))
    launch(tmp_path, "0", device="auto")
    assert len(starts(tmp_path / "fake")) == 3
    assert len(asked.read_text().splitlines()) == 1


def test_inside_another_engines_job_its_name_and_its_log_are_kept(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("DROPTUNE_JOB", "ray droptune-digits-0")
    given, jobs = launch(tmp_path, "interval:0")
    assert starts(tmp_path / "fake")[0]["job"] == "ray droptune-digits-0"
    assert jobs == []
    assert list(given.folder.glob("*.log")) == []
    assert "last words of start 1" in capfd.readouterr().out


RUN = """
import sys
from pathlib import Path
from droptune.errors import DroptuneError
from droptune.launch import Order
from droptune.launch.local import LocalLauncher

project, python, workers = sys.argv[1:]
order = Order("digits", Path(project), "postgresql://db/trials", workers=int(workers), device="cpu")
try:
    LocalLauncher(python=python).submit(order, lambda jobs: None)
except DroptuneError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def running(tmp_path):
    """Start the launcher in a process of its own; wait until its workers run."""
    processes = []

    def start(*plan: str, workers: int = 1):
        python = make_fake_python(tmp_path / "fake", *plan)
        arguments = [str(tmp_path), str(python), str(workers)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DROPTUNE_")}
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        until(lambda: len(starts(tmp_path / "fake")) == workers)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(folder: Path) -> list[int]:
    return [s["pid"] for s in starts(folder) if _running(s["pid"])]


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_is_passed_on_and_waited_for(tmp_path, running, number):
    process = running("wait", workers=2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    happened = sorted(event.rsplit(" ", 1)[0] for event in events(tmp_path / "fake"))
    assert happened == ["TERM", "TERM", "exit 75", "exit 75"]
    assert process.returncode == WorkRemainsError.exit_code
    assert "the workers handed their trainings back" in said


def test_nohup_means_to_go_on_after_a_hang_up(tmp_path, running):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as its children begin
    try:
        process = running("wait")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "SIGHUP" not in said
    assert "SIGTERM" in said


def test_a_second_ctrl_c_kills(tmp_path, running):
    process = running("deaf")
    process.send_signal(signal.SIGINT)
    until(lambda: events(tmp_path / "fake"))
    process.send_signal(signal.SIGTERM)  # a second TERM does not: engines send it twice
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert alive(tmp_path / "fake") == []


def test_an_interrupt_between_two_starts_ends_the_launch(tmp_path, running):
    process = running("75")
    until(lambda: events(tmp_path / "fake"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_workers_do_not_outlive_a_killed_launcher(tmp_path, running):
    process = running("wait", workers=2)
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not alive(tmp_path / "fake"))
    assert sorted(events(tmp_path / "fake"))[:2] == ["TERM 1", "TERM 1"]


def test_without_a_name_workers_serve_every_study(tmp_path):
    launch(tmp_path, "0", study=None)
    argv = starts(tmp_path / "fake")[0]["argv"]
    assert argv[-2:] == ["--device", "cpu"]
    assert "--until-done" not in argv
