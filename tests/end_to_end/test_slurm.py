"""Workers on a real Slurm of one node: arrays, GPUs, requeue, preemption, time limits."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from pathlib import Path

import pytest
from fake_worker import events, make_fake_python, starts
from lasting_study import LastingStudy, droptune
from slurm import OneNodeSlurm, missing

from droptune.launch import Order
from droptune.launch.recorded import recorded_jobs
from droptune.launch.slurm import SlurmLauncher
from droptune.training import State

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no Slurm here: {missing()}")

URL = "postgresql://db/trials"


def cluster_of(**options):
    """A running cluster in a short path: its munge socket must have one."""
    with tempfile.TemporaryDirectory(prefix="droptune-slurm-") as folder:
        cluster = OneNodeSlurm(Path(folder), **options)
        try:
            yield cluster.start()
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def slurm():
    yield from cluster_of()


@pytest.fixture
def slurm_with_user_signal():
    """A site that sends the signal of `--signal` first when it preempts."""
    yield from cluster_of(user_signal=True)


class Launch:
    """Fake workers on the cluster."""

    def __init__(self, cluster, tmp_path, monkeypatch):
        self.cluster = cluster
        self.fake = tmp_path / "fake"
        self.project = tmp_path / "pro ject's $HOME"
        self.project.mkdir()
        for name in ("PATH", "SLURM_CONF"):
            monkeypatch.setenv(name, cluster.environment[name])
        self.order: Order | None = None

    def start(self, *plan: str, workers: int = 1, options=(), **settings):
        """Submit, and wait until all workers run; their jobs."""
        python = str(make_fake_python(self.fake, *plan))
        self.order = Order("di'gits", self.project, URL, workers=workers, options=options)
        recorded = []
        SlurmLauncher(python=python, **settings).submit(self.order, recorded.extend)
        self.cluster.wait(lambda: len(starts(self.fake)) >= workers, 60)
        return [job.id for job in recorded]

    def wait_for(self, *states: str, job: str) -> None:
        self.cluster.wait(lambda: self.cluster.jobs().get(job) in states, 90)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.order.folder.glob("*.log")))


@pytest.fixture
def launch(slurm, tmp_path, monkeypatch):
    yield Launch(slurm, tmp_path, monkeypatch)
    slurm.run("scancel", "--user=root", check=False)
    slurm.wait(lambda: not slurm.run("squeue", "-h"), 60)


def test_each_task_of_the_array_is_a_worker_with_its_own_gpu(launch):
    jobs = launch.start("interval:0", workers=4)
    for job in jobs:
        launch.wait_for("COMPLETED", job=job)
    found = starts(launch.fake)
    assert sorted(start["CUDA_VISIBLE_DEVICES"] for start in found) == ["0", "1", "2", "3"]
    assert sorted(start["job"] for start in found) == [f"slurm {job}" for job in jobs]
    assert {start["folder"] for start in found} == {str(launch.project)}
    assert {start["storage"] for start in found} == {URL}


def test_exit_75_requeues_this_task_and_no_other(launch):
    """Of an array's tasks one has the array's own id, by which all would be requeued."""
    jobs = launch.start("75", "wait", workers=3)
    launch.cluster.wait(lambda: len(starts(launch.fake)) == 6, 60)
    counts = [(start["job"], start["start"]) for start in starts(launch.fake)]
    assert sorted(counts) == sorted((f"slurm {job}", n) for job in jobs for n in (1, 2))
    assert {launch.cluster.jobs()[job] for job in jobs} == {"RUNNING"}


def test_a_crash_is_requeued_until_patience_ends(launch):
    (job,) = launch.start("1", restarts=1)
    launch.wait_for("FAILED", job=job)
    assert [start.get("SLURM_RESTART_COUNT") for start in starts(launch.fake)] == [None, "1"]
    assert "1 restarts without a finished interval: giving up" in launch.log()


def test_a_configuration_error_is_not_requeued(launch):
    (job,) = launch.start("78")
    launch.wait_for("FAILED", job=job)
    assert len(starts(launch.fake)) == 1


def test_scancel_hands_back_and_stays_away(launch):
    first, second = launch.start("wait", workers=2)
    launch.cluster.run("scancel", first)
    launch.wait_for("CANCELLED", job=first)
    assert events(launch.fake) == ["TERM 1", "exit 75 1"]
    assert launch.cluster.jobs()[second] == "RUNNING"


def test_scontrol_requeue_in_the_middle(launch):
    (job,) = launch.start("wait", "0")
    launch.cluster.run("scontrol", "requeue", job)
    launch.wait_for("COMPLETED", job=job)
    assert events(launch.fake) == ["TERM 1", "exit 75 1", "exit 0 2"]


def preempt(launch: Launch) -> None:
    """A job of the higher partition takes the whole node for a moment."""
    high = ("sbatch", "-p", "high", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    launch.cluster.run(*high)


def test_preemption_hands_back_at_once(launch):
    (job,) = launch.start("wait", "0")
    preempt(launch)
    launch.wait_for("COMPLETED", job=job)
    assert events(launch.fake) == ["TERM 1", "exit 75 1", "exit 0 2"]


def test_preemption_with_the_users_signal(slurm_with_user_signal, tmp_path, monkeypatch):
    launch = Launch(slurm_with_user_signal, tmp_path, monkeypatch)
    (job,) = launch.start("wait", "0")
    preempt(launch)
    launch.wait_for("COMPLETED", job=job)
    assert events(launch.fake)[0] == "USR2 1"
    assert events(launch.fake)[-2:] == ["exit 75 1", "exit 0 2"]


def test_the_time_limit_hands_back_and_requeues(launch):
    """A limit below the two minutes of the warning: it comes at Slurm's next look, twice a minute.

    Where that falls on the job's first second, before its step exists, the warning is lost and
    the job is ended by TERM at the limit: requeued as well.
    """
    (job,) = launch.start("wait", "0", options=("--time=1",))
    launch.wait_for("COMPLETED", job=job)
    signals = {event for event in events(launch.fake) if not event.startswith("exit")}
    assert signals in ({"USR2 1"}, {"TERM 1"})
    assert [e for e in events(launch.fake) if e.startswith("exit")] == ["exit 75 1", "exit 0 2"]


def test_the_script_reads_its_own_files_only(launch):
    launch.start("0")
    assert os.listdir(launch.project) == ["droptune-launch"]


# -- real workers, a real study, a real database --------------------------------------------------


class SlurmStudy:
    """A lasting study in PostgreSQL, its workers submitted to the cluster."""

    def __init__(self, cluster, study: LastingStudy, url: str, *arguments: str) -> None:
        self.cluster, self.study, self.storage, self.url = cluster, study, study.storage, url
        words = ("launch", "slurm", "lasting", "--device", "cpu", *arguments)
        environment = {name: cluster.environment[name] for name in ("PATH", "SLURM_CONF")}
        environment["DROPTUNE_STORAGE"] = url
        self.jobs = re.findall(
            r"slurm (\d+_\d+)", droptune(*words, folder=study.folder, **environment)
        )

    def restarts(self, job: str) -> int:
        shown = self.cluster.run("scontrol", "show", "job", job)
        return int(re.search(r"Restarts=(\d+)", shown)[1])

    def until_both_train(self, *, registered: int) -> None:
        """Until that many workers have been there, two train, and some intervals are finished."""

        def training() -> bool:
            alive = [worker for worker in self.storage.list_workers() if worker.holds]
            return len(alive) == 2 and len(self.storage.list_workers(ended=True)) == registered

        self.cluster.wait(training, 120)
        before = self.study.intervals()
        self.cluster.wait(lambda: self.study.intervals() >= before + 2, 60)

    def until_completed(self, seconds: float) -> None:
        """Until all jobs have ended well."""
        jobs = self.cluster.jobs
        self.cluster.wait(lambda: {jobs().get(job) for job in self.jobs} == {"COMPLETED"}, seconds)

    def finish(self, seconds: float) -> None:
        """Until all jobs have ended well; then nothing is lost."""
        self.until_completed(seconds)
        logs = self.study.folder.glob("droptune-launch/*/*.log")
        self.study.assert_nothing_lost("".join(path.read_text() for path in logs))


@pytest.fixture
def submit(slurm, tmp_path, postgresql):
    """Makes a study in PostgreSQL and launches it with the given arguments."""

    def start(*arguments: str, **lasting: float) -> SlurmStudy:
        url = postgresql.create().render_as_string(hide_password=False)
        study = LastingStudy(tmp_path, url, **lasting)
        return SlurmStudy(slurm, study, url, *arguments)

    yield start
    slurm.run("scancel", "--user=root", check=False)
    slurm.wait(lambda: not slurm.run("squeue", "-h"), 60)


@pytest.mark.timeout(600)
def test_a_study_survives_requeue_and_preemption(submit):
    study = submit("--workers", "2", pause=0.1, trials=12)
    study.until_both_train(registered=2)
    study.cluster.run("scontrol", "requeue", study.jobs[0])
    study.until_both_train(registered=3)
    high = ("sbatch", "-p", "high", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    study.cluster.run(*high)
    study.finish(400)
    assert [study.restarts(job) for job in study.jobs] == [2, 1]
    names = {worker.info["job"] for worker in study.storage.list_workers(ended=True)}
    assert names == {f"slurm {job}" for job in study.jobs}
    assert {job.name for job in recorded_jobs(study.storage)} == names


@pytest.mark.timeout(600)
def test_stopping_the_study_ends_its_workers_well(submit):
    """In the middle of trainings that would last for minutes: none ends before workers are told."""
    study = submit("--workers", "2", pause=0.1, trials=4, epochs=1000)
    study.until_both_train(registered=2)
    droptune("study", "stop", "lasting", folder=study.study.folder, DROPTUNE_STORAGE=study.url)
    study.until_completed(120)
    assert [study.restarts(job) for job in study.jobs] == [0, 0]
    assert {record.state for record in study.study.records()} == {State.QUEUED}  # for `resume`
    assert study.study.intervals() > 0


@pytest.fixture(scope="module", autouse=True)
def long_study(request, tmp_path_factory, postgresql):
    """A study under time limits of a minute, in a cluster of its own.

    It mostly waits: so it begins with the first test above and goes on beside them all.
    """
    wanted = any("three_time_limits" in item.name for item in request.session.items)
    if not wanted:
        yield None
        return
    url = postgresql.create().render_as_string(hide_password=False)
    ended = threading.Event()
    for cluster in cluster_of():
        study = LastingStudy(tmp_path_factory.mktemp("long"), url, pause=0.2, trials=8)
        # A loaded machine may start torch several times before an interval fits into a limit.
        submitted = SlurmStudy(cluster, study, url, "--restarts=50", "--", "--time=1")

        def start_requeued(cluster=cluster):
            while not ended.wait(1):
                cluster.start_requeued()

        restarting = threading.Thread(target=start_requeued)
        restarting.start()
        try:
            yield submitted
        finally:
            ended.set()
            restarting.join()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_longer_than_three_time_limits_ends_without_a_human(long_study):
    long_study.finish(540)
    assert long_study.restarts(long_study.jobs[0]) >= 3
