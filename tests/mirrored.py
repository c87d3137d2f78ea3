"""A study that is trained without training, and a comparison of MLflow with SQL."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from droptune.mirror import MirroredStudy, Tracking, runs
from droptune.mirror.server import Server, stop
from droptune.sites.site import Site
from droptune.spec.spec import StudySpec
from droptune.storage import Budget, Storage
from droptune.training import (
    Assignment,
    Measurement,
    NewTraining,
    Record,
    State,
    Training,
    TrainingKind,
)

SITES = ("layers.2", "layers.5", "head.dropout")
AUTHORS = (0.2, 0.5, 0.1)
BASELINES = {"none": (0.0, 0.0, 0.0), "half": (0.5, 0.5, 0.5), "author": AUTHORS}
DISTRIBUTION = json.dumps(
    {
        "name": "FloatDistribution",
        "attributes": {"step": None, "low": 0.0, "high": 0.9, "log": False},
    }
)
NAN = math.nan


def create(storage: Storage, name: str = "digits", *, trials: int = 30, intervals: int = 6, **spec):
    """A study of an imaginary model with three sites, its baselines queued."""
    given = {"name": name, "program": "digits_mlp.py", "objective": "nll", **spec}
    return storage.create_study(
        name,
        spec=StudySpec.parse(given).to_json(),
        sites=[
            Site(path=path, kind="element", rate=rate, shape=(64, 32)).to_json()
            for path, rate in zip(SITES, AUTHORS, strict=True)
        ],
        directions=["minimize"],
        meta={"versions": {"torch": "2.13.0"}, "intervals": intervals},
        intervals=intervals,
        seed=0,
        queue=[
            NewTraining(TrainingKind.BASELINE, assignment(rates, lr), label)
            for label, rates in BASELINES.items()
            for lr in (3e-4, 3e-3)
        ],
        params=[_params(assignment(r, lr)) for r in BASELINES.values() for lr in (3e-4, 3e-3)],
        budget=Budget(trials=trials),
    )


def assignment(rates: Sequence[float], lr: float) -> Assignment:
    return Assignment(dict(zip(SITES, rates, strict=True)), lr, {"weight_decay": 1.5e-4})


def _params(given: Assignment) -> dict[str, tuple[float, str]]:
    return {f"dropout/{path}": (rate, DISTRIBUTION) for path, rate in given.rates.items()}


class Trainings:
    """Claims, measures and ends trainings of a study as a worker would, with made-up curves."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage = storage
        self.study = storage.study(name)
        self.worker = storage.register_worker(
            host=socket.gethostname(), pid=os.getpid(), device="cpu"
        )

    def claim(self, limit: int = 1) -> list[Training]:
        claimed = self.storage.claim(self.study.id, self.worker, limit)
        new = [training for training in claimed if training.assignment is None]
        chosen = [self._chosen(training) for training in new]
        assigned = self.storage.assign(new, chosen, [_params(each) for each in chosen])
        return [t for t in claimed if t.assignment is not None] + assigned

    def _chosen(self, training: Training) -> Assignment:
        draw = random.Random(training.number)
        return assignment([draw.uniform(0, 0.8) for _ in SITES], 10 ** draw.uniform(-4, -2))

    def measure(self, trainings: Sequence[Training], first: int, last: int, **given: float) -> None:
        """Write the intervals from `first` to `last` of all of them."""
        for interval in range(first, last + 1):
            items = [(t, Measurement(interval, measured(t, interval) | given)) for t in trainings]
            assert not self.storage.record(items, ["val/nll"])

    def complete(self, trainings: Sequence[Training]) -> None:
        for training in trainings:
            done = training.intervals
            value = measured(training, done)["val/nll"]
            assert self.storage.finish(training, State.COMPLETE, values=[value], best_interval=done)

    def run(self, count: int = 1) -> list[Training]:
        """Trains whole trainings: every third trial is pruned half way, every seventh fails."""
        trainings = self.claim(count)
        for training in trainings:
            half = training.intervals // 2
            if training.kind is not TrainingKind.SEARCH or (training.number or 0) % 3:
                self.measure([training], 1, training.intervals)
                self.complete([training])
            elif (training.number or 0) % 7 == 0:
                self.measure([training], 1, half)
                self.storage.finish(training, State.FAIL, reason="diverged: val/nll is NaN")
            else:
                self.measure([training], 1, half)
                self.storage.finish(training, State.PRUNED)
        return trainings


def measured(training: Training, interval: int) -> dict[str, float]:
    """A made-up measurement: a parabola in the mean rate, with its own noise per training."""
    assert training.assignment is not None
    noise = random.Random(training.id * 1000 + interval).gauss(0, 0.004)
    rate, lr = training.assignment.mean_rate, training.assignment.lr
    level = 0.25 + 0.5 * (rate - 0.35) ** 2 + 0.02 * abs(math.log10(lr) + 2.7)
    nll = level + 1.2 * math.exp(-interval / (2 + 6 * rate)) + noise
    return {
        "val/nll": nll,
        "val/accuracy": 1 - nll / 3,
        "val/error": nll / 3,
        "train/loss": nll - 0.1 + 0.1 * rate,
        "lr": lr,
        "time/seconds": 1.5 + noise,
    }


# -- comparing -----------------------------------------------------------------------------


def differences(storage: Storage, name: str, tracking: Tracking) -> list[str]:
    """What MLflow shows otherwise than SQL has it: [] when every run and point is there once."""
    client = tracking.connect()
    study = MirroredStudy.of(storage.study(name))
    known = storage.records(study.id)
    records = [record for record in known if expected(record)]
    experiments = [e for e in client.search_experiments() if e.name == study.experiment_name]
    if len(experiments) != 1:
        return [f"{len(experiments)} experiments"]
    found = client.search_runs([experiments[0].experiment_id], max_results=50_000)
    of: dict[str, list] = {}
    for run in found:
        of.setdefault(run.data.tags.get(runs.UID, "?"), []).append(run)
    wrong = [f"{len(each)} runs with uid {uid}" for uid, each in of.items() if len(each) > 1]
    parents = of.pop(f"{study.uuid}/parent", [])
    wrong += [f"{len(parents)} parents"] if len(parents) != 1 else []
    reference = runs.reference_of(known, study.objectives[0])
    for record in records:
        each = of.pop(runs.uid(study.uuid, record.training), [])
        if not each:
            wrong.append(f"{record.training.name}: no run")
        elif parents:
            lines = _compare(client, study, record, each[0], parents[0].info.run_id, reference)
            wrong += [f"{record.training.name}: {line}" for line in lines]
    return wrong + [f"run of nothing: {uid}" for uid in of]


def expected(record: Record) -> bool:
    return record.state is not State.QUEUED and record.training.assignment is not None


def _compare(client, study, record, run, parent, reference) -> Iterator[str]:
    if run.info.run_name != record.training.name:
        yield f"named {run.info.run_name}"
    if run.info.status != runs.status(record.state):
        yield f"{run.info.status} for {record.state}"
    if run.data.tags.get("mlflow.parentRunId") != parent:
        yield "another parent"
    if run.data.tags.get("droptune.state") != record.state.value:
        yield f"tagged {run.data.tags.get('droptune.state')}, is {record.state}"
    if record.reason and run.data.tags.get("droptune.reason") != record.reason:
        yield "no reason"
    if run.data.params != runs.params(record.training.assignment):
        yield f"params {run.data.params}"
    if record.ended and run.info.end_time != runs.milliseconds(record.ended):
        yield "ended at another time"
    points = list(runs.curve_points(record, study.objectives, started=run.info.start_time, after=0))
    if record.state.finished:
        time = run.info.end_time or 0
        points += runs.final_points(record, study.objectives, time=time)
        if reference is not None:
            points += runs.gain_points(record, study.objectives[0], reference, time=time)
    wanted = Counter((p.key, p.step, p.value, p.time) for p in points)
    there = Counter(
        (m.key, m.step, m.value, m.timestamp)
        for key in run.data.metrics
        for m in client.get_metric_history(run.info.run_id, key)
    )
    if wanted != there:
        yield f"lacks {[*(wanted - there).items()][:3]}, has {[*(there - wanted).items()][:3]}"


# -- servers -------------------------------------------------------------------------------


def copy_database(source: Path, target: Path) -> None:
    """A copy of an SQLite file and of its write-ahead log."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    folder: Path,
    *,
    database: str | None = None,
    port: int | None = None,
    options: Sequence[str] = (),
) -> Iterator[Server]:
    """An MLflow server on a database, else a new one in the folder; it is gone afterwards."""
    tracking = Tracking.resolve(database or f"sqlite:///{folder / 'mlflow.db'}", "")
    server = Server(tracking, port=port or free_port())
    with (folder / "mlflow.log").open("a") as log:
        process = server.start(*options, log=log.fileno())
        try:
            yield server
        finally:
            stop(process)
