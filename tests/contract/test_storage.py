"""What a study, its queue and its measurements promise, on every database."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
import sqlalchemy as sa

from droptune.errors import StorageError, UnknownStudyError
from droptune.storage import Budget, Ending
from droptune.storage.claims import time_used
from droptune.training import (
    Assignment,
    Measurement,
    NewTraining,
    Seeds,
    State,
    TrainingKind,
)

ASSIGNMENT = Assignment({"fc1": 0.25, "fc2": 0.0}, 1e-3, {"schedule": "constant"})
FLOAT = json.dumps(
    {
        "name": "FloatDistribution",
        "attributes": {"step": None, "low": 0.0, "high": 0.9, "log": False},
    }
)
PARAMS = {"dropout/fc1": (0.25, FLOAT), "dropout/fc2": (0.0, FLOAT)}


def create(storage, name="digits", **given):
    values = {
        "spec": {"name": name},
        "sites": [{"path": "fc1"}],
        "directions": ["minimize"],
        "meta": {},
        "intervals": 5,
        "seed": 7,
    }
    return storage.create_study(name, **(values | given))


def baselines(*labels):
    return [NewTraining(TrainingKind.BASELINE, ASSIGNMENT, label) for label in labels]


def confirmations(*indices, label="none"):
    kind = TrainingKind.CONFIRMATION
    return [NewTraining(kind, ASSIGNMENT, label, seed_index=i) for i in indices]


def claimed(storage, study, limit=1, worker=1):
    """Claimed trainings, the new ones assigned."""
    got = storage.claim(study.id, worker, limit)
    new = [t for t in got if t.assignment is None]
    assigned = storage.assign(new, [ASSIGNMENT] * len(new), [PARAMS] * len(new))
    return [t for t in got if t.assignment is not None] + assigned


def measured(storage, training, intervals, value=0.5):
    for i in range(1, intervals + 1):
        storage.record([(training, Measurement(i, {"val/nll": value / i}))], ["val/nll"])


def numbers(trainings):
    return [training.number for training in trainings]


# -- studies ------------------------------------------------------------------------------------


def test_a_study_reads_back_as_it_was_created(storage):
    deadline = datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC)
    spec = {"name": "digits", "priority": 3, "note": "ü" * 100_000}  # more than a TEXT of MySQL
    budget = Budget(trials=9, intervals=100, device_seconds=3.5, deadline=deadline)
    made = create(storage, spec=spec, meta={"a": [1, None]}, budget=budget)
    found = storage.study("digits")
    assert found == made
    assert (found.spec, found.sites, found.meta) == (spec, [{"path": "fc1"}], {"a": [1, None]})
    assert (found.status, found.phase, found.directions) == ("active", "searching", ("minimize",))
    assert (found.intervals, found.seed, found.budget) == (5, 7, budget)
    assert abs(found.created - datetime.now(UTC)) < timedelta(minutes=5)


def test_the_time_is_the_databases(storage):
    before = create(storage, "before").created
    after = create(storage, "after").created
    assert before < after


@pytest.mark.parametrize(
    "name",
    [
        'it\'s "quoted" `so` and; DROP TABLE droptune_studies; --',
        "ütf-8 — 学習 🎲",
        "../../etc/passwd",
        "a\\b%s%(x)s:y?{z}",
        "n" * 500,
        "🎲" * 500,
    ],
)
def test_hostile_names_are_kept_exactly(storage, name):
    create(storage, name)
    assert storage.study(name).name == name
    assert [s.name for s in storage.studies()] == [name]
    storage.delete_study(name)
    assert storage.studies() == []


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("name", ["", "  ", " padded", "line\nbreak", "nul\0", "\ud800", "n" * 501])
def test_impossible_names_are_refused_in_one_line(storage, name):
    with pytest.raises(StorageError) as refused:
        create(storage, name)
    assert "\n" not in str(refused.value)
    assert storage.studies() == []


@pytest.mark.databases("sqlite", "postgresql")
def test_names_may_differ_only_in_case(storage):
    create(storage, "Digits")
    create(storage, "digits")
    assert [study.name for study in storage.studies()] == ["Digits", "digits"]


@pytest.mark.databases("mysql")
def test_mysql_does_not_tell_names_by_case(storage):
    create(storage, "Digits")
    with pytest.raises(StorageError, match="does not tell 'digits' from its study 'Digits'"):
        create(storage, "digits")


def test_a_name_is_taken_once(storage):
    create(storage)
    with pytest.raises(StorageError, match="already in"):
        create(storage)


def test_a_name_taken_by_optuna_alone_is_refused(storage, url):
    import optuna

    optuna.create_study(study_name="digits", storage=url)
    with pytest.raises(StorageError, match="made by Optuna alone"):
        create(storage)


def test_an_unknown_study_names_its_neighbours(storage):
    with pytest.raises(UnknownStudyError, match="has none"):
        storage.study("digits")
    create(storage)
    with pytest.raises(UnknownStudyError, match="did you mean 'digits'"):
        storage.study("digist")


def test_only_one_worker_moves_a_study_on(storage):
    study = create(storage)
    assert storage.update_study(study.id, phase="confirming", if_phase="searching")
    assert not storage.update_study(study.id, phase="confirming", if_phase="searching")
    assert storage.update_study(study.id, status="stopped", spec={"a": 1}, meta={"b": 2})
    found = storage.study("digits")
    assert (found.phase, found.status) == ("confirming", "stopped")
    assert (found.spec, found.meta) == ({"a": 1}, {"b": 2})
    assert not storage.update_study(999, phase="done")


def test_a_summary_counts_and_finds_the_best(storage):
    study = create(storage, queue=[*baselines("none", "half"), *confirmations(0)])
    create(storage, "second", directions=["maximize", "minimize"], spec={"priority": 2})
    first, second, confirmation = storage.claim(study.id, 1, 3)
    storage.finish(first, State.COMPLETE, values=[0.4], best_interval=5)
    storage.finish(second, State.FAIL, reason="diverged")
    storage.finish(confirmation, State.COMPLETE, values=[0.1], best_interval=5)
    storage.claim(study.id, 1, 2)
    one, two = storage.studies()
    assert (one.best, one.running, two.best, two.priority) == (0.4, 2, None, 2)
    assert one.trials[State.COMPLETE] == one.trials[State.FAIL] == one.others[State.COMPLETE] == 1
    assert one.trials[State.RUNNING] == 2


def test_deleting_leaves_nothing_behind(storage, url):
    kept = create(storage, "kept", queue=baselines("none"))
    before = row_counts(url)
    study = create(storage, queue=[*baselines("none"), *confirmations(0)])
    training, other = claimed(storage, study, 2)
    measured(storage, training, 3)
    storage.finish(training, State.COMPLETE, values=[0.1], best_interval=3)
    storage.put_score(training.id, "test", "nll", b"123")
    storage.put_verdict(study.id, {"best": 1})
    storage.acquire_mirror_lease(study.id, "me", 10)
    storage.put_mirror_link(study.id, training.id, {"run_id": "x"})
    storage.beat(1, [], device_seconds={study.id: 1.0})
    assert set(storage.delete_study("digits")) == {training.id, other.id}
    assert row_counts(url) == before
    assert storage.study("kept") == kept
    with pytest.raises(UnknownStudyError):
        storage.delete_study("digits")
    assert storage.record([(other, Measurement(1, {}))], ["val/nll"]) == {other.id}
    assert not storage.finish(other, State.FAIL)
    assert storage.claim(study.id, 1, 1) == []
    assert storage.progress(study.id).idle


def row_counts(url):
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        names = sa.inspect(connection).get_table_names()
        return {
            name: connection.execute(
                sa.select(sa.func.count()).select_from(sa.table(name))
            ).scalar()
            for name in names
        }


# -- claims -------------------------------------------------------------------------------------


def test_the_queue_comes_first_and_numbers_are_contiguous(storage):
    study = create(storage, queue=baselines("none", "half"), budget=Budget(trials=5))
    first = storage.claim(study.id, 1, 3)
    second = storage.claim(study.id, 2, 9)
    assert numbers(first + second) == [0, 1, 2, 3, 4]
    assert [t.label for t in first] == ["none", "half", ""]
    assert [t.assignment for t in first] == [ASSIGNMENT, ASSIGNMENT, None]
    assert [t.seeds for t in first] == [Seeds.of_trial(7, n) for n in range(3)]
    assert {(t.lease_epoch, t.attempt, t.intervals) for t in first + second} == {(1, 1, 5)}
    assert storage.claim(study.id, 1, 3) == []


def test_a_repeated_claim_returns_the_same_trainings(storage):
    study = create(storage, queue=baselines("none"))
    first = storage.claim(study.id, 1, 3, ticket="t-1")
    assert storage.claim(study.id, 1, 3, ticket="t-1") == first
    assert numbers(storage.claim(study.id, 1, 1, ticket="t-2")) == [3]


def test_a_released_training_is_claimed_again_under_its_number(storage):
    study = create(storage, budget=Budget(trials=1))
    (training,) = storage.claim(study.id, 1, 1)
    storage.release([training])
    storage.release([training])  # twice is harmless
    (again,) = storage.claim(study.id, 2, 1)
    assert (again.id, again.number, again.assignment) == (training.id, 0, None)
    assert again.lease_epoch > training.lease_epoch
    assert again.seeds == training.seeds
    (assigned,) = storage.assign([again], [ASSIGNMENT], [PARAMS])
    storage.release([assigned])
    (third,) = storage.claim(study.id, 1, 1)
    assert third.assignment == ASSIGNMENT


def test_only_active_studies_that_search_give_new_trials(storage):
    study = create(storage, queue=confirmations(0))
    storage.update_study(study.id, status="stopped")
    assert storage.claim(study.id, 1, 3) == []
    storage.update_study(study.id, status="active", phase="confirming")
    assert [t.name for t in storage.claim(study.id, 1, 3)] == ["confirm none s0"]


def test_confirmations_have_seeds_in_pairs_and_no_number(storage):
    study = create(storage, queue=[*confirmations(0, 1), *confirmations(0, 1, label="trial 17")])
    storage.update_study(study.id, phase="confirming")
    a0, a1, b0, b1 = storage.claim(study.id, 1, 9)
    assert numbers([a0, a1, b0, b1]) == [None] * 4
    assert a0.seeds == b0.seeds == Seeds.of_confirmation(7, 0)
    assert a1.seeds == b1.seeds != a0.seeds


def test_the_same_confirmation_is_queued_once(storage):
    study = create(storage)
    assert len(storage.enqueue(study.id, confirmations(0, 1))) == 2
    assert len(storage.enqueue(study.id, confirmations(0, 1, 2))) == 1
    assert len(storage.enqueue(study.id, baselines("none", "none"))) == 2
    assert storage.progress(study.id).queued == 5


def test_a_queued_training_may_have_its_own_length_and_seeds(storage):
    seeds = Seeds(2**63 - 1, 0, 5)
    new = NewTraining(TrainingKind.REPLAY, ASSIGNMENT, "trial 3", seeds=seeds, intervals=2)
    study = create(storage, queue=[new])
    (training,) = storage.claim(study.id, 1, 1)
    assert (training.seeds, training.intervals, training.number) == (seeds, 2, None)


def test_assigning_needs_the_lease(storage):
    study = create(storage)
    training, lost = storage.claim(study.id, 1, 2)
    storage.release([lost])
    assigned = storage.assign([training, lost], [ASSIGNMENT] * 2, [PARAMS] * 2)
    assert [t.id for t in assigned] == [training.id]
    assert storage.records(study.id)[1].training.assignment is None


# -- measurements -------------------------------------------------------------------------------


def test_every_float_survives(storage):
    study = create(storage)
    (training,) = claimed(storage, study)
    values = [0.1 + 0.2, 5e-324, -1.7976931348623157e308, math.inf, -math.inf, math.nan]
    for i, value in enumerate(values, 1):
        measurement = Measurement(i, {"val/nll": value, "train/loss": -value})
        assert storage.record([(training, measurement)], ["val/nll"]) == set()
    (record,) = storage.records(study.id)
    assert list(map(repr, record.curves["val/nll"])) == list(map(repr, values))
    assert record.curves["train/loss"][0] == -values[0]
    assert record.intervals_done == len(values)


def test_the_first_values_of_an_interval_stay(storage):
    study = create(storage)
    (training,) = claimed(storage, study)
    measured(storage, training, 2, value=0.5)
    items = [(training, Measurement(i, {"val/nll": 9.0})) for i in (1, 2, 3)]
    assert storage.record(items, ["val/nll"]) == set()
    assert storage.records(study.id)[0].curves["val/nll"] == (0.5, 0.25, 9.0)


def test_a_missing_interval_or_key_is_nan(storage):
    study = create(storage)
    (training,) = claimed(storage, study)
    items = [
        (training, Measurement(1, {"a": 1.0})),
        (training, Measurement(3, {"a": 3.0, "b": 4.0})),
    ]
    storage.record(items, ["a"])
    curves = storage.records(study.id)[0].curves
    assert list(map(str, curves["a"])) == ["1.0", "nan", "3.0"]
    assert list(map(str, curves["b"])) == ["nan", "nan", "4.0"]


def test_a_group_is_recorded_together_and_the_lost_are_named(storage):
    study = create(storage)
    group = claimed(storage, study, 4)
    storage.release(group[:1])
    items = [(t, Measurement(1, {"val/nll": float(t.number)})) for t in group]
    assert storage.record(items, ["val/nll"]) == {group[0].id}
    curves = [record.curves for record in storage.records(study.id)]
    assert curves == [{}, {"val/nll": (1.0,)}, {"val/nll": (2.0,)}, {"val/nll": (3.0,)}]


def test_an_end_is_written_once(storage):
    study = create(storage)
    (training,) = claimed(storage, study)
    measured(storage, training, 2)
    assert storage.finish(training, State.COMPLETE, values=[0.25], best_interval=2)
    assert storage.finish(training, State.COMPLETE, values=[0.25], best_interval=2)  # a retry
    assert not storage.finish(training, State.FAIL, reason="late")
    assert storage.record([(training, Measurement(3, {"val/nll": 0.0}))], ["val/nll"])
    (record,) = storage.records(study.id)
    assert (record.state, record.values, record.best_interval) == (State.COMPLETE, (0.25,), 2)
    assert record.value == 0.25
    assert record.started < record.ended


@pytest.mark.databases("sqlite")
def test_a_complete_training_has_numbers(storage):
    study = create(storage)
    (training,) = claimed(storage, study)
    for values in (None, [], [math.nan]):
        with pytest.raises(ValueError, match="needs values"):
            storage.finish(training, State.COMPLETE, values=values)
    with pytest.raises(ValueError, match="not the end"):
        storage.finish(training, State.RUNNING)


def test_a_group_ends_together(storage):
    study = create(storage)
    group = claimed(storage, study, 3)
    storage.release(group[2:])
    endings = [
        Ending(group[0], State.COMPLETE, values=[math.inf], best_interval=1),
        Ending(group[1], State.FAIL, reason="diverged"),
        Ending(group[2], State.PRUNED),
    ]
    assert storage.finish_all(endings) == {group[2].id}
    states = [(record.state, record.reason) for record in storage.records(study.id)]
    assert states == [
        (State.COMPLETE, None),
        (State.FAIL, "diverged"),
        (State.QUEUED, None),
    ]
    assert storage.records(study.id)[0].value == math.inf


def test_a_restart_replaces_what_was_measured(storage):
    study = create(storage)
    (training,) = claimed(storage, study)
    measured(storage, training, 3)
    again = storage.restart(training)
    assert (again.attempt, again.number, again.seeds) == (2, training.number, training.seeds)
    assert storage.restart(training) == again  # a retry
    assert storage.records(study.id)[0].curves == {}
    assert storage.record([(training, Measurement(4, {"val/nll": 1.0}))], ["val/nll"])
    measured(storage, again, 1, value=7.0)
    assert storage.records(study.id)[0].curves == {"val/nll": (7.0,)}


def test_records_are_chosen(storage):
    study = create(storage, queue=[*baselines("none"), *confirmations(0)])
    group = claimed(storage, study, 3)
    storage.finish(group[0], State.FAIL)
    kinds = [r.training.kind for r in storage.records(study.id)]
    assert kinds == [TrainingKind.BASELINE, TrainingKind.CONFIRMATION, TrainingKind.SEARCH]
    assert len(storage.records(study.id, kinds=[TrainingKind.CONFIRMATION])) == 1
    assert len(storage.records(study.id, states=[State.RUNNING])) == 2
    assert len(storage.records(study.id, ids=[group[0].id])) == 1
    assert storage.records(study.id, ids=[]) == []


def test_changes_tell_every_end_once(storage):
    study = create(storage, queue=baselines("none"))
    group = claimed(storage, study, 3)
    seen, cursor = storage.changes(study.id)
    assert [r.state for r in seen] == [State.RUNNING] * 3
    measured(storage, group[2], 2)
    storage.finish(group[2], State.PRUNED)
    storage.finish(group[0], State.COMPLETE, values=[1.0])
    storage.release([group[1]])
    seen, cursor = storage.changes(study.id, cursor)
    assert [r.state for r in seen] == [State.COMPLETE, State.QUEUED, State.PRUNED]
    assert seen[2].curves == {"val/nll": (0.5, 0.25)}
    (waiting,), again = storage.changes(study.id, cursor)
    assert (waiting.state, again) == (State.QUEUED, cursor)


# -- budgets ------------------------------------------------------------------------------------


def test_intervals_are_reserved_and_given_back(storage):
    study = create(storage, queue=baselines("none"), budget=Budget(intervals=23))
    group = claimed(storage, study, 9)
    assert numbers(group) == [0, 1, 2, 3]  # 20 of 23 are reserved
    assert storage.claim(study.id, 1, 1) == []
    measured(storage, group[1], 4)
    storage.finish(group[1], State.PRUNED)  # gives back 1 of 5: 4 are free
    assert storage.claim(study.id, 1, 1) == []
    measured(storage, group[0], 3)
    storage.finish(group[0], State.PRUNED)  # 6 are free
    assert numbers(storage.claim(study.id, 1, 9)) == [4]
    assert storage.progress(study.id).tickets == 0


def test_confirmations_do_not_spend_the_searchs_budget(storage):
    study = create(storage, budget=Budget(intervals=10, trials=2))
    storage.enqueue(study.id, confirmations(0, 1, 2))
    assert storage.progress(study.id).tickets == 2
    assert len(storage.claim(study.id, 1, 9)) == 5


@pytest.mark.parametrize(("deadline", "share"), [(9.0, 1.0), (10.0, 1.0), (20.0, 0.0)])
def test_a_deadline_before_a_studys_creation_is_used_up(deadline, share):
    study = SimpleNamespace(
        budget_deadline=deadline, budget_device_seconds=None, created_at=10.0, at=10.0
    )
    assert time_used(None, study) == {"deadline": share}


def test_nothing_starts_after_the_deadline(storage):
    past = datetime.now(UTC) - timedelta(seconds=1)
    study = create(storage, queue=baselines("none"), budget=Budget(deadline=past))
    assert storage.claim(study.id, 1, 1) == []
    progress = storage.progress(study.id)
    assert (progress.spent, progress.claimable, progress.idle) == ("deadline", False, True)
    storage.update_study(study.id, budget=Budget(deadline=past + timedelta(hours=1)))
    assert len(storage.claim(study.id, 1, 1)) == 1


def test_device_hours_are_summed_over_workers(storage):
    study = create(storage, budget=Budget(device_seconds=10.0))
    (training,) = storage.claim(study.id, 1, 1)
    assert storage.beat(1, [training.id], device_seconds={study.id: 4.0}).spent == frozenset()
    storage.beat(1, [training.id], device_seconds={study.id: 6.0})  # so far, not in addition
    assert len(storage.claim(study.id, 2, 1)) == 1
    orders = storage.beat(2, [], device_seconds={study.id: 4.0})
    assert orders.spent == frozenset()  # worker 2 says that it trains nothing
    assert storage.beat(1, [training.id]).spent == {study.id}
    assert storage.claim(study.id, 1, 1) == []
    assert storage.progress(study.id).spent == "device hours"


def test_raising_the_budget_continues_a_study(storage):
    study = create(storage, budget=Budget(trials=1))
    (training,) = claimed(storage, study)
    storage.finish(training, State.COMPLETE, values=[1.0])
    assert storage.progress(study.id).idle
    storage.update_study(study.id, budget=Budget(trials=3))
    assert storage.progress(study.id).tickets == 2
    assert numbers(storage.claim(study.id, 1, 9)) == [1, 2]


@pytest.mark.parametrize("budget", [Budget(trials=1), Budget(intervals=9)])
def test_lowering_the_budget_takes_back_what_has_not_begun(storage, url, budget):
    small = create(storage, "small", queue=baselines("none", "half"))
    storage.claim(small.id, 1, 2)
    expected = row_counts(url)
    storage.delete_study("small")
    study = create(storage, queue=[*baselines("none", "half", "author"), *confirmations(0)])
    begun = claimed(storage, study, 2)
    storage.release(begun)
    storage.update_study(study.id, budget=budget)
    storage.update_study(study.id, budget=budget)  # nothing is left to be taken back
    waiting = storage.claim(study.id, 1, 9)
    assert [(t.label, t.number) for t in waiting[:2]] == [("none", 0), ("half", 1)]
    assert [t.number for t in waiting[2:]] == [None]
    assert row_counts(url)["trials"] == expected["trials"]
    assert row_counts(url)["trial_user_attributes"] == expected["trial_user_attributes"]
    storage.update_study(study.id, budget=Budget(trials=4))
    storage.enqueue(study.id, baselines("author"))
    assert numbers(storage.claim(study.id, 1, 9)) == [2, 3]


def test_without_a_budget_there_is_no_end(storage):
    study = create(storage)
    assert storage.progress(study.id).tickets is None
    assert storage.progress(study.id).claimable
    assert len(storage.claim(study.id, 1, 20)) == 20


def test_who_had_a_training_of_a_deleted_study_writes_into_no_other(storage):
    first = create(storage, intervals=1)
    (late,) = claimed(storage, first)
    storage.delete_study("digits")
    second = create(storage, intervals=1)
    (now,) = claimed(storage, second, worker=2)
    assert (second.id, now.id) != (first.id, late.id)
    assert storage.record([(late, Measurement(1, {"val/nll": 9.0}))], ["val/nll"]) == {late.id}
    assert not storage.put_score(late.id, "test", "nll", b"9")
    assert not storage.finish(late, State.COMPLETE, values=[9.0])
    (record,) = storage.records(second.id)
    assert (record.state, dict(record.curves)) == (State.RUNNING, {})
