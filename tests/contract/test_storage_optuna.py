"""What droptune writes is what Optuna reads: its API, its command line, on every database."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from datetime import datetime, timedelta

import optuna
import pytest
from test_storage import ASSIGNMENT, FLOAT, PARAMS, baselines, claimed, confirmations, create

from droptune.training import Measurement, State

CHOICE = json.dumps(
    {"name": "CategoricalDistribution", "attributes": {"choices": ["constant", "up"]}}
)


def record(storage, training, *values):
    items = [(training, Measurement(i, {"val/nll": v})) for i, v in enumerate(values, 1)]
    storage.record(items, ["val/nll"])


def load(url, name="digits"):
    return optuna.load_study(study_name=name, storage=url)


@pytest.fixture
def searched(storage):
    """Trials in every state, with values of every sort."""
    params = [PARAMS, None]
    queue = [*baselines("none", "half"), *confirmations(0)]
    study = create(storage, queue=queue, params=[*params, None])
    none, half, _, complete, pruned, failed, running = claimed(storage, study, 7)
    storage.release([half])
    record(storage, none, 0.9, math.inf, -math.inf, math.nan)
    storage.finish(none, State.COMPLETE, values=[0.5], best_interval=1)
    record(storage, complete, 0.4, 0.3)
    storage.finish(complete, State.COMPLETE, values=[0.3], best_interval=2)
    record(storage, pruned, 0.9, 0.8)
    storage.finish(pruned, State.PRUNED)
    storage.finish(failed, State.FAIL, reason="diverged")
    record(storage, running, 0.7)
    chosen = {"dropout/fc1": (0.125, FLOAT), "schedule": (1.0, CHOICE)}
    storage.assign([running], [ASSIGNMENT], [chosen])
    return study


def test_optuna_reads_all_trials(searched, url):
    trials = load(url).trials
    assert [t.number for t in trials] == [0, 1, 2, 3, 4, 5]
    states = ["COMPLETE", "WAITING", "COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [t.state.name for t in trials] == states
    assert [t.values for t in trials] == [[0.5], None, [0.3], [0.8], None, None]
    assert str(trials[0].intermediate_values) == "{1: 0.9, 2: inf, 3: -inf, 4: nan}"
    assert trials[2].intermediate_values == {1: 0.4, 2: 0.3}
    assert trials[0].params == {"dropout/fc1": 0.25, "dropout/fc2": 0.0}
    assert trials[1].params == {}
    assert trials[5].params == {"dropout/fc1": 0.125, "schedule": "up"}
    low_high = optuna.distributions.FloatDistribution(0.0, 0.9)
    assert trials[0].distributions["dropout/fc1"] == low_high
    assert trials[0].user_attrs == {"droptune": {"kind": "baseline", "label": "none"}}


def test_optunas_times_are_the_databases(searched, url):
    for trial in load(url).trials:
        if trial.state.name == "WAITING":
            assert trial.datetime_start is None
            continue
        assert abs(datetime.now() - trial.datetime_start) < timedelta(minutes=5)
        assert (trial.datetime_complete is not None) == trial.state.is_finished()


def test_optunas_best_is_ours(searched, url, storage):
    study = load(url)
    assert study.best_trial.number == 2
    assert study.best_value == storage.studies()[0].best == 0.3
    assert study.direction.name == "MINIMIZE"
    assert study.user_attrs["droptune"]["uuid"] == searched.uuid


def test_a_restart_is_a_restart_for_optuna(storage, url):
    study = create(storage)
    (training,) = claimed(storage, study)
    record(storage, training, 0.9, 0.8)
    again = storage.restart(training)
    record(storage, again, 0.7)
    (trial,) = load(url).trials
    assert trial.intermediate_values == {1: 0.7}
    assert trial.state.name == "RUNNING"


def test_several_objectives(storage, url):
    study = create(storage, directions=["minimize", "maximize"])
    one, two = claimed(storage, study, 2)
    storage.record([(one, Measurement(1, {"val/nll": 1.0}))], ["val/nll", "val/accuracy"])
    storage.finish(one, State.COMPLETE, values=[1.0, math.inf], best_interval=1)
    storage.finish(two, State.PRUNED)
    loaded = load(url)
    assert [d.name for d in loaded.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert [t.values for t in loaded.trials] == [[1.0, math.inf], None]
    assert loaded.trials[0].intermediate_values == {}


def test_a_sampler_of_optuna_goes_on_from_it(searched, url):
    study = load(url)
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=1, seed=1)
    trial = study.ask(
        fixed_distributions={"dropout/fc1": optuna.distributions.FloatDistribution(0.0, 0.9)}
    )
    study.tell(trial, 0.1)
    assert study.best_value == 0.1


def test_the_command_line_of_optuna_reads_it(searched, url):
    def run(command):
        line = [sys.executable, "-m", "optuna.cli", command, "--storage", url]
        program = "from optuna.cli import main; main()"
        line = [sys.executable, "-c", program, *line[3:], "--study-name", "digits", "-f", "json"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
        return json.loads(done.stdout)

    assert [t["number"] for t in run("trials")] == [0, 1, 2, 3, 4, 5]
    assert run("best-trial")["number"] == 2


def test_optuna_may_delete_what_droptune_made(searched, url, storage):
    optuna.delete_study(study_name="digits", storage=url)
    assert storage.study("digits").name == "digits"
    storage.delete_study("digits")
    assert storage.studies() == []
