"""Workers as real processes: signals, exit statuses, stops, deaths, services, budgets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from crew import (
    PROGRAM,
    Crew,
    check_same,
    end,
    make_study,
    results,
    train_here,
    wait_until,
)
from typer.testing import CliRunner

from droptune.cli import app
from droptune.storage import Storage
from droptune.training import State, TrainingKind

SLOW = "0.04"  # seconds for each update
SMALL = {"budget": "{trials: 3}", "confirm": "{enabled: false}"}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "project"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the tiny study gives when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    storage = Storage.open(f"sqlite:///{folder}/droptune.db", create=True)
    study = make_study(storage, folder)
    train_here(study, folder)
    assert study.phase() == "done"
    return results(study)


def training_of(storage, process, intervals=1):
    """What a worker trains, once it has measured so many intervals of something."""

    def look():
        rows = [w for w in storage.list_workers() if w.pid == process.pid]
        holds = [h for w in rows for h in w.holds]
        return holds if any(h.intervals_done >= intervals for h in holds) else None

    return wait_until(look)


def states(study):
    return [record.state for record in study.records()]


# -- signals ------------------------------------------------------------------------------------


def test_signals_hand_back_and_the_next_worker_goes_on(storage, url, folder, undisturbed):
    study = make_study(storage, folder)
    with Crew(url, folder, DROPTUNE_CHECKPOINT_SECONDS="600") as crew:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR2):
            worker = crew.start("study", "--until-done", SLOW=SLOW)
            held = training_of(storage, worker)
            os.kill(worker.pid, number)
            assert end(worker) == 75
            assert f"ended by {number.name}" in worker.log.read_text()
            assert State.RUNNING not in states(study)
            assert all(row.state == "ended" for row in storage.list_workers(ended=True))
            by_id = {r.training.id: r for r in study.records()}
            assert all(by_id[h.training.id].intervals_done >= h.intervals_done for h in held)
        assert end(crew.start("study", "--until-done")) == 0
    assert study.phase() == "done"
    assert {r.training.attempt for r in study.records()} == {1}  # nothing began again
    check_same(results(study), undisturbed)


@pytest.mark.databases("sqlite")
def test_a_second_ctrl_c_ends_at_once(storage, url, folder):
    study = make_study(storage, folder)
    with Crew(url, folder) as crew:
        worker = crew.start("study", STUCK="12")
        wait_until((folder / "stuck").exists)
        os.kill(worker.pid, signal.SIGINT)
        time.sleep(0.2)
        os.kill(worker.pid, signal.SIGINT)
        assert end(worker, 30) == 75
        assert State.RUNNING in states(study)  # its lease has to run out


@pytest.mark.databases("sqlite")
def test_a_signal_ends_a_worker_that_is_still_loading(storage, url, folder):
    study = make_study(storage, folder)
    with Crew(url, folder) as crew:
        worker = crew.start("study", STUCK="data")
        wait_until((folder / "stuck").exists)
        os.kill(worker.pid, signal.SIGTERM)
        assert end(worker, 60) == 75
    assert State.RUNNING not in states(study)


@pytest.mark.databases("sqlite")
def test_a_worker_that_is_to_mirror_nothing_makes_no_file_for_mlflow(storage, url, folder):
    study = make_study(storage, folder, mlflow="{mirror: worker}", **SMALL)
    (folder / "droptune.toml").write_text('tracking = "sqlite:///mlflow.db"\n')
    with Crew(url, folder, DROPTUNE_MIRROR="none") as crew:
        worker = crew.start("study", "--until-done")
        assert end(worker) == 0
        assert "mirror" not in worker.log.read_text()
    assert study.phase() == "done"
    assert list(folder.parent.rglob("mlflow.db*")) == []


# -- workers that can never work ----------------------------------------------------------------


@pytest.mark.databases("sqlite")
def test_other_code_is_refused_by_name_or_trained_when_told_so(storage, url, folder):
    study = make_study(storage, folder)
    (folder / "program.py").write_text(PROGRAM.replace("nn.Linear(8, 2)", "nn.Linear(8, 2, True)"))
    with Crew(url, folder) as crew:
        refused = crew.start("study", "--until-done")
        assert end(refused) == 78
        assert "the code here differs in program.py" in refused.log.read_text()
        assert study.storage.progress(study.row.id).running == 0
        assert end(crew.start("study", "--until-done", "--allow-drift")) == 0
    assert study.phase() == "done"
    infos = [row.info for row in storage.list_workers(ended=True)]
    assert {"study": ["program.py"]} in [info.get("drift") for info in infos]


@pytest.mark.databases("sqlite")
def test_what_a_worker_cannot_be_is_said_in_one_line(storage, url, folder):
    study = make_study(storage, folder)
    (folder.parent / "outside.py").write_text(PROGRAM)
    with Crew(url, folder) as crew:
        cases = [
            (crew.start("study", "--device", "cuda:7"), 78, "device 'cuda:7' cannot be used here"),
            (crew.start("study", DROPTUNE_PATIENCE="long"), 78, "DROPTUNE_PATIENCE=long"),
            (crew.start("stduy"), 2, "did you mean 'study'"),
        ]
        spec = {**study.row.spec, "program": "../outside.py"}
        for worker, status, words in cases:
            assert end(worker) == status
            assert words in worker.log.read_text().splitlines()[-1]
        storage.update_study(study.row.id, spec=spec)
        outside = crew.start("study")
        assert end(outside) == 78
        assert "lies outside the project" in outside.log.read_text().splitlines()[-1]
    assert study.storage.progress(study.row.id).running == 0


@pytest.mark.databases("sqlite")
def test_a_study_of_another_version_is_refused_and_keeps_no_other_from_being_trained(
    storage, url, folder
):
    newer, study = make_study(storage, folder, name="newer"), make_study(storage, folder, **SMALL)
    storage.update_study(newer.row.id, spec={**newer.row.spec, "brand_new": 1})
    with Crew(url, folder) as crew:
        service = crew.start("--until-done")
        assert end(service) == 78
        last = service.log.read_text().splitlines()[-1]
        assert "study 'newer': unknown key brand_new" in last
        assert "another droptune" in last
    assert study.phase() == "done"
    assert set(states(newer)) == {State.QUEUED}


# -- programs that fail -------------------------------------------------------------------------

# One trial begins with such a weight, another comes there; a fused update fails as a whole.
POISON = PROGRAM.replace(
    "        return self.layers(x)",
    """        share = self.layers[0].weight.detach()[0, 0] + 0.44
        torch.linalg.cholesky(torch.eye(2, dtype=x.dtype) * share)
        return self.layers(x)""",
)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("trainer", ["fused", "solo"])
def test_only_the_training_that_fails_by_itself_ends(storage, folder, undisturbed, trainer):
    training = f"{{precision: float64, width: 2, trainer: {trainer}}}"
    study = make_study(
        storage, folder, program=POISON, budget="{trials: 6}", training=training,
        confirm="{enabled: false}",
    )  # fmt: skip
    train_here(study, folder)
    found = results(study)
    failed = [name for name, (state, _, _) in found.items() if state is State.FAIL]
    assert failed == [("baseline", "half", 2, None), ("search", "", 3, None)]
    reason = study.trial(2).reason
    assert "program.py:" in reason
    assert "LinAlgError" in reason
    assert "\n" not in reason
    for name in found.keys() - set(failed):
        check_same({name: found[name]}, {name: undisturbed[name]})


@pytest.mark.databases("sqlite")
def test_a_fault_that_does_not_come_back_changes_nothing(storage, url, folder, undisturbed):
    study = make_study(storage, folder)
    with Crew(url, folder) as crew:
        assert end(crew.start("study", "--until-done", BROKEN="30")) == 0
    check_same(results(study), undisturbed)


@pytest.mark.databases("sqlite")
def test_a_program_that_trains_nothing_here_fails_no_trial(storage, url, folder):
    study = make_study(storage, folder)
    with Crew(url, folder) as crew:
        for calls in ("0", "3"):  # while it loads, in the first interval
            worker = crew.start("study", "--until-done", OVER=calls)
            assert end(worker) == 78
            assert "program.py:" in worker.log.read_text().splitlines()[-1]
    assert set(states(study)) <= {State.QUEUED}


# -- stopping, waiting, dying -------------------------------------------------------------------


def test_a_stopped_study_ends_its_workers_and_can_be_resumed(storage, url, folder, undisturbed):
    study = make_study(storage, folder)
    with Crew(url, folder) as crew:
        workers = [crew.start("study", "--until-done", SLOW=SLOW) for _ in range(2)]
        for worker in workers:
            training_of(storage, worker)
        storage.update_study(study.row.id, status="stopped")
        assert [end(worker) for worker in workers] == [0, 0]
        assert State.RUNNING not in states(study)
        idle = crew.start("study", "--until-done")
        assert end(idle) == 0  # nothing to do while it is stopped
        assert "droptune study resume study" in idle.log.read_text()
        assert study.phase() == "stopped"
        storage.update_study(study.row.id, status="active")
        assert end(crew.start("study", "--until-done")) == 0
    assert study.phase() == "done"
    check_same(results(study), undisturbed)


@pytest.mark.databases("sqlite")
def test_all_workers_stay_until_the_study_is_done(storage, url, folder):
    """Four workers for three trainings at a time: those without wait for what comes after."""
    study = make_study(storage, folder, budget="{trials: 3}", training="{precision: float64}")
    with Crew(url, folder) as crew:
        workers = [crew.start("study", "--until-done", "--width", "1") for _ in range(4)]
        wait_until(lambda: any(worker.exitcode is not None for worker in workers))
        assert study.phase() == "done"
        assert [end(worker) for worker in workers] == [0] * 4


@pytest.mark.parametrize("options", [(), ("--until-done",)])
@pytest.mark.databases("sqlite")
def test_an_idle_worker_ends_after_the_time_it_was_given(storage, url, folder, options):
    make_study(storage, folder, budget="{trials: 3}")
    with Crew(url, folder) as crew:
        busy = crew.start("study", "--width", "4", STUCK="12")
        wait_until((folder / "stuck").exists)
        assert end(crew.start("study", *options, DROPTUNE_IDLE_SECONDS="0.5")) == 0
        assert busy.exitcode is None


def freeze(worker, storage):
    """Stop a worker; not while it writes to SQLite, whose only lock nobody can take from it."""
    os.kill(worker.pid, signal.SIGSTOP)
    file = storage.database.address.path
    while file is not None:
        try:
            with closing(sqlite3.connect(file, timeout=0.5, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                return
        except sqlite3.OperationalError:
            os.kill(worker.pid, signal.SIGCONT)
            time.sleep(0.02)
            os.kill(worker.pid, signal.SIGSTOP)


def test_a_worker_that_was_believed_dead_cannot_write(storage, url, folder, undisturbed):
    study = make_study(storage, folder)
    with Crew(url, folder) as crew:
        late = crew.start("study", "--until-done", SLOW=SLOW)
        held = training_of(storage, late)
        freeze(late, storage)
        other = crew.start("study", "--until-done")
        assert end(other) == 0  # it took over when the lease had run out
        assert study.phase() == "done"
        before = results(study)
        os.kill(late.pid, signal.SIGCONT)
        assert end(late) == 0
        assert "another worker has it" in late.log.read_text()
    assert results(study) == before
    check_same(before, undisturbed)
    epochs = {r.training.id: r.training.lease_epoch for r in study.records()}
    assert all(epochs[holding.training.id] > holding.training.lease_epoch for holding in held)


@pytest.mark.databases("sqlite")
def test_without_its_checkpoint_a_training_is_a_new_attempt(storage, url, folder, undisturbed):
    study = make_study(storage, folder)
    with Crew(url, folder) as crew:
        worker = crew.start("study", "--until-done", SLOW=SLOW)
        held = training_of(storage, worker)
        worker.kill()
        worker.join()
        shutil.rmtree(folder / ".droptune", ignore_errors=True)
        assert end(crew.start("study", "--until-done")) == 0
    check_same(results(study), undisturbed)
    attempts = {r.training.id: r.training.attempt for r in study.records()}
    assert {attempts[holding.training.id] for holding in held} == {2}
    assert sum(attempts.values()) == len(attempts) + len(held)


@pytest.mark.databases("sqlite")
def test_checkpoints_in_the_database_and_damaged_ones(storage, url, folder, undisturbed):
    study = make_study(storage, folder, checkpoints="{store: sql}")
    with Crew(url, folder) as crew:
        worker = crew.start("study", "--until-done", SLOW=SLOW)
        training_of(storage, worker)
        os.kill(worker.pid, signal.SIGTERM)
        assert end(worker) == 75
        snapshots = [name for name in storage.blob_names() if "attempt" in name]
        assert snapshots
        storage.put_blob(snapshots[0], b"damaged")
        assert end(crew.start("study", "--until-done")) == 0
    check_same(results(study), undisturbed)
    assert sorted(r.training.attempt for r in study.records())[-2:] == [1, 2]
    assert not (folder / ".droptune").exists()


@pytest.mark.databases("sqlite")
def test_what_is_kept_of_a_finished_study(storage, url, folder):
    """The weights of the best trial and of the confirmations, and no checkpoint."""
    study = make_study(storage, folder)
    with Crew(url, folder) as crew:
        workers = [crew.start("study", "--until-done") for _ in range(2)]
        assert [end(worker) for worker in workers] == [0, 0]
    records = study.records()
    trials = [r for r in records if r.training.kind.is_trial]
    best = min(trials, key=lambda r: r.values)
    confirmed = {r.training.id for r in records if r.training.kind is TrainingKind.CONFIRMATION}
    files = [path for path in (folder / ".droptune").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"weights.safetensors"}
    assert {int(path.parent.name) for path in files} == {best.training.id} | confirmed


# -- several studies ----------------------------------------------------------------------------


@pytest.mark.databases("postgresql")
def test_a_service_serves_every_active_study(storage, url, folder):
    first = make_study(storage, folder, name="first", **SMALL)
    urgent = make_study(storage, folder, name="urgent", **SMALL, priority=5)
    elsewhere = make_study(
        storage, folder / "elsewhere", name="elsewhere", program=f"{PROGRAM}\n# other", **SMALL
    )
    with Crew(url, folder) as crew:
        workers = [crew.start() for _ in range(2)]
        wait_until(lambda: {first.phase(), urgent.phase()} == {"done"})
        begun = {s.name: [r.started for r in s.records()] for s in (first, urgent)}
        assert max(begun["urgent"]) <= min(begun["first"])
        late = make_study(storage, folder, name="late", **SMALL)
        wait_until(lambda: late.phase() == "done")
        for worker in workers:
            assert worker.exitcode is None
            os.kill(worker.pid, signal.SIGTERM)
        assert [end(worker) for worker in workers] == [75, 75]
        refusals = [w.log.read_text().count("the code here differs") for w in workers]
        assert refusals == [1, 1]
        assert end(crew.start("--until-done")) == 78  # all else is done
    assert states(elsewhere) == [State.QUEUED] * 3


@pytest.mark.databases("sqlite")
def test_who_trains_what_can_be_seen(storage, url, folder):
    make_study(storage, folder)
    with Crew(url, folder) as crew:
        worker = crew.start("study", STUCK="20")
        wait_until((folder / "stuck").exists)
        listed = json.loads(run_droptune(url, "worker", "list", "--json"))
        assert [(w["pid"], w["state"], len(w["holds"])) for w in listed] == [
            (worker.pid, "alive", 2)
        ]
        assert "study: 2 slots" in run_droptune(url, "worker", "list")
        shown = run_droptune(url, "study", "show", "study")
        names = ", ".join(h["training"]["label"] for h in listed[0]["holds"])
        assert f"worker {listed[0]['id']} (" in shown
        assert names.split(", ")[0] in shown


def run_droptune(url, *arguments):
    result = CliRunner().invoke(app, arguments, env={"DROPTUNE_STORAGE": url, "COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


# -- budgets ------------------------------------------------------------------------------------


def run_two(url, folder, **environment):
    with Crew(url, folder, **environment) as crew:
        workers = [crew.start("study", "--until-done") for _ in range(2)]
        assert [end(worker) for worker in workers] == [0, 0]


def trained_seconds(study):
    return sum(sum(r.curves.get("time/seconds", ())) for r in study.records())


@pytest.mark.databases("mysql")
def test_a_budget_of_epochs_is_never_exceeded(storage, url, folder):
    study = make_study(storage, folder, budget="{epochs: 23}")  # 5 trials of 4
    run_two(url, folder)
    assert study.phase() == "done"
    trials = [r for r in study.records() if r.training.kind.is_trial]
    assert [r.training.number for r in trials] == list(range(5))
    assert all(r.state is State.COMPLETE for r in trials)


@pytest.mark.databases("sqlite")
def test_device_hours_end_a_study_and_more_of_them_continue_it(storage, url, folder):
    limit = 3.0
    study = make_study(storage, folder, budget=f"{{device_hours: {limit / 3600}}}")
    run_two(url, folder, SLOW=SLOW)
    assert study.phase() == "done"
    assert State.RUNNING not in states(study)
    longest = max(max(r.curves.get("time/seconds", (0,))) for r in study.records())
    assert trained_seconds(study) <= limit + 2 * 2 * longest  # two workers of two slots
    before = results(study)
    assert study.verdict() is not None

    study = make_study(storage, folder, budget="{trials: 10}")
    assert study.phase() == "searching"
    run_two(url, folder)
    assert study.phase() == "done"
    after = results(study)
    assert all(record.state.finished for record in study.records())
    assert len([name for name in after if name[0].is_trial]) >= 10
    ended = {name: result for name, result in before.items() if result[0].finished}
    assert all(after[name] == result for name, result in ended.items())


@pytest.mark.databases("sqlite")
def test_a_deadline_leaves_time_to_confirm(storage, url, folder):
    deadline = datetime.now(UTC) + timedelta(seconds=9)
    study = make_study(storage, folder, budget=f"{{deadline: '{deadline.isoformat()}'}}")
    run_two(url, folder, SLOW="0.01")
    assert study.phase() == "done"
    records = [r for r in study.records() if r.started is not None]
    assert max(r.started for r in records) <= deadline
    trials = [r.started for r in records if r.training.kind.is_trial]
    reserved = (deadline - study.row.created) / 3
    assert max(trials) <= deadline - reserved + timedelta(seconds=0.5)


@pytest.mark.databases("sqlite")
def test_more_trials_continue_a_finished_study_and_confirm_its_winner(storage, folder):
    study = make_study(storage, folder, budget="{trials: 4}")
    train_here(study, folder)
    first = study.verdict()
    study = make_study(storage, folder, budget="{trials: 16}")
    assert study.phase() == "searching"
    train_here(study, folder)
    assert study.phase() == "done"
    second = study.verdict()
    assert first["confirmed"]
    assert second["confirmed"]
    assert first["winner"]["label"] != second["winner"]["label"]
    assert all(record.state is State.COMPLETE for record in study.records())
    assert [r.training.number for r in study.records() if r.training.number is not None] == list(
        range(16)
    )
