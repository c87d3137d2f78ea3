"""What people see: `droptune mirror ui` in a browser, and a model that is served.

With DROPTUNE_SCREENSHOTS=DIR the pages are kept there as PNG.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from mirrored import AUTHORS, SITES, Trainings, assignment, create, free_port

from droptune.mirror import Mirror, Tracking
from droptune.mirror.models import Trained
from droptune.program.short_form import classification
from droptune.storage import Storage
from droptune.training import NewTraining, TrainingKind

CHROMIUM = Path("/usr/bin/chromium")
LAUNCH = {
    "executable_path": str(CHROMIUM),
    "args": ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
}
# The assistant's panel opens over the runs on a first visit; people close it once.
CLOSE_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
pytestmark = pytest.mark.slow


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(0.2),
            torch.nn.Linear(16, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def trained(record):
    x, y = torch.randn(30, 8), torch.arange(30) % 3
    program = classification(model=Net, train=(x, y), batch_size=8, epochs=1, lr=1e-3)
    torch.manual_seed(0)
    return Trained(record, program, Net().state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mirrored study of 40 trials, one of them running, with confirmations."""
    folder = tmp_path_factory.mktemp("ui")
    url = f"sqlite:///{folder / 'droptune.db'}"
    store = Storage.open(url, create=True)
    row = create(store, trials=41, intervals=20)
    worker = Trainings(store, "digits")
    worker.run(40)
    worker.measure(worker.claim(1), 1, 7)
    kind, best = TrainingKind.CONFIRMATION, assignment(AUTHORS, 1e-3)
    store.enqueue(row.id, [NewTraining(kind, best, "winner", seed_index=i) for i in range(2)])
    worker.run(2)
    mirror = Mirror(store, "digits", Tracking.resolve(None, url), load=trained)
    assert mirror.sync_once(refresh=True).complete
    mirror.release()
    return folder


@pytest.fixture(scope="module")
def links(folder):
    """The addresses that `droptune mirror ui` prints."""
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(
        [sys.executable, "-m", "droptune", "mirror", "ui", "--port", str(free_port())],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        lines = [process.stdout.readline().split() for _ in range(4)]
        yield {words[0]: words[1] for words in lines}
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip("no chromium here")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(**LAUNCH)
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.add_init_script(CLOSE_ASSISTANT)
    yield context.new_page()
    context.close()


def show(page, address: str, name: str, *texts: str) -> None:
    """Open a page, wait for the texts, keep a picture where that is asked for."""
    page.goto(address)
    for text in texts:
        page.get_by_text(text).first.wait_for(timeout=60_000)
    if chosen := os.environ.get("DROPTUNE_SCREENSHOTS"):
        page.wait_for_timeout(3000)  # charts draw after their titles
        Path(chosen).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(chosen) / f"mlflow-{name}.png")


def test_the_link_opens_a_leaderboard(page, links, folder):
    show(page, links["leaderboard"], "leaderboard", "gain", "objective", "41 matching runs")
    body = page.inner_text("body")
    store = Storage.open(f"sqlite:///{folder / 'droptune.db'}")
    records = [r for r in store.records(1) if r.values and r.training.kind.is_trial]
    best = sorted(records, key=lambda r: r.value)[:3]
    places = [body.index(record.training.name) for record in best]
    assert places == sorted(places)
    for column in ("objective", "gain", "lr", "dropout_mean", "droptune.state"):
        assert column in body
    assert "confirm winner" not in body


def test_the_charts_are_those_of_dropout(page, links):
    show(page, links["charts"], "charts", "dropout_mean", "val/nll")
    body = page.inner_text("body")
    assert "digits: NOT CONFIRMED" in body
    assert "Parallel Coordinates" in body
    assert "time/seconds" not in body


def test_a_trial_shows_its_rates_and_curves(page, links):
    show(page, links["leaderboard"], "leaderboard", "41 matching runs")
    page.get_by_text("trial 0007").first.click()
    page.wait_for_url("**/runs/*")
    show(page, page.url, "trial", "trial 0007", f"dropout/{SITES[0]}", "best/accuracy", "objective")


def test_the_answer_is_the_first_line_of_the_study_s_run(page, links):
    show(page, links["answer"], "answer", "NOT CONFIRMED", "probability of zeroing")


def test_a_page_to_explore_needs_nothing_from_elsewhere(page, folder):
    """Pointing at a trial's point says what it is; what is chosen across and up moves it."""
    (file,) = folder.glob("mlartifacts/**/explore.html")
    wanted = []
    page.on("request", lambda request: wanted.append(request.url))
    page.goto(file.as_uri())
    points = page.locator("#points circle")
    assert points.count() > 20
    points.first.dispatch_event("pointerenter")
    about = page.inner_text("#about")
    assert about.startswith(
        page.locator("circle.chosen").get_attribute("data-trial") + ": COMPLETE"
    )
    assert "head.dropout" in about
    before = points.first.get_attribute("cx")
    page.select_option("#x", "mean rate")
    assert points.first.get_attribute("cx") != before
    assert page.locator("#curves path").count() > points.count()  # pruned ones have no objective
    assert wanted == [file.as_uri()]


def test_the_registry_has_the_challenger(page, links):
    show(page, links["models"], "registry", "challenger", "Version 1")


def test_the_registered_model_is_served(folder):
    """`mlflow models serve` answers, in the environment that is there."""
    tracking = Tracking.resolve(None, f"sqlite:///{folder / 'droptune.db'}")
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local",
        "-m", "models:/droptune-digits@challenger", "-p", str(port), "-h", "127.0.0.1",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it calls uvicorn
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking.uri, "PATH": path}
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            answer = _ask(port, process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
    assert len(answer["predictions"]) == 2
    assert all(math.isfinite(value) for row in answer["predictions"] for value in row)


def _ask(port: int, process: subprocess.Popen) -> dict:
    given = json.dumps({"inputs": [[0.0] * 8, [1.0] * 8]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", given, {"Content-Type": "application/json"}
    )
    for _ in range(600):
        assert process.poll() is None
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.1)
    raise AssertionError("no answer")
