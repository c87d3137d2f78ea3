"""A pod of the worker Job, without a cluster: its words run as real processes and are ended as
Kubernetes ends them, with TERM and, after the grace period of a spot node, KILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from lasting_study import LastingStudy
from manifests import action

from droptune.launch import Order
from droptune.launch.kubernetes import KubernetesLauncher

GRACE = 30.0  # seconds: Kubernetes' default, and what spot nodes give


@pytest.fixture
def study(tmp_path):
    url = f"sqlite:///{tmp_path}/trials.db"
    (tmp_path / "url").write_text(url)
    return LastingStudy(tmp_path, url, pause=0.05, trials=4)


def start(job: dict, folder: Path) -> subprocess.Popen:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert "command" not in container  # the image's entry point: tini -- droptune
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    environment = {
        **{key: value for key, value in os.environ.items() if key != "DROPTUNE_STORAGE"},
        "DROPTUNE_STORAGE_FILE": str(folder / "url"),
        "DROPTUNE_JOB": values["DROPTUNE_JOB"].replace("$(JOB_COMPLETION_INDEX)", "0"),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "droptune", *container["args"]]
    return subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def evict(pod: subprocess.Popen) -> float:
    """TERM, and KILL after the grace period; returns the seconds that it took to end."""
    began = time.monotonic()
    pod.send_signal(signal.SIGTERM)
    try:
        pod.wait(GRACE)
    except subprocess.TimeoutExpired:
        pod.kill()
        pod.wait()
    return time.monotonic() - began


def until(condition, pod: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert pod.poll() is None, pod.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_evicted_worker_hands_back_in_time_and_costs_no_retry(study, tmp_path):
    order = Order("lasting", tmp_path, "by secret", device="cpu")
    launcher = KubernetesLauncher(image="droptune-worker:0.1.0", project=str(tmp_path))
    job = yaml.safe_load(launcher.manifest(order))
    pod = start(job, tmp_path)
    until(lambda: study.intervals() >= 3, pod)
    evict(pod)
    assert pod.returncode == 75, pod.communicate()[1]
    assert action(job, pod.returncode) == "Ignore"
    assert action(job, pod.returncode, "DisruptionTarget") == "Ignore"
    before = study.intervals()
    pod = start(job, tmp_path)
    until(lambda: study.intervals() > before, pod)
    evict(pod)
    assert pod.returncode == 75
    pod = start(job, tmp_path)
    assert pod.wait(200) == 0, pod.communicate()[1]
    study.assert_nothing_lost()


def test_the_grace_period_is_enough_in_the_middle_of_a_longer_interval(tmp_path):
    url = f"sqlite:///{tmp_path}/trials.db"
    (tmp_path / "url").write_text(url)
    pause = tmp_path / "pause"
    pause.write_text("0.05")
    study = LastingStudy(tmp_path, url, pause="float(open('pause').read())", trials=2)
    order = Order("lasting", tmp_path, "by secret", device="cpu")
    launcher = KubernetesLauncher(image="droptune-worker:0.1.0", project=str(tmp_path))
    job = yaml.safe_load(launcher.manifest(order))
    pod = start(job, tmp_path)
    until(lambda: study.intervals() >= 2, pod)
    pause.write_text("9")  # for each of five batches
    time.sleep(2)
    evict(pod)
    assert pod.returncode == 75, pod.communicate()[1]
    pause.write_text("0")
    pod = start(job, tmp_path)
    assert pod.wait(200) == 0, pod.communicate()[1]
    study.assert_nothing_lost()


def test_a_worker_that_can_never_work_fails_its_index(study, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        program.read_text().replace("nn.Linear(8, 16)", "nn.Linear(8, 16, bias=False)")
    )
    order = Order("lasting", tmp_path, "by secret", device="cpu")
    launcher = KubernetesLauncher(image="droptune-worker:0.1.0", project=str(tmp_path))
    job = yaml.safe_load(launcher.manifest(order))
    pod = start(job, tmp_path)
    _, said = pod.communicate(timeout=120)
    assert pod.returncode == 78, said
    assert action(job, pod.returncode) == "FailIndex"
    assert action(job, 1) == action(job, 137) == "Count"
