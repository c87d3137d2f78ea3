"""The database goes away and comes back: nothing is lost, nothing is doubled."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress

import psycopg
import pymysql
import pytest
import sqlalchemy as sa
from databases import own_postgresql
from test_storage import ASSIGNMENT, PARAMS, baselines, confirmations, create
from test_storage_many import check_complete, work

from droptune.errors import StorageError, WorkRemainsError
from droptune.storage import Budget, Storage
from droptune.storage.address import Address
from droptune.storage.database import Database
from droptune.storage.studies import lock_study
from droptune.training import Measurement, State

processes = multiprocessing.get_context("forkserver")


# -- a commit whose reply is lost ---------------------------------------------------------------


@contextmanager
def losing_replies(storage):
    """Each first commit of a transaction succeeds, and its reply never arrives."""
    lost = set()

    def commit_and_lose(connection):
        caller = threading.get_ident()
        if caller in lost:
            lost.discard(caller)
            return
        lost.add(caller)
        connection.connection.dbapi_connection.commit()
        cause = ConnectionResetError("reset by peer")
        raise sa.exc.OperationalError("COMMIT", {}, cause, connection_invalidated=True)

    writing = storage.database._writing
    sa.event.listen(writing, "commit", commit_and_lose)
    storage.patience = 30.0
    yield
    sa.event.remove(writing, "commit", commit_and_lose)


def scenario(storage):
    """Every write that there is; returns all that they answer and all that is kept."""
    said = []
    say = said.append
    queue = [*baselines("none"), *confirmations(0)]
    study = create(storage, queue=queue, params=[PARAMS, None], budget=Budget(trials=4))
    worker = storage.register_worker(host="h", pid=1, device="cpu")
    say(storage.enqueue(study.id, [*confirmations(0, 1), *baselines("half")]))
    group = storage.claim(study.id, worker, 6)
    say([t.name for t in group])
    new = [t for t in group if t.assignment is None]
    say(storage.assign(new, [ASSIGNMENT] * len(new), [PARAMS] * len(new)))
    for i in (1, 2):
        items = [(t, Measurement(i, {"val/nll": i + t.id / 9})) for t in group]
        say(storage.record(items, ["val/nll"]))
    say(storage.finish(group[0], State.COMPLETE, values=[0.5], best_interval=2))
    say(storage.finish(group[2], State.PRUNED))
    say(storage.restart(group[1]))
    storage.release(group[3:5])
    say(storage.beat(worker, [group[5].id], device_seconds={study.id: 3.0}))
    storage.database.present_seconds = lambda connection: 1e9
    say([t.id for t in storage.claim(study.id, worker, 1)])
    say(storage.update_study(study.id, phase="confirming", if_phase="searching"))
    say(storage.put_score(group[0].id, "test", "nll", b"1"))
    storage.put_blob("b", b"12")
    storage.put_verdict(study.id, {"a": 1})
    storage.remember_width("d", "f", {"width": 2})
    say(storage.acquire_mirror_lease(study.id, "o", 60))
    storage.put_mirror_link(study.id, group[0].id, {"run_id": "r"})
    storage.end_worker(worker)
    say([(r.training, r.state, r.curves, r.values) for r in storage.records(study.id)])
    say(storage.progress(study.id))
    say((storage.get_blob("b"), storage.get_verdict(study.id), len(storage.list_workers())))
    say(len(create(storage, "second").name))
    say(storage.delete_study("second"))
    return said


def test_every_write_survives_the_loss_of_its_reply(new_url):
    undisturbed = scenario(Storage.open(new_url(), create=True))
    storage = Storage.open(new_url(), create=True)
    with losing_replies(storage):
        assert scenario(storage) == undisturbed


# -- a network that is cut ----------------------------------------------------------------------


class Proxy:
    """Forwards TCP connections to a server, until it is cut."""

    def __init__(self, host, port):
        self.target = (host, port)
        self.open = []
        self.up = True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if not self.up:
                    client.close()
                    continue
                server = socket.create_connection(self.target)
                self.open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source, target):
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self.up = False
        for end in self.open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.open.clear()

    def close(self):
        self.cut()
        self.listener.close()


@pytest.fixture
def proxy(url):
    address = sa.make_url(url)
    if not address.host:
        pytest.skip("this server listens on a socket file only")
    made = Proxy(
        address.host, address.port or {"mysql": 3306}.get(address.get_backend_name(), 5432)
    )
    made.url = address.set(host="127.0.0.1", port=made.port).render_as_string(hide_password=False)
    yield made
    made.close()


@pytest.mark.databases("postgresql", "mysql")
def test_workers_go_on_when_the_network_is_cut_again_and_again(storage, proxy):
    count = 30
    study = create(storage, intervals=3, budget=Budget(trials=count))
    crew = [processes.Process(target=work, args=(proxy.url, study.name, 2, 0.01)) for _ in range(3)]
    for process in crew:
        process.start()
    for _ in range(6):
        time.sleep(0.4)
        proxy.cut()
        time.sleep(0.15)
        proxy.up = True
    for process in crew:
        process.join(timeout=120)
        assert process.exitcode == 0
    check_complete(storage, study, count)


@pytest.mark.databases("postgresql", "mysql")
def test_patience_ends_with_work_remaining(proxy):
    storage = Storage.open(proxy.url, patience=0.5)
    proxy.cut()
    with pytest.raises(WorkRemainsError, match="cannot be reached") as ended:
        storage.studies()
    assert "\n" not in str(ended.value)
    assert storage.away.is_set()
    storage.patience = 0.0
    with pytest.raises(StorageError, match="cannot be reached"):
        storage.studies()
    proxy.up = True
    assert storage.studies() == []
    assert not storage.away.is_set()


@pytest.mark.databases("postgresql", "mysql")
def test_patience_may_end_while_waiting(proxy):
    storage = Storage.open(proxy.url, patience=600.0)
    proxy.cut()
    threading.Timer(0.3, lambda: setattr(storage, "patience", 0.1)).start()
    with pytest.raises(WorkRemainsError):
        storage.studies()


@pytest.mark.databases("postgresql", "mysql")
def test_a_worker_may_start_before_its_database(proxy):
    proxy.cut()
    threading.Timer(0.5, lambda: setattr(proxy, "up", True)).start()
    assert Storage.open(proxy.url, patience=30.0).studies() == []


# -- a server that dies -------------------------------------------------------------------------


@pytest.fixture
def mortal():
    """A PostgreSQL server that only this test uses."""
    with own_postgresql() as server:
        yield server


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "stopped"])
def test_a_postgresql_that_dies_under_load_loses_nothing(mortal, end):
    address = sa.make_url(mortal.get_uri()).set(drivername="postgresql+psycopg")
    url = address.render_as_string(hide_password=False)
    storage = Storage.open(url, create=True, patience=60.0)
    count = 40
    study = create(storage, intervals=3, budget=Budget(trials=count))
    crew = [processes.Process(target=work, args=(url, study.name, 2, 0.02)) for _ in range(4)]
    for process in crew:
        process.start()
    while storage.studies()[0].trials[State.COMPLETE] < 5:
        time.sleep(0.02)
    os.kill(mortal.get_pid(), end)
    time.sleep(1.0)
    for left in ("postmaster.pid", ".s.PGSQL.5432.lock", ".s.PGSQL.5432"):
        (mortal.pgdata / left).unlink(missing_ok=True)  # its process may not be reaped
    mortal.ensure_postgres_running()
    for process in crew:
        process.join(timeout=120)
        assert process.exitcode == 0
    check_complete(storage, study, count)


def explained(url, cause):
    """What is said of a connection that failed in this way."""
    wrapped = not isinstance(cause, OSError)
    error = sa.exc.OperationalError("SELECT 1", {}, cause) if wrapped else cause
    return Database(Address.parse(url)).explain(error)


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        ("SSL error: certificate verify failed", "refused"),
        ("server does not support SSL, but SSL was required", "refused"),
        ("SSL SYSCALL error: EOF detected", "cannot be reached"),
        ("SSL connection has been closed unexpectedly", "cannot be reached"),
    ],
)
def test_a_wrong_certificate_is_not_waited_for_and_a_dying_server_is(words, verb):
    """As a PostgreSQL with TLS was seen to end connections that are just being made."""
    assert verb in explained(
        "postgresql://h/d?sslmode=verify-full", psycopg.OperationalError(words)
    )


def test_a_wrong_certificate_of_mysql_is_not_waited_for():
    words = "Can't connect to MySQL server on 'h' ([SSL: CERTIFICATE_VERIFY_FAILED] certificate…)"
    assert "refused" in explained("mysql://h/d", pymysql.OperationalError(2003, words))
    assert "refused" in explained("mysql://h/d?ssl_ca=/no/such", FileNotFoundError(2, "No file"))
    refused = pymysql.OperationalError(2003, "Can't connect to MySQL server on 'h' ([Errno 111])")
    assert "cannot be reached" in explained("mysql://h/d", refused)


# -- a worker that is frozen --------------------------------------------------------------------


def freeze_while_writing(url, name, frozen):
    """Record an interval, and be stopped (SIGSTOP) when all is locked and nothing committed."""
    storage = Storage.open(url, patience=60.0, lease_seconds=4.0)
    study = storage.study(name)
    worker = storage.register_worker(host="here", pid=os.getpid(), device="cpu")
    (training,) = storage.claim(study.id, worker, 1)
    write, times = storage._write_progress, []

    def stop(connection, held):
        write(connection, held)
        lock_study(connection, study.id)
        times.append(time.monotonic())
        if len(times) == 1:
            frozen.set()
            os.kill(os.getpid(), signal.SIGSTOP)

    storage._write_progress = stop
    lost = storage.record([(training, Measurement(1, {"val/nll": 1.0}))], ["val/nll"])
    assert lost == {training.id}


@pytest.mark.databases("postgresql", "mysql")
def test_a_worker_frozen_in_a_transaction_keeps_nobody_waiting(storage, url):
    study = create(storage, budget=Budget(trials=2))
    frozen = processes.Event()
    late = processes.Process(target=freeze_while_writing, args=(url, study.name, frozen))
    late.start()
    assert frozen.wait(60)
    storage.database.present_seconds = lambda connection: 1e9
    ended = []
    deadline = time.monotonic() + 60
    try:
        while len(ended) < 2:
            assert time.monotonic() < deadline, "its rows stay locked"
            storage.requeue_stale()
            for training in storage.claim(study.id, 7, 2):
                storage.record([(training, Measurement(1, {"val/nll": 0.5}))], ["val/nll"])
                assert storage.finish(training, State.COMPLETE, values=[0.5])
                ended.append(training.number)
            time.sleep(0.05)
    finally:
        os.kill(late.pid, signal.SIGCONT)
    late.join(60)
    assert late.exitcode == 0  # it ran its transaction again, and found its lease lost
    assert sorted(ended) == [0, 1]
    assert {r.curves["val/nll"] for r in storage.records(study.id)} == {(0.5,)}


@pytest.mark.databases("postgresql")
def test_a_worker_frozen_for_long_tries_again(url, monkeypatch):
    """However long that was: it waited for no lock meanwhile."""
    monkeypatch.setattr("droptune.storage.database.BUSY_SECONDS", 0.1)
    database, runs = Database(Address.parse(url), standing_seconds=0.2), []

    def work(connection):
        runs.append(connection.execute(sa.text("SELECT 1")).scalar())
        if len(runs) == 1:
            time.sleep(1.0)
        return connection.execute(sa.text("SELECT 2")).scalar()

    assert database.write(work) == 2
    assert runs == [1, 1]
