"""Workers as jobs of a real Ray on this machine.

Its install is heavy, so this runs by hand: pip install 'droptune[ray]'; pytest -m ray
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
from lasting_study import LastingStudy, droptune

from droptune.launch.recorded import recorded_jobs

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("ray") is None, reason="no ray on PATH"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.fixture
def ray_address(monkeypatch):
    """A Ray of four CPUs and its job server's address."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        options = [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        options += ["--num-cpus=4", "--disable-usage-stats", "--include-dashboard=true"]
        head = subprocess.Popen(
            ["ray", "start", "--head", "--block", *options],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        address = f"http://127.0.0.1:{dashboard}"
        listing = ["ray", "job", "list", f"--address={address}"]
        until(lambda: subprocess.run(listing, capture_output=True).returncode == 0, 120)
        yield address
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(60)
        finally:
            os.killpg(head.pid, signal.SIGKILL)


def status(job: str, address: str) -> str:
    command = ["ray", "job", "status", job, f"--address={address}"]
    said = subprocess.run(command, capture_output=True, text=True)
    words = said.stdout + said.stderr
    found = re.search(r"succeeded|stopped|failed|running|pending", words, re.IGNORECASE)
    return found[0].upper() if found else words


def test_a_study_runs_to_its_end_and_a_stopped_job_loses_nothing(ray_address, tmp_path, postgresql):
    url = postgresql.create().render_as_string(hide_password=False)
    study = LastingStudy(tmp_path, url, pause=0.1, trials=8)
    (tmp_path / "droptune.toml").write_text(f'[launch.ray]\npython = "{sys.executable}"\n')
    words = ("launch", "ray", "lasting", "--workers", "2", "--device", "cpu")
    said = droptune(*words, "--", f"--address={ray_address}", folder=tmp_path, DROPTUNE_STORAGE=url)
    jobs = sorted(job.id for job in recorded_jobs(study.storage))
    assert len(jobs) == 2
    assert all(job in said for job in jobs)
    until(lambda: sum(len(worker.holds) > 0 for worker in study.storage.list_workers()) == 2)
    before = study.intervals()
    until(lambda: study.intervals() >= before + 2)
    subprocess.run(["ray", "job", "stop", jobs[0], f"--address={ray_address}"], check=True)
    until(lambda: status(jobs[1], ray_address) == "SUCCEEDED")
    assert status(jobs[0], ray_address) == "STOPPED"
    study.assert_nothing_lost()
    names = {worker.info["job"] for worker in study.storage.list_workers(ended=True)}
    assert names == {f"ray {job}" for job in jobs}
