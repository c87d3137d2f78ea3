"""The mirror among failures: killed syncers, killed servers, answers that never come."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
import sqlalchemy as sa
from mirrored import Trainings, create, differences, free_port, serving

from droptune.mirror import Mirror, Tracking, parent
from droptune.mirror import syncer as syncer_module
from droptune.mirror.syncer import Companion, Syncer
from droptune.storage import Storage

pytestmark = pytest.mark.databases("sqlite")

SYNCER = """
import sys, time
from droptune.mirror import Mirror, Tracking
from droptune.storage import Storage
url, tracking, name, lease = sys.argv[1:]
where = Tracking.resolve(tracking, url)
mirror = Mirror(Storage.open(url), name, where, lease_seconds=float(lease))
while True:
    result = mirror.sync_once(refresh=True)
    if result.complete:
        print("complete", flush=True)
    time.sleep(0.05)
"""


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'droptune.db'}"


@pytest.fixture
def store(url):
    return Storage.open(url, create=True)


def syncer(url, tracking, name, *, lease=1.0):
    return subprocess.Popen(
        [sys.executable, "-c", SYNCER, url, tracking.uri, name, str(lease)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.slow
def test_killed_syncers_and_a_killed_server_lose_and_double_nothing(store, url, tmp_path):
    """Three syncers die at random points, then the server does; trainings go on all the while."""
    draw = random.Random(4)
    create(store, trials=60)
    worker = Trainings(store, "digits")
    port = free_port()
    with serving(tmp_path, port=port) as server:
        tracking = Tracking.resolve(server.address, "")
        for _ in range(3):
            running = worker.claim(3)
            worker.measure(running, 1, 3)
            process = syncer(url, tracking, "digits")
            _wait_for_link(store, store.study("digits").id)
            worker.run(8)
            time.sleep(draw.uniform(0, 0.6))
            process.kill()
            process.communicate()
            worker.measure(running, 4, 6)
            worker.complete(running)
    process = syncer(url, tracking, "digits")  # nobody listens now
    worker.run(8)
    with serving(tmp_path, port=port):
        assert process.stdout.readline() == "complete\n"
        process.kill()
        process.communicate()
        assert differences(store, "digits", tracking) == []


def _wait_for_link(store, study_id):
    """Until the syncer is in the middle of its work."""
    known = len(store.mirror_links(study_id))
    while len(store.mirror_links(study_id)) <= known:
        time.sleep(0.02)


class Lossy(ThreadingHTTPServer):
    """A proxy before MLflow: `plan` says what happens to the next creations of runs.

    "drop": it is done, but the answer is lost; "late": it is done by `deliver`, long after the
    client gave up.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = target
        self.plan: Iterator[str] = iter(())
        self.late: list[tuple[str, bytes]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def deliver(self) -> None:
        for path, body in self.late:
            assert self.forward("POST", path, body)[0] == 200

    def forward(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        request = Request(self.target + path, data=body or None, headers=headers, method=method)
        try:
            with urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()


class Handler(BaseHTTPRequestHandler):
    server: Lossy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        creates = self.path.endswith("/runs/create")
        fate = next(self.server.plan, "") if creates else ""
        if fate == "late":
            self.server.late.append((self.path, body))
        else:
            status, answer = self.server.forward(self.command, self.path, body)
        if fate:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PATCH = do_DELETE = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_creations_without_an_answer_leave_no_ghosts(store, tmp_path):
    create(store)
    Trainings(store, "digits").run(7)
    with serving(tmp_path) as server, Lossy(server.address) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        proxy.plan = iter(["drop", "", "drop", "late", "", "late", "late", "drop"])
        mirror = Mirror(store, "digits", Tracking.resolve(proxy.address, ""))
        assert not mirror.sync_once(refresh=True).complete
        while not mirror.sync_once(refresh=True).complete:
            pass
        assert next(proxy.plan, None) is None
        proxy.deliver()
        direct = Tracking.resolve(server.address, "")
        assert any("2 runs with" in line for line in differences(store, "digits", direct))
        row = store.study("digits")
        state = store.mirror_state(row.id)
        store.put_mirror_state(row.id, state | {"sweep_at": 0})  # as if a minute had passed
        mirror.release()
        assert not Mirror(store, "digits", direct).sync_once(refresh=True).doubtful
        assert differences(store, "digits", direct) == []
        proxy.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_holder_that_was_too_slow_leaves_no_ghosts(store, tmp_path, monkeypatch):
    """Its creation arrives when the next holder has looked and found nothing."""
    monkeypatch.setattr(parent, "_DOUBT", 1500)
    create(store)
    Trainings(store, "digits").run(4)
    with serving(tmp_path) as server, Lossy(server.address) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        slow = Mirror(store, "digits", Tracking.resolve(proxy.address, ""), lease_seconds=30)
        proxy.plan = iter(["", "", "late"])
        assert not slow.sync_once().complete
        direct = Tracking.resolve(server.address, "")
        fast = Mirror(store, "digits", direct)
        _expire_lease(store)
        assert fast.sync_once().doubtful
        proxy.deliver()
        assert any("2 runs with" in line for line in differences(store, "digits", direct))
        while fast.sync_once().doubtful:
            time.sleep(0.1)
        assert differences(store, "digits", direct) == []
        proxy.shutdown()
        thread.join()


def _expire_lease(store):
    store.database.write(
        lambda c: c.execute(sa.text("UPDATE droptune_mirrors SET lease_until = 0"))
    )


def test_a_companion_ends_with_its_worker_and_has_written_all(store, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    create(store)
    worker = Trainings(store, "digits")
    with Companion(["digits"], storage_url=url) as companion:
        worker.run(7)
        assert companion.close(wait=240)
    assert differences(store, "digits", Tracking.resolve(None, url)) == []


def test_nobody_waits_for_a_companion_in_a_hurry(url):
    """As after Ctrl-C, while it waits for a server that does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        create(Storage.open(url, create=True))
        asked: list[float] = []

        def hurried():
            asked.append(time.monotonic())
            return len(asked) > 3

        companion = Companion(["digits"], storage_url=url, tracking_uri=address, hurried=hurried)
        with companion:
            process = psutil.Process(companion.pid)
        assert len(asked) == 4
        process.kill()


def test_a_drain_does_not_insist_on_a_server_that_is_away(store, monkeypatch):
    monkeypatch.setattr(syncer_module, "_VAIN", 0.2)
    create(store)
    Trainings(store, "digits").run(1)
    away = Tracking.resolve("http://127.0.0.1:9", "")
    rounds: list[str | None] = []
    syncer = Syncer(
        lambda: ["digits"],
        lambda name: Mirror(store, name, away),
        tell=lambda name, result: rounds.append(result.reason),
        period=0.1,
    )
    assert not syncer.drain(3600)
    assert rounds == ["MLflow at http://127.0.0.1:9: nobody listens there"]


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.parametrize("served", [False, True], ids=["directly", "through a server"])
def test_eight_syncers_at_once_on_an_empty_mlflow(store, url, tmp_path, database, served, request):
    """One experiment, one parent, each child once; two studies race for the schema as well."""
    for name in ("a", "b"):
        create(store, name)
        Trainings(store, name).run(6)
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    if database == "postgresql":
        created = request.getfixturevalue("postgresql").create()
        address = created.render_as_string(hide_password=False)
    with serving(tmp_path, database=address) if served else nullcontext() as server:
        tracking = Tracking.resolve(server.address if server else address, "")
        syncers = [syncer(url, tracking, name, lease=10) for name in "abababab"]
        try:
            while not all(_covered(store, name) for name in ("a", "b")):
                assert all(process.poll() is None for process in syncers)
                time.sleep(0.1)
        finally:
            for process in syncers:
                process.kill()
                process.communicate()
        for name in ("a", "b"):
            assert differences(store, name, tracking) == []


def _covered(store, name):
    links = store.mirror_links(store.study(name).id).values()
    return len(links) == 6 and all(link.get("gain") for link in links)
