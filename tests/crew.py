"""Real workers for tests: processes that run `droptune worker start` on a tiny study.

They are forked from a server that has imported torch already, so that one starts in no time; a
kill, a signal and an exit status are those of any process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from droptune.preparation import prepare
from droptune.spec.spec import StudySpec
from droptune.study import Study
from droptune.workers.worker import Worker, WorkerOptions

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "droptune.cli.worker",
        "droptune.workers.worker",
        "droptune.search.sampling",
        "droptune.verdict.verdict",
        "torch._dynamo",
        "sqlalchemy.dialects.postgresql.psycopg",
        "psycopg",
        "pymysql",
        "optuna.storages",
        "alembic.command",
    ]
)

PROGRAM = """
import os, time
import droptune, torch
from torch import nn

calls = 0
evaluating = None  # called in every evaluation

def stick():
    open("stuck", "w").close()
    time.sleep(600)

def data():
    if os.environ.get("STUCK") == "data":
        stick()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=draw)
    return x, (x[:, 0] * x[:, 1] > 0).long()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))

    def forward(self, x):
        global calls
        torch.ones(()).item()  # what looks at numbers is called in every update, and not replayed
        calls += self.training
        if self.training and "SLOW" in os.environ:
            time.sleep(float(os.environ["SLOW"]))
        if not self.training and evaluating is not None:
            evaluating()
        if os.environ.get("STUCK") == str(calls):
            stick()
        if os.environ.get("BROKEN") == str(calls) or calls > int(os.environ.get("OVER", 10**9)):
            raise ValueError(f"broken at call {calls}")
        return self.layers(x)

program = droptune.classification(model=Net, train=data, batch_size=16, epochs=4, lr=1e-2)
"""
STUDY = """
program: program.py
budget: {trials: 8}
sampler: random
pruner: none
baselines: {trials: 1}
confirm: {top: 1, min_seeds: 2, max_seeds: 2}
training: {precision: float64, width: 2}
mlflow: {mirror: none}
"""


def make_study(storage, folder, *, name="study", program=PROGRAM, **changes):
    """Create or continue a study of the tiny program in this folder.

    `changes` replace lines of its file. What is known of a program is found out once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "droptune.toml").touch()
    (folder / "program.py").write_text(program)
    lines = [line for line in STUDY.splitlines() if line.partition(":")[0] not in changes]
    lines += [f"{key}: {value}" for key, value in changes.items()]
    file = folder / f"{name}.yaml"
    file.write_text("\n".join(lines))
    known = (name, program, tuple(changes.items()))
    if known not in _prepared:
        _prepared[known] = prepare(StudySpec.load(file), folder)
    prepared = _prepared[known]
    here = replace(prepared, root=folder, meta={**prepared.meta, "root": str(folder)})
    return Study.create(storage, here)[0]


_prepared = {}


class Crew:
    """Workers of one database and project folder; `with` ends whatever still runs."""

    def __init__(self, url, folder, **environment):
        self.environment = {
            "OMP_NUM_THREADS": "1",
            "DROPTUNE_STORAGE": url,
            "DROPTUNE_LEASE_SECONDS": "2",
            "DROPTUNE_CHECKPOINT_SECONDS": "0.1",
            **environment,
        }
        self.folder = Path(folder)
        self.all = []

    def start(self, *arguments, **environment):
        """A worker; its `log` is a file."""
        log = self.folder / f"worker-{len(self.all)}.log"
        settings = {**self.environment, **environment}
        process = processes.Process(target=_run, args=(arguments, settings, self.folder, log))
        process.start()
        process.log = log
        self.all.append(process)
        return process

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.join()


def _run(arguments, environment, folder, log):
    for name in [name for name in os.environ if name.startswith(("DROPTUNE", "MLFLOW"))]:
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["droptune", "worker", "start", *arguments]
    from droptune.cli import main

    main()


def end(process, seconds=120):
    """The exit status of a worker that ends by itself."""
    process.join(seconds)
    assert process.exitcode is not None, process.log.read_text()
    return process.exitcode


def wait_until(condition, seconds=60):
    """Look again and again; what is waited for is returned."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)
    return found


def train_here(study, folder, **options):
    """Train a study to its end in this process, undisturbed."""
    url = study.storage.database.address.url.render_as_string(hide_password=False)
    options = {"until_done": True, "threads": 1, **options}
    Worker(study.storage, WorkerOptions(root=folder, storage=url, **options)).run([study.name])


def results(study):
    """What was measured of every training, and its end, whoever trained it; times left out."""
    return {
        (r.training.kind, r.training.label, r.training.number, r.training.seed_index): (
            r.state,
            {k: curve for k, curve in r.curves.items() if k != "time/seconds"},
            r.values,
        )
        for r in Study.open(study.storage, study.name).records()
    }


def check_same(found, expected, apart=1e-9):
    """Every training is there once, ended alike, with the same measurements."""
    assert found.keys() == expected.keys()
    for name, (state, curves, values) in expected.items():
        assert found[name][0] is state, name
        assert found[name][1].keys() == curves.keys()
        for key, curve in curves.items():
            assert found[name][1][key] == pytest.approx(curve, abs=apart), (name, key)
        assert found[name][2] == pytest.approx(values, abs=apart)
