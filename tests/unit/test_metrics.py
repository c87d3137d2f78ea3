"""Metrics against scikit-learn, and under vmap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch.nn import functional

from droptune.program.examples import Examples, example_scores, example_sums
from droptune.program.metrics import (
    CLASSIFICATION,
    IGNORED,
    REGRESSION,
    classification_metrics,
    regression_metrics,
)


def drawn(n, classes, seed, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, classes, (n,), generator=generator)
    return logits, targets


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 7), st.integers(0, 10**6))
def test_classification_agrees_with_scikit_learn(n, classes, seed):
    logits, targets = drawn(n, classes, seed)
    found = {name: float(value) for name, value in classification_metrics(logits, targets).items()}
    p = logits.softmax(-1).numpy()
    predicted = p.argmax(-1)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        targets, predicted, average="macro", zero_division=0
    )
    expected = {
        "nll": sk.log_loss(targets, p, labels=range(classes)),
        "accuracy": sk.accuracy_score(targets, predicted),
        "error": 1 - sk.accuracy_score(targets, predicted),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "brier": np.square(p - np.eye(classes)[targets]).sum(-1).mean(),
        "ece": calibration_error(p, targets.numpy()),
    }
    assert list(found) == list(CLASSIFICATION)
    assert found == pytest.approx(expected, abs=1e-9)


def calibration_error(p, targets, bins=15):
    """Guo et al. 2017, eq. 3, written as a loop."""
    confidence, correct = p.max(-1), p.argmax(-1) == targets
    error = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            error += inside.mean() * gap
    return error


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10**6))
def test_regression_agrees_with_scikit_learn(n, seed):
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = torch.randn(2, n, 1, generator=generator, dtype=torch.float64)
    found = {name: float(value) for name, value in regression_metrics(predictions, targets).items()}
    mse = sk.mean_squared_error(targets, predictions)
    gaussian = torch.distributions.Normal(predictions, math.sqrt(mse))
    expected = {
        "mse": mse,
        "rmse": math.sqrt(mse),
        "mae": sk.mean_absolute_error(targets, predictions),
        "nll": -float(gaussian.log_prob(targets).mean()),
    }
    assert list(found) == list(REGRESSION)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0)])
def test_slots_are_measured_as_alone(in_dims):
    logits = torch.stack([drawn(50, 4, seed)[0] for seed in range(3)])
    targets = drawn(50, 4, 9)[1]
    given_targets = targets if in_dims[1] is None else targets.expand(3, 50)
    fused = torch.func.vmap(classification_metrics, in_dims=in_dims)(logits, given_targets)
    for slot in range(3):
        alone = classification_metrics(logits[slot], targets)
        for name, value in alone.items():
            torch.testing.assert_close(fused[name][slot], value, rtol=0, atol=1e-12)


def test_regression_runs_under_vmap():
    predictions, targets = torch.randn(3, 20), torch.randn(20)
    fused = torch.func.vmap(regression_metrics, in_dims=(0, None))(predictions, targets)
    for slot in range(3):
        for name, value in regression_metrics(predictions[slot], targets).items():
            torch.testing.assert_close(fused[name][slot], value)


def test_ignored_targets_count_nowhere():
    logits, targets = drawn(40, 5, 1)
    targets[::3] = IGNORED
    counted = targets != IGNORED
    whole = classification_metrics(logits, targets)
    for name, value in classification_metrics(logits[counted], targets[counted]).items():
        torch.testing.assert_close(whole[name], value, rtol=0, atol=1e-12, msg=name)


def test_sequences_are_measured_position_by_position():
    logits, targets = drawn(24, 5, 2)
    rows = classification_metrics(logits, targets)
    for name, value in classification_metrics(logits.view(4, 6, 5), targets.view(4, 6)).items():
        torch.testing.assert_close(value, rows[name])


def test_half_precision_is_measured_in_float32():
    logits, targets = drawn(2000, 5, 3)
    low = classification_metrics(logits.bfloat16(), targets)
    assert all(value.dtype == torch.float32 for value in low.values())
    assert float(low["nll"]) == pytest.approx(
        float(classification_metrics(logits, targets)["nll"]), abs=0.01
    )


@pytest.mark.parametrize("metrics", [classification_metrics, regression_metrics])
def test_a_set_is_measured_part_by_part(metrics):
    logits, targets = drawn(40, 5, 4)
    if metrics is regression_metrics:
        logits, targets = logits[:, 0], targets.double()
    cuts = (slice(0, 7), slice(7, 8), slice(8, 40))
    parts = [metrics.sums(logits[cut], targets[cut]) for cut in cuts]
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    for name, value in metrics(logits, targets).items():
        torch.testing.assert_close(metrics.of(total)[name], value, rtol=0, atol=1e-12, msg=name)


def scored(task, predictions, targets, *cuts):
    """Scores of examples that come in parts."""
    sizes = np.diff([0, *cuts, len(targets)]).tolist()
    parts = zip(predictions.split(sizes), targets.split(sizes), strict=True)
    return example_scores(task, [example_sums(task, *part) for part in parts])


def test_examples_average_to_the_metrics():
    logits, targets = drawn(40, 5, 4)
    scores = scored("classification", logits, targets, 13, 14)
    whole = classification_metrics(logits, targets)
    assert {name: tuple(score.shape) for name, score in scores.items()} == dict.fromkeys(
        ("nll", "correct", "brier"), (40,)
    )
    for name, metric in (("nll", "nll"), ("correct", "accuracy"), ("brier", "brier")):
        torch.testing.assert_close(scores[name].mean(), whole[metric])
    torch.testing.assert_close(
        scores["nll"], functional.cross_entropy(logits, targets, reduction="none")
    )


def test_regression_examples_average_to_the_metrics():
    predictions, targets = torch.randn(30, 2).double(), torch.randn(30, 2).double()
    scores = scored("regression", predictions, targets, 11)
    whole = regression_metrics(predictions, targets)
    for name in ("mse", "mae", "nll"):
        assert scores[name].shape == (30,)
        torch.testing.assert_close(scores[name].mean(), whole[name])


def test_examples_of_sequences_count_by_their_known_targets():
    logits, targets = drawn(12, 3, 5)
    logits, targets = logits.view(3, 4, 3), targets.view(3, 4).clone()
    targets[0, 2:] = targets[1] = IGNORED  # two known, none, four
    scores, whole = (
        scored("classification", logits, targets),
        classification_metrics(logits, targets),
    )
    first = functional.cross_entropy(logits[0, :2], targets[0, :2])
    torch.testing.assert_close(scores["nll"][0], first)  # two is their mean
    assert float(scores["nll"][1]) == float(scores["correct"][1]) == 0
    for name, metric in (("nll", "nll"), ("correct", "accuracy"), ("brier", "brier")):
        torch.testing.assert_close(scores[name].mean(), whole[metric])


def sampled(logits, targets, size):
    """The sample of logits of examples that come in parts of this size."""
    examples = Examples("classification", len(targets))
    for part in zip(logits.split(size), targets.split(size), strict=True):
        examples.add(*part)
    return {n: v for n, v in examples.scores().items() if n in ("logits", "targets")}


def test_a_sample_of_logits_holds_the_same_probabilities():
    torch.manual_seed(0)
    logits, targets = 8 * torch.randn(30_000, 10), torch.randint(0, 10, (30_000,))
    targets[::7] = IGNORED
    sample = sampled(logits, targets, 999)
    chosen = torch.arange(0, 30_000, 3)
    chosen = chosen[targets[chosen] != IGNORED]
    assert sample["logits"].dtype == torch.float16
    assert sample["targets"].tolist() == targets[chosen].tolist()
    exact = functional.cross_entropy(logits[chosen], targets[chosen])
    kept = functional.cross_entropy(sample["logits"].float(), sample["targets"].long())
    assert float(kept) == pytest.approx(float(exact), abs=1e-3)


def test_no_sample_of_sequences_or_of_very_many_classes():
    assert sampled(torch.randn(4, 5, 3), torch.zeros(4, 5, dtype=torch.long), 3) == {}
    assert sampled(torch.zeros(300, 50_000), torch.zeros(300, dtype=torch.long), 100) == {}
    few = sampled(torch.zeros(20, 3), torch.zeros(20, dtype=torch.long), 7)
    assert len(few["targets"]) == 20


def test_a_perfect_regression_has_no_infinite_loss():
    same = torch.ones(5)
    assert torch.isfinite(regression_metrics(same, same)["nll"])
