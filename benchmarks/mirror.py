"""What the mirror costs and how fast it is.

    python benchmarks/mirror.py throughput [--trials 500] [--intervals 30]
    python benchmarks/mirror.py training    what a training process pays for its companion
    python benchmarks/mirror.py chaos       server away for --away seconds, syncer killed 3 times

Each writes one JSON line; `chaos` compares every run and point with SQL at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mirrored import Trainings, create, differences, free_port, measured, serving

from droptune.mirror import Mirror, Tracking
from droptune.mirror.syncer import Companion
from droptune.storage import Ending, Storage
from droptune.training import Measurement, State

SYNCER = """
import sys, time
from droptune.mirror import Mirror, Tracking
from droptune.storage import Storage
url, tracking = sys.argv[1:]
mirror = Mirror(Storage.open(url), "digits", Tracking.resolve(tracking, url), lease_seconds=5)
while True:
    mirror.sync_once()
    time.sleep(1)
"""


def trained(folder: Path, trials: int, intervals: int) -> tuple[Storage, str]:
    """A study whose trials have all ended: a third of them pruned half way."""
    url = f"sqlite:///{folder / 'droptune.db'}"
    store = Storage.open(url, create=True)
    create(store, trials=trials, intervals=intervals)
    worker = Trainings(store, "digits")
    while group := worker.claim(50):
        train(store, worker, group, intervals)
    return store, url


def train(store: Storage, worker: Trainings, group, intervals: int) -> None:
    for interval in range(1, intervals + 1):
        alive = [t for t in group if not pruned(t) or interval <= intervals // 2]
        items = [(t, Measurement(interval, measured(t, interval))) for t in alive]
        store.record(items, ["val/nll"])
    store.finish_all(
        [
            Ending(t, State.PRUNED)
            if pruned(t)
            else Ending(t, State.COMPLETE, [measured(t, intervals)["val/nll"]], None, intervals)
            for t in group
        ]
    )


def pruned(training) -> bool:
    return training.kind.is_trial and training.label == "" and training.number % 3 == 0


def throughput(given: argparse.Namespace) -> dict:
    found = {}
    for where in ("database", "server"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            store, url = trained(folder, given.trials, given.intervals)
            if where == "server":
                with serving(folder) as server:
                    found[where] = _timed(store, Tracking.resolve(server.address, ""), given.trials)
            else:
                found[where] = _timed(store, Tracking.resolve(None, url), given.trials)
    return found


def _timed(store: Storage, tracking: Tracking, trials: int) -> dict:
    tracking.connect()  # the schema is there: that is paid once for all studies
    before, cpu = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
    result = Mirror(store, "digits", tracking).sync_once(refresh=True)
    seconds = time.perf_counter() - before
    return {
        "trials_per_minute": round(60 * trials / seconds),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(_cpu(resource.RUSAGE_SELF) - cpu, 1),
        "points": result.points,
        "wrong": differences(store, "digits", tracking)[:5],
    }


def training(given: argparse.Namespace) -> dict:
    """CPU seconds of a process that only waits, with and without a busy companion."""
    found = {}
    for busy in (False, True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _, url = trained(folder, given.trials, given.intervals)
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
            companion = Companion(["digits"], storage_url=url)
            before, cpu = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
            if busy:
                with companion:
                    time.sleep(given.seconds)
            else:
                time.sleep(given.seconds)
            share = (_cpu(resource.RUSAGE_SELF) - cpu) / (time.perf_counter() - before)
            found["with companion" if busy else "alone"] = f"{100 * share:.3f} % CPU"
    return found


def chaos(given: argparse.Namespace) -> dict:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        url = f"sqlite:///{folder / 'droptune.db'}"
        store = Storage.open(url, create=True)
        create(store, trials=given.trials, intervals=given.intervals)
        worker = Trainings(store, "digits")
        group_seconds: dict[str, list[float]] = {"before": [], "away": [], "after": []}
        with serving(folder, port=port) as server:
            tracking = Tracking.resolve(server.address, "")
            syncer = _syncer(url, tracking)
            for _ in range(3):
                for _ in range(2):
                    group_seconds["before"].append(_group(store, worker, given))
                time.sleep(draw.uniform(0, 3))
                syncer.kill()
                syncer.wait()
                syncer = _syncer(url, tracking)
        end = time.monotonic() + given.away  # the server is dead now
        while time.monotonic() < end:
            group_seconds["away"].append(_group(store, worker, given))
            time.sleep(1)
        with serving(folder, port=port):
            while (seconds := _group(store, worker, given)) is not None:
                group_seconds["after"].append(seconds)
            syncer.kill()
            syncer.wait()
            time.sleep(6)  # its lease
            last = Mirror(store, "digits", tracking)
            while not (result := last.sync_once(refresh=True)).complete or result.doubtful:
                time.sleep(5)
            wrong = differences(store, "digits", tracking)
    mean = {
        when: round(sum(filter(None, taken)) / max(1, len(list(filter(None, taken)))), 3)
        for when, taken in group_seconds.items()
    }
    return {"trials": given.trials, "wrong": wrong, "seconds_per_group_of_10": mean}


def _group(store: Storage, worker: Trainings, given: argparse.Namespace) -> float | None:
    """How long ten trials take that cost nothing but their writes; None when all are trained."""
    before = time.perf_counter()
    group = worker.claim(10)
    if not group:
        return None
    train(store, worker, group, given.intervals)
    return time.perf_counter() - before


def _syncer(url: str, tracking: Tracking) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SYNCER, url, tracking.uri], stderr=subprocess.DEVNULL
    )


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("throughput", "training", "chaos"))
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--intervals", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--away", type=float, default=120)
    given = parser.parse_args()
    print(json.dumps({given.what: globals()[given.what](given)}))
