"""Two hundred workers on one database: how long a claim takes, and how many connections they need.

    python benchmarks/many_workers.py --url postgresql://… [--workers 200] [--seconds 120]

Each fake worker claims one training, "trains" its intervals by sleeping, records each, ends it,
and claims the next; a beat goes out every 10 s. Workers come within `--spread` seconds, as those of
an engine do that import torch on many nodes. They are threads of a few processes, each with its
own Storage, so that the machine's memory is not what is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import threading
import time
from collections import defaultdict
from typing import Any

import sqlalchemy as sa

from droptune.storage import Budget, Storage
from droptune.training import Assignment, Measurement, State

ASSIGNMENT = Assignment({"fc1": 0.5}, 1e-3)
SITES = [{"path": f"encoder.layers.{i}.dropout", "shape": [128, 768]} for i in range(100)]
BEAT_SECONDS = 10.0


def fake_worker(url: str, name: str, options: argparse.Namespace, times: Any, index: int) -> None:
    end = time.monotonic() + options.spread + options.seconds
    time.sleep(random.uniform(0, options.spread))
    before = time.perf_counter()
    storage = Storage.open(url, patience=120.0)
    study = storage.study(name)
    worker = storage.register_worker(host=f"node{index}", pid=index, device="none")
    times["open"].append(time.perf_counter() - before)
    beaten = time.monotonic()

    def timed(what: str, call: Any) -> Any:
        before = time.perf_counter()
        result = call()
        times[what].append(time.perf_counter() - before)
        return result

    time.sleep(random.uniform(0, options.interval))
    while time.monotonic() < end:
        launching = time.monotonic() < end - options.seconds + options.interval
        what = "first claim" if launching else "claim"
        (training,) = timed(what, lambda: storage.claim(study.id, worker, 1))
        storage.assign([training], [ASSIGNMENT], [{}])
        for i in range(1, study.intervals + 1):
            time.sleep(options.interval * random.uniform(0.8, 1.2))
            item = (training, Measurement(i, {"val/nll": 1 / i, "train/loss": 1.0}))
            timed("record", lambda item=item: storage.record([item], ["val/nll"]))
            if time.monotonic() - beaten > BEAT_SECONDS:
                beaten = time.monotonic()
                timed("beat", lambda held=training.id: storage.beat(worker, [held]))
        final = {"values": [random.random()], "best_interval": study.intervals}
        timed("finish", lambda t=training, f=final: storage.finish(t, State.COMPLETE, **f))
    storage.end_worker(worker)


def process(url: str, name: str, options: argparse.Namespace, indices: range) -> dict[str, Any]:
    times: dict[str, list[float]] = defaultdict(list)
    before = time.process_time()
    threads = [
        threading.Thread(target=fake_worker, args=(url, name, options, times, i)) for i in indices
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times["cpu"].append(time.process_time() - before)
    return dict(times)


def watch_connections(storage: Storage, peak: list[int], ended: threading.Event) -> None:
    if storage.database.dialect != "postgresql":
        return
    query = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
    while not ended.wait(0.2):
        peak.append(
            storage.database.read(lambda connection: connection.execute(query).scalar_one())
        )


def percentile(values: list[float], share: float) -> float:
    return round(1000 * sorted(values)[min(int(share * len(values)), len(values) - 1)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--spread", type=float, default=10.0)
    parser.add_argument("--interval", type=float, default=8.0)
    parser.add_argument("--intervals", type=int, default=5)
    options = parser.parse_args()
    storage = Storage.open(options.url, create=True, patience=60.0)
    study = storage.create_study(
        f"many workers {time.time()}", spec={}, sites=SITES, directions=["minimize"], meta={},
        intervals=options.intervals, seed=0, budget=Budget(),
    )  # fmt: skip
    peak, ended = [0], threading.Event()
    threading.Thread(target=watch_connections, args=(storage, peak, ended), daemon=True).start()
    shares = [range(i, options.workers, options.processes) for i in range(options.processes)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes) as pool:
        arguments = [(options.url, study.name, options, share) for share in shares]
        parts = pool.starmap(process, arguments)
    ended.set()
    numbers = [r.training.number for r in storage.records(study.id)]
    result: dict[str, Any] = {
        "workers": options.workers,
        "trials": len(numbers),
        "contiguous": numbers == list(range(len(numbers))),
        "connections_peak": max(peak),
    }
    result["client_cpu_seconds"] = round(sum(sum(part["cpu"]) for part in parts), 1)
    for what in ("open", "first claim", "claim", "record", "beat", "finish"):
        values = [value for part in parts for value in part.get(what, [])]
        if values:
            shares_ms = {f"p{round(100 * s)}_ms": percentile(values, s) for s in (0.5, 0.99, 1.0)}
            result[what] = {"count": len(values)} | shares_ms
    storage.delete_study(study.name)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
