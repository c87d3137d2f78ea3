"""Planning confirmations and judging studies whose truth is known."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from simulated import World, confirm, fashion, make_record, make_spec, pruned, search, train

from droptune.report.report import html, markdown
from droptune.spec.sections import Confirm
from droptune.training import NewTraining, Seeds, State, TrainingKind
from droptune.verdict.comparison import ablations, after_scaling, compare, example_scores
from droptune.verdict.confirmation import (
    AT_WINNERS_LR,
    CHOICE,
    allowance_of,
    plan,
    predicted_cost,
)
from droptune.verdict.evidence import assigned, key
from droptune.verdict.findings import edge
from droptune.verdict.member import best_baselines, front_runners, noise_aware
from droptune.verdict.sentences import (
    baseline_sentence,
    provisional_reason,
    recommendation_reason,
    winners_lr_sentence,
)
from droptune.verdict.statistics import paired
from droptune.verdict.surface import find_inputs
from droptune.verdict.verdict import _recommend, judge
from droptune.verdict.weakness import hints


def lr_part(lr):
    return 0.02 * np.log10(lr / 1.7e-3) ** 2


def flat(rates, lr):
    """Dropout does nothing, the learning rate does."""
    return 0.5 + lr_part(lr)


def helpful(rates, lr):
    strength = np.mean(list(rates.values()))
    return 0.5 + lr_part(lr) - 0.2 * min(strength, 0.4) + 0.3 * max(strength - 0.6, 0)


def steep(rates, lr):
    return 0.5 + 5 * lr_part(lr)


def harmful(rates, lr):
    return 0.5 + lr_part(lr) + 0.1 * (sum(rates.values()) > 0)


def world(loss=helpful, seed=0, **more):
    more = {"seed_sd": 0.008, **more}
    return World(loss, np.random.default_rng([9, seed]), salt=seed, **more)


@pytest.fixture(scope="module")
def searched():
    return search(world(), trials=30)


@pytest.fixture(scope="module")
def confirmed(searched):
    return confirm(world(seed=1), searched)


# -- what was searched ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "names", "coordinates"),
    [
        (["relu", "tanh"], ["a = tanh"], [0, 1]),
        ([1, 4], ["a"], [1, 4]),
        ([False, True], ["a"], [0, 1]),
        ([0.1, "none", None], ["a = None", "a = none"], [0, 0]),  # of older studies
    ],
)
def test_choices_are_inputs_of_the_surface(searched, choices, names, coordinates):
    def chosen(record):
        value = choices[record.training.id % len(choices)]
        assignment = replace(record.training.assignment, values={"a": value})
        return replace(record, training=replace(record.training, assignment=assignment))

    records = [chosen(record) for record in searched.records]
    inputs = [one for one in find_inputs(searched, records) if one.value]
    assert [one.name for one in inputs] == names
    assert [inputs[0].of(assigned(record)) for record in records[:2]] == coordinates


# -- planning -------------------------------------------------------------------------------------


def test_front_runners_are_chosen_and_baselines_paired_at_once(searched):
    planned = plan(searched)
    assert not planned.decided
    labels = {new.label for new in planned.queue}
    assert {"none", "author", "half"} <= labels
    front = {new.label for new in planned.queue if new.seed_index >= CHOICE}
    assert front == {member.label for member in planned.design.front}
    assert all(new.kind is TrainingKind.CONFIRMATION for new in planned.queue)


def test_pairs_share_their_seeds_and_the_choice_has_its_own(searched):
    by_index = {}
    for new in plan(searched).queue:
        by_index.setdefault(new.seed_index, set()).add(new.seeds)
    assert all(len(seeds) == 1 for seeds in by_index.values())
    assert len(set().union(*by_index.values())) == len(by_index)
    assert by_index[1] == {Seeds.of_confirmation(7, 1)}


def test_folds_share_a_draw_and_every_member_of_a_pair_has_the_same(searched):
    folds = replace(searched, spec=make_spec(confirm={"splits": "folds"}))
    new = plan(folds).queue
    by_index = {one.seed_index: one.seeds for one in new}
    assert all(one.seeds == by_index[one.seed_index] for one in new)
    splits = [by_index[i].split for i in (0, 1, 2)]
    assert [split % 5 for split in splits] == [0, 1, 2]
    assert len({split // 5 for split in splits}) == 1
    assert by_index[CHOICE].split // 5 != splits[0] // 5
    assert folds.overlap == 5000 / 2000
    assert searched.overlap == 0


def test_planning_depends_on_the_records_alone(searched):
    shuffled = list(searched.records)
    random.Random(1).shuffle(shuffled)
    assert plan(replace(searched, records=tuple(shuffled))) == plan(searched)


def test_what_is_queued_is_not_queued_again(searched):
    planned = plan(searched)
    waiting = tuple(
        make_record(900 + i, new, {"val/nll": ()}, state=State.QUEUED)
        for i, new in enumerate(planned.queue)
    )
    again = plan(replace(searched, records=searched.records + waiting))
    assert again.queue == ()
    assert not again.decided


def test_a_half_made_queue_is_completed(searched):
    planned = plan(searched)
    begun = train(world(seed=1), searched, planned.queue[:5])
    assert plan(begun).queue == planned.queue[5:]


def test_each_baseline_is_confirmed_at_its_own_best(searched):
    for member in best_baselines(searched):
        same = [r for r in searched.trials if assigned(r).rates == member.assignment.rates]
        benefit, error = noise_aware(searched, same)
        within = benefit >= benefit.max() - error[benefit.argmax()]
        assert member.promised == min(r.value for r, near in zip(same, within, strict=True) if near)


def test_a_lucky_trial_at_a_poor_learning_rate_is_not_a_baselines_best():
    """The learning rate matters more than noise: other trials know that this one was lucky."""
    studies = [search(world(steep, seed, seed_sd=0.02), trials=30) for seed in range(6)]
    costs = {"raw": [], "chosen": []}
    for evidence in studies:
        for member in best_baselines(evidence):
            same = [r for r in evidence.trials if r.training.label == member.label]
            raw = min(same, key=lambda r: r.value)
            costs["raw"].append(steep({}, assigned(raw).lr))
            costs["chosen"].append(steep({}, member.assignment.lr))
    assert np.mean(costs["chosen"]) < np.mean(costs["raw"])
    assert max(costs["chosen"]) <= max(costs["raw"])


def test_equal_baselines_are_confirmed_once(searched):
    zero = tuple(replace(site, rate=0.0) for site in searched.sites)
    records = tuple(
        replace(
            r,
            training=replace(
                r.training,
                assignment=replace(r.training.assignment, rates={"fc1": 0.0, "fc2": 0.0}),
            ),
        )
        if r.training.label == "author"
        else r
        for r in searched.records
    )
    merged = replace(searched, sites=zero, records=records)
    assert [member.label for member in best_baselines(merged)] == ["none", "half"]


def test_front_runners_differ_and_hold_the_mildest_of_the_best(searched):
    front = front_runners(searched, 4)
    assert len({key(member.assignment) for member in front}) == len(front) == 4
    assert front[1].assignment.mean_rate <= min(m.assignment.mean_rate for m in front) + 0.05
    assert all(member.assignment.mean_rate > 0 for member in front)


def test_no_dropout_is_also_trained_at_the_winners_learning_rate(confirmed):
    planned = plan(confirmed)
    twin = next(m for m in planned.compared if m.label == AT_WINNERS_LR)
    assert twin.assignment.lr == planned.winner.assignment.lr
    assert set(twin.assignment.rates.values()) == {0.0}


def test_a_site_at_a_fixed_rate_keeps_it_in_every_baseline(searched):
    def fix(record):
        rates = {**record.training.assignment.rates, "stem": 0.1}
        assignment = replace(record.training.assignment, rates=rates)
        return replace(record, training=replace(record.training, assignment=assignment))

    stem = replace(searched.sites[0], path="stem", rate=0.1)
    fixed = replace(
        searched, sites=(stem, *searched.sites), records=tuple(fix(r) for r in searched.records)
    )
    assert all(fixed.has_dropout(m.assignment) for m in front_runners(fixed, 4))
    none = next(m for m in best_baselines(fixed) if m.label == "none")
    assert none.assignment.rates == {"stem": 0.1, "fc1": 0.0, "fc2": 0.0}
    done = confirm(world(sites=("stem", "fc1", "fc2"), seed=1), fixed)
    twin = next(m for m in plan(done).compared if m.label == AT_WINNERS_LR)
    assert twin.assignment.rates == none.assignment.rates
    said = "fixed sites keep their rates everywhere, also where this says no dropout: stem at 0.1"
    assert judge(done).hints.count(said) == judge(fixed).hints.count(said) == 1
    assert not any("fixed sites" in hint for hint in judge(searched).hints)


def test_half_is_said_to_be_everywhere_only_where_it_is(confirmed):
    (one,) = [c for c in judge(confirmed).comparisons if c.against == "half"]
    assert "0.5 everywhere" in baseline_sentence(confirmed, one)
    attention = replace(confirmed.sites[0], kind="attention")
    mixed = replace(confirmed, sites=(attention, *confirmed.sites[1:]))
    verdict = judge(mixed)
    name = "0.5 at every element and channel site"
    assert name in baseline_sentence(mixed, one)
    assert provisional_reason(mixed, "half", 1.0, 0.0).startswith(name)
    assert recommendation_reason(mixed, "half", "worse").startswith(name)
    assert name in verdict.details[-1] or name in verdict.details[-2]
    assert name in markdown(mixed, verdict)
    assert "0.5 everywhere" not in html(mixed, verdict)
    kept = replace(mixed, ranges={"lr": (1e-4, 1e-2), "fc2": (0.0, 0.8)})
    assert kept.name("half") == "0.5 everywhere"  # of the sites that are searched


def test_the_winner_is_the_mildest_within_one_standard_error():
    searched = search(world(), trials=30)
    planned = plan(searched)
    value = {member.label: 0.4 for member in planned.design.front}
    mild = min(planned.design.front, key=lambda m: m.assignment.mean_rate)
    value[mild.label] = 0.401
    done = []
    for i, new in enumerate(planned.queue):
        noise = 0.01 * ((i + (new.label == mild.label)) % 3)
        found = value.get(new.label, 0.5) + noise
        done.append(make_record(500 + i, new, {"val/nll": (found,)}, value=found))
    assert plan(replace(searched, records=searched.records + tuple(done))).winner == mild


def test_a_front_runner_that_fails_on_a_fresh_seed_is_out(searched):
    planned = plan(searched)
    out = planned.design.front[0].label
    done = [
        make_record(
            500 + i,
            new,
            {"val/nll": (0.4,)},
            value=0.3 if new.label == out else 0.4 + 0.001 * i,
            state=State.FAIL if new.label == out and new.seed_index == CHOICE else State.COMPLETE,
        )
        for i, new in enumerate(planned.queue)
    ]
    winner = plan(replace(searched, records=searched.records + tuple(done))).winner
    assert winner.label != out


def test_failed_seeds_are_not_trained_again_and_their_pairs_are_left_out(confirmed):
    failed = tuple(
        replace(r, state=State.FAIL, values=None, reason="loss is NaN")
        if r.training.label == "none" and r.training.seed_index == 1
        else r
        for r in confirmed.records
    )
    spoilt = confirm(world(seed=2), replace(confirmed, records=failed))
    verdict = judge(spoilt)
    assert 1 not in verdict.comparison("none").seeds
    assert any("1 of" in hint and "loss is NaN" in hint for hint in verdict.hints)


def test_the_share_of_the_budget_is_kept(searched):
    for share in (0.2, 0.3333, 0.5):
        spec = make_spec(confirm={"share": share})
        noisy = replace(search(world(flat), spec, trials=45))
        done = confirm(world(flat, seed=3), noisy)
        allowed = max(allowance_of(spec.confirm, 60), 9)
        assert len(done.confirmations) <= allowed


def test_a_tiny_budget_still_compares_with_no_dropout():
    done = confirm(world(), search(world(), make_spec(confirm={"share": 0.05}), trials=12))
    planned = plan(done)
    assert planned.design.choice_seeds == 0
    assert {"none"} <= {member.label for member in planned.compared}
    assert len(done.confirmations) <= 9


def test_predicted_cost_bounds_what_is_trained(confirmed):
    cost = predicted_cost(confirmed.spec.confirm, trials=45, baselines=3, intervals=60)
    assert cost.least - 3 <= len(confirmed.confirmations) <= cost.most
    assert cost.intervals_most == 60 * cost.most
    assert predicted_cost(Confirm(share=1), trials=9, baselines=1, intervals=1).most == 42


def test_a_large_difference_stops_at_the_first_look(confirmed):
    quiet = confirm(world(seed=4, seed_sd=0.002), search(world(seed_sd=0.002), trials=30))
    assert plan(quiet).stops["none"].why == "decided"
    assert plan(quiet).stops["none"].look == 0


def test_confirmation_can_be_switched_off():
    planned = plan(search(world(), make_spec(confirm={"enabled": False}), trials=12))
    assert planned.decided
    assert planned.queue == ()
    assert "left out" in planned.reason


def test_without_a_dropout_trial_there_is_nothing_to_confirm(searched):
    none = tuple(r for r in searched.records if r.training.label == "none")
    planned = plan(replace(searched, records=none))
    assert planned.decided
    assert judge(replace(searched, records=none)).recommended is None


# -- judging --------------------------------------------------------------------------------------


def test_dropout_that_helps(confirmed):
    verdict = judge(confirmed)
    assert verdict.confirmed
    assert verdict.outcome == "better"
    assert verdict.sentence.startswith("Dropout helps: test NLL 0.0")
    assert verdict.recommended.choice == "winner"
    main = verdict.comparison("none")
    assert main.data == "test"
    assert main.difference.low < 0.08 < main.difference.high + 0.03
    assert verdict.comparison("author") is not None


def test_dropout_that_does_nothing():
    verdict = judge(confirm(world(flat), search(world(flat), trials=30)))
    assert verdict.outcome == "undetected"
    assert verdict.sentence.startswith("No detectable difference")
    assert "or more would have been detected" in verdict.sentence


def test_dropout_that_hurts():
    hurt = world(harmful, seed_sd=0.004)
    verdict = judge(confirm(hurt, search(hurt, trials=30)))
    assert verdict.outcome == "worse"
    assert verdict.sentence.startswith("Dropout hurts")
    assert verdict.recommended.choice == "none"
    assert set(verdict.recommended.assignment.rates.values()) == {0.0}


@pytest.mark.parametrize("rival", ["author", "half"])
@pytest.mark.parametrize(("mean", "ahead"), [(-0.3, False), (-0.7, True)])
def test_another_baseline_is_recommended_only_ahead_of_no_dropout(confirmed, rival, mean, ahead):
    def behind(one, mean):
        rows = mean + np.array([-0.01, 0.0, 0.01])
        return replace(one, difference=paired(rows))

    planned = plan(confirmed)
    means = {"none": -0.5, rival: mean}
    compared = [
        behind(one, means[one.against])
        for one in compare(confirmed, planned)
        if one.against in means
    ]
    assert {one.outcome for one in compared} == {"worse"}
    found = _recommend(confirmed, planned, compared, planned.winner, "worse")
    assert found.choice == (rival if ahead else "none")
    assert ("by more than any other baseline" in found.reason) == (not ahead)


def test_a_gain_of_the_learning_rate_is_not_called_dropouts():
    """The baseline's few learning rates miss the good one; the search finds it."""

    def narrow(rates, lr):
        return 0.5 - 0.3 * np.exp(-0.5 * (np.log(lr / 9.5e-4) / 0.12) ** 2)

    narrow_world = world(narrow, seed_sd=0.004, example_sd=0.02, interaction_sd=0.02)
    verdict = judge(confirm(narrow_world, search(narrow_world, trials=60)))
    assert verdict.comparison("none").outcome == "better"
    assert verdict.outcome == "learning_rate"
    assert "the learning rate's, not dropout's" in verdict.sentence
    assert verdict.recommended.choice == "none"
    assert verdict.recommended.assignment.lr == verdict.winner.assignment.lr


def test_the_learning_rates_part_is_taken_on_common_seeds(confirmed):
    found = {one.against: one for one in compare(confirmed, plan(confirmed))}
    own = next(iter(found.values()))

    def seen(*each, lr=1e-3):
        chosen = replace(own.assignment, lr=lr)
        given = {"seeds": tuple(range(len(each))), "each": each, "assignment": chosen}
        return replace(own, **given, difference=paired(np.array(each)))

    pair = {"none": seen(0.1, 0.1, 0.1, 0.9, 0.9, 0.9), AT_WINNERS_LR: seen(0.3, 0.31, 0.29)}
    assert "raises it by 0.200 nats" in winners_lr_sentence(confirmed, pair)


def test_few_trials_are_counted_against_rates_that_are_searched(searched):
    few = replace(searched, records=searched.records[12:21], groups={"all": searched.searched})
    (hint,) = (hint for hint in judge(few).hints if "few" in hint)
    assert hint.startswith("9 completed trials are few for 1 rate and an lr: more trials would")


def test_before_confirmation_the_verdict_says_so(searched):
    verdict = judge(searched)
    assert not verdict.confirmed
    assert verdict.sentence.startswith("NOT CONFIRMED")
    assert verdict.comparisons == ()
    assert any("confirmation is not finished" in hint for hint in verdict.hints)


@pytest.mark.parametrize(("loss", "dropout"), [(helpful, True), (flat, False), (harmful, False)])
def test_without_confirmation_dropout_is_recommended_where_it_leads_by_more_than_chance(
    loss, dropout
):
    spec = make_spec(confirm={"enabled": False})
    verdict = judge(search(world(loss, seed_sd=0.02), spec, trials=30))
    choice = verdict.recommended.choice
    assert (choice != "none") == dropout
    assert verdict.recommended.trial == verdict.leading[choice]
    assert verdict.hints[0].endswith("confirm now with: `droptune study confirm simulated`")


def test_a_baseline_may_lead_the_search(searched):
    half = next(member for member in best_baselines(searched) if member.label == "half")
    records = tuple(
        replace(r, values=(0.2,)) if r.training.number == half.trial else r
        for r in searched.records
    )
    verdict = judge(replace(searched, records=records))
    assert "the leading trial with dropout has NLL 0.200" in verdict.sentence
    assert verdict.recommended.choice == "half"
    assert verdict.recommended.trial == verdict.leading["winner"] == half.trial


def test_test_scores_are_not_looked_at_before_all_is_decided(searched):
    planned = plan(searched)
    half_way = train(world(seed=1), searched, planned.queue)
    half_way = train(world(seed=1), half_way, plan(half_way).queue[:4])
    assert not plan(half_way).decided
    assert {c.data for c in judge(half_way).comparisons} <= {"validation"}
    assert not judge(half_way).confirmed


def test_without_test_scores_the_interval_is_called_optimistic(confirmed):
    verdict = judge(replace(confirmed, scores={}, sizes={"validation": 5000}))
    assert verdict.comparison("none").data == "validation"
    assert any("optimistic" in hint for hint in verdict.hints)


def test_pairs_without_a_finite_test_score_are_left_out(confirmed):
    ruined = next(
        r.training.id
        for r in confirmed.records
        if r.training.label == "none" and r.training.seed_index == 0
    )
    nan = {"nll": np.full(200, np.nan)}
    verdict = judge(replace(confirmed, scores={**confirmed.scores, ruined: nan}))
    main = verdict.comparison("none")
    assert 0 not in main.seeds
    assert main.data == "test"
    assert any("NLL is not finite on the test set for 1 of" in hint for hint in verdict.hints)
    json.dumps(verdict.to_json(), allow_nan=False)


def test_one_pair_alone_is_no_verdict(confirmed):
    """Every training of no dropout but one has failed; the author's rates are compared."""
    failed = tuple(
        replace(r, state=State.FAIL, values=None, reason="loss is NaN")
        if r.training.kind is TrainingKind.CONFIRMATION
        and not any(assigned(r).rates.values())
        and r.training.seed_index != 1
        else r
        for r in confirmed.records
    )
    spec = make_spec(confirm={"max_seeds": 3})
    verdict = judge(replace(confirmed, spec=spec, records=failed))
    assert verdict.comparison("none").difference.seeds == 1
    assert verdict.outcome == "undetected"
    assert "[no interval]" in verdict.sentence
    assert "one pair of trainings cannot tell it from chance" in verdict.sentence


def test_without_any_training_of_no_dropout_there_is_no_verdict_on_it(confirmed):
    failed = tuple(
        replace(r, state=State.FAIL, values=None, reason="loss is NaN")
        if r.training.kind is TrainingKind.CONFIRMATION and not any(assigned(r).rates.values())
        else r
        for r in confirmed.records
    )
    spec = make_spec(confirm={"max_seeds": 3})
    verdict = judge(replace(confirmed, spec=spec, records=failed))
    assert verdict.outcome == "none"
    assert verdict.sentence.startswith("No verdict on dropout")
    assert verdict.recommended.reason == "the best dropout found; no dropout failed on fresh seeds"


def test_a_verdict_is_json(confirmed, searched):
    for evidence in (confirmed, searched):
        text = json.dumps(judge(evidence).to_json(), allow_nan=False)
        assert json.loads(text)["study"] == "simulated"


def test_intervals_hold_and_null_studies_are_not_called_better():
    """A small version of benchmarks/calibration.py: search, choice, confirmation, verdict."""
    held, better = [], 0
    for seed in range(40):
        one = world(flat, seed=seed, examples=60)
        verdict = judge(confirm(one, search(one, trials=20)))
        main = verdict.comparison("none")
        truth = one.truth(main.assignment) - one.truth(verdict.winner.assignment)
        held.append(main.difference.low <= truth <= main.difference.high)
        better += verdict.outcome == "better"
    assert np.mean(held) >= 0.85
    assert better <= 5


def test_maximised_metrics_are_turned_round():
    def accuracy(rates, lr):
        return 0.9 - helpful(rates, lr) / 5

    spec = make_spec(objective={"metric": "accuracy"})
    sharp = world(accuracy, metric="accuracy", seed_sd=0.001, validation_sd=0.0)
    sharp = replace(sharp, example_sd=0.02, interaction_sd=0.01)
    evidence = confirm(sharp, search(sharp, spec, trials=30))
    scores = {i: {"correct": s["accuracy"]} for i, s in evidence.scores.items()}
    verdict = judge(replace(evidence, scores=scores))
    assert verdict.outcome == "better"
    assert "points higher" in verdict.sentence


def test_a_metric_without_scores_of_examples_is_compared_over_seeds_on_the_test_set(confirmed):
    """Like F1, which is no mean over examples: each training's value on the test set is stored."""
    spec = make_spec(objective={"metric": "own", "direction": "minimize"})
    curves = {"val/own": (0.5,)}
    records = tuple(replace(r, curves=curves) for r in confirmed.records)
    tested = {i: {"own": float(s["nll"].mean())} for i, s in confirmed.scores.items()}
    evidence = replace(confirmed, spec=spec, records=records, scores={}, tested=tested)
    main = judge(evidence).comparison("none")
    assert main.data == "test"
    assert main.difference.examples is None
    assert main.theirs - main.ours == pytest.approx(main.difference.mean)


# -- with curves ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    made = fashion(0)
    evidence = pruned(search(made, trials=45), 0.4, np.random.default_rng(0))
    return confirm(made, evidence)


def test_overfitting_without_dropout_is_seen(whole):
    found = judge(whole).overfitting
    assert "overfits" in found.sentence
    assert found.best_interval < 40
    assert found.validation > found.best > found.train


def test_importance_and_regions(whole):
    verdict = judge(whole)
    assert set(verdict.importance) == {"drop1", "drop2", "head.drop", "lr"}
    assert verdict.importance["drop2"] > verdict.importance["drop1"]
    for site in verdict.sites:
        assert site.near[0] <= site.winner <= site.near[1]
    assert any("end of its range" in line for line in verdict.warnings)


def test_temperature_scaling_takes_its_part(whole):
    verdict = judge(whole)
    none = next(c for c in verdict.calibration if c.label == "none")
    assert none.ece > 0.05 > none.ece_after
    assert none.temperature > 1.5
    scaled = after_scaling(whole, plan(whole))
    assert abs(scaled.difference.mean) < abs(verdict.comparison("none").difference.mean) / 5


def test_cost_and_curse(whole):
    verdict = judge(whole)
    assert 1.0 < verdict.cost.winner / verdict.cost.none < 1.2
    assert verdict.curse.error > 0
    assert verdict.curse.none is not None
    assert abs(verdict.curse.none) < 0.05
    assert verdict.counts["pruned"] == 18


def test_times_of_fused_trainings_say_nothing_of_cost(whole):
    assert judge(replace(whole, fused=True)).cost is None


def test_calibration_compares_the_same_examples(whole):
    sample = ("logits", "targets")
    scores = {
        i: {name: s[name][:500] if name in sample else s[name] for name in s}
        for i, s in whole.scores.items()
    }
    full = {i: {**s, "nll": s["nll"] + 1} for i, s in scores.items()}
    one, other = (judge(replace(whole, scores=given)).calibration for given in (scores, full))
    assert one == other
    seen = next(c for c in one if c.label == "none")
    assert seen.nll > seen.nll_after


def test_leaving_out_one_group_at_a_time(whole):
    spec = make_spec(confirm={"ablate": True})
    asked = plan(replace(whole, spec=spec))
    assert not asked.decided
    assert {new.label for new in asked.queue} == {f"without {site.path}" for site in whole.sites}
    assert {new.kind for new in asked.queue} == {TrainingKind.ABLATION}
    done = confirm(fashion(5), replace(whole, spec=spec))
    found = {c.against: c for c in ablations(done, plan(done))}
    assert found["without drop2"].difference.mean > found["without drop1"].difference.mean
    assert found["without drop2"].outcome == "better"


# -- hints ----------------------------------------------------------------------------------------


def test_a_metric_that_cannot_tell_is_named(whole):
    spec = make_spec(objective={"metric": "accuracy"})
    records = tuple(
        replace(r, values=(r.curves["val/accuracy"][-1],)) if r.values else r for r in whole.records
    )
    verdict = judge(confirm(fashion(6), replace(whole, spec=spec, records=records)))
    assert verdict.outcome == "undetected"
    assert any("accuracy cannot tell, but validation NLL can" in hint for hint in verdict.hints)
    assert any("validation cannot tell which of the better" in hint for hint in verdict.hints)


def test_a_difference_that_validation_alone_was_sure_of_is_named(confirmed):
    planned = plan(confirmed)
    first = compare(confirmed, planned)[0]
    unsure = replace(first, difference=paired(np.array([0.01, -0.02, 0.03])), stopped="decided")
    assert any("the test set is not" in hint for hint in hints(confirmed, planned, [unsure]))
    assert not any("the test set is not" in hint for hint in hints(confirmed, planned, [first]))


def test_a_training_that_still_improves_is_named(whole):
    def improving(record):
        n = len(record.curves["val/nll"])
        curve = tuple(float(x) for x in 1.2 - 0.012 * np.arange(n))
        return replace(record, curves={**record.curves, "val/nll": curve})

    records = tuple(improving(r) for r in whole.records)
    assert any("still improving" in h for h in judge(replace(whole, records=records)).hints)
    assert not any("still improving" in h for h in judge(whole).hints)


def test_many_failures_are_named(searched):
    records = tuple(
        replace(r, state=State.FAIL, values=None) if r.training.number % 3 == 0 else r
        for r in searched.records
    )
    assert any("trials failed" in hint for hint in judge(replace(searched, records=records)).hints)


# -- small things ---------------------------------------------------------------------------------


def test_edges_of_ranges():
    assert edge(0.79, (0.0, 0.8)) == "high"
    assert edge(0.0, (0.0, 0.8)) is None
    assert edge(0.006, (0.005, 0.5)) == "low"
    assert edge(1.1e-4, (1e-4, 1e-2), log=True) == "low"
    assert edge(1e-3, (1e-4, 1e-2), log=True) is None
    assert edge(0.5, None) is None
    assert edge(0.0, (0.0, 0.0)) is None  # the first block of stochastic depth


def test_scores_of_examples_have_the_metric_as_their_mean():
    rng = np.random.default_rng(0)
    squared = rng.gamma(1.0, 2.0, 400)
    assert example_scores("rmse", {"mse": squared}).mean() == pytest.approx(squared.mean() ** 0.5)
    correct = rng.integers(0, 2, 400).astype(float)
    assert example_scores("error", {"correct": correct}).mean() == pytest.approx(1 - correct.mean())
    assert example_scores("f1", {"correct": correct}) is None


def test_a_new_training_is_named_after_its_trial(searched):
    first = plan(searched).queue[0]
    assert isinstance(first, NewTraining)
    assert first.label.startswith("trial ")
