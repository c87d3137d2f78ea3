"""Nobody reads what is said any more: workers hand their trainings back all the same."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from fake_worker import events, make_fake_python, starts

from droptune.launch import supervisor
from droptune.launch.supervisor import Patience, Supervised, Supervisor
from droptune.storage import Storage


@pytest.fixture
def project(tmp_path):
    """A project with one study, whose workers are stand-ins that wait for a signal."""
    folder = tmp_path / "project"
    folder.mkdir()
    python = make_fake_python(tmp_path / "fake", "wait")
    (folder / "droptune.toml").write_text(f'[launch.local]\npython = "{python}"\n')
    storage = Storage.open(f"sqlite:///{folder}/droptune.db", create=True)
    storage.create_study(
        "digits", spec={}, sites=[], directions=["minimize"], meta={}, intervals=1, seed=0
    )
    return folder


@pytest.fixture
def launched(project):
    """Start `launch local` with two workers and wait until they run."""
    processes = []

    def start(**how):
        command = [sys.executable, "-m", "droptune", "launch", "local", "digits"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DROPTUNE_")}
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--workers", "2"],
            **{"cwd": project, "env": environment, "start_new_session": True, **how},
        )
        processes.append(process)
        until(lambda: len(starts(project.parent / "fake")) == 2)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def handed_back(project):
    happened = sorted(event.rsplit(" ", 1)[0] for event in events(project.parent / "fake"))
    return happened == ["TERM", "TERM", "exit 75", "exit 75"]


def test_a_terminal_is_closed(project, launched):
    controller, terminal = os.openpty()
    process = launched(
        stdin=terminal, stdout=terminal, stderr=terminal,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    os.close(controller)
    assert process.wait(60) == 75
    assert handed_back(project)


def test_ctrl_c_ends_the_reader_too(project, launched):
    reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process = launched(stdout=reader.stdin, stderr=reader.stdin)
    reader.stdin.close()
    reader.kill()
    reader.wait()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    assert handed_back(project)


@pytest.mark.parametrize(("error", "code"), [("WorkRemainsError", 75), ("DroptuneError", 1)])
def test_the_exit_code_does_not_depend_on_a_reader(error, code):
    program = (
        "import sys\nfrom droptune import cli, errors\n"
        "def app():\n    sys.stdout.write('some output')\n    sys.stdin.read()\n"
        f"    raise errors.{error}('it ended')\n"
        "cli.app = app\ncli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_is_lost_for_another_reason_is_still_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "droptune", "--version"], stdout=full, stderr=subprocess.DEVNULL
        )
    assert done.returncode != 0


def failing(folder, plan, monkeypatch):
    """A supervisor that fails for no foreseen reason once its worker runs, and that worker."""
    environment = {**os.environ, "DROPTUNE_JOB": "local 0", "DROPTUNE_STORAGE": "sqlite://"}
    command = [str(make_fake_python(folder / "fake", plan))]
    worker = Supervised("w", command, environment, folder, folder / "log", folder / "marker")
    supervised = Supervisor([worker], Patience())

    def fail(_wake):
        if starts(folder / "fake"):
            raise RuntimeError("unforeseen")

    monkeypatch.setattr(supervised, "_sleep", fail)
    return supervised, worker


def test_an_error_of_the_supervisor_lets_workers_hand_back(tmp_path, monkeypatch):
    supervised, _ = failing(tmp_path, "wait", monkeypatch)
    with pytest.raises(RuntimeError, match="unforeseen"):
        supervised.run()
    assert events(tmp_path / "fake") == ["TERM 1", "exit 75 1"]


def test_what_does_not_hand_back_is_killed_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.3)
    supervised, worker = failing(tmp_path, "deaf", monkeypatch)
    with pytest.raises(RuntimeError, match="unforeseen"):
        supervised.run()
    assert worker.process.returncode == -signal.SIGKILL
