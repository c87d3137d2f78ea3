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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mirrored import Trainings, create, differences, free_port, measured, serving

from droptune.mirror import Mirror, Tracking, tenure
from droptune.mirror.server import Server
from droptune.mirror.syncer import Companion
from droptune.storage import Ending, Storage
from droptune.training import Measurement, Record, State


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


def throughput(given: argparse.Namespace) -> list[dict]:
    """A whole study at once: into a database, and through a server with one connection or four."""
    ways = [("database", 1), *2 * [("server", 1), ("server", 4)]]
    return [{"into": into, "connections": n, **_whole(given, into, n)} for into, n in ways]


def _whole(given: argparse.Namespace, into: str, connections: int) -> dict:
    tenure.CONNECTIONS = connections
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, url = trained(folder, given.trials, given.intervals)
        if into == "database":
            return _timed(store, Tracking.resolve(None, url), given.trials)
        with serving(folder) as server:
            return _timed(store, Tracking.resolve(server.address, ""), given.trials)


def _timed(store: Storage, tracking: Tracking, trials: int) -> dict:
    tracking.connect()  # the schema is there: that is paid once for all studies
    before, cpu, servers = time.perf_counter(), _cpu(), _servers_cpu()
    result = Mirror(store, "digits", tracking).sync_once(refresh=True)
    seconds = time.perf_counter() - before
    return {
        "trials_per_minute": round(60 * trials / seconds),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(_cpu() - cpu, 1),
        "server_cpu_seconds": round(_servers_cpu() - servers, 1),
        "load": round(os.getloadavg()[0], 1),
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
            before, cpu = time.perf_counter(), _cpu()
            if busy:
                with companion:
                    time.sleep(given.seconds)
            else:
                time.sleep(given.seconds)
            share = (_cpu() - cpu) / (time.perf_counter() - before)
            found["with companion" if busy else "alone"] = f"{100 * share:.3f} % CPU"
            found["load"] = round(os.getloadavg()[0], 1)
    return found


def chaos(given: argparse.Namespace) -> dict:
    """Trials in groups of ten, each group beside one of a study that nobody mirrors.

    The server is killed for `--away` seconds when a third is done; the syncer, which is the
    command that a worker starts, is killed three times, at a random moment of each third.
    """
    with tempfile.TemporaryDirectory() as name, Chaos(Path(name), given) as scene:
        scene.run()
        found = {
            "trials": given.trials,
            "points": sum(len(r.curves) * r.intervals_done for r in scene.records()),
            "syncer_killed": scene.killed,
            "server_away_seconds": scene.away,
            "caught_up_after_seconds": scene.catch_up(),
            "wrong": differences(scene.store, "digits", scene.tracking),
        }
        return found | {"seconds_per_group_of_10": scene.costs(), "load": os.getloadavg()[0]}


class Chaos:
    """Two studies trained side by side, a server and a syncer for the first one only."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.given = given
        self.folder = folder
        self.server = Server(
            Tracking.resolve(f"sqlite:///{folder / 'mlflow.db'}", ""), port=free_port()
        )
        self.tracking = Tracking.resolve(self.server.address, "")
        self.url, self.store, self.worker = _study(folder / "droptune.db", given)
        _, self.alone, self.lone_worker = _study(folder / "alone.db", given)
        self.killed: list[dict] = []
        self.away = 0.0
        self.phase = "before"
        self.groups: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def __enter__(self) -> Chaos:
        self.log = (self.folder / "log").open("w")
        self.serving = self.server.start(log=self.log.fileno())
        self.syncer = self._follow()
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.syncer, self.serving):
            _kill(process)
        self.log.close()

    def run(self) -> None:
        draw = random.Random(self.given.seed)
        third = self.given.away
        kills = [(draw.uniform(i, i + 1) * third, self._kill_syncer) for i in range(3)]
        events = [*kills, (third, self._away)]
        threads = [threading.Timer(*event) for event in events]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for number in range(self.given.trials // 10):
            time.sleep(max(0.0, began + number * 30 * third / self.given.trials - time.monotonic()))
            self._pair(draw)
        for thread in threads:
            thread.join()

    def _pair(self, draw: random.Random) -> None:
        """Ten trials of both studies, in random order: what else the machine does hits both."""
        taken = {}
        sides = [("mirrored", self.store, self.worker), ("alone", self.alone, self.lone_worker)]
        for which, store, worker in draw.sample(sides, 2):
            before = time.perf_counter()
            train(store, worker, worker.claim(10), self.given.intervals)
            taken[which] = time.perf_counter() - before
        self.groups[self.phase].append((taken["mirrored"], taken["alone"]))

    def _kill_syncer(self) -> None:
        links = len(self.store.mirror_links(1))
        self.killed.append({"trainings_begun": links, "server": self.phase})
        _kill(self.syncer)
        self.syncer = self._follow()

    def _away(self) -> None:
        _kill(self.serving)
        self.phase, began = "away", time.monotonic()
        time.sleep(self.given.away)
        self.serving = self.server.start(log=self.log.fileno())
        self.phase, self.away = "after", round(time.monotonic() - began)

    def _follow(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "droptune", "mirror", "sync", "digits", "--follow"]
        places = {"DROPTUNE_STORAGE": self.url, "MLFLOW_TRACKING_URI": self.tracking.uri}
        return subprocess.Popen(
            command, env=os.environ | places, stdout=self.log, stderr=self.log, cwd=self.folder
        )

    def records(self) -> list[Record]:
        return self.store.records(1)

    def catch_up(self) -> float:
        """Wait until the syncer has written all and knows that nothing is there twice."""
        began = time.monotonic()
        while not self._complete():
            time.sleep(1)
        return round(time.monotonic() - began, 1)

    def _complete(self) -> bool:
        state = self.store.mirror_state(1)
        links = self.store.mirror_links(1).values()
        done = sum(bool(link.get("state")) for link in links)
        settled = state.get("sweep_at") is None and not state.get("reason")
        return (
            settled
            and done == self.given.trials
            and all("gain" in link for link in links if link["state"] == "COMPLETE")
        )

    def costs(self) -> dict:
        """Medians by phase, and by how much the mirrored of a pair was slower (95 % interval)."""
        slower = [m - a for pairs in self.groups.values() for m, a in pairs]
        error = 1.96 * statistics.stdev(slower) / len(slower) ** 0.5
        medians = {
            phase: {
                "groups": len(pairs),
                "mirrored": round(statistics.median(m for m, _ in pairs), 3),
                "alone": round(statistics.median(a for _, a in pairs), 3),
            }
            for phase, pairs in self.groups.items()
        }
        mean = statistics.mean(slower)
        return medians | {"slower_by": [round(v, 3) for v in (mean - error, mean, mean + error)]}


def _study(file: Path, given: argparse.Namespace) -> tuple[str, Storage, Trainings]:
    url = f"sqlite:///{file}"
    store = Storage.open(url, create=True)
    create(store, trials=given.trials, intervals=given.intervals)
    return url, store, Trainings(store, "digits")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the process and what it has started."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _servers_cpu() -> float:
    """Seconds of all processes that this one has started and that run."""
    running = psutil.Process().children(recursive=True)
    return sum(sum(process.cpu_times()[:2]) for process in running)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("throughput", "training", "chaos"))
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--intervals", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--away", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps({given.what: globals()[given.what](given)}))
