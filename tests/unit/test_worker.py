from __future__ import annotations

import math
import os
import signal
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
from crew import check_same, make_study, results, train_here

from droptune.cli.worker import open_patiently, read_seconds
from droptune.errors import ConfigurationError, StorageError, WorkRemainsError
from droptune.program.loading import load_program
from droptune.storage import Budget, Holding, Storage, StudySummary, WorkerRow
from droptune.trainers.checkpoint import CheckpointStore
from droptune.trainers.fused import make_trainer
from droptune.trainers.recipe import Recipe
from droptune.trainers.slot import Interrupted
from droptune.training import Measurement, State, TrainingKind
from droptune.workers.beat import Beat
from droptune.workers.device import find_device, set_threads
from droptune.workers.group import Group, blame
from droptune.workers.signals import Signals
from droptune.workers.turns import Turns
from droptune.workers.worker import engine_job

# -- signals, beats, devices --------------------------------------------------------------------


def test_the_first_signal_is_kept_and_handlers_are_put_back():
    told = []
    signals = Signals(lambda: told.append(1))
    before = signal.getsignal(signal.SIGTERM)
    with signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt), signals.breaking():
            pytest.fail("a signal that came before breaks too")
    assert signals.first == "SIGTERM"
    assert len(told) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals(lambda: None)
    try:
        with signals.handled():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.first is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_breaks_what_holds_nothing():
    signals = Signals(lambda: None)
    with signals.handled():
        with pytest.raises(KeyboardInterrupt), signals.breaking():
            os.kill(os.getpid(), signal.SIGUSR2)
        assert signals.first == "SIGUSR2"
        os.kill(os.getpid(), signal.SIGUSR2)  # breaks nothing any more


def test_a_beat_goes_on_whatever_becomes_of_one():
    beats, calls = threading.Semaphore(0), []

    def work():
        calls.append(1)
        beats.release()
        if len(calls) == 1:
            raise StorageError("no")
        if len(calls) == 2:
            raise ZeroDivisionError

    beat = Beat(work, 0.01, threading.Event())
    for _ in range(4):
        assert beats.acquire(timeout=20)
    beat.end()


def test_a_beat_on_demand_waits_for_it_but_not_for_an_absent_database():
    calls, away = [], threading.Event()
    beat = Beat(lambda: calls.append(1), 600, away)
    beat.now()
    assert calls == [1]
    beat.end()
    away.set()
    beat.now()  # nobody beats any more


def test_devices_and_threads(monkeypatch):
    assert find_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cuda:99", "cpu:0:0"):
        with pytest.raises(ConfigurationError, match="cannot be used here"):
            find_device(name)
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert set_threads(None, cores=8, workers=3) == 2
    assert set_threads(3, cores=8, workers=8) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set_threads(None, cores=8, workers=1) == 3  # as it was: the environment has its say
    torch.set_num_threads(before)


def test_seconds_come_from_the_environment():
    found = read_seconds({"DROPTUNE_PATIENCE": "0", "DROPTUNE_LEASE_SECONDS": "2.5"})
    assert found["DROPTUNE_PATIENCE"] == 0
    assert found["DROPTUNE_LEASE_SECONDS"] == 2.5
    assert found["DROPTUNE_IDLE_SECONDS"] == 600
    assert read_seconds({}, until_done=True)["DROPTUNE_IDLE_SECONDS"] == math.inf
    given = {"DROPTUNE_IDLE_SECONDS": "60"}
    assert read_seconds(given, until_done=True)["DROPTUNE_IDLE_SECONDS"] == 60
    for wrong in ("soon", "-1", "inf", "nan"):
        with pytest.raises(ConfigurationError, match=f"DROPTUNE_PATIENCE={wrong}"):
            read_seconds({"DROPTUNE_PATIENCE": wrong})
    with pytest.raises(ConfigurationError, match="DROPTUNE_LEASE_SECONDS=0: give a number"):
        read_seconds({"DROPTUNE_LEASE_SECONDS": "0"})


def test_a_database_without_studies_is_not_waited_for(tmp_path, caplog):
    with pytest.raises(StorageError, match="or create a study"):
        open_patiently(f"sqlite:///{tmp_path}/none.db", patience=600, lease=60)
    assert "Waiting" not in caplog.text


def test_the_job_of_an_engine():
    assert engine_job({}) is None
    assert engine_job({"SLURM_JOB_ID": "7"}) == "slurm 7"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert engine_job(array) == "slurm 7_2"
    assert engine_job({"POD_NAME": "x"}) == "kubernetes x"


def test_whose_fault_it_is():
    cpu = torch.device("cpu")
    assert isinstance(blame(RuntimeError("CUDA error: launch failed"), "s", cpu), WorkRemainsError)
    assert isinstance(blame(MemoryError(), "s", cpu), WorkRemainsError)
    found = blame(ValueError("two\nlines"), "s", cpu)
    assert isinstance(found, ConfigurationError)
    assert "\n" not in str(found)


# -- turns --------------------------------------------------------------------------------------


def summary(study_id, priority=0):
    return StudySummary(
        study_id, f"s{study_id}", "u", "active", "searching", priority,
        dict.fromkeys(State, 0), dict.fromkeys(State, 0), None, datetime.now(UTC), (), Budget(),
    )  # fmt: skip


def crew(*counts):
    """Workers of each study s1, s2, …"""
    now = datetime.now(UTC)
    names = [f"s{i}" for i, count in enumerate(counts, 1) for _ in range(count)]
    return [
        WorkerRow(i, "h", i, "cpu", "1", {}, now, now, "alive", (Holding(name, None, 0),) * 3)
        for i, name in enumerate(names)
    ]


def test_priority_then_fewest_workers_then_longest_unserved():
    clock = [0.0]
    turns = Turns(30, lambda: clock[0])
    studies = [summary(1), summary(2), summary(3, priority=1)]
    order = lambda others: [s.id for s in turns.order(studies, others)]  # noqa: E731
    assert order(crew()) == [3, 1, 2]
    assert order(crew(2, 1, 5)) == [3, 2, 1]
    clock[0] = 5.0
    turns.end(1)
    assert order(crew()) == [3, 2, 1]
    clock[0] = 6.0
    turns.end(2)
    assert order(crew()) == [3, 1, 2]


def test_a_turn_ends_for_equals_and_at_once_for_the_urgent():
    clock = [0.0]
    turns = Turns(30, lambda: clock[0])
    studies = [summary(1), summary(2), summary(3, priority=-1)]
    rivals = lambda others: [s.id for s in turns.rivals(1, studies, others)]  # noqa: E731
    turns.begin()
    assert rivals(crew()) == []
    studies.append(summary(4, priority=1))
    assert rivals(crew()) == [4]
    clock[0] = 30.0
    assert rivals(crew()) == [2, 4]
    assert rivals(crew(0, 1)) == [4]  # study 2 has its worker
    assert rivals(crew(1, 1)) == [2, 4]
    assert turns.rivals(9, studies, crew()) == []  # stopped meanwhile


# -- the group ----------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    storage = Storage.open(f"sqlite:///{tmp_path}/droptune.db", create=True)
    return make_study(storage, tmp_path, confirm="{enabled: false}", budget="{trials: 4}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    storage = Storage.open(f"sqlite:///{folder}/droptune.db", create=True)
    made = make_study(storage, folder, confirm="{enabled: false}", budget="{trials: 4}")
    train_here(made, folder)
    return results(made)


@pytest.fixture
def make_group(study, tmp_path):
    made = []

    def make():
        worker = study.storage.register_worker(host="here", pid=1, device="cpu")
        program = load_program(study.spec.program, tmp_path)
        recipe = Recipe.of(program, study.sites, study.spec, torch.device("cpu"))
        store = CheckpointStore.of(study, tmp_path)
        made.append(Group(study, worker, make_trainer(recipe, study), store))
        return made[-1]

    yield make
    for group in made:
        group.close()


def test_a_stop_is_neither_lost_nor_left_behind(study, make_group, undisturbed):
    group = make_group()
    assert group.step()
    group.stop()
    group.stop()
    for _ in range(2):
        with pytest.raises(Interrupted):
            group.step()
    group.hand_back()
    assert group.holding() == []
    again = make_group()
    while again.step():
        pass
    check_same(results(study), undisturbed)


def test_a_stop_breaks_an_evaluation_too(study, make_group, undisturbed):
    group = make_group()
    group.step()
    program = sys.modules[type(group.trainer.recipe.program.model()).__module__]
    program.evaluating = group.stop
    with pytest.raises(Interrupted):
        group.step()
    program.evaluating = None
    assert {held.measurements[-1].interval for held in group.held.values()} == {1}
    group.hand_back()
    again = make_group()
    while again.step():
        pass
    check_same(results(study), undisturbed)


def test_a_stop_while_trainings_are_claimed_hands_them_back(study, make_group):
    group = make_group()
    claim = study.claim

    def claim_and_stop(*arguments):
        claimed = claim(*arguments)
        group.stop()
        return claimed

    study.claim = claim_and_stop
    with pytest.raises(Interrupted):
        group.step()
    assert len(group.holding()) == 2
    group.hand_back()
    assert {record.state for record in study.records()} == {State.QUEUED}


def test_a_training_that_had_reached_its_end_is_not_trained_again(study, make_group, undisturbed):
    """As after a worker's death while the database was away."""
    group = make_group()
    for _ in range(3):
        group.step()
    for index, outcome in group.trainer.train_interval().items():
        group.held[index].measurements.append(outcome.measurement)
    group.hand_back()
    again = make_group()
    while again.step():
        pass
    check_same(results(study), undisturbed)


@pytest.mark.parametrize("fault", ["of another model", "without its history"])
def test_a_checkpoint_that_cannot_be_used_is_a_new_attempt(
    study, tmp_path, make_group, undisturbed, fault
):
    group = make_group()
    group.step()
    first = group.holding()[0]
    group.hand_back()
    store = CheckpointStore.of(study, tmp_path)
    snapshot = store.load(first.id, first.attempt)
    if fault == "of another model":
        wrong = {name: torch.zeros(3, 3) for name in snapshot.tensors}
        store.save(first.id, first.attempt, replace(snapshot, tensors=wrong))
    else:
        store.save(first.id, first.attempt, snapshot.with_meta(curve=[]))
    again = make_group()
    while again.step():
        pass
    check_same(results(study), undisturbed)
    attempts = {r.training.id: r.training.attempt for r in study.records()}
    assert attempts.pop(first.id) == 2
    assert set(attempts.values()) == {1}


def fails(error, times=10**6):
    """A function that raises for some time, and is put before another one."""
    left = iter(range(times))

    def before(function):
        def call(*arguments):
            if next(left, None) is not None:
                raise error
            return function(*arguments)

        return call

    return before


def test_too_little_memory_to_resume_deletes_nothing(study, make_group, undisturbed):
    group = make_group()
    group.step()
    group.hand_back()
    late = make_group()
    late.trainer.fill = fails(torch.OutOfMemoryError("CUDA out of memory"))(late.trainer.fill)
    with pytest.raises(WorkRemainsError, match="out of memory"):
        late.step()
    assert max(len(record.curves.get("val/nll", ())) for record in study.records()) == 1
    assert {record.training.attempt for record in study.records()} == {1}
    study.storage.release([r.training for r in study.records() if r.state is State.RUNNING])
    again = make_group()
    while again.step():
        pass
    check_same(results(study), undisturbed)


def test_too_little_memory_slot_by_slot_fails_no_training(study, make_group):
    group = make_group()
    train = fails(ValueError("of one training"), times=1)(
        fails(MemoryError())(group.trainer.train_interval)
    )
    group.trainer.train_interval = train
    with pytest.raises(WorkRemainsError):
        group.step()
    assert len(group.holding()) == 2
    group._recorder.flush()
    assert {record.state for record in study.records()} <= {State.QUEUED, State.RUNNING}


def test_confirmations_that_cannot_be_scored_fail_and_the_study_ends(tmp_path, caplog):
    storage = Storage.open(f"sqlite:///{tmp_path}/droptune.db", create=True)
    study = make_study(storage, tmp_path, budget="{trials: 4}")
    fault = ValueError("only one class in the test set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("droptune.trainers.solo.score", fails(fault)(None))
        patch.setattr("droptune.trainers.fused.score", fails(fault)(None))
        train_here(study, tmp_path)
    confirmations = [r for r in study.records() if r.training.kind is TrainingKind.CONFIRMATION]
    assert confirmations
    assert {record.state for record in confirmations} == {State.FAIL}
    assert all("only one class in the test set" in record.reason for record in confirmations)
    assert study.phase() == "done"


def test_metrics_that_come_and_go_are_nan_where_they_are_missing(study, make_group):
    group = make_group()
    group.step()
    held = group.held[0]
    first = held.measurements[0]
    held.measurements[0] = Measurement(1, {**first.values, "val/early": 1.0})
    held.measurements.append(Measurement(2, {**first.values, "val/late": 2.0}))
    assert held.curves["val/early"] == pytest.approx((1.0, math.nan), nan_ok=True)
    assert held.curves["val/late"] == pytest.approx((math.nan, 2.0), nan_ok=True)


def test_a_full_disk_is_a_warning(study, tmp_path, make_group, undisturbed, caplog):
    (tmp_path / ".droptune").write_text("in the way")
    group = make_group()
    group.step()
    group.save()
    assert "training goes on without it" in caplog.text
    while group.step():
        pass
    check_same(results(study), undisturbed)


def test_a_lost_training_leaves_its_checkpoint_to_the_other(study, tmp_path, make_group):
    group = make_group()
    group.step()
    group.save()
    lost = group.holding()[0]
    study.storage.release([lost])
    other = study.storage.register_worker(host="there", pid=2, device="cpu")
    assert [t.id for t in study.storage.claim(study.row.id, other, 1)] == [lost.id]
    group.step(refill=False)
    group.step(refill=False)
    assert lost.id not in {training.id for training in group.holding()}
    assert CheckpointStore.of(study, tmp_path).load(lost.id, lost.attempt) is not None


def test_history_is_recorded_again_in_order(study, make_group):
    """What was measured while the database was away comes from the checkpoint."""
    group = make_group()
    group.step()
    first = next(iter(group.held.values()))
    measured = first.measurements[0]
    first.measurements.append(Measurement(2, {k: v + 1 for k, v in measured.values.items()}))
    curve = [[m.interval, dict(m.values)] for m in first.measurements]
    snapshot = group.trainer.snapshot(0).with_meta(curve=curve)
    group._store.save(first.training.id, 1, replace(snapshot, interval=2))
    group._recorder.flush()
    study.storage.release(group.holding())
    again = make_group()
    again.step()
    again._recorder.flush()
    record = next(r for r in study.records() if r.training.id == first.training.id)
    assert record.curves["val/nll"][0] == measured.values["val/nll"]
    assert record.curves["val/nll"][1] == measured.values["val/nll"] + 1
