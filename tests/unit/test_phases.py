"""A study moves through its phases to its end, whatever is asked of it on the way."""

import json
import logging
import re

import numpy as np
import pytest
from crew import PROGRAM, make_study, train_here

from droptune import answer
from droptune.errors import SpecError, StorageError, UsageError
from droptune.report.report import FORMATS, render
from droptune.storage import Ending, Storage
from droptune.study import Study
from droptune.training import Measurement, State, TrainingKind

CONFIRM = "{top: 2, min_seeds: 2, max_seeds: 4, share: 0.5}"


@pytest.fixture
def storage(tmp_path):
    return Storage.open(f"sqlite:///{tmp_path}/study.db", create=True)


def make(storage, folder, trials, **changes):
    given = {"budget": f"{{trials: {trials}}}", "baselines": "{trials: 2}", "confirm": CONFIRM}
    return make_study(storage, folder, **{**given, **changes})


def test_a_budget_in_epochs_has_the_confirmations_of_as_many_trials(storage, tmp_path):
    in_epochs = make_study(
        storage, tmp_path, name="epochs", budget="{epochs: 80}", baselines="{trials: 2}",
        confirm=CONFIRM,
    )  # fmt: skip
    assert in_epochs.spec.epochs == 4
    assert in_epochs.cost() == make(storage, tmp_path, 20).cost()


class Player:
    """A worker that makes results up; what fails, fails at random."""

    def __init__(self, storage, seed=0, failing=0.0):
        self.storage, self.failing = storage, failing
        self.rng = np.random.default_rng(seed)
        self.id = storage.register_worker(host="here", pid=1, device="cpu", info={})

    def train(self, study, limit=4):
        trainings = study.claim(self.id, limit)
        items = [(t, Measurement(1, {"val/nll": self.value(t.assignment)})) for t in trainings]
        self.storage.record(items, ["val/nll"])
        self.storage.finish_all([self.ending(t, m.values["val/nll"]) for t, m in items])
        return trainings

    def value(self, assignment):
        return 0.5 - 0.05 * assignment.mean_rate + self.rng.normal(0, 0.01)

    def ending(self, training, value):
        if self.rng.random() < self.failing:
            return Ending(training, State.FAIL, reason="made up")
        return Ending(training, State.COMPLETE, [value], best_interval=1)

    def play(self, study, rounds=200):
        """Train until the study is done."""
        for _ in range(rounds):
            if study.phase() == "done":
                return
            if self.storage.progress(study.row.id).claimable:
                self.train(study)
            else:
                study.advance()
        left = self.storage.progress(study.row.id)
        raise AssertionError(f"it does not come to an end: {left}")


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_may_be_raised_again_and_again(storage, tmp_path, seed):
    """A new winner has a new twin without dropout: its label is known, its assignment is not."""
    player = Player(storage, seed, failing=0.1 * (seed % 2))
    for trials in (12, 13, 15, 20):
        study = make(storage, tmp_path, trials, seed=seed)
        player.play(study)
        trained = [r for r in study.records() if r.training.kind.is_trial]
        assert len(trained) == trials
        assert study.verdict()["confirmed"] or seed % 2


def test_a_budget_smaller_than_the_baselines_is_kept_and_may_be_raised(storage, tmp_path):
    """Each baseline has its first learning rate before any has its second."""
    player = Player(storage)
    study = make(storage, tmp_path, 4)
    player.play(study)
    trials = [r.training for r in study.records() if r.training.kind.is_trial]
    assert [trial.label for trial in trials] == ["none", "author", "half", "none"]
    assert [trial.assignment.lr for trial in trials[:3]] == [1e-2] * 3
    study = make(storage, tmp_path, 8)
    player.play(study)
    trials = [r.training for r in study.records() if r.training.kind.is_trial]
    assert [trial.number for trial in trials] == list(range(8))
    assert [trial.label for trial in trials[4:]] == ["author", "half", "", ""]


def test_what_was_only_tried_is_not_called_found(storage, tmp_path):
    study = make(storage, tmp_path, 6)  # its baselines, and nothing to search
    Player(storage).play(study)
    assert study.verdict()["confirmed"]
    said = [answer.text(study), json.dumps(answer.to_json(study)), answer.code(study)]
    said += [render(study.evidence(), study.judge(), format) for format in FORMATS]
    assert not re.findall("dropout found|best found|was found", " ".join(said))
    assert all("best dropout tried" in text for text in (said[0], said[1], *said[3:6]))
    study = make(storage, tmp_path, 9)
    Player(storage).play(study)
    assert "dropout found" in answer.text(study)


def test_baselines_that_wait_are_beyond_a_budget_that_is_lowered(storage, tmp_path):
    """As if it had been created so, but for what has begun."""
    player = Player(storage)
    player.train(make(storage, tmp_path, 12), limit=2)
    study = make(storage, tmp_path, 4)
    player.play(study)
    trials = [r.training for r in study.records() if r.training.kind.is_trial]
    assert [trial.label for trial in trials] == ["none", "author", "half", "none"]
    study = make(storage, tmp_path, 8)
    player.play(study)
    trials = [r.training for r in study.records() if r.training.kind.is_trial]
    assert [trial.number for trial in trials] == list(range(8))
    assert [trial.label for trial in trials[4:]] == ["author", "half", "", ""]


def test_confirmations_queued_at_the_last_moment_are_trained(storage, tmp_path, monkeypatch):
    study, player = make(storage, tmp_path, 12), Player(storage)
    player.play(study)
    storage.update_study(study.row.id, phase="confirming")  # as if a worker were about to end it
    put = storage.put_verdict

    def meanwhile(*given):
        monkeypatch.undo()
        put(*given)
        assert Study.open(storage, study.name).confirm(top=None, max_seeds=6, ablate=False)

    monkeypatch.setattr(storage, "put_verdict", meanwhile)
    assert not study.advance()
    assert study.phase() == "confirming"
    assert storage.progress(study.row.id).claimable
    player.play(study)


def test_confirming_again_finds_what_waits(storage, tmp_path):
    study, player = make(storage, tmp_path, 12), Player(storage)
    player.play(study)
    assert study.confirm(top=None, max_seeds=6, ablate=False) > 0
    storage.update_study(study.row.id, phase="done")
    assert study.confirm(top=None, max_seeds=6, ablate=False) == 0
    assert study.phase() == "confirming"
    player.play(study)


def test_what_cannot_be_trained_is_said_and_ends(storage, tmp_path, monkeypatch, caplog):
    study, player = make(storage, tmp_path, 12), Player(storage)
    while storage.progress(study.row.id).claimable:
        player.train(study)
    monkeypatch.setattr(storage, "enqueue", lambda *given, **more: [])
    with caplog.at_level(logging.WARNING, "droptune.study"):
        assert not study.advance()
    assert study.phase() == "done"
    assert "no training is left for what is missing" in caplog.text
    assert not study.verdict()["confirmed"]


def test_a_study_that_nobody_trains_says_so(storage, tmp_path, capsys, monkeypatch):
    from droptune.cli.study import show

    monkeypatch.setenv("DROPTUNE_STORAGE", f"sqlite:///{tmp_path}/study.db")
    monkeypatch.chdir(tmp_path)
    study, player = make(storage, tmp_path, 12), Player(storage)
    while storage.progress(study.row.id).claimable:
        player.train(study)
    show("study", watch=False, json=False, storage=None)
    assert "no worker is alive" not in capsys.readouterr().out
    storage.end_worker(player.id)
    show("study", watch=False, json=False, storage=None)
    assert "go on with: droptune worker start study --until-done" in capsys.readouterr().out


def test_another_worker_that_was_first_is_waited_for(storage, tmp_path):
    study, player = make(storage, tmp_path, 12), Player(storage)
    while storage.progress(study.row.id).claimable:
        player.train(study)
    assert Study.open(storage, study.name).advance()
    assert not study.advance()
    assert study.phase() == "confirming"
    confirmations = [r for r in study.records() if r.training.kind is TrainingKind.CONFIRMATION]
    assert len({(r.training.label, r.training.seed_index) for r in confirmations}) == len(
        confirmations
    )


def test_a_budget_raised_at_the_last_moment_is_spent(storage, tmp_path, monkeypatch):
    study, player = make(storage, tmp_path, 12), Player(storage)
    player.play(study)
    storage.update_study(study.row.id, phase="searching")
    progress = storage.progress

    def meanwhile(study_id):
        monkeypatch.undo()
        found = progress(study_id)
        make(storage, tmp_path, 14)
        return found

    monkeypatch.setattr(storage, "progress", meanwhile)
    assert not study.advance()
    assert study.phase() == "searching"
    player.play(study)
    assert len([r for r in study.records() if r.training.kind.is_trial]) == 14


def test_confirming_in_the_midst_of_a_search_waits_for_what_is_trained(storage, tmp_path):
    """Front runners are chosen once, when all that was begun has ended."""
    study, player = make(storage, tmp_path, 20), Player(storage)
    for _ in range(3):
        player.train(study)
    begun = study.claim(player.id, 2)
    assert study.confirm(top=1, max_seeds=None, ablate=False) is None
    assert not study.advance()
    storage.finish_all([Ending(t, State.FAIL, reason="made up") for t in begun])
    player.play(study)
    records = study.records()
    assert len([r for r in records if r.training.kind.is_trial]) == 14
    confirmed = {r.training.label for r in records if r.training.label.startswith("trial ")}
    assert len(confirmed) == 1


def test_one_group_alone_is_not_left_out(storage, tmp_path):
    study, player = make(storage, tmp_path, 12), Player(storage)
    player.play(study)
    with pytest.raises(StorageError, match="nothing to leave out"):
        study.confirm(top=None, max_seeds=None, ablate=True)
    assert not Study.open(storage, study.name).spec.confirm.ablate


def test_confirming_on_fewer_seeds_than_the_least_is_refused(storage, tmp_path):
    study = make(storage, tmp_path, 12, confirm="{min_seeds: 5}")
    with pytest.raises(UsageError, match=r"3 seeds at most are fewer .* give 5 or more"):
        study.confirm(top=None, max_seeds=3, ablate=False)


def test_a_stopped_study_is_to_be_resumed_before_its_confirmations_are_trained(
    storage, tmp_path, capsys, monkeypatch
):
    from droptune.cli.study import confirm

    monkeypatch.chdir(tmp_path)
    study, player = make(storage, tmp_path, 12), Player(storage)
    player.play(study)
    storage.update_study(study.row.id, status="stopped")
    confirm(
        study.name, top=None, max_seeds=6, ablate=False, storage=f"sqlite:///{tmp_path}/study.db"
    )
    assert "queued; next: droptune study resume study" in capsys.readouterr().out


def test_the_lines_to_paste_hold_the_last_verdict_while_more_is_confirmed(storage, tmp_path):
    study, player = make(storage, tmp_path, 12), Player(storage)
    player.play(study)
    assert study.confirm(top=None, max_seeds=6, ablate=False) > 0
    lines = answer.code(Study.open(storage, study.name)).splitlines()
    assert lines[1:3] == [
        "# The study is confirming; its last verdict was:",
        f"# {study.verdict()['sentence']}",
    ]


def test_confirming_beyond_the_deadline_is_refused(storage, tmp_path):
    budget = "{trials: 12, deadline: 2020-01-01T00:00:00Z}"
    study = make(storage, tmp_path, 12, budget=budget)
    with pytest.raises(StorageError, match="has used up its deadline: raise the budget"):
        study.confirm(top=None, max_seeds=None, ablate=False)


def test_folds_need_validation_data_that_droptune_splits_off(storage, tmp_path):
    given = PROGRAM.replace("train=data,", "train=data, validation=data,")
    with pytest.raises(SpecError, match=r"confirm.splits is folds, but .* gives validation data"):
        make(storage, tmp_path, 12, program=given, confirm="{splits: folds}")


def test_folds_are_trained_side_by_side(storage, tmp_path):
    confirm = "{top: 1, min_seeds: 2, max_seeds: 2, splits: folds}"
    study = make(storage, tmp_path, 6, confirm=confirm, baselines="{trials: 1}")
    train_here(study, tmp_path)
    records = [r for r in study.records() if r.training.kind is TrainingKind.CONFIRMATION]
    assert len({r.training.seeds.split for r in records}) == 2
    assert all(r.state is State.COMPLETE for r in records)
    assert study.verdict()["confirmed"]


@pytest.mark.parametrize(("flag", "enabled"), [(None, False), (False, False), (True, True)])
def test_the_file_says_whether_to_confirm_unless_the_flag_does(
    storage, tmp_path, monkeypatch, flag, enabled
):
    from droptune.cli import running
    from droptune.cli.study import run

    study = make(storage, tmp_path, 12, confirm="{enabled: false}")
    monkeypatch.setattr(running, "run_here", lambda *given, **more: None)
    file, url = tmp_path / "study.yaml", f"sqlite:///{tmp_path}/study.db"
    run(file, None, device="auto", workers=None, width="auto", confirm=flag, storage=url)
    assert Study.open(storage, study.name).spec.confirm.enabled is enabled


def test_a_study_that_ended_unconfirmed_is_confirmed_when_that_is_switched_on(storage, tmp_path):
    player = Player(storage)
    study = make(storage, tmp_path, 12, confirm="{enabled: false}")
    player.play(study)
    assert not study.verdict()["confirmed"]
    study = make(storage, tmp_path, 12)
    assert study.phase() == "confirming"
    player.play(study)
    assert study.verdict()["confirmed"]
    assert make(storage, tmp_path, 12, confirm="{enabled: false}").phase() == "done"


def test_the_mirror_draws_from_the_plan_as_it_is_now(storage, tmp_path, monkeypatch):
    from droptune import figures
    from droptune.mirror.opening import _shown

    study, player = make(storage, tmp_path, 12), Player(storage)
    player.play(study)
    Study.open(storage, study.name).confirm(top=None, max_seeds=6, ablate=False)
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda evidence, verdict: drawn.append(evidence) or {})
    assert "report.html" in _shown(study, study.records())
    assert {evidence.spec.confirm.max_seeds for evidence in drawn} == {6}
