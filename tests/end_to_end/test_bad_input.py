"""Bad input: one line on stderr, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from droptune.cli import main
from droptune.storage import Storage
from droptune.study import Study
from droptune.trainers.checkpoint import CheckpointStore
from droptune.training import Measurement, State

MODEL = """
import torch
from torch import nn
import droptune

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), {dropout}nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)

x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
{poison}
y = torch.arange(60) % 3
program = droptune.classification(model=Net, train=(x, y), batch_size=16, epochs=2, lr=1e-2)
"""
STUDY = "program: model.py\nbudget: {trials: 4}\nmlflow: {mirror: none}\n"


@pytest.fixture
def droptune(monkeypatch, capsys):
    """Run a command as `main` does, in this process: starting one each takes seconds."""

    def run(*arguments, cwd, **environment):
        for name in [name for name in os.environ if name.startswith("DROPTUNE")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["droptune", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "a project"  # paths with spaces are paths
    folder.mkdir()
    (folder / "model.py").write_text(MODEL.format(dropout="nn.Dropout(0.3), ", poison=""))
    (folder / "study.yaml").write_text(STUDY)
    return folder


def refused(result, *words, left: set[str], folder: Path):
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert lines, result.stdout
    assert lines[0].startswith("droptune: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert {path.name for path in folder.iterdir() if path.name != "__pycache__"} == left


FILES = {"model.py", "study.yaml"}


@pytest.fixture
def create(droptune, project):
    return lambda **environment: droptune(
        "study", "create", "study.yaml", cwd=project, **environment
    )


def test_missing_program_file(create, project):
    (project / "study.yaml").write_text(STUDY.replace("model.py", "modle.py"))
    refused(create(), "modle.py", left=FILES, folder=project)


def test_file_without_a_program_shows_the_skeleton(create, project):
    (project / "model.py").write_text("from torch import nn\nclass Mine(nn.Module):\n    pass\n")
    refused(create(), "program = droptune.classification", "Mine", left=FILES, folder=project)


def test_file_that_trains_when_imported_is_not_run(create, project):
    source = "import pathlib\nfor epoch in range(3):\n    loss.backward()\n    optimizer.step()\n"
    (project / "model.py").write_text("open('ran', 'w').close()\n" + source)
    refused(create(), "droptune.classification", left=FILES, folder=project)


def test_model_without_a_site_says_how_to_insert_one(create, droptune, project):
    (project / "model.py").write_text(MODEL.format(dropout="", poison=""))
    line = 'insert: [{after: "ReLU", kind: element}]'
    refused(create(), line, left=FILES, folder=project)
    wrote = droptune("study", "init", "model.py", "-o", "study.yaml", "--force", cwd=project)
    assert "1 site, inserted" in wrote.stdout, wrote.stderr
    assert f"\n{line}  # " in (project / "study.yaml").read_text()
    assert "layers.1.inserted-element: 0 to 0.8" in create().stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bugdet: {trials: 4}", ("bugdet", "budget")),
        ("space: {rates: {'*': {low: 0, high: 1.5}}}", ("rates", "0.9")),
        ("space: {rates: {'*': {low: -0.1, high: 0.5}}}", ("rates",)),
        ("sampler: tpee", ("tpee", "tpe")),
        ("insert: [{after: layers.1, kind: elemnt}]", ("elemnt", "element")),
        ("pruner: fare", ("fare", "fair")),
        ("pruner: {name: fair, checkpoints: 0.5}", ("pruner fair", "checkpoints", "0.5")),
        ("pruner: {name: median, warmup: 3}", ("pruner median", "warmup")),
        ("sampler: {name: tpe, startup: 3}", ("sampler tpe", "startup")),
        ("objective: {metric: accurracy}", ("accurracy", "accuracy")),
        ("space: {rates: {'2': {high: 0.5}}}", ("study.yaml:4: space.rates: '2' names no site",)),
        ("pruner: {name: median, warmup: 3}", ("study.yaml:4: pruner median",)),
        ("space: {batch_size: [16, 32]}", ("batch_size", "shapes")),
    ],
)
def test_faults_of_the_study_file_name_the_key(create, project, line, words):
    (project / "study.yaml").write_text(f"{STUDY}{line}\n")
    refused(create(), *words, left=FILES, folder=project)


def test_what_a_budget_is_too_small_for_is_spoken_of(create, project):
    (project / "study.yaml").write_text(f"{STUDY}epochs: 1\nobjective: [nll, accuracy]\n")
    said = create().stdout
    assert "trains 1 epoch where the program says 2" in said
    assert "the baselines alone are 15 trials, of which the budget has only the first 4" in said
    assert "cost: up to 4 trials of 1 interval to search" in said
    assert "the verdict are about nll, the first" in said


def test_nan_in_the_data(create, project):
    source = MODEL.format(dropout="nn.Dropout(0.3), ", poison="x[7, 2] = float('nan')")
    (project / "model.py").write_text(source)
    refused(create(), "NaN", left=FILES, folder=project)


def test_unreachable_database_shows_no_password(create, project):
    url = "postgresql://someone:secret@127.0.0.1:1/none"
    result = create(DROPTUNE_STORAGE=url)
    refused(result, "127.0.0.1", left=FILES, folder=project)
    assert "secret" not in result.stderr


def test_unknown_study_names_the_near_ones(create, droptune, project):
    assert create().returncode == 0
    left = {path.name for path in project.iterdir() if path.name != "__pycache__"}
    result = droptune("study", "best", "stduy", cwd=project)
    refused(result, "'stduy'", "'study'", left=left, folder=project)


def test_a_continued_study_says_what_has_changed(create, project):
    assert "changed" not in create().stdout
    assert "changed" not in create().stdout
    (project / "study.yaml").write_text(STUDY.replace("trials: 4", "trials: 9"))
    assert "  changed: budget.trials 4 → 9\n" in create().stdout


def test_changed_study_file_names_the_keys_and_another_name(create, project):
    assert create().returncode == 0
    left = {path.name for path in project.iterdir() if path.name != "__pycache__"}
    (project / "study.yaml").write_text(STUDY + "seed: 7\n")
    refused(create(), "seed", "--name study-2", left=left, folder=project)
    (project / "study.yaml").write_text(STUDY.replace("4", "6"))  # the budget is free
    assert create().returncode == 0


def test_files_that_are_no_study_file(droptune, project):
    (project / "folder.yaml").mkdir()
    for name, content, word in (
        ("empty.yaml", b"", "no keys"),
        ("tabs.yaml", b"program: model.py\nbudget:\n\ttrials: 3\n", "spaces"),
        ("binary.yaml", b"\xff\xfe\x00", "UTF-8"),
    ):
        (project / name).write_bytes(content)
        left = {path.name for path in project.iterdir()}
        result = droptune("study", "create", name, cwd=project)
        refused(result, name, word, left=left, folder=project)
    result = droptune("study", "create", "folder.yaml", cwd=project)
    refused(result, "folder.yaml", "Is a directory", left=left, folder=project)


@pytest.mark.parametrize("line", ["budget: {trials: 0}", "training: {width: 0}"])
def test_nothing_can_be_trained_with_zero(create, project, line):
    study = "program: model.py\nmlflow: {mirror: none}\n"
    (project / "study.yaml").write_text(f"{study}{line}\n")
    refused(create(), "got 0", left=FILES, folder=project)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--width", "foo"), "--width foo: possible are auto, 1, 2"),
        (("--device", "cup"), "--device cup: possible are auto, cpu"),
        (("--device", "mps", "--workers", "2"), "this machine has one"),
    ],
)
def test_a_run_that_cannot_begin_creates_no_study(droptune, project, options, word):
    (project / "study.yaml").write_text("program: model.py\nmlflow: {mirror: none}\n")
    result = droptune("study", "run", "study.yaml", *options, cwd=project)
    refused(result, word, left=FILES, folder=project)


def test_files_that_cannot_be_written(create, droptune, project):
    assert create().returncode == 0
    left = {path.name for path in project.iterdir() if path.name != "__pycache__"}
    for arguments in (
        ("init", "model.py", "-o", "none/x.yaml"),
        ("report", "study", "-o", "none/x.html"),
        ("export", "study", "-o", "none/x.csv"),
    ):
        result = droptune("study", *arguments, cwd=project)
        refused(result, arguments[-1], "cannot be written", left=left, folder=project)


def test_the_demo_where_nothing_can_be_written(droptune):
    result = droptune("demo", cwd="/proc")
    assert result.returncode == 2
    assert "run the demo in a folder of your own" in result.stderr


def test_the_demo_with_more_workers_than_gpus_writes_nothing(droptune, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'GPU 0: A100 (UUID: GPU-aaaa)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    folder = tmp_path / "empty"
    folder.mkdir()
    result = droptune("demo", "--workers", "2", cwd=folder)
    refused(result, "--workers 2: a worker owns one device", left=set(), folder=folder)


def test_the_wrong_folder_hints_at_the_database(create, droptune, project, tmp_path):
    assert create().returncode == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = droptune("study", "best", "study", cwd=elsewhere)
    refused(result, "No database file", "--storage", "droptune.toml", left=set(), folder=elsewhere)
    left = {path.name for path in project.iterdir() if path.name != "__pycache__"}
    result = droptune("study", "best", "another", cwd=project)
    refused(result, "'another'", "--storage", left=left, folder=project)


def test_a_stopped_study_says_what_a_new_run_does(create, droptune, project):
    assert create().returncode == 0
    url = f"sqlite:///{project}/droptune.db"
    stopped = droptune("study", "stop", "study", "--storage", url, cwd=project)
    assert f"droptune study resume study --storage '{url}'" in stopped.stdout
    shown = droptune("study", "show", "study", cwd=project).stdout
    assert "stopped" in shown
    assert "study resume study" in shown


def test_a_study_of_a_project_below_is_known_by_its_folder(droptune, project):
    above = project.parent
    made = droptune("study", "create", "a project/study.yaml", cwd=above).stdout
    going_on = f"droptune worker start study --until-done --project '{project}'"
    assert made.strip().endswith(going_on)
    url = f"sqlite:///{above}/droptune.db"
    for word in ("show", "confirm", "resume"):
        assert going_on in droptune("study", word, "study", cwd=above).stdout
    within = droptune("study", "show", "study", "--storage", url, cwd=project).stdout
    assert "droptune worker start study" in within
    assert "--project" not in within
    study = Study.open(Storage.open(url), "study")
    store = CheckpointStore.of(study, project)
    training = study.records()[0].training.id
    assert store.save_weights(training, {"w": torch.ones(2)}, {})
    assert "deleted" in droptune("study", "delete", "study", "--yes", cwd=above).stdout
    assert store.load_weights(training) is None
    assert not any((project / ".droptune" / "checkpoints").iterdir())


def test_a_project_that_this_machine_has_not_is_not_named(droptune, project):
    above = project.parent
    droptune("study", "create", "a project/study.yaml", cwd=above)
    project.rename(above / "elsewhere")
    assert "--project" not in droptune("study", "show", "study", cwd=above).stdout


def test_a_mirror_that_cannot_be_is_shown(create, droptune, project):
    study = STUDY.replace("none", "worker")
    (project / "study.yaml").write_text(study)
    assert create().returncode == 0
    words, elsewhere = ("study", "show", "study"), {"MLFLOW_TRACKING_URI": "sqlite:///own.db"}
    shown = droptune(*words, cwd=project, **elsewhere).stdout
    assert "MLflow" not in shown
    clash = {"MLFLOW_TRACKING_URI": f"sqlite:///{project}/droptune.db"}
    shown = droptune(*words, cwd=project, **clash).stdout
    assert "droptune.db is the studies' database and cannot be MLflow's too" in shown
    (why,) = json.loads(droptune(*words, "--json", cwd=project, **clash).stdout)["mirror"]
    assert why in shown.splitlines()
    (project / "study.yaml").write_text(STUDY)  # mirrors nothing
    assert create().returncode == 0
    assert "MLflow" not in droptune(*words, cwd=project, **clash).stdout


def test_every_json_is_json(create, droptune, project):
    assert create().returncode == 0
    for words in (("study", "list"), ("study", "show", "study"), ("worker", "list")):
        json.loads(droptune(*words, "--json", cwd=project).stdout)
    json.loads(droptune("study", "schema", cwd=project).stdout)
    json.loads(droptune("sites", "model.py", "--json", cwd=project).stdout)
    nothing = droptune("study", "best", "study", "--json", cwd=project)
    assert (nothing.returncode, nothing.stdout) == (1, "")


def test_what_diverged_is_null_in_json(create, droptune, project):
    assert create().returncode == 0
    storage = Storage.open(f"sqlite:///{project}/droptune.db")
    worker = storage.register_worker(host="here", pid=1, device="cpu")
    diverged, good = storage.claim(storage.study("study").id, worker, 2)
    for training, value in ((diverged, math.nan), (good, 0.5)):
        measured = {"train/loss": math.inf * value, "val/nll": value}
        storage.record([(training, Measurement(1, measured))], ["val/nll"])
    storage.finish(diverged, State.FAIL, reason="diverged: val/nll is NaN")
    storage.finish(good, State.COMPLETE, values=[0.5], best_interval=1)
    of_study = ("study", "show", "study", "--json")
    of_trial = ("trial", "show", "study", str(diverged.number), "--json")
    shown = json.loads(droptune(*of_study, cwd=project).stdout, parse_constant=pytest.fail)
    alone = json.loads(droptune(*of_trial, cwd=project).stdout, parse_constant=pytest.fail)
    assert alone in shown["trainings"]
    assert alone["curves"] == {"train/loss": [None], "val/nll": [None]}
    for words in (("best", "study", "--json"), ("report", "study", "--format", "json")):
        json.loads(droptune("study", *words, cwd=project).stdout, parse_constant=pytest.fail)
