"""What a trial costs in SQL: claim + reports + pruning's read + end, beside plain Optuna.

    python benchmarks/storage.py [--url sqlite:///…] [--finished 100 10000] [--width 16]

Fills a study with finished trials, then measures CPU and wall time per trial of one group after
the other: claim, assign, 10 reports (each followed by the pruner's read of what is new), end. The
same with Optuna's own ask, report, should_prune, tell, K trials at a time. CPU is this process's.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import optuna

from droptune.storage import Budget, Ending, Storage, StudyRow
from droptune.training import Assignment, Measurement, Record, State, Training

SITES = [f"blocks.{i}.dropout" for i in range(8)]
KEYS = [
    "val/nll", "val/accuracy", "val/error", "val/precision", "val/recall", "val/f1", "val/brier",
    "val/ece", "train/loss", "time/seconds",
]  # fmt: skip
INTERVALS = 10
DISTRIBUTION = optuna.distributions.FloatDistribution(0.0, 0.9)
STORED = optuna.distributions.distribution_to_json(DISTRIBUTION)


class History:
    """What a worker keeps between two reads: the finished, and where it stopped reading."""

    def __init__(self, storage: Storage, study: StudyRow) -> None:
        self.storage, self.study, self.cursor = storage, study, 0
        self.finished: dict[int, Record] = {}

    def read(self) -> list[Record]:
        changed, self.cursor = self.storage.changes(self.study.id, self.cursor)
        self.finished.update((r.training.id, r) for r in changed if r.state.finished)
        return changed


def assignment() -> Assignment:
    rates = {site: random.uniform(0, 0.9) for site in SITES}
    return Assignment(rates, 10 ** random.uniform(-4, -2))


def measurement(training: Training, interval: int) -> Measurement:
    base = 1 / interval + (training.number or 0) % 7 / 10
    return Measurement(interval, {key: base + i / 100 for i, key in enumerate(KEYS)})


def group_of(storage: Storage, study: StudyRow, width: int) -> list[Training]:
    claimed = storage.claim(study.id, 1, width)
    chosen = [assignment() for _ in claimed]
    params = [{f"dropout/{s}": (r, STORED) for s, r in a.rates.items()} for a in chosen]
    return storage.assign(claimed, chosen, params)


def train_group(storage: Storage, study: StudyRow, width: int, history: History | None) -> None:
    group = group_of(storage, study, width)
    for interval in range(1, INTERVALS + 1):
        storage.record([(t, measurement(t, interval)) for t in group], ["val/nll"])
        if history is not None:
            history.read()
    storage.finish_all(
        [Ending(t, State.COMPLETE, values=[measurement(t, 10).values["val/nll"]]) for t in group]
    )


def train_optuna(study: optuna.Study, width: int) -> None:
    distributions = {f"dropout/{site}": DISTRIBUTION for site in SITES}
    trials = [study.ask(fixed_distributions=distributions) for _ in range(width)]
    for step in range(1, INTERVALS + 1):
        for trial in trials:
            trial.report(1 / step, step)
            trial.should_prune()
    for trial in trials:
        study.tell(trial, random.random())


def cost(work: Callable[[], None], rounds: int, width: int) -> tuple[float, float]:
    """CPU and wall milliseconds per trial."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(rounds):
        work()
    per_trial = 1000 / (rounds * width)
    return (time.process_time() - cpu) * per_trial, (time.perf_counter() - wall) * per_trial


def fill(storage: Storage, study: StudyRow, until: int) -> None:
    while (left := until - storage.studies()[-1].trials[State.COMPLETE]) > 0:
        train_group(storage, study, min(left, 500), None)


def measure(storage: Storage, study: StudyRow, width: int, rounds: int) -> dict[str, float]:
    history = History(storage, study)
    before = time.process_time()
    history.read()
    first_read = time.process_time() - before
    train_group(storage, study, width, history)  # statements are compiled once
    cpu, wall = cost(lambda: train_group(storage, study, width, history), rounds, width)
    return {"cpu_ms": cpu, "wall_ms": wall, "first_read_s": first_read}


def measure_optuna(url: str, finished: int, width: int, rounds: int) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=url, study_name="plain", load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(), pruner=optuna.pruners.MedianPruner(),
    )  # fmt: skip
    there = len(study.get_trials(deepcopy=False))
    study.add_trials([_finished() for _ in range(finished - there)])
    train_optuna(study, width)
    cpu, wall = cost(lambda: train_optuna(study, width), rounds, width)
    return {"cpu_ms": cpu, "wall_ms": wall}


def _finished() -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        params={f"dropout/{site}": random.uniform(0, 0.9) for site in SITES},
        distributions={f"dropout/{site}": DISTRIBUTION for site in SITES},
        intermediate_values={step: 1 / step for step in range(1, INTERVALS + 1)},
        value=random.random(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="")
    parser.add_argument("--finished", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-optuna", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = options.url or f"sqlite:///{Path(folder) / 'benchmark.db'}"
        storage = Storage.open(url, create=True)
        study = storage.create_study(
            f"benchmark {time.time()}", spec={}, sites=[], directions=["minimize"], meta={},
            intervals=INTERVALS, seed=0, budget=Budget(),
        )  # fmt: skip
        for finished in options.finished:
            fill(storage, study, finished)
            result = {"finished": finished, "width": options.width}
            result["droptune"] = _rounded(measure(storage, study, options.width, options.rounds))
            if not options.no_optuna:
                plain = measure_optuna(url, finished, options.width, max(options.rounds // 2, 1))
                result["optuna"] = _rounded(plain)
            print(json.dumps(result), flush=True)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 2) for key, value in values.items()}


if __name__ == "__main__":
    main()
