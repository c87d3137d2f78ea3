"""The main job as a user runs it: commands in a fresh folder, real workers, a real MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

MODEL = """
import droptune
from sklearn.datasets import load_iris
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x)

program = droptune.classification(
    model=Net, train=load_iris(return_X_y=True), batch_size=16, epochs=10, lr=1e-2)
"""
STUDY = """
program: my model.py
budget: {trials: 14}
baselines: {trials: 2}
confirm: {top: 1, min_seeds: 2, max_seeds: 2}
"""
WITHOUT_DROPTUNE = """
import json, sys
sys.modules["droptune"] = None  # must not be needed
import mlflow, numpy as np, torch
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pytorch.load_model(f"models:/{sys.argv[2]}@challenger")
data = np.load(sys.argv[3])
with torch.no_grad():
    logits = model(torch.from_numpy(data["x"]))
print(json.dumps(float((logits.argmax(1).numpy() == data["y"]).mean())))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that has run to its end, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("main") / "my project"
    folder.mkdir()
    (folder / "my model.py").write_text(MODEL)
    (folder / "study.yaml").write_text(STUDY)
    result = droptune("study", "run", "study.yaml", "--workers", "2", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def droptune(*arguments: str, cwd: Path, **options):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DROPTUNE", "MLFLOW"))}
    return subprocess.run(
        [sys.executable, "-m", "droptune", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=280, env=environment, **options,
    )  # fmt: skip


def test_it_ends_with_the_answer_beside_the_baselines_and_what_to_do_next(finished):
    _, printed = finished
    for words in (
        "each at the best learning rate of its own",
        "none",
        "half",
        "author",
        "layers.2",
        "cost:",
    ):
        assert words in printed
    for command in ("study best study --code", "study report study", "mirror ui study"):
        assert command in printed
    assert printed.count("baseline none") == 2  # each baseline at its learning rates


def test_optuna_reads_the_study(finished):
    folder, _ = finished
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{folder}/droptune.db")
    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(14))
    assert all(trial.state.is_finished() for trial in trials)
    assert set(study.best_trial.params) == {"dropout/layers.2", "lr"}
    assert 0 <= study.best_trial.params["dropout/layers.2"] <= 0.8
    found = json.loads(droptune("study", "best", "study", "--json", cwd=folder).stdout)
    assert found["best"]["value"] == study.best_value


def test_the_registered_model_predicts_as_recorded_without_droptune(finished, tmp_path):
    import numpy as np

    from droptune.program.loading import load_program
    from droptune.storage import Storage
    from droptune.study import Study

    folder, _ = finished
    study = Study.open(Storage.open(f"sqlite:///{folder}/droptune.db"), "study")
    best = study.progress().best
    splits = load_program("my model.py", folder).splits(best.training.seeds.split)
    x, y = splits.validation.tree
    np.savez(tmp_path / "validation.npz", x=x.numpy(), y=y.numpy())
    uri, model = f"sqlite:///{folder}/mlflow.db", "droptune-study"
    code = [sys.executable, "-W", "ignore", "-c", WITHOUT_DROPTUNE, uri, model]
    loaded = subprocess.run(
        [*code, str(tmp_path / "validation.npz")], capture_output=True, text=True, cwd=tmp_path
    )
    assert loaded.returncode == 0, loaded.stderr
    recorded = best.curves["val/accuracy"][best.best_interval - 1]
    assert json.loads(loaded.stdout) == pytest.approx(recorded, abs=1e-6)


def test_running_the_file_again_shows_the_answer_and_trains_nothing(finished):
    folder, _ = finished
    again = droptune("study", "run", "study.yaml", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "continued" in again.stdout
    assert "started, pid" not in again.stderr


def test_a_trial_replayed_solo_is_the_same_within_rounding(finished):
    folder, _ = finished
    replayed = droptune("trial", "replay", "study", "7", cwd=folder)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "the same within rounding" in replayed.stdout
