"""`study run` is ended by Ctrl-C, or by nobody reading it any more, and goes on."""

from __future__ import annotations

import os
import select
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from crew import wait_until

from droptune.storage import Storage
from droptune.study import Study

MODEL = """
import time
import droptune, torch
from torch import nn

x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))

    def forward(self, x):
        if not self.training:
            time.sleep(0.02)  # an interval is long enough to be interrupted
        return self.layers(x)

program = droptune.classification(
    model=Net, train=(x, (x[:, 0] > 0).long()), batch_size=16, epochs=10, lr=1e-2)
"""
STUDY = """
program: model.py
budget: {trials: 3}
baselines: {trials: 1}
confirm: {enabled: false}
training: {trainer: solo}
"""


@pytest.mark.timeout(900)
def test_the_line_after_ctrl_c_continues_this_study_and_its_mirror(tmp_path):
    folder, elsewhere = tmp_path / "my project", tmp_path / "else where"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "a study.yaml").write_text(STUDY)
    url = f"sqlite:///{elsewhere}/studies.db"
    given = ["study", "run", "a study.yaml", "--name", "other", "--storage", url]
    given += ["--workers", "1", "--width", "1"]
    program = str(Path(sys.executable).parent / "droptune")
    own = {k: v for k, v in os.environ.items() if not k.startswith(("DROPTUNE", "MLFLOW"))}
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    running = subprocess.Popen(
        [program, *given], cwd=folder, env=own, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_until(lambda: running.poll() is not None or _intervals(url) >= 2, 400)
        running.send_signal(signal.SIGINT)
        printed, said = running.communicate(timeout=400)
    finally:
        running.kill()
    assert running.returncode == 75, printed + said
    line = said.strip().splitlines()[-1]
    assert line.startswith("droptune: stopped; nothing is lost, go on with: ")
    again = line.partition("go on with: ")[2]
    assert shlex.split(again) == ["droptune", *given]
    done = subprocess.run(
        ["bash", "-c", again], cwd=folder, env=own, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "study 'other' continued" in done.stdout
    study = Study.open(Storage.open(url), "other")
    assert study.phase() == "done"
    # MLflow is beside the study's database, for the workers and for the last sync
    assert not list(folder.glob("mlflow.db*"))
    with closing(sqlite3.connect(elsewhere / "mlflow.db")) as mlflow:
        assert mlflow.execute("SELECT name FROM registered_models").fetchall()
    report = next(x for x in done.stdout.splitlines() if x.startswith("report:"))
    assert shlex.split(report.partition(":")[2])[-2:] == ["--storage", url]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("terminal", [True, False])
def test_it_hands_back_where_nobody_reads_any_more(tmp_path, terminal):
    """A terminal that goes without a SIGHUP, and `study run … | head -1`."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "study.yaml").write_text(STUDY.replace("trials: 3", "trials: 30"))
    url = f"sqlite:///{tmp_path}/droptune.db"
    own = {k: v for k, v in os.environ.items() if not k.startswith(("DROPTUNE", "MLFLOW"))}
    own["TERM"] = "xterm"  # a dumb one has no panel
    command = [sys.executable, "-m", "droptune", "study", "run", "study.yaml", "--workers", "1"]
    reader, writer = os.openpty() if terminal else os.pipe()
    running = subprocess.Popen(
        [*command, "--name", "other"], cwd=tmp_path, env=own, stdout=writer,
        stderr=writer if terminal else subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(writer)
    drain = threading.Thread(target=_read, args=(reader, closing := threading.Event()))
    drain.start()
    try:
        wait_until(lambda: running.poll() is not None or _intervals(url) >= 2, 400)
        closing.set()
        drain.join()
        assert running.wait(200) == 75
    finally:
        closing.set()
        running.kill()
    study = Study.open(Storage.open(url), "other")
    assert study.progress().running == 0
    assert all(row.state == "ended" for row in study.storage.list_workers(ended=True))


def _read(reader: int, closing: threading.Event) -> None:
    """Read what is printed until told to close."""
    while not closing.is_set():
        if select.select([reader], [], [], 0.1)[0]:
            os.read(reader, 4096)
    os.close(reader)


def _intervals(url: str) -> int:
    try:
        study = Study.open(Storage.open(url), "other")
    except Exception:
        return 0  # not created yet
    return study.progress().intervals
