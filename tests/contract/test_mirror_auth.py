"""A server with users: what one may not do is said in one line, and the lease is given up."""

from __future__ import annotations

import base64
import json
import urllib.request

import pytest
from mirrored import Trainings, create, differences, serving

from droptune.mirror import Mirror, Tracking
from droptune.storage import Storage

pytestmark = [pytest.mark.databases("sqlite"), pytest.mark.slow]

ADMIN, WRITER, READER = ("admin", "a-password-of-admin"), ("ann", "ann-1234567890"), (
    "bob",
    "bob-1234567890",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auth")
    patch = pytest.MonkeyPatch()
    (folder / "auth.ini").write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = sqlite:///{folder / 'users.db'}\n"
        f"admin_username = {ADMIN[0]}\n"
        f"admin_password = {ADMIN[1]}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 60\n"
    )
    patch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(folder / "auth.ini"))
    patch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "only for this test")
    with serving(folder, options=("--app-name", "basic-auth")) as running:
        for name, password in (WRITER, READER):
            _post(running, "users/create", {"username": name, "password": password})
        yield running
    patch.undo()


def _post(server, what, body):
    token = base64.b64encode(":".join(ADMIN).encode()).decode()
    request = urllib.request.Request(
        f"{server.address}/api/2.0/mlflow/{what}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Basic {token}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


@pytest.fixture
def store(tmp_path):
    opened = Storage.open(f"sqlite:///{tmp_path / 'droptune.db'}", create=True)
    create(opened)
    Trainings(opened, "digits").run(7)
    return opened


def log_in(monkeypatch, user):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])


def test_users_and_permissions(store, server, monkeypatch):
    tracking = Tracking.resolve(server.address, "")
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    nobody = Mirror(store, "digits", tracking).sync_once(refresh=True)
    assert nobody.refused
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in nobody.reason
    assert store.mirror_state(1)["reason"] == nobody.reason

    log_in(monkeypatch, (WRITER[0], "wrong-1234567890"))
    assert "(401)" in Mirror(store, "digits", tracking).sync_once().reason

    log_in(monkeypatch, WRITER)
    writer = Mirror(store, "digits", tracking)
    assert writer.sync_once(refresh=True).complete
    writer.release()
    assert differences(store, "digits", tracking) == []

    Trainings(store, "digits").run(3)
    log_in(monkeypatch, READER)
    reader = Mirror(store, "digits", tracking).sync_once()
    assert reader.refused
    assert "does not let bob write (403)" in reader.reason

    log_in(monkeypatch, WRITER)  # the reader has given up the lease
    again = Mirror(store, "digits", tracking)
    assert again.sync_once(refresh=True).complete
    assert store.mirror_state(1)["reason"] is None
    assert differences(store, "digits", tracking) == []
