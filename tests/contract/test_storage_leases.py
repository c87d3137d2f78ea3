"""Workers come, go, die and return late: leases, beats, fences; and what outlives a training."""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa
from test_storage import ASSIGNMENT, PARAMS, baselines, claimed, create, measured, numbers

from droptune.errors import StorageError
from droptune.storage import Budget, Storage, schema
from droptune.training import Measurement, State


def age_leases(storage, seconds):
    """Let time pass in the database: every lease ends `seconds` earlier."""

    def work(connection):
        for table in (schema.trainings, schema.workers):
            until = table.c.lease_until
            connection.execute(table.update().values(lease_until=until - seconds))

    storage.database.write(work)


def seasoned(storage):
    """A storage whose server has been up for long enough."""
    storage.database.present_seconds = lambda connection: 1e9
    return storage


# -- lost trainings -----------------------------------------------------------------------------


def test_a_lost_training_resumes_under_its_number_and_the_late_worker_is_fenced_off(storage):
    study = create(storage, budget=Budget(trials=1))
    (old,) = claimed(storage, study, worker=1)
    measured(storage, old, 2)
    assert seasoned(storage).requeue_stale() == []
    age_leases(storage, 61)
    assert storage.requeue_stale() == [old.id]
    assert storage.requeue_stale() == []
    # between its loss and the next claim, and after it
    assert storage.record([(old, Measurement(3, {"val/nll": 0.0}))], ["val/nll"]) == {old.id}
    (new,) = storage.claim(study.id, 2, 3)
    assert (new.id, new.number, new.assignment, new.attempt) == (old.id, 0, ASSIGNMENT, 1)
    assert new.lease_epoch > old.lease_epoch
    assert storage.record([(old, Measurement(3, {"val/nll": 0.0}))], ["val/nll"]) == {old.id}
    assert not storage.finish(old, State.COMPLETE, values=[0.0])
    assert storage.assign([old], [ASSIGNMENT], [PARAMS]) == []
    assert storage.restart(old) == old
    storage.release([old])
    assert storage.record([(new, Measurement(3, {"val/nll": 0.3}))], ["val/nll"]) == set()
    assert storage.finish(new, State.COMPLETE, values=[0.3])
    (record,) = storage.records(study.id)
    assert record.curves == {"val/nll": (0.5, 0.25, 0.3)}
    assert record.training.attempt == 1


def test_beats_and_measurements_keep_a_lease(storage):
    study = create(storage)
    beating, measuring, silent = claimed(storage, study, 3)
    seasoned(storage)
    for i in (1, 2):
        age_leases(storage, 40)
        storage.beat(1, [beating.id])
        storage.record([(measuring, Measurement(i, {"val/nll": 1.0}))], ["val/nll"])
    assert storage.requeue_stale() == [silent.id]


def test_a_beat_names_what_was_lost(storage):
    study = create(storage)
    kept, released, ended = claimed(storage, study, 3, worker=1)
    storage.release([released])
    storage.finish(ended, State.FAIL)
    orders = storage.beat(1, [kept.id, released.id, ended.id])
    assert orders.lost == {released.id, ended.id}
    (again,) = storage.claim(study.id, 2, 1)
    assert again.id == released.id
    assert storage.beat(1, [again.id]).lost == {again.id}


def test_a_beat_names_stopped_studies(storage):
    first, second = create(storage, "first"), create(storage, "second")
    held = [*claimed(storage, first), *claimed(storage, second)]
    storage.update_study(second.id, status="stopped")
    orders = storage.beat(1, [t.id for t in held])
    assert (orders.stopped, orders.lost) == ({second.id}, frozenset())


def test_after_an_absence_of_the_database_all_may_return_first(storage):
    study = create(storage)
    (training,) = claimed(storage, study)
    age_leases(storage, 61)
    storage.database.present_seconds = lambda connection: 5.0
    assert storage.requeue_stale() == []
    assert storage.record([(training, Measurement(1, {"val/nll": 1.0}))], ["val/nll"]) == set()
    assert seasoned(storage).requeue_stale() == []


def test_the_database_knows_for_how_long_it_was_there(storage):
    present = storage.database.read(storage.database.present_seconds)
    assert present > 0
    storage.database.away.set()
    storage.studies()
    assert not storage.away.is_set()
    assert storage.database.read(storage.database.present_seconds) < 60


def test_a_clock_of_a_worker_does_not_matter(storage, monkeypatch):
    study = create(storage)
    (training,) = claimed(storage, study)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 600)
    (other,) = claimed(storage, study, worker=2)
    assert seasoned(storage).requeue_stale() == []
    records = {r.training.id: r for r in storage.records(study.id)}
    apart = records[other.id].started - records[training.id].started
    assert abs(apart.total_seconds()) < 60


# -- workers ------------------------------------------------------------------------------------


def test_workers_show_what_they_train(storage):
    study = create(storage, queue=baselines("none"))
    worker = storage.register_worker(host="node-1", pid=12, device="cuda:0", info={"job": "j7"})
    quiet = storage.register_worker(host="node-1", pid=13, device="cpu")
    (training, _) = claimed(storage, study, 2, worker=worker)
    measured(storage, training, 3)
    row, _ = storage.list_workers()
    assert (row.id, row.host, row.pid, row.device) == (worker, "node-1", 12, "cuda:0")
    assert (row.state, row.info) == ("alive", {"job": "j7"})
    held = [(h.study, h.training.name, h.intervals_done) for h in row.holds]
    assert held == [("digits", "baseline none 0000", 3), ("digits", "trial 0001", 0)]
    assert storage.records(study.id)[0].worker == "node-1:12"
    age_leases(storage, 61)
    storage.beat(worker, [training.id], info={"job": "j8"})
    states = [(w.state, w.info) for w in storage.list_workers()]
    assert states == [("alive", {"job": "j8"}), ("silent", {})]
    storage.end_worker(quiet)
    assert [w.id for w in storage.list_workers()] == [worker]
    assert [w.state for w in storage.list_workers(ended=True)] == ["alive", "ended"]


def test_a_worker_that_ends_leaves_nothing_running(storage):
    study = create(storage)
    worker = storage.register_worker(host="h", pid=1, device="cpu")
    claimed(storage, study, 2, worker=worker)
    storage.end_worker(worker)
    progress = storage.progress(study.id)
    assert (progress.queued, progress.running) == (2, 0)
    assert numbers(storage.claim(study.id, 9, 2)) == [0, 1]


def other_machine(storage, monkeypatch):
    monkeypatch.setattr("droptune.storage.workers.machine_id", lambda: "another")
    return storage.register_worker(host="far", pid=1, device="cpu")


@pytest.mark.databases("sqlite")
def test_sqlite_serves_one_machine(storage, monkeypatch):
    here = storage.register_worker(host="near", pid=1, device="cpu")
    with pytest.raises(StorageError, match=r"near.*one machine only: use PostgreSQL"):
        other_machine(storage, monkeypatch)
    storage.end_worker(here)
    other_machine(storage, monkeypatch)


@pytest.mark.databases("sqlite")
def test_a_machine_that_was_restarted_is_still_the_same(storage, monkeypatch):
    storage.register_worker(host="far", pid=1, device="cpu")  # and it never ended
    other_machine(storage, monkeypatch)


@pytest.mark.databases("postgresql", "mysql")
def test_servers_serve_many_machines(storage, monkeypatch):
    storage.register_worker(host="near", pid=1, device="cpu")
    other_machine(storage, monkeypatch)
    assert len(storage.list_workers()) == 2


@pytest.mark.databases("sqlite")
def test_sqlite_on_a_network_is_refused_for_workers(storage, monkeypatch):
    monkeypatch.setattr("droptune.storage.address.file_system", lambda folder: "nfs4")
    with pytest.raises(StorageError, match=r"network file system \(nfs4\).*PostgreSQL"):
        storage.register_worker(host="h", pid=1, device="cpu")


def test_widths_are_remembered(storage):
    assert storage.recall_width("H200", "f1") is None
    storage.remember_width("H200", "f1", {"width": 16})
    storage.remember_width("H200", "f1", {"width": 32})
    storage.remember_width("H200", "f2", {"width": 1})
    assert storage.recall_width("H200", "f1") == {"width": 32}


# -- what the mirror, the verdict and the checkpoints keep --------------------------------------


def test_one_owner_mirrors_a_study(storage):
    study = create(storage)
    assert storage.acquire_mirror_lease(study.id, "a", 30)
    assert storage.acquire_mirror_lease(study.id, "a", 30)
    assert not storage.acquire_mirror_lease(study.id, "b", 30)
    storage.release_mirror_lease(study.id, "b")
    assert not storage.acquire_mirror_lease(study.id, "b", 30)
    storage.release_mirror_lease(study.id, "a")
    assert storage.acquire_mirror_lease(study.id, "b", -1)  # over at once
    assert storage.acquire_mirror_lease(study.id, "c", 30)


def test_links_are_kept_per_training(storage):
    study = create(storage)
    assert storage.mirror_links(study.id) == {}
    assert storage.mirror_state(study.id) == {}
    storage.put_mirror_link(study.id, 4, {"run_id": None})
    storage.put_mirror_link(study.id, 4, {"run_id": "r", "synced": 3})
    storage.put_mirror_link(study.id, 5, {"run_id": "s"})
    storage.put_mirror_state(study.id, {"experiment": "7"})
    links = {4: {"run_id": "r", "synced": 3}, 5: {"run_id": "s"}}
    assert storage.mirror_links(study.id) == links
    assert storage.mirror_state(study.id) == {"experiment": "7"}
    storage.forget_mirror_links(study.id)
    assert storage.mirror_links(study.id) == storage.mirror_state(study.id) == {}


def test_a_score_is_never_replaced(storage):
    study = create(storage)
    first, second = storage.claim(study.id, 1, 2)
    assert storage.put_score(first.id, "test", "nll", b"\0one")
    assert not storage.put_score(first.id, "test", "nll", b"two")
    assert storage.put_score(second.id, "test", "nll", b"three")
    assert storage.put_score(second.id, "test", "correct", b"four")
    assert storage.get_score(first.id, "test", "nll") == b"\0one"
    assert storage.get_score(first.id, "validation", "nll") is None
    assert storage.scores(study.id, "test", "nll") == {first.id: b"\0one", second.id: b"three"}


def test_a_verdict_is_kept_and_replaced(storage):
    study = create(storage)
    assert storage.get_verdict(study.id) is None
    storage.put_verdict(study.id, {"best": "trial 3", "interval": [0.1, None]})
    storage.put_verdict(study.id, {"best": "none"})
    assert storage.get_verdict(study.id) == {"best": "none"}


def test_blobs_of_any_size_are_kept(storage):
    large = bytes(range(256)) * (9 * 2**12)  # 9 MB
    for name, content in {"a/1": large, "a/2": b"", "b_1": b"x", "b%": b"y"}.items():
        storage.put_blob(name, content)
        assert storage.get_blob(name) == content
    storage.put_blob("a/1", b"short")
    assert storage.get_blob("a/1") == b"short"
    assert storage.blob_names("a/") == ["a/1", "a/2"]
    assert storage.blob_names("b_") == ["b_1"]
    storage.delete_blob("a/1")
    storage.delete_blob("a/1")
    assert storage.get_blob("a/1") is None


# -- the connection -----------------------------------------------------------------------------


def connection_id(storage):
    """The server's number of the connection that a transaction runs on."""
    which = {"postgresql": "pg_backend_pid", "mysql": "connection_id"}[storage.database.dialect]
    query = sa.select(getattr(sa.func, which)())
    return storage.database.read(lambda connection: connection.execute(query).scalar())


def connections(url):
    """All that are open to this database, but for the one that asks."""
    query = {
        "postgresql": "SELECT pid FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        "mysql": "SELECT id FROM information_schema.processlist "
        "WHERE db = database() AND id <> connection_id()",
    }
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return set(connection.execute(sa.text(query[engine.dialect.name])).scalars())


@pytest.mark.databases("postgresql", "mysql")
def test_a_burst_shares_a_connection_and_none_stays_open(storage, url, monkeypatch):
    monkeypatch.setattr("droptune.storage.pool.LINGER_SECONDS", 60.0)
    first = connection_id(storage)
    assert connection_id(storage) == first
    assert first in connections(url)
    monkeypatch.setattr("droptune.storage.pool.LINGER_SECONDS", 0.01)
    assert connection_id(storage) == first
    deadline = time.monotonic() + 30
    while first in connections(url):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert connection_id(storage) != first


@pytest.mark.databases("postgresql", "mysql")
def test_transactions_at_the_same_time_have_their_own_connections(storage):
    which = {"postgresql": "pg_backend_pid", "mysql": "connection_id"}[storage.database.dialect]
    query = sa.select(getattr(sa.func, which)())

    def nested(connection):
        return connection.execute(query).scalar(), connection_id(storage)

    outer, inner = storage.database.read(nested)
    assert outer != inner


@pytest.mark.databases("sqlite")
def test_sqlite_keeps_a_write_ahead_log(storage, url):
    with storage.database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
    assert Storage.open(url).redacted == url
