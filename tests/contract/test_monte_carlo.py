"""Monte-Carlo dropout: the same fused and solo, on where it should be, and without side effects."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_trainer import (
    Mlp,
    _classify,
    _labels,
    _noise,
    alone,
    assert_fused_is_solo,
    assert_same,
    make_recipe,
    recipe_of,
    training,
)
from torch import nn
from torch.nn import functional

import droptune
from droptune.errors import SpecError
from droptune.spec.objective import MONTE_CARLO
from droptune.spec.spec import StudySpec
from droptune.trainers.fused import Fused
from droptune.trainers.monte_carlo import METRICS
from droptune.trainers.solo import Solo
from droptune.training import Assignment

MODELS = ("mlp with batch norm", "transformer with padding", "resnet with drop path")


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.output = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = functional.dropout(self.hidden(x).relu(), 0.4, self.training)
        return self.output(x)


@pytest.mark.parametrize("name", MODELS)
def test_fused_equals_solo(name):
    recipe = replace(recipe_of(name), mc_passes=3, _kept={})
    values = [{"schedule": "late", "cutoff": 0.2}, {}, {"schedule": "up"}]
    assert_fused_is_solo(recipe, [training(recipe, k, values=v) for k, v in enumerate(values)])


@pytest.mark.parametrize("name", MODELS)
def test_training_does_not_notice(name):
    recipe = recipe_of(name)
    each = training(recipe, 2)
    without, with_passes = (
        alone(replace(recipe, mc_passes=passes, _kept={}), each, 2) for passes in (0, 4)
    )
    assert_same(without[0], with_passes[0], tolerance=1e-15)
    for a, b in zip(without[1], with_passes[1], strict=True):
        for key, value in a.measurement.values.items():
            if key != "time/seconds":
                assert b.measurement.values[key] == value, key
        new = b.measurement.values.keys() - a.measurement.values.keys()
        assert new == {f"val/{name}" for name in MONTE_CARLO["classification"]}


@pytest.mark.parametrize("model", [Mlp, Functional])
def test_it_is_the_usual_evaluation_at_rate_zero_and_only_there(model):
    recipe = make_recipe(_classify(model, _noise(22, 6), lr=1e-2), mc_passes=5)
    each = training(recipe, 1)
    rated = alone(recipe, each, 2)[1][-1].measurement.values
    assert rated["val/mc_nll"] != pytest.approx(rated["val/nll"], abs=1e-6)
    zero = Assignment({site.path: 0.0 for site in recipe.sites}, 1e-2)
    still = alone(recipe, replace(each, assignment=zero), 2)[1][-1].measurement.values
    for name in MONTE_CARLO["classification"]:
        if name != "mc_entropy":
            assert still[f"val/{name}"] == pytest.approx(still[f"val/{name[3:]}"], abs=1e-9)
    assert 0 <= still["val/mc_entropy"] <= math.log(3) + 1e-9


def test_regression_measures_the_mean_prediction_and_the_mixture():
    x = _noise(24, 6)
    model = lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))  # noqa: E731
    program = droptune.regression(
        model=model, train=(x, x.sum(1, keepdim=True)), batch_size=8, epochs=2, lr=1e-2, test=False
    )
    recipe = make_recipe(program, mc_passes=6)
    values = alone(recipe, training(recipe, 2), 2)[1][-1].measurement.values
    assert {f"val/{name}" for name in MONTE_CARLO["regression"]} < set(values)
    assert_fused_is_solo(recipe, [training(recipe, k) for k in range(3)])


def test_the_formulas_are_those_of_the_paper():
    torch.manual_seed(0)
    passes, targets = torch.randn(7, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    got = METRICS["regression"](passes.T, targets)
    variance = (passes - targets).square().mean()
    density = torch.distributions.Normal(passes, variance.sqrt()).log_prob(targets).exp()
    assert got["nll"].item() == pytest.approx(-density.mean(0).log().mean().item())
    mean = passes.mean(0)
    assert got["rmse"].item() == pytest.approx((mean - targets).square().mean().sqrt().item())
    p = torch.randn(6, 4, dtype=torch.float64).softmax(-1)
    entropy = METRICS["classification"](p.log(), _labels(6))["entropy"]
    assert entropy.item() == pytest.approx(torch.distributions.Categorical(p).entropy().mean())


def test_it_may_be_the_objective_where_passes_are_asked_for():
    program = _classify(Mlp, _noise(22, 6))
    spec = StudySpec.from_json({"name": "mc", "program": "p.py", "objective": "mc_nll"})
    with pytest.raises(SpecError, match="mc_passes: 20"):
        spec.resolved(program)
    asked = replace(spec, training=replace(spec.training, mc_passes=20))
    assert asked.resolved(program).objectives[0].direction == "minimize"


def test_the_test_set_is_scored_with_the_same_passes():
    recipe = make_recipe(_classify(Mlp, _noise(22, 6), lr=1e-2, test=(_noise(9, 6), _labels(9))))
    recipe = replace(recipe, mc_passes=4, _kept={})
    fused, solo, each = Fused(recipe, 2), Solo(recipe), training(recipe, 1)
    for trainer in (fused, solo):
        trainer.fill(0, each)
        trainer.train_interval()
    scores = [trainer.score(0) for trainer in (fused, solo)]
    assert scores[0].split == "test"
    assert set(MONTE_CARLO["classification"]) < set(scores[0].metrics)
    for name, value in scores[0].metrics.items():
        assert value == pytest.approx(scores[1].metrics[name], abs=1e-9), name
