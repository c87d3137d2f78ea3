"""Proposals: inside the space, different for every number, the same in every run, and learning."""

from __future__ import annotations

import math

import numpy as np
import pytest

from droptune.errors import SpecError
from droptune.search.noisy_gp import NoisyGPSampler
from droptune.search.sampling import Proposer, from_unit, to_unit
from droptune.space.parameters import RateParameter, ValueParameter
from droptune.space.space import Space
from droptune.spec.objective import Objective
from droptune.spec.sections import Baselines, Sampler
from droptune.spec.spec import StudySpec
from droptune.training import Record, Seeds, State, Training, TrainingKind

NAMES = ["tpe", "gp", "cmaes", "random", "qmc"]
SPACE = Space(
    rates=(
        RateParameter("dropout/a", ("a",), (1.0,), 0.0, 0.9),
        RateParameter("dropout/b", ("b",), (1.0,), 0.0, 0.5),
    ),
    lr=ValueParameter("lr", 1e-4, 1e-2, log=True),
    values=(ValueParameter("schedule", choices=("constant", "up")),),
    author={"a": 0.5, "b": 0.1},
)
NLL = Objective("nll")


def proposer(name, seed=0, objectives=(NLL,), baselines=False, **options):
    wanted = Baselines(trials=2, none=baselines, half=baselines, author=baselines)
    spec = StudySpec(
        name="s", program="p.py", seed=seed, objectives=objectives,
        sampler=Sampler(name, options), baselines=wanted,
    )  # fmt: skip
    return Proposer.of(spec, SPACE)


def value(assignment):
    return (assignment.rates["a"] - 0.6) ** 2 + 0.3 * (math.log10(assignment.lr) + 3) ** 2


def record(number, assignment, state=State.COMPLETE, values=None, intervals=10):
    training = Training(
        id=number, study_id=1, kind=TrainingKind.SEARCH, number=number, label="",
        assignment=assignment, seeds=Seeds(0, 0, 0), seed_index=None, intervals=10, attempt=0,
        lease_epoch=0,
    )  # fmt: skip
    final = values or (value(assignment),)
    curves = {
        key: tuple(v + 0.5 * (10 - i) / 10 for i in range(1, intervals + 1))
        for key, v in zip(("val/nll", "val/accuracy"), final, strict=False)
    }
    return Record(training, state, curves=curves, values=final if state == "COMPLETE" else None)


def history(count, seed=5):
    return [record(n, a) for n, a in enumerate(proposer("random", seed).propose([], range(count)))]


def key(assignment):
    return (*assignment.rates.values(), assignment.lr, assignment.values["schedule"])


@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_inside_the_space_different_and_the_same_in_every_run(name):
    records = history(20)
    numbers = range(20, 23 if name == "gp" else 28)  # Optuna's GP is slow
    proposed = proposer(name).propose(records, numbers)
    assert len({key(a) for a in proposed}) == len(numbers)
    for assignment in proposed:
        assert 0 <= assignment.rates["a"] <= 0.9
        assert 0 <= assignment.rates["b"] <= 0.5
        assert 1e-4 <= assignment.lr <= 1e-2 * (1 + 1e-9)
        assert assignment.values["schedule"] in ("constant", "up")
    again = proposer(name).propose(records, numbers)
    assert [key(a) for a in again] == [key(a) for a in proposed]


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_never_propose_the_same(name):
    records = history(20)
    ours = proposer(name).propose(records, [20, 22])
    theirs = proposer(name).propose(records, [21, 23])
    assert len({key(a) for a in [*ours, *theirs]}) == 4


@pytest.mark.parametrize("name", ["tpe", "cmaes", pytest.param("gp", marks=pytest.mark.slow)])
def test_samplers_that_learn_come_closer_than_the_first_wave(name):
    records = []
    asking = proposer(name)
    for start in range(0, 40, 8):
        numbers = range(start, start + 8)
        records += [
            record(n, a) for n, a in zip(numbers, asking.propose(records, numbers), strict=True)
        ]
    values = [r.values[0] for r in records]
    assert np.median(values[-16:]) < np.median(values[:8])
    assert min(values) < 0.05


def test_the_first_wave_needs_no_records_and_is_a_function_of_the_number():
    one, other = proposer("tpe"), proposer("tpe")
    assert key(one.propose([], [3])[0]) == key(other.propose(history(3), [2, 3])[1])
    assert key(one.propose([], [3])[0]) != key(proposer("tpe", seed=1).propose([], [3])[0])


def test_baselines_come_before_the_first_wave():
    with_baselines = proposer("tpe", baselines=True)
    count = len(SPACE.baselines(Baselines(trials=2)))
    assert count >= 4
    designed = proposer("qmc", baselines=True).propose([], [count + 7])
    assert key(with_baselines.propose([], [count + 7])[0]) == key(designed[0])


def test_exact_zeros_are_proposed():
    proposed = proposer("random").propose([], range(200))
    zeros = sum(a.rates["a"] == 0 for a in proposed)
    assert 8 <= zeros <= 40


def test_running_trials_and_failed_ones_change_nothing_they_should_not():
    records = history(30)
    running = record(30, records[3].training.assignment, State.RUNNING)
    unassigned = record(31, records[3].training.assignment, State.RUNNING)
    failed = record(32, records[3].training.assignment, State.FAIL)
    asking = proposer("tpe")
    first = asking.propose([*records, running, unassigned, failed], [31, 33])
    assert len({key(a) for a in first}) == 2
    fresh = proposer("tpe").propose([*records, running, unassigned, failed], [31, 33])
    again = asking.propose([*records, running, unassigned, failed], [31, 33])
    assert [key(a) for a in again] == [key(a) for a in fresh]  # nothing was left behind


@pytest.mark.parametrize("name", ["gp", "cmaes", "tpe"])
def test_pruned_trials_are_learned_from(name):
    records = history(40)
    cut = [record(r.training.number, r.training.assignment, State.PRUNED, intervals=4)
           if i % 2 else r for i, r in enumerate(records)]  # fmt: skip
    without = [r for i, r in enumerate(records) if not i % 2]
    asked = proposer(name).propose(cut, [40])
    assert key(asked[0]) != key(proposer(name).propose(without, [40])[0])


@pytest.mark.parametrize("name", ["tpe", "gp", "random", "qmc"])
def test_two_objectives(name):
    both = (NLL, Objective("accuracy"))
    records = [
        record(n, a, values=(value(a), 1 - a.rates["a"]))
        for n, a in enumerate(proposer("random").propose([], range(12)))
    ]
    assert len({key(a) for a in proposer(name, objectives=both).propose(records, [20])}) == 1


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("tpe", {"startup": 3}, "sampler tpe, startup 3"),
        ("tpe", {"n_startup_trials": "ten"}, "sampler tpe, n_startup_trials 'ten'"),
        ("cmaes", {"popsize": "many"}, "sampler cmaes, popsize 'many'"),
        ("cmaes", {"sigma": 3}, "no option 'sigma'"),
        ("qmc", {"x": 3}, "no option 'x'"),
    ],
)
def test_wrong_options_are_one_line(name, options, told):
    with pytest.raises(SpecError, match=told):
        proposer(name, **options)


def test_auto_is_the_gp_for_a_few_trials_and_tpe_for_many():
    records = history(20)
    few, many = [20, 21], list(range(20, 30))
    auto = proposer("auto")
    as_gp = proposer("gp").propose(records, few)
    assert [key(a) for a in auto.propose(records, few)] == [key(a) for a in as_gp]
    as_tpe = proposer("tpe").propose(records, many)
    assert [key(a) for a in auto.propose(records, many)] == [key(a) for a in as_tpe]


def test_cmaes_refuses_two_objectives():
    with pytest.raises(SpecError, match="one objective only"):
        proposer("cmaes", objectives=(NLL, Objective("accuracy")))


def test_the_unit_cube_and_back():
    kinds = SPACE.sampler_distributions()
    params = from_unit(kinds, np.array([0.3, 0.8, 0.5, 0.9]))
    assert params["lr"] == pytest.approx(1e-3)
    assert params["schedule"] == "up"
    assert to_unit(kinds, params) == pytest.approx([0.3, 0.8, 0.5, 0.75])


def test_what_a_sampler_sees_is_bounded_and_holds_the_best():
    asking = proposer("gp")
    records = history(60)
    best = min(records[:30], key=lambda r: r.value)
    seen = asking._chosen(records[::-1], 20)
    assert len(seen) == 20
    assert best in seen
    assert seen[-10:] == records[-10:]
    assert asking._chosen(records[:20], 20) == records[:20]


def test_the_gp_sees_pruned_trials_with_the_noise_of_what_is_predicted(monkeypatch):
    told, fitted = [], NoisyGPSampler._fitted

    def watched(self, space, x, score, own):
        told.append(own)
        return fitted(self, space, x, score, own)

    monkeypatch.setattr(NoisyGPSampler, "_fitted", watched)
    records = [
        record(r.training.number, r.training.assignment, State.PRUNED, intervals=4)
        if r.training.number % 2 else r for r in history(40)
    ]  # fmt: skip
    proposer("gp").propose(records, [40])
    own = told[-1]
    assert own.shape == (40,)
    assert (own[::2] == 0).all()
    assert (own[1::2] > 0).all()


def test_what_the_gp_learned_before_changes_nothing():
    """Predictions of pruned trials change with each trial that ends; workers must agree."""
    records = [
        record(r.training.number, r.training.assignment, State.PRUNED, intervals=4)
        if r.training.number % 3 == 1 else r for r in history(30)
    ]  # fmt: skip
    asking = proposer("gp")
    asking.propose(records[:24], [30])
    (again,), (fresh,) = asking.propose(records, [31]), proposer("gp").propose(records, [31])
    assert key(again) == key(fresh)
