"""Optuna's GP sampler, told of each value how uncertain it is beside the noise that all share.

For pruned trials, which stand with predicted values. It is made of private parts of Optuna 5.0,
so `sampling` takes Optuna's own sampler where another version is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from optuna import Study
from optuna._gp import acqf, gp
from optuna._gp.search_space import SearchSpace
from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from droptune.search.prediction import UNCERTAINTY, Array

LARGEST = 10.0  # of a value's own noise, in standard deviations of all values: it tells nothing
SEEDS = 1 << 30  # of quasi-random numbers


class NoisyRegressor(gp.GPRegressor):
    """The observations' covariance has a known variance of each one on its diagonal, beside the
    fitted one (Rasmussen & Williams 2006, eq. 2.20 with a diagonal matrix for the noise).

    own: [n], in units of the standardised values
    """

    def __init__(self, *args: Any, own: torch.Tensor, **others: Any) -> None:
        super().__init__(*args, **others)
        self._own = own

    def kernel(
        self, X1: torch.Tensor | None = None, X2: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Covariance of two sets of points, without X1 that of the observations."""
        covariance = super().kernel(X1, X2)
        return covariance if X1 is not None else covariance + self._own.diag()


class NoisyGPSampler(GPSampler):
    """GPSampler for trials of which some tell their UNCERTAINTY; it knows no constraints."""

    def _sample_relative_impl(
        self,
        study: Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        space = SearchSpace(search_space)
        x = space.get_normalized_params(completed_trials)
        scores, noise = _standardised(study, completed_trials)
        regressors = [
            self._fitted(space, x, score, own) for score, own in zip(scores.T, noise.T, strict=True)
        ]
        seen = ~noise.any(1)  # what is only predicted is nothing to improve on
        if seen.any():
            x, scores = x[seen], scores[seen]
        wanted = self._wanted(space, regressors, scores, running_trials)
        start = (
            x[[scores.argmax()]]
            if len(regressors) == 1
            else self._get_best_params_for_multi_objective(x, scores)
        )
        return space.get_unnormalized_param(self._optimize_acqf(wanted, start))

    def _fitted(self, space: SearchSpace, x: Array, score: Array, own: Array) -> NoisyRegressor:
        """With the likeliest length scales, scale and common noise; Optuna's first guess of them
        where no optimum is found."""

        def guessed() -> NoisyRegressor:
            ones = torch.ones(x.shape[1] + 2, dtype=torch.float64)
            return NoisyRegressor(
                torch.from_numpy(space.is_categorical),
                torch.from_numpy(x),
                torch.from_numpy(score.copy()),
                ones[2:],
                ones[0],
                ones[1],
                own=torch.from_numpy(own.copy()),
            )

        try:
            return guessed()._fit_kernel_params(  # type: ignore[return-value]
                self._log_prior, self._minimum_noise, self._deterministic, gtol=1e-2
            )
        except RuntimeError:
            regressor = guessed()
            regressor._cache_matrix()
            return regressor

    def _wanted(
        self,
        space: SearchSpace,
        regressors: Sequence[NoisyRegressor],
        scores: Array,
        running: Sequence[FrozenTrial],
    ) -> acqf.BaseAcquisitionFunc:
        """Expected improvement, or of the hypervolume, given what runs (all as Optuna does)."""
        highest = float(scores.max())
        if len(regressors) == 1 and not running:
            return acqf.LogEI(regressors[0], space, highest)
        beside: dict[str, Any] = {"qmc_seed": self._rng.rng.randint(SEEDS)}
        if running:
            beside["normalized_params_of_running_trials"] = space.get_normalized_params([*running])
        if len(regressors) == 1:
            return acqf.qLogEI(regressors[0], space, highest, self._n_qmc_samples_qei, **beside)
        kind, front = acqf.qLogEHVI if running else acqf.LogEHVI, torch.from_numpy(scores)
        return kind([*regressors], space, front, self._n_qmc_samples_ehvi, **beside)


def _standardised(study: Study, trials: Sequence[FrozenTrial]) -> tuple[Array, Array]:
    """Values, larger is better, and their own variances [trials, objectives]."""
    sign = np.array([-1.0 if d == StudyDirection.MINIMIZE else 1.0 for d in study.directions])
    values = gp.warn_and_convert_inf(sign * np.array([trial.values for trial in trials]))
    spread = np.maximum(values.std(0), 1e-10)
    sds = np.array([_sds(trial.user_attrs, len(sign)) for trial in trials])
    sds = np.nan_to_num(sds, nan=np.inf, posinf=np.inf)
    return (values - values.mean(0)) / spread, np.minimum(sds / spread, LARGEST) ** 2


def _sds(told: Mapping[str, Any], objectives: int) -> Sequence[float]:
    return told.get(UNCERTAINTY) or [0.0] * objectives
