"""The lines of `study best --code`: run as they are, they make a model train as recommended."""

import math
from dataclasses import replace

import pytest
import torch
from crew import make_study, train_here
from torch import nn

from droptune import answer
from droptune.program.loading import load_program
from droptune.script import INSERTED, script
from droptune.sites.dropout import KINDS
from droptune.sites.installed import find_sites
from droptune.storage import Storage
from droptune.training import Assignment

PROGRAM = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.drop = nn.Dropout(0.2)
        self.dropout_share = 0.1
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        x = self.drop(self.inner(x).relu())
        x = F.dropout(x, self.dropout_share, self.training)
        return self.out(F.dropout(x, 0.3, self.training))

class Program:
    batch_size, epochs, lr, task = 16, 3, 1e-2, "classification"
    searched = {"temperature": (0.5, 2.0), "focus": ["flat", "sharp"]}
    model = Net

    def data(self):
        x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
        return {"train": (x, (x[:, 0] > 0).long())}

    def loss(self, model, batch, values):
        x, y = batch
        return F.cross_entropy(model(x) / values["temperature"], y)

program = Program()
"""
SPACE = (
    "{weight_decay: {low: 1e-5, high: 0.1}, l1: {low: 1e-7, high: 1e-4}, "
    "schedule: [constant, up, early, late]}"
)


def run(lines, model):
    """The lines, in a script that has a model."""
    names = {"model": model}
    exec(lines, names)
    return names


def test_the_script_of_a_study_that_searches_everything_reproduces_its_choice(tmp_path):
    storage = Storage.open(f"sqlite:///{tmp_path}/droptune.db", create=True)
    study = make_study(
        storage, tmp_path, program=PROGRAM, space=SPACE, insert="[{after: inner, kind: element}]",
        training="{trainer: solo}", confirm="{enabled: false}",
    )  # fmt: skip
    train_here(study, tmp_path)
    assert study.phase() == "done"
    chosen = answer._chosen(study, study.progress())
    model = load_program("program.py", tmp_path).model()
    lines = answer.code(study)
    names = run(lines, model)
    assert names["lr"] == pytest.approx(chosen.lr, rel=1e-5)
    for name, value in chosen.values.items():
        if name not in ("schedule", "cutoff"):
            assert names[name] == (pytest.approx(value, rel=1e-5) if value != str(value) else value)
    assert {"weight_decay", "l1", "temperature", "focus"} <= names.keys()
    assert ("set_rates" in names) == (chosen.values["schedule"] != "constant")
    assert model.drop.p == pytest.approx(chosen.rates["drop"], abs=1e-5)
    assert model.dropout_share == pytest.approx(chosen.rates["dropout"], abs=1e-5)
    inserted = "inner.inserted-element"
    assert names["inserted"][inserted] == pytest.approx(chosen.rates[inserted], abs=1e-5)
    literal = next(line for line in lines.splitlines() if "dropout_1 (element, " in line)
    assert literal.endswith(f"program.py:17): {chosen.rates['dropout_1']:.6g}")


class Block(nn.Module):
    def forward(self, x):
        return x + 1


def test_every_kind_that_can_be_inserted_has_its_lines():
    assert set(INSERTED) == {name for name, kind in KINDS.items() if kind.insertable}


@pytest.mark.parametrize("kind", INSERTED)
def test_an_inserted_site_drops_as_it_did_in_the_study(kind):
    torch.manual_seed(0)
    x = (
        torch.ones(64, 32, 12, 12)
        if kind in ("channel", "block", "path")
        else torch.ones(64, 9, 32)
    )
    model = nn.Sequential(Block())
    found = find_sites(model, x[:2], insert=[{"after": "0", "kind": kind}]).sites
    run(script(Assignment({found[0].path: 0.25}, 0.1), found), model)
    assert torch.equal(model.eval()(x), x + 1)
    dropped = model.train()(x)
    low = 1.0 if kind == "path" else 0.0  # the block's input passes
    share = (dropped == low).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.12)
    assert dropped.mean().item() == pytest.approx(2.0, abs=0.2)
    whole = {"channel": (2, 3), "path": (1, 2, 3), "variational": (1,), "element": (), "block": ()}
    for dimension in whole[kind]:
        first = dropped.select(dimension, 0).unsqueeze(dimension)
        assert torch.equal(dropped, first.expand_as(dropped))


def test_dropout_behind_a_recurrent_layer_is_on_the_first_of_its_outputs():
    model = nn.Sequential(nn.LSTM(4, 16, batch_first=True))
    x = torch.randn(3, 5, 4)
    found = find_sites(model, x, insert=[{"after": "0", "kind": "variational"}]).sites
    run(script(Assignment({found[0].path: 0.5}, 0.1), found), model)
    y, (h, _) = model.train()(x)
    assert (y == 0).any()
    assert not (h == 0).any()


@pytest.mark.parametrize(
    ("schedule", "factors"), [("up", (0.0, 0.3, 0.9)), ("early", (1, 1, 0)), ("late", (0, 0, 1))]
)
def test_a_schedule_moves_the_rates(schedule, factors):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    x = torch.ones(2, 2)
    sites = find_sites(model, x, insert=[{"after": "0", "kind": "element"}]).sites
    rates = {site.path: 0.4 for site in sites}
    values = {"schedule": schedule, "cutoff": 0.6}
    names = run(script(Assignment(rates, 0.1, values), sites), model)
    for progress, factor in zip((0.0, 0.3, 0.9), factors, strict=True):
        names["set_rates"](progress)
        assert math.isclose(model[1].p, 0.4 * factor)
        assert math.isclose(names["inserted"]["0.inserted-element"], 0.4 * factor)
        model.train()(x)


def test_sites_of_one_attribute_with_different_rates_are_told():
    model = nn.Sequential(nn.Dropout(0.5))
    (site,) = find_sites(model, torch.ones(2, 2)).sites
    both = (site, replace(site, path="0.again"))
    lines = script(Assignment({"0": 0.1, "0.again": 0.2}, 0.1), both)
    assert "#   0.again (element): 0.2" in lines
    run(lines, model)
    assert model[0].p == 0.5


def test_values_are_written_as_the_program_declared_them():
    chosen = Assignment({}, 0.1, {"focus": "flat", "bias": True, "temperature": 0.25})
    lines = script(chosen, ())
    assert "focus = 'flat'" in lines
    assert "bias = True" in lines
    assert "temperature = 0.25" in lines
    assert [answer.shown(value) for value in chosen.values.values()] == ["flat", "True", "0.25"]
