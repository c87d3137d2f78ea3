"""The statistics against theory, against resampling, and against simulated truth."""

import math

import numpy as np
import pytest
from scipy import stats

from droptune.verdict.statistics import (
    binomial_error,
    detectable,
    holm,
    holm_alphas,
    looks,
    operating,
    paired,
    settled,
    shares,
    verdict_share,
    winners_curse,
)

SCHEDULE = (3, 5, 10)


def crossed(rng, seeds, examples, of_seed, of_example, of_both):
    """Differences [seeds, examples] with mean 0 and three sources of noise."""
    noise = of_seed * rng.standard_normal((seeds, 1))
    noise = noise + of_example * rng.standard_normal(examples)
    return noise + of_both * rng.standard_normal((seeds, examples))


def test_on_seeds_alone_it_is_the_paired_t_test():
    sample = np.array([0.31, 0.24, 0.4, 0.29])
    found = paired(sample)
    expected = stats.ttest_1samp(sample, 0.0)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-4)
    assert found.examples is None


def test_one_seed_has_no_interval():
    found = paired(np.array([0.3]))
    assert found.outcome == "undetected"
    assert math.isinf(found.high)
    assert found.to_json()["high"] is None


def test_equal_members_differ_by_nothing():
    found = paired(np.zeros((4, 50)))
    assert (found.mean, found.p, found.outcome) == (0.0, 1.0, "undetected")
    assert found.outcome == "undetected"


def test_errors_are_those_of_the_two_way_analysis_of_variance():
    rng = np.random.default_rng(0)
    many = [paired(crossed(rng, 5, 80, 0.5, 3.0, 2.0)) for _ in range(1000)]
    assert np.mean([d.seed_error**2 for d in many]) == pytest.approx(0.5**2 / 5 + 4 / 400, rel=0.1)
    assert np.mean([d.example_error**2 for d in many]) == pytest.approx(9 / 80, rel=0.06)


def test_standard_error_agrees_with_the_pigeonhole_bootstrap():
    """Owen 2007: resampling rows and columns; it counts the interaction up to three times."""
    rng = np.random.default_rng(1)
    rows = crossed(rng, 10, 300, 0.4, 4.0, 1.0)
    means = [
        rows[np.ix_(rng.integers(0, 10, 10), rng.integers(0, 300, 300))].mean() for _ in range(2000)
    ]
    # A resampled variance is (n - 1) / n of the sample's.
    assert np.std(means) == pytest.approx(paired(rows).error, rel=0.08)


def test_p_agrees_with_a_sign_flip_permutation_test():
    rng = np.random.default_rng(2)
    sample = rng.normal(0.5, 1.0, 14)
    flips = rng.choice([-1.0, 1.0], (20_000, 14)) * sample
    permuted = np.mean(np.abs(flips.mean(axis=1)) >= abs(sample.mean()))
    assert paired(sample).p == pytest.approx(permuted, abs=0.02)


def test_p_is_the_level_at_which_the_interval_touches_zero():
    rows = crossed(np.random.default_rng(3), 4, 60, 0.3, 2.0, 1.0) + 0.7
    found = paired(rows, share=0.3)
    touching = found.at_level(found.p)
    assert min(abs(touching.low), abs(touching.high)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize(
    "noise", [(1.0, 0.0, 0.0), (0.3, 5.0, 5.0), (1.0, 10.0, 0.0), (1.0, 5.0, 15.0), (0.0, 9.0, 9.0)]
)
def test_intervals_cover(seeds, noise):
    rng = np.random.default_rng(4)
    found = [paired(crossed(rng, seeds, 100, *noise)) for _ in range(1000)]
    covered = np.mean([d.low <= 0 <= d.high for d in found])
    assert 0.93 <= covered <= 0.98


@pytest.mark.parametrize("seeds", [5, 10])
def test_intervals_cover_where_training_sets_overlap(seeds):
    """Differences of two splits of the same data are correlated (Nadeau & Bengio 2003)."""
    rng, overlap = np.random.default_rng(5), 0.25
    shared = rng.normal(0, np.sqrt(0.2), (2000, 1))
    drawn = shared + rng.normal(0, np.sqrt(0.8), (2000, seeds))
    blind = [paired(each) for each in drawn]
    seeing = [paired(each, overlap=overlap) for each in drawn]
    assert np.mean([d.low <= 0 <= d.high for d in blind]) < 0.9
    assert np.mean([d.low <= 0 <= d.high for d in seeing]) == pytest.approx(0.95, abs=0.02)


def test_more_seeds_are_no_help_where_the_data_are_what_limits():
    seen = np.array([0.2, -0.1, 0.3, 0.1, 0.05])
    assert settled(seen, SCHEDULE, 1) is None
    assert settled(seen, SCHEDULE, 1, overlap=0.5) == "hopeless"


def test_seeds_that_agree_by_coarseness_prove_nothing():
    """Three times one of 45 examples more: likely by chance, and no spread to judge it by."""
    accuracy = np.float32(np.array([40, 41, 39]) / 45), np.float32(np.array([39, 40, 38]) / 45)
    seen = paired(np.float64(accuracy[0]) - np.float64(accuracy[1]))
    assert seen.outcome == "undetected"
    assert (seen.bounded, seen.p) == (False, 1.0)
    assert math.isinf(seen.detectable)
    assert settled(np.array([1.0, 1.0, 1.0]), SCHEDULE, 0) is None
    assert paired(np.zeros(3)).outcome == "undetected"


def test_seeds_means_that_agree_have_the_error_of_the_examples():
    """Each seed is right on one example more, a different one each time."""
    rows = np.zeros((3, 30))
    rows[[0, 1, 2], [4, 11, 23]] = 1.0
    seen = paired(rows)
    assert seen.seed_error > 0
    assert seen.low < 0 < seen.high


def test_looks_are_few_and_end_at_the_cap():
    assert looks(3, 10) == SCHEDULE
    assert looks(3, 4) == (3, 4)
    assert looks(3, 3) == (3,)
    assert looks(5, 3) == (5,)
    assert sum(shares(looks(2, 30))) == pytest.approx(1.0)


def test_a_large_difference_is_decided_at_the_first_look():
    assert settled(np.array([0.30, 0.31, 0.29]), SCHEDULE, 0) == "decided"
    assert settled(np.array([0.30, -0.1, 0.2]), SCHEDULE, 0) is None


def test_no_difference_is_given_up_at_the_second_look_only():
    nothing = np.array([0.1, -0.1, 0.12, -0.11, 0.0])
    assert settled(nothing[:3], SCHEDULE, 0) is None
    assert settled(nothing, SCHEDULE, 1) == "hopeless"
    assert settled(nothing, (3, 5), 1) is None


def test_what_is_left_of_alpha_when_a_comparison_stops():
    assert verdict_share(0, SCHEDULE, decided=True) == 1.0
    assert verdict_share(1, SCHEDULE, decided=True) == pytest.approx(0.2)
    assert verdict_share(1, SCHEDULE, decided=False) == pytest.approx(0.7)
    assert verdict_share(2, SCHEDULE, decided=True) == pytest.approx(0.5)
    assert verdict_share(2, SCHEDULE, decided=False) == pytest.approx(0.5)
    assert verdict_share(0, (3,), decided=False) == 1.0


def sequential(rng, effect):
    """One comparison under the rule: its interval and whether it was decided."""
    sample = rng.standard_normal(SCHEDULE[-1]) + effect
    for look, seeds in enumerate(SCHEDULE):
        why = settled(sample[:seeds], SCHEDULE, look)
        if why is not None:
            break
    share = verdict_share(look, SCHEDULE, decided=why == "decided")
    return paired(sample[:seeds], share=share), why == "decided"


@pytest.mark.parametrize("effect", [0.0, 1.0, 3.0, 10.0])
def test_the_sequential_rule_keeps_coverage_and_power(effect):
    rng = np.random.default_rng(5)
    made = [sequential(rng, effect) for _ in range(1000)]
    covered = np.mean([d.low <= effect <= d.high for d, _ in made])
    assert 0.93 <= covered <= 0.98
    better = np.mean([d.outcome == "better" for d, _ in made])
    if effect == 0.0:
        assert better <= 0.05
    else:
        assert better == pytest.approx(operating(effect, SCHEDULE).power, abs=0.05)


def test_the_detectable_difference_is_found_four_times_out_of_five():
    rng = np.random.default_rng(6)
    effect = detectable(0.5 / math.sqrt(5), 0.0, 5)
    found = [paired(rng.normal(effect, 0.5, 5)).outcome == "better" for _ in range(1000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    assert paired(rng.normal(0, 0.5, 5)).detectable > 0


def test_the_detectable_difference_with_examples():
    rng = np.random.default_rng(7)
    seed_error, example_error = 0.3 / math.sqrt(6), 3 / math.sqrt(200)
    effect = detectable(seed_error, example_error, 6)
    rows = [crossed(rng, 6, 200, 0.3, 3.0, 0.0) + effect for _ in range(1000)]
    assert np.mean([paired(r).outcome == "better" for r in rows]) == pytest.approx(0.8, abs=0.04)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([]) == ()


def test_intervals_at_holms_levels_exclude_zero_exactly_where_holm_rejects():
    rng = np.random.default_rng(8)
    for _ in range(200):
        found = [paired(rng.normal(rng.uniform(0, 1.5), 0.5, 5)) for _ in range(3)]
        p_values = [d.p for d in found]
        levels, adjusted = holm_alphas(p_values), holm(p_values)
        for one, level, p in zip(found, levels, adjusted, strict=True):
            assert (one.at_level(level).outcome != "undetected") == (p <= 0.05)


def test_binomial_error():
    assert binomial_error(0.84, 5000) == pytest.approx(0.0052, abs=1e-4)
    assert binomial_error(1.0, 100) > 0


def test_winners_curse_is_positive_where_the_search_flattered():
    assert winners_curse(0.44, np.array([0.46, 0.48]), "minimize").excess == pytest.approx(0.03)
    assert winners_curse(0.90, np.array([0.88, 0.86]), "maximize").excess == pytest.approx(0.03)
    assert math.isinf(winners_curse(0.9, np.array([0.88]), "maximize").error)
