"""PostgreSQL behind a real pgbouncer in transaction mode: no client keeps a server's session."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from test_storage import create
from test_storage_many import check_complete, processes, work

from droptune.storage import Budget, Storage

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
pytestmark = [
    pytest.mark.databases("postgresql"),
    pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed (apt-get install it)"),
]
CONFIGURATION = """\
[databases]
* = {server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
max_client_conn = 300
"""


@pytest.fixture
def bouncer(tmp_path):
    """Puts a pgbouncer with three connections before the server of a URL; the URL through it."""
    started = []

    def start(url: str) -> str:
        address = sa.make_url(url)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            listen = probe.getsockname()[1]
        server = {
            "host": address.host or address.query.get("host"),
            "port": address.port or 5432,
            "user": address.username or "postgres",
            "password": address.password,
        }
        words = " ".join(f"{key}={value}" for key, value in server.items() if value)
        file = tmp_path / "pgbouncer.ini"
        file.write_text(CONFIGURATION.format(listen=listen, server=words))
        started.append(subprocess.Popen([PROGRAM, "-q", *_as_nobody(file)]))
        through = address.set(host="127.0.0.1", port=listen, query={})
        _wait_for(listen)
        return through.render_as_string(hide_password=False)

    yield start
    for process in started:
        process.kill()
        process.wait()


def _as_nobody(file: Path) -> list[str]:
    """It refuses to be root, and may not look into pytest's folder."""
    if os.geteuid() != 0:
        return [str(file)]
    handle = os.open(file, os.O_RDONLY)
    os.set_inheritable(handle, True)
    return ["-u", pwd.getpwnam("nobody").pw_name, f"/proc/{os.getpid()}/fd/{handle}"]


def _wait_for(port: int) -> None:
    give_up = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < give_up, "pgbouncer does not listen"
            time.sleep(0.02)


def test_a_study_behind_pgbouncer(bouncer, empty_url):
    """Made, claimed, recorded and ended through three connections; nothing stays in a session."""
    url, count = bouncer(empty_url), 20
    storage = Storage.open(url, create=True)
    study = create(storage, intervals=3, budget=Budget(trials=count))
    crew = [processes.Process(target=work, args=(url, study.name, 2)) for _ in range(4)]
    for process in crew:
        process.start()
    for process in crew:
        process.join(timeout=120)
        assert process.exitcode == 0
    check_complete(storage, study, count)
    bound = sa.text("SHOW idle_in_transaction_session_timeout")
    assert storage.database.read(lambda c: c.execute(bound).scalar()) == "0"
    assert storage.database.write(lambda c: c.execute(bound).scalar()) == "30s"
    assert storage.database.read(lambda c: c.execute(bound).scalar()) == "0"
