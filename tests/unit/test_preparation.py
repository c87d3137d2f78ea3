"""What is found out of a program before a study of it is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from droptune.errors import ProgramError, SpecError
from droptune.preparation import _chance, _in_vain, prepare
from droptune.program.long_form import adapt
from droptune.program.short_form import regression
from droptune.sites.installed import find_program_sites
from droptune.spec.objective import Objective
from droptune.spec.spec import StudySpec
from droptune.trainers.recipe import Recipe
from droptune.trainers.resumption import what_is_lost

OWN = """
import torch
from torch import nn

class Program:
    batch_size, epochs, lr = 4, 10, 1e-2

    def model(self):
        return nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 1))

    def data(self):
        return {"train": (torch.ones(20, 2), torch.ones(20, 1)), "test": False}

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def predict(self, model, batch):
        return model(batch[0]), batch[1]

    def metrics(self, predictions, targets):
        return {METRICS}

program = Program()
"""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))


def test_an_untrained_loss_is_of_all_the_training_data_not_of_the_first():
    y = torch.linspace(0, 3, 400).square().unsqueeze(1)
    program = regression(model=net, train=(torch.ones(400, 2), y), batch_size=32, epochs=9, lr=1e-2)
    assert 8 < _chance(program) < 24  # the mean of y squared is 16


def _compiled():
    def refuse(*_):
        raise RuntimeError("No working C++ compiler found")

    return nn.Sequential(torch.compile(net(), backend=refuse))


def test_nothing_compiles_a_model_before_it_trains_as_it_is_written():
    class Compiled:
        batch_size, epochs, lr, model = 4, 9, 1e-2, staticmethod(_compiled)

        def data(self):
            return {"train": (torch.ones(20, 2), torch.ones(20, 1)), "test": False}

        def loss(self, model, batch):
            return (model(batch[0]) - batch[1]).square().mean()

        def metrics(self, predictions, targets):
            return {"loss": (predictions - targets).square().mean()}

    program = adapt(Compiled())
    program.check()
    assert program.metric_names == ("loss",)
    assert _chance(program) > 0
    recipe = Recipe(program, find_program_sites(program).sites, Objective("loss"))
    assert what_is_lost(recipe) == []


def test_an_untrained_loss_may_be_of_gradients():
    class Steep:
        batch_size, epochs, lr, model = 4, 9, 1e-2, staticmethod(net)

        def data(self):
            return {"train": (torch.ones(20, 2), torch.ones(20, 1)), "test": False}

        def loss(self, model, batch):
            x = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            return slope.square().mean()

    assert _chance(adapt(Steep())) > 0


def _regressing(**more) -> Recipe:
    data = torch.ones(20, 2), torch.ones(20, 1)
    program = regression(model=net, train=data, batch_size=4, epochs=9, lr=1e-2, **more)
    return Recipe(program, find_program_sites(program).sites, Objective("mse"))


def test_an_optimizer_that_leaves_the_learning_rate_aside_is_noticed():
    stubborn = _regressing(optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), 0.1))
    assert "searched in vain" in _in_vain(stubborn)[0]
    assert _in_vain(_regressing()) == []


def test_a_schedule_that_is_not_finite_is_refused():
    broken = _regressing(schedule=lambda progress: float("nan") if progress > 0.1 else 1.0)
    with pytest.raises(ProgramError, match=r"schedule\(0.2\) is nan: it must be a finite factor"):
        broken.learning_rates(np.array([0.0, 0.2]))


def test_an_untrained_loss_is_the_highest_that_searched_values_make_it():
    class Scaled:
        batch_size, epochs, lr = 4, 9, 1e-2
        searched = {"scale": (1.0, 100.0), "how": ["plain", "doubled"]}  # noqa: RUF012

        def model(self):
            return net()

        def data(self):
            return {"train": (torch.ones(20, 2), torch.full((20, 1), 5.0))}

        def loss(self, model, batch, values):
            factor = 2 if values["how"] == "doubled" else 1
            return (model(batch[0]) - batch[1]).square().mean() * values["scale"] * factor

    assert _chance(adapt(Scaled())) > 2000


def test_weights_from_numpy_are_seeded_too():
    def model() -> nn.Module:
        made = net()
        made[0].weight.data = torch.from_numpy(np.random.normal(size=(8, 2))).float()
        return made

    x, y = torch.ones(20, 2), torch.ones(20, 1)
    program = regression(model=model, train=(x, y), batch_size=4, epochs=9, lr=1e-2)
    recipe = Recipe(program, find_program_sites(program).sites, Objective("mse"))
    before = np.random.get_state()[2]
    first, again, other = (recipe.fresh_model(seed)[0].weight for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert np.random.get_state()[2] == before


@pytest.mark.parametrize(
    ("metrics", "gap"),
    [
        ('{"iou": predictions.mean(), "loss": predictions.std()}', ("loss", 1.0)),
        ('{"iou": predictions.mean()}', None),
        ('{"accuracy": predictions.mean()}', ("accuracy", -1.0)),
    ],
)
def test_a_gap_needs_a_metric_of_which_it_is_known_what_is_better(tmp_path, metrics, gap):
    (tmp_path / "own.py").write_text(OWN.replace("{METRICS}", metrics))
    spec = StudySpec.parse({"name": "own", "program": "own.py", "objective": {"metric": "gap"}})
    if gap is None:
        with pytest.raises(SpecError, match="and iou are the program"):
            prepare(spec, tmp_path)
        return
    prepared = prepare(spec, tmp_path)
    recipe = Recipe(prepared.program, prepared.sites, prepared.spec.objectives[0])
    assert recipe.gap == gap


@pytest.mark.parametrize(
    ("gradient", "trainer"),
    [
        ("torch.autograd.grad(summed(x.requires_grad_()), x, create_graph=True)[0]", "solo"),
        ("torch.func.grad(summed)(x)", "fused"),
    ],
)
def test_a_loss_with_a_penalty_on_gradients_trains(tmp_path, gradient, trainer):
    lines = f"""        x = batch[0].clone()
        def summed(x):
            return model(x).square().sum()
        return {gradient}.square().mean() + ("""
    text = OWN.replace("        return (model(batch[0])", f"{lines}model(batch[0])", 1)
    (tmp_path / "own.py").write_text(text.replace("{METRICS}", '{"loss": predictions.mean()}'))
    spec = StudySpec.parse({"name": "own", "program": "own.py", "objective": {"metric": "loss"}})
    prepared = prepare(spec, tmp_path)
    assert [site.path for site in prepared.sites] == ["0"]
    assert prepared.meta["trainer"] == trainer, prepared.describe()
    if trainer == "solo":
        assert "requires_grad_() " in prepared.describe()
