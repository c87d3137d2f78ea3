"""Pruning: what is pruned, what never is, and that nothing depends on order or neighbours."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from droptune.errors import SpecError
from droptune.search.audit import Audit
from droptune.search.prediction import Process, Trace, Warp, expected_values, points
from droptune.search.pruning import (
    FairPruner,
    FairPruning,
    NoPruning,
    Rules,
    decide,
    is_audited,
    make_pruner,
)
from droptune.spec.objective import Objective
from droptune.spec.sections import Pruner
from droptune.spec.spec import StudySpec
from droptune.training import Assignment, Record, Seeds, State, Training, TrainingKind

INTERVALS = 40
NLL = Objective("nll")
RULES = Rules(audit=0.0)


def curve(rate, lr, seed=0):
    """Little dropout learns fast and overfits; much learns slowly and wins late."""
    t = np.arange(1, INTERVALS + 1) / INTERVALS
    pace = (lr / 1e-3) ** 0.3
    learned = 2.0 * np.exp(-t * pace * (14 - 10 * rate))
    overfitted = 1.2 * (1 - rate) ** 2 * pace * np.maximum(0, t - 0.15)
    noise = 0.01 * np.random.default_rng(seed).normal(size=INTERVALS)
    return 0.45 + learned + overfitted + noise


GRID = [(rate, lr) for rate in np.linspace(0, 0.8, 9) for lr in (3e-4, 1e-3, 3e-3)]
CURVES = np.array([curve(rate, lr, i) for i, (rate, lr) in enumerate(GRID)])
POINTS = points([Assignment({"a": rate}, lr) for rate, lr in GRID])
BEST = int(CURVES[:, -1].argmin())


def trace(i, done=INTERVALS, **more):
    values = np.array([CURVES[i, -1]]) if done == INTERVALS else None
    return Trace(i, CURVES[None, i, :done], POINTS[i], values, **more)


def record(i, rate, lr, values, state=State.RUNNING, kind=TrainingKind.SEARCH, **more):
    training = Training(
        id=100 + i, study_id=1, kind=kind, number=i, label="", seeds=Seeds(0, 0, 0),
        assignment=Assignment({"a": rate}, lr), seed_index=None, intervals=INTERVALS, attempt=0,
        lease_epoch=0,
    )  # fmt: skip
    curves = {"val/nll": tuple(map(float, values))}
    final = (float(values[-1]),) if state is State.COMPLETE else None
    return Record(training, state, curves=curves, values=final, **more)


def study_records(running, done, finished):
    complete = [record(i, *GRID[i], CURVES[i], State.COMPLETE) for i in finished]
    return complete + [record(i, *GRID[i], CURVES[i, :done]) for i in running]


TEACHERS = [i for i in range(0, 27, 2) if i != BEST]
OTHERS = [i for i in range(27) if i not in TEACHERS]


# -- decide -----------------------------------------------------------------------------------


def test_bad_trainings_are_pruned_and_the_best_is_not_though_it_is_last_now():
    done = RULES.at(INTERVALS)[0]
    running = [trace(i, done) for i in OTHERS]
    decisions = decide([trace(i) for i in TEACHERS], running, INTERVALS, ["last"], RULES)
    now = {i: CURVES[i, done - 1] for i in OTHERS}
    assert now[BEST] > np.median(list(now.values()))  # a median pruner would prune it
    assert not decisions[BEST].prune
    pruned = [i for i in OTHERS if decisions[i].prune]
    assert len(pruned) >= 4
    assert min(CURVES[pruned, -1]) > CURVES[TEACHERS, -1].min()


def test_predictions_are_close_and_their_sd_honest():
    running = [trace(i, 20) for i in OTHERS]
    decisions = decide([trace(i) for i in TEACHERS], running, INTERVALS, ["last"], RULES)
    errors = np.array([d.predicted[0] - CURVES[i, -1] for i, d in decisions.items()])
    assert np.abs(errors).max() < 0.15
    assert np.mean(np.abs(errors) < 2 * np.array([d.sd[0] for d in decisions.values()])) > 0.8


def test_neither_order_nor_neighbours_change_a_decision():
    completed, running = [trace(i) for i in TEACHERS], [trace(i, 8) for i in OTHERS]
    whole = decide(completed, running, INTERVALS, ["last"], RULES)
    turned = decide(completed[::-1], running[::-1], INTERVALS, ["last"], RULES)
    assert {k: d.prune for k, d in whole.items()} == {k: d.prune for k, d in turned.items()}
    for one in running:
        alone = decide(completed, [one], INTERVALS, ["last"], RULES)[one.key]
        assert alone.prune == whole[one.key].prune
        assert alone.predicted == pytest.approx(whole[one.key].predicted)


def test_neighbours_of_a_kind_that_never_completed_change_nothing():
    def scheduled(i, done, word):
        made = record(
            i, *GRID[i], CURVES[i, :done], State.COMPLETE if done == INTERVALS else State.RUNNING
        )
        values = {"schedule": word}
        assignment = replace(made.training.assignment, values=values)
        return replace(made, training=replace(made.training, assignment=assignment))

    completed = [scheduled(i, INTERVALS, "constant") for i in TEACHERS]
    constant = scheduled(OTHERS[0], 20, "constant")
    early = scheduled(OTHERS[1], 20, "early")
    judge = FairPruning((NLL,), INTERVALS, rules=RULES).judge
    alone = judge([*completed, constant], {constant.training.id}).decisions
    both = judge([*completed, constant, early], {constant.training.id, early.training.id})
    one = constant.training.id
    assert both.decisions[one].predicted == pytest.approx(alone[one].predicted)
    assert both.decisions[one].sd == pytest.approx(alone[one].sd)
    assert early.training.id not in both.pruned  # nobody knows what early does


def test_nothing_is_decided_before_there_are_pilots_or_off_checkpoints():
    few = [trace(i) for i in TEACHERS[: RULES.pilots - 1]]
    assert decide(few, [trace(1, 8)], INTERVALS, ["last"], RULES) == {}
    many = [trace(i) for i in TEACHERS]
    assert decide(many, [trace(1, 9)], INTERVALS, ["last"], RULES) == {}


def test_nothing_is_pruned_while_curves_say_nothing():
    random = np.random.default_rng(0)

    def noise(key, done):
        final = np.array([random.normal()]) if done == INTERVALS else None
        return Trace(key, random.normal(size=(1, done)), random.normal(size=2), final)

    completed = [noise(i, INTERVALS) for i in range(30)]
    running = [noise(100 + i, 8) for i in range(30)]
    decisions = decide(completed, running, INTERVALS, ["last"], RULES)
    assert not any(d.prune for d in decisions.values())


def test_protected_trainings_are_not_even_judged():
    completed = [trace(i) for i in TEACHERS]
    assert decide(completed, [trace(0, 8, protected=True)], INTERVALS, ["last"], RULES) == {}


def test_an_audited_training_goes_on_and_says_so():
    completed = [trace(i) for i in TEACHERS]
    plain = decide(completed, [trace(1, 20)], INTERVALS, ["last"], RULES)[1]
    audited = decide(completed, [trace(1, 20, audited=True)], INTERVALS, ["last"], RULES)[1]
    assert (plain.prune, plain.audited) == (True, False)
    assert (audited.prune, audited.audited) == (False, True)


def test_an_overfitting_training_lives_on_its_past_only_where_best_counts():
    def lowest(i, done=INTERVALS):
        one = trace(i, done)
        return one if one.values is None else replace(one, values=np.array([CURVES[i].min()]))

    past = int(CURVES[:, :20].min(1).argmin())  # the lowest so far, rising since
    teachers = [i for i in range(27) if i != past]
    by_last = decide([trace(i) for i in teachers], [trace(past, 20)], INTERVALS, ["last"], RULES)
    by_best = decide([lowest(i) for i in teachers], [lowest(past, 20)], INTERVALS, ["best"], RULES)
    assert not by_best[past].prune
    assert by_best[past].predicted[0] <= CURVES[past, :20].min() + 1e-9
    assert by_last[past].prune == bool(CURVES[past, -1] > CURVES[teachers, -1].min() + 0.1)


def test_what_counts_right_and_wrong_is_not_kept_for_its_luck():
    shaky = CURVES + 0.12 * np.random.default_rng(2).normal(size=CURVES.shape)

    def noisy(i, done=INTERVALS):
        values = np.array([shaky[i, -1]]) if done == INTERVALS else None
        return Trace(i, shaky[None, i, :done], POINTS[i], values)

    completed, running = [noisy(i) for i in TEACHERS], [noisy(i, 8) for i in OTHERS]
    pruned = []
    for counted in (False, True):
        decisions = decide(completed, running, INTERVALS, ["last"], RULES, counted=[counted])
        pruned.append({i for i, decision in decisions.items() if decision.prune})
    assert pruned[0] < pruned[1]


def test_with_two_objectives_only_the_dominated_are_pruned():
    def two(i, done=INTERVALS):
        one = trace(i, done)
        cost = 1 + POINTS[i, 0] + 0 * one.curves  # cheaper without dropout
        values = None if one.values is None else np.array([one.values[0], cost[0, -1]])
        return replace(one, curves=np.vstack([one.curves, cost]), values=values)

    running = [two(i, 20) for i in OTHERS]
    takes = ["last", "last"]
    decisions = decide([two(i) for i in TEACHERS], running, INTERVALS, takes, RULES)
    for i, decision in decisions.items():
        if decision.prune:
            better = CURVES[TEACHERS, -1] < CURVES[i, -1]
            assert (better & (POINTS[TEACHERS, 0] < POINTS[i, 0])).any()
    cheapest = [i for i in OTHERS if GRID[i][0] == 0]
    assert not any(decisions[i].prune for i in cheapest)


def test_blow_ups_among_the_completed_do_no_harm():
    wild = Trace(99, 1e6 * np.ones((1, INTERVALS)), POINTS[2], np.array([1e6]))
    completed = [*(trace(i) for i in TEACHERS), wild]
    running = [trace(i, 20) for i in OTHERS]
    decisions = decide(completed, running, INTERVALS, ["last"], RULES)
    assert not decisions[BEST].prune
    assert sum(d.prune for d in decisions.values()) > 3


def test_the_recorded_grid_is_replayed_without_losing_its_best():
    path = Path(__file__).parents[2] / "benchmarks" / "curves" / "grid_n2000.json"
    data = json.loads(path.read_text())
    steps = np.array(data["steps"])
    nll = np.array([t["nll"] for t in data["trainings"]])
    assignments = [Assignment(t["rates"], t["lr"]) for t in data["trainings"]]
    rows, best, kept, spent = points(assignments), int(nll[:, -1].argmin()), 0, 0.0
    filled = nll[:, np.searchsorted(steps, np.arange(1, 61), side="right") - 1]
    for order in range(5):
        completed = []
        for i in np.random.default_rng(order).permutation(len(nll)):
            done = 60
            for at in RULES.at(60) if len(completed) >= RULES.pilots else ():
                running = Trace(int(i), filled[None, i, :at], rows[i])
                decisions = decide(completed, [running], 60, ["last"], RULES)
                if any(d.prune for d in decisions.values()):
                    done = at
                    break
            spent += done / 60 / len(nll) / 5
            if done == 60:
                value = np.array([nll[i, -1]])
                completed.append(Trace(int(i), filled[None, i], rows[i], value))
        kept += any(c.key == best for c in completed)
    assert kept == 5
    assert spent < 0.6


# -- the parts --------------------------------------------------------------------------------


def test_the_process_interpolates_and_its_left_out_errors_are_those_of_fitting_anew():
    random = np.random.default_rng(1)
    x = random.uniform(-1, 1, (20, 2))
    y = np.sin(2 * x[:, 0]) + x[:, 1]
    process = Process(x, y)
    mean, sd = process.predict(x)
    assert np.abs(mean - y).max() < 0.2
    far, far_sd = process.predict(np.array([[4.0, 4.0]]))
    assert far_sd[0] > 2 * sd.mean()
    assert np.isfinite(far).all()
    errors = []
    for i in range(20):  # with the chosen numbers, on the same scale
        rest = np.delete(np.arange(20), i)
        z, t = process._standard(x), (y - y.mean()) / y.std()
        noise = process.NOISE[process._chosen] * np.eye(20)
        kernel = process._kernel(z, process._chosen) + noise
        weights = np.linalg.solve(kernel[np.ix_(rest, rest)], t[rest])
        errors.append(t[i] - kernel[i, rest] @ weights)
    assert process.error == pytest.approx(y.std() * np.sqrt(np.mean(np.square(errors))))


def test_a_warp_keeps_order_and_comes_back():
    values = np.array([0.5, 0.6, 0.9, 2.0])
    warp = Warp.of(values)
    assert (np.diff(warp(values)) > 0).all()
    assert warp.back(warp(values), np.zeros(4))[0] == pytest.approx(values)
    assert Warp.of(np.array([1.0, 1.0, 1.0, 2.0])) is None


def test_points_drop_what_says_nothing_and_spell_out_words():
    made = points(
        [
            Assignment({"a": 0.0, "b": 0.0, "c": 0.3}, 1e-3, {"schedule": "up", "wd": 1e-2}),
            Assignment({"a": 0.5, "b": 0.5, "c": 0.3}, 1e-2, {"schedule": "early", "wd": 1e-2}),
        ]
    )
    assert made.shape == (2, 5)  # mean rate, a (b is its twin), lr, two schedules
    many = [Assignment({f"s{i}": 0.01 * i * j for i in range(30)}, 1e-3) for j in range(3)]
    assert points(many).shape[1] <= 7


# -- on records -------------------------------------------------------------------------------


def test_records_are_judged_in_one_go_and_baselines_never_pruned():
    records = study_records(OTHERS, 20, TEACHERS)
    ids = {r.training.id for r in records if r.state is State.RUNNING}
    judged = FairPruning((NLL,), INTERVALS, seed=1, rules=RULES).judge(records, ids)
    assert judged.pruned
    assert 100 + BEST not in judged.pruned
    as_baselines = [
        replace(r, training=replace(r.training, kind=TrainingKind.BASELINE)) for r in records
    ]
    assert not FairPruning((NLL,), INTERVALS, rules=RULES).judge(as_baselines, ids).pruned


def test_maximising_gives_the_same_decisions_with_figures_in_their_own_direction():
    records = study_records(OTHERS, 20, TEACHERS)
    ids = {r.training.id for r in records if r.state is State.RUNNING}
    accuracy = Objective("accuracy")
    turned = [
        replace(
            r,
            curves={"val/accuracy": tuple(-v for v in r.curves["val/nll"])},
            values=None if r.values is None else (-r.values[0],),
        )
        for r in records
    ]
    plain = FairPruning((NLL,), INTERVALS, rules=RULES).judge(records, ids)
    other = FairPruning((accuracy,), INTERVALS, rules=RULES).judge(turned, ids)
    assert plain.pruned == other.pruned
    for key, decision in plain.decisions.items():
        assert other.decisions[key].predicted[0] == pytest.approx(-decision.predicted[0])


def test_few_intervals_prune_nothing_and_say_so():
    pruner = FairPruning((NLL,), 5)
    assert "no pruning: 5 intervals" in pruner.note
    assert FairPruning((NLL,), INTERVALS).note == ""


def test_the_audit_is_a_seeded_share_and_is_read_back():
    share = np.mean([is_audited(3, n, 0.1) for n in range(2000)])
    assert 0.08 < share < 0.12
    assert [is_audited(3, n, 0.1) for n in range(50)] == [is_audited(3, n, 0.1) for n in range(50)]
    rules = Rules(audit=1.0)
    running = [i for i in OTHERS if i != BEST]
    records = study_records(running, 20, TEACHERS)
    ids = {r.training.id for r in records if r.state is State.RUNNING}
    judged = FairPruning((NLL,), INTERVALS, rules=rules).judge(records, ids)
    assert not judged.pruned
    ended = [
        record(i, *GRID[i], CURVES[i], State.COMPLETE, reason=judged.reasons.get(100 + i))
        for i in running
    ]
    audit = Audit.of(ended, [NLL])
    assert audit.finished == len(judged.reasons) > 3
    assert audit.right == audit.finished
    assert audit.covered > 0.6 * audit.finished
    assert "would have been right for" in audit.sentence


def test_an_audit_of_two_objectives_is_right_where_both_are_no_better():
    told = "audited: would be pruned at interval 4: predicted 0.9 ± 0.1, 0.5 ± 0.02, best 0.5, 0.6"
    ends = [(0.95, 0.51), (0.4, 0.51), (0.95, 0.7), (0.5, 0.6)]
    records = [
        replace(record(i, 0.1, 1e-3, [1.0], State.COMPLETE, reason=told), values=values)
        for i, values in enumerate(ends)
    ]
    audit = Audit.of(records, [NLL, Objective("accuracy")])
    assert (audit.finished, audit.right, audit.covered) == (4, 2, 1)


def test_pruned_trials_get_expected_values_for_samplers_that_need_them():
    cut = [record(i, *GRID[i], CURVES[i, :20], State.PRUNED) for i in OTHERS]
    records = study_records([], 0, TEACHERS) + cut
    expected = expected_values(records, (NLL,), INTERVALS)
    assert set(expected) == {100 + i for i in OTHERS}
    errors = [expected[100 + i].values[0] - CURVES[i, -1] for i in OTHERS]
    assert np.abs(errors).max() < 0.15
    assert expected_values(cut, (NLL,), INTERVALS) == {}


# -- what diverges ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curves", "told"),
    [
        ({"train/loss": (2.3, math.nan)}, "train/loss is nan at interval 2"),
        ({"val/nll": (math.inf,)}, "val/nll is inf"),
        ({"train/loss": (2.0, 25.0)}, "diverged"),
        ({"train/loss": (2.3, 0.1), "val/nll": (2.3, 40.0)}, None),
        ({"train/loss": (2.3, 2.0), "val/nll": (2.3, 2.1), "val/auc": (0.5, math.nan)}, None),
    ],
)
def test_divergence_is_told_and_overfitting_is_not(curves, told):
    made = replace(record(0, 0.1, 1e-3, [1.0]), curves=curves)
    for pruner in (NoPruning((NLL.key,)), FairPruning((NLL,), INTERVALS)):
        failed = pruner.judge([made], {100}).failed
        assert (told or "") in failed.get(100, "")
        assert (100 in failed) == (told is not None)


@pytest.mark.parametrize("name", ["fair", "none", "median"])
def test_what_an_untrained_model_loses_is_the_measure_where_it_is_known(name):
    pruner = make_pruner(spec(name), INTERVALS, chance=2.3)
    at_once, spiking = ((30.0,), (0.01, 0.4))
    for losses, fails in ((at_once, True), (spiking, False)):
        made = replace(record(0, 0.1, 1e-3, [1.0]), curves={"train/loss": losses})
        assert bool(pruner.judge([made], {100}).failed) == fails


# -- by name ----------------------------------------------------------------------------------


def spec(name, objectives=(NLL,), **options):
    pruner = Pruner(name, options)
    return StudySpec(name="s", program="p.py", objectives=objectives, pruner=pruner)


@pytest.mark.parametrize("name", ["median", "percentile", "sha", "hyperband", "patient"])
def test_optunas_pruners_by_name_prune_and_warn(name):
    pruner = make_pruner(spec(name), INTERVALS)
    assert "may prune from interval" in pruner.note
    records, pruned = [], set()
    for i in range(27):
        for done in range(1, INTERVALS + 1):
            running = record(i, *GRID[i], CURVES[i, :done])
            now = pruner.judge([*records, running], {100 + i}).pruned
            if now:
                records.append(replace(running, state=State.PRUNED))
                pruned.add(i)
                break
        else:
            records.append(record(i, *GRID[i], CURVES[i], State.COMPLETE))
    assert (len(pruned) > 5) == (name != "patient")


def test_an_optuna_pruner_rebuilt_from_records_agrees_with_one_that_saw_them_grow():
    growing = make_pruner(spec("median"), INTERVALS)
    complete = [record(i, *GRID[i], CURVES[i], State.COMPLETE) for i in TEACHERS]
    ids = {100 + i for i in OTHERS}
    for done in range(1, 12):
        records = [*complete, *(record(i, *GRID[i], CURVES[i, :done]) for i in OTHERS)]
        grown = growing.judge(records, ids).pruned
    assert grown == make_pruner(spec("median"), INTERVALS).judge(records, ids).pruned


def test_a_late_warm_up_is_not_warned_about():
    assert make_pruner(spec("median", n_warmup_steps=20), INTERVALS).note == ""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (spec("median", warmup=3), "no option 'warmup'"),
        (spec("fair", pilot=3), "did you mean 'pilots'"),
        (spec("fair", checkpoints=0.5), "pruner fair: checkpoints"),
        (spec("fair", level=99), "pruner fair: level"),
        (spec("fair", pilots="some"), "pruner fair: pilots"),
        (spec("percentile", percentile=200.0), "pruner percentile"),
        (spec("hyperband", min_resource=0), "pruner hyperband, .*min_resource 0"),
        (spec("sha", objectives=(NLL, Objective("accuracy"))), "one objective"),
    ],
)
def test_wrong_options_are_one_line(given, told):
    with pytest.raises(SpecError, match=told):
        make_pruner(given, INTERVALS)


def test_none_and_fair_by_name():
    assert isinstance(make_pruner(spec("none"), INTERVALS), NoPruning)
    assert make_pruner(spec("fair", level=0.995), INTERVALS).rules.level == 0.995


# -- anybody's Optuna code --------------------------------------------------------------------


def test_fair_pruner_in_an_optuna_study_keeps_the_best():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = FairPruner(n_steps=INTERVALS, rates=["p"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0), pruner=pruner)
    order = np.random.default_rng(0).permutation(27)

    def objective(trial):
        i = order[trial.number]
        trial.suggest_float("p", *[GRID[i][0]] * 2)
        trial.suggest_float("lr", *[GRID[i][1]] * 2, log=True)
        for step, value in enumerate(CURVES[i]):
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return CURVES[i, -1]

    study.optimize(objective, n_trials=27)
    states = [t.state for t in study.trials]
    assert states.count(optuna.trial.TrialState.PRUNED) >= 5
    assert study.best_value == pytest.approx(CURVES[BEST, -1])


def test_fair_pruner_reads_trials_that_reported_longer():
    study = optuna.create_study()
    kinds = {"p": optuna.distributions.FloatDistribution(0, 0.9)}
    for i in TEACHERS:
        curve = [*CURVES[i], *[CURVES[i, -1]] * (i % 3)]
        study.add_trial(
            optuna.trial.create_trial(
                params={"p": GRID[i][0]}, distributions=kinds, value=CURVES[i, -1],
                intermediate_values=dict(enumerate(curve)),
            )
        )  # fmt: skip
    running = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING, params={"p": 0.0}, distributions=kinds,
        intermediate_values=dict(enumerate(CURVES[1, :20])),
    )  # fmt: skip
    assert FairPruner(n_steps=INTERVALS, rates=["p"]).prune(study, running)


def test_fair_pruner_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="n_steps=5"):
        FairPruner(5)
    with pytest.raises(ValueError, match="take='first'"):
        FairPruner(20, take="first")
