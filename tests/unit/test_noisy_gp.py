"""The GP that is told how uncertain each value is: exact algebra, and Optuna's own without."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import GPSampler
from optuna.trial import TrialState, create_trial

from droptune.search import sampling
from droptune.search.noisy_gp import NoisyGPSampler, NoisyRegressor
from droptune.search.prediction import UNCERTAINTY

KINDS = {
    "x": FloatDistribution(0.0, 1.0),
    "y": FloatDistribution(1e-4, 1e-1, log=True),
    "z": CategoricalDistribution(["a", "b"]),
}


def study(objectives=1, sds=(), running=0):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(directions=["minimize", "maximize"][:objectives])
    random = np.random.default_rng(0)
    for i in range(16 + running):
        params = {
            "x": random.uniform(),
            "y": 10 ** random.uniform(-4, -1),
            "z": str(random.choice(["a", "b"])),
        }
        values = [(params["x"] - 0.3) ** 2, np.log(params["y"])][:objectives]
        told = {UNCERTAINTY: [sds[i]] * objectives} if i < len(sds) else {}
        finished = i < 16
        made.add_trial(
            create_trial(
                state=TrialState.COMPLETE if finished else TrialState.RUNNING,
                params=params,
                distributions=KINDS,
                values=values if finished else None,
                user_attrs=told,
            )
        )
    return made


def asked(sampler, known):
    known.sampler = sampler
    return known.ask(KINDS).params


@pytest.mark.parametrize("running", [0, 3])
@pytest.mark.parametrize("objectives", [1, 2])
def test_where_all_is_certain_it_proposes_what_optunas_own_does(objectives, running):
    ours = asked(NoisyGPSampler(seed=1), study(objectives, running=running))
    own = asked(GPSampler(seed=1), study(objectives, running=running))
    assert ours["z"] == own["z"]
    assert (ours["x"], ours["y"]) == pytest.approx((own["x"], own["y"]), rel=1e-6)


@pytest.mark.parametrize("running", [0, 3])
@pytest.mark.parametrize("objectives", [1, 2])
def test_uncertainty_changes_what_is_proposed(objectives, running):
    certain = asked(NoisyGPSampler(seed=1), study(objectives, running=running))
    sds = [0.3] * 8
    assert asked(NoisyGPSampler(seed=1), study(objectives, sds, running)) != certain


def test_the_posterior_is_that_of_a_known_noise_on_the_diagonal():
    random = np.random.default_rng(1)
    x, y, own = random.uniform(size=(7, 2)), random.normal(size=7), random.uniform(0, 2, 7)
    tensors = [torch.from_numpy(a) for a in (np.zeros(2, dtype=bool), x, y)]
    scales = torch.tensor([3.0, 0.5, 1.3, 0.1], dtype=torch.float64)
    regressor = NoisyRegressor(
        *tensors, scales[:2], scales[2], scales[3], own=torch.from_numpy(own)
    )
    plain = regressor.kernel(tensors[1]).numpy()  # of the points with themselves, no noise
    regressor._cache_matrix()
    at = random.uniform(size=(5, 2))
    mean, variance = regressor.posterior(torch.from_numpy(at))
    cross = regressor.kernel(torch.from_numpy(at)).numpy()
    inverse = np.linalg.inv(plain + np.diag(own + 0.1))
    assert mean.numpy() == pytest.approx(cross @ inverse @ y, abs=1e-10)
    expected = 1.3 - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    assert variance.numpy() == pytest.approx(expected, abs=1e-10)


def test_a_value_that_tells_nothing_misleads_nobody_even_where_it_is_the_best():
    sds = [0.0] * 15 + [10.0]
    known, lying = study(sds=sds), study(sds=sds)
    lying.get_trials(deepcopy=False)[15].values[0] = -0.5
    one, other = (asked(NoisyGPSampler(seed=2), each)["x"] for each in (known, lying))
    assert one == pytest.approx(0.3, abs=0.1)
    assert other == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("objectives", [1, 2])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_what_is_not_finite_is_cut_off(objectives, value):
    wrong = study(objectives, sds=[0.1, np.nan, np.inf])
    wrong.get_trials(deepcopy=False)[5].values[-1] = value
    with pytest.warns(UserWarning, match="non-finite"):
        assert 0 <= asked(NoisyGPSampler(seed=1), wrong)["x"] <= 1


def test_another_optuna_gets_its_own_sampler(monkeypatch):
    monkeypatch.setattr(optuna, "__version__", "5.1.0")
    assert type(sampling.OPTUNA["gp"](seed=1)) is GPSampler
    monkeypatch.setattr(optuna, "__version__", "5.0.3")
    assert type(sampling.OPTUNA["gp"](seed=1)) is NoisyGPSampler
