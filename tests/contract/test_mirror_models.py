"""Registered models: they load without droptune, predict the same, and can be trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mirrored import Trainings, create
from torch import nn

import droptune
from droptune.mirror import Mirror, Tracking
from droptune.mirror.models import Trained, export, load
from droptune.mirror.registry import CHALLENGER, CHAMPION
from droptune.storage import Storage
from droptune.training import Assignment, NewTraining, TrainingKind

pytestmark = pytest.mark.databases("sqlite")
ROOT = Path(__file__).parents[2]
PROGRAM = "studies/digits_mlp.py"


class Plain(nn.Module):
    """Dropout and batch normalisation: evaluation mode matters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.layers(x)


class Tokens(nn.Module):
    """Called by names, with an attention mask; returns a dict, tied weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(20, 3)

    def forward(self, input_ids=None, attention_mask=None):
        mask = attention_mask.unsqueeze(-1).to(self.head.weight.dtype)
        hidden = (self.embed(input_ids) * mask).mean(1)
        return {"hidden": hidden, "logits": self.out(self.head(hidden))}


class Branching(nn.Module):
    """Control flow that depends on the data: cannot be traced."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        if float(x.sum()) > 0:
            return self.layer(x)
        return self.layer(-x) * 2


def program(model, train):
    return droptune.classification(
        model=model, train=train, batch_size=8, epochs=1, lr=1e-3, validation=train, test=False
    )


def numbers(count=40):
    torch.manual_seed(0)
    return torch.randn(count, 6), torch.arange(count) % 3


def tokens(count=40):
    torch.manual_seed(0)
    ids = torch.randint(20, (count, 5))
    return {
        "input_ids": ids,
        "attention_mask": (ids > 3).long(),
        "labels": torch.arange(count) % 3,
    }


def moved(model):
    """A model that is not as it was initialised, its running statistics neither."""
    torch.manual_seed(1)
    built = model().train()
    with torch.no_grad():
        for value in built.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
    return built


def trained(model, train, record, dtype=torch.float32):
    weights = moved(model).to(dtype).state_dict()
    return Trained(record, program(model, train), weights)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Storage.open(f"sqlite:///{tmp_path / 'droptune.db'}", create=True)


@pytest.fixture
def record(store):
    create(store)
    Trainings(store, "digits").run(1)
    return store.records(1)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exported_model_predicts_as_the_trained_one_in_evaluation(record, tmp_path, dtype):
    import mlflow

    given = trained(Plain, numbers(), record, dtype)
    assert export(given, tmp_path / "model", model_id="m-1", run_id="r").reason is None
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    x = torch.randn(7, 6, dtype=dtype)
    wanted = moved(Plain).to(dtype).eval()(x).detach()
    assert torch.equal(torch.tensor(served.predict(x.numpy())), wanted)
    assert "Tensor" in str(served.metadata.signature)


def test_a_model_called_by_names_that_returns_a_dict_is_exported(record, tmp_path):
    import mlflow

    exported = export(
        trained(Tokens, tokens(), record), tmp_path / "model", model_id="m", run_id="r"
    )
    assert exported.reason is None
    loaded = mlflow.pytorch.load_model(str(tmp_path / "model"))
    given = {key: value[:3] for key, value in tokens().items() if key != "labels"}
    wanted = moved(Tokens).eval()(**given)["logits"]
    assert torch.allclose(loaded(given["input_ids"], given["attention_mask"]), wanted)


def test_what_cannot_be_traced_keeps_its_parts_and_says_why(record, tmp_path):
    given = trained(Branching, numbers(), record)
    exported = export(given, tmp_path / "model", model_id="m", run_id="r")
    assert exported.reason is not None
    parts = {p.name for p in (tmp_path / "model" / "droptune").iterdir()}
    assert {"weights.safetensors", "rates.json", "config.json"} <= parts
    config = json.loads((tmp_path / "model" / "droptune" / "config.json").read_text())
    assert (config["pt2"], config["why_no_pt2"]) == (False, exported.reason)


def test_nothing_is_pickled(record, tmp_path):
    given = trained(Plain, numbers(), record)
    export(given, tmp_path / "model", model_id="m", run_id="r")
    names = [p.name for p in (tmp_path / "model").rglob("*")]
    assert not [n for n in names if n.endswith((".pkl", ".pickle", ".pth", ".pt", ".bin"))]


# -- the registry -----------------------------------------------------------------------------


LOAD = """
import sys
sys.modules["droptune"] = None  # as if it were not installed
import mlflow, torch
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pytorch.load_model(sys.argv[2])
given = torch.load(sys.argv[3], weights_only=True)
print(torch.equal(model(given["x"]), given["y"]))
"""


@pytest.fixture
def digits(store):
    """A study of the shipped program with a searched trial and confirmations."""
    row = create(store, program=PROGRAM)
    worker = Trainings(store, "digits")
    done = worker.run(7)
    best = Assignment({"layers.2": 0.1, "layers.5": 0.35}, 1e-3)
    store.enqueue(
        row.id,
        [NewTraining(TrainingKind.CONFIRMATION, best, "winner", seed_index=i) for i in (0, 1)],
    )
    return done, worker.run(2)


def weights_of(training_id):
    torch.manual_seed(training_id)
    from droptune.program.loading import load_program

    return load_program(PROGRAM, ROOT).model().state_dict()


def loader(record):
    given = replace(record.training.assignment, rates={"layers.2": 0.1, "layers.5": 0.35})
    known = replace(record, training=replace(record.training, assignment=given))
    return load(known, weights_of(record.training.id), reference=PROGRAM, root=ROOT)


def test_the_best_is_challenger_and_only_what_is_confirmed_champion(store, tmp_path, digits):
    tracking = Tracking.resolve(None, f"sqlite:///{tmp_path / 'droptune.db'}")
    mirror = Mirror(store, "digits", tracking, load=loader)
    result = mirror.sync_once(refresh=True)
    assert (result.complete, result.unregistered) == (True, None)
    client = tracking.connect()
    best = min((r for r in store.records(1) if r.values and r.training.kind.is_trial),
               key=lambda r: r.value)  # fmt: skip
    version = client.get_model_version_by_alias("droptune-digits", CHALLENGER)
    assert version.tags["droptune.training"] == best.training.name
    assert "NOT CONFIRMED" in version.description
    assert CHAMPION not in client.get_registered_model("droptune-digits").aliases

    confirmed = {"assignment": digits[1][0].assignment.to_json()}
    said = {"confirmed": True, "sentence": "rates beat no dropout", "recommended": confirmed}
    store.put_verdict(1, said)
    mirror.sync_once(refresh=True)
    mirror.sync_once(refresh=True)
    mirror.release()
    again = Mirror(store, "digits", tracking, load=loader)
    again.sync_once(refresh=True)
    assert sorted(p.name for p in tmp_path.glob("*.db")) == ["droptune.db", "mlflow.db"]
    assert again.rebuild().complete
    aliases = client.get_registered_model("droptune-digits").aliases
    assert {alias: int(v) for alias, v in aliases.items()} == {CHALLENGER: 1, CHAMPION: 2}
    assert len(client.search_model_versions("name = 'droptune-digits'")) == 2
    assert len(client.search_logged_models([_experiment(client)])) == 2

    done = store.records(1, ids=[training.id for training in digits[1]])
    model = loader(min(done, key=lambda record: record.value))
    x, _ = model.program.example_batch(5)
    module = model.program.model()
    module.load_state_dict(dict(model.weights))
    torch.save({"x": x.float(), "y": module.eval()(x.float()).detach()}, tmp_path / "xy.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tracking.uri, "models:/droptune-digits@champion",
         str(tmp_path / "xy.pt")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


def _experiment(client):
    return client.get_experiment_by_name("droptune/digits").experiment_id


def test_the_parts_rebuild_the_module_with_its_tuned_rates(store, tmp_path, digits):
    record = store.records(1, ids=[digits[0][0].id])[0]
    export(loader(record), tmp_path / "model", model_id="m", run_id="r")
    code = (
        "import runpy, torch\n"
        "model = runpy.run_path('model/droptune/rebuild.py')['model']\n"
        "print([m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)])\n"
        "print(float(sum(p.double().sum() for p in model.parameters())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    rates, total = done.stdout.split("\n")[:2]
    assert rates == "[0.1, 0.35]"
    wanted = sum(w.double().sum() for w in weights_of(record.training.id).values())
    assert float(total) == float(wanted)


def test_weights_that_are_gone_and_programs_that_are_not_here_are_told(store, tmp_path, digits):
    tracking = Tracking.resolve(None, f"sqlite:///{tmp_path / 'droptune.db'}")
    gone = Mirror(store, "digits", tracking, load=lambda record: None).sync_once(refresh=True)
    assert gone.complete
    assert "not in the checkpoint store" in gone.unregistered

    def elsewhere(record):
        return load(record, {}, reference="missing.py", root=tmp_path)

    store.release_mirror_lease(1, _owner(store))
    away = Mirror(store, "digits", tracking, load=elsewhere).sync_once(refresh=True)
    assert away.complete
    assert "missing.py" in away.unregistered


def _owner(store):
    import sqlalchemy as sa

    return store.database.read(
        lambda c: c.execute(sa.text("select owner from droptune_mirrors")).scalar()
    )
