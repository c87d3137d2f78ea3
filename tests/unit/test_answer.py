"""What `study best` says before and after confirmation, from a tiny study that was trained."""

import io
import json
from dataclasses import replace

import pytest
from crew import PROGRAM, make_study, train_here
from rich.console import Console

from droptune import answer
from droptune.cli import panel
from droptune.errors import DroptuneError
from droptune.report.report import html, markdown, text
from droptune.storage import Storage
from droptune.study import Study
from droptune.training import State


def shown(drawn):
    console = Console(width=100, file=io.StringIO())
    console.print(drawn)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer")
    storage = Storage.open(f"sqlite:///{folder}/droptune.db", create=True)
    half = PROGRAM.replace("Dropout(0.2)", "Dropout(0.5)")
    study = make_study(storage, folder, program=half, baselines="{trials: 2}")
    with pytest.raises(DroptuneError, match="no completed trial yet; see `droptune study show"):
        answer.text(study)
    study.reconfigure(confirm=replace(study.spec.confirm, enabled=False))
    train_here(study, folder)
    study = Study.open(storage, study.name)
    unconfirmed = {
        "text": answer.text(study),
        "json": answer.to_json(study),
        "code": answer.code(study),
        "panel": shown(panel.panel(study)),
    }
    study.confirm(top=1, max_seeds=3, ablate=False)
    train_here(study, folder)
    return Study.open(storage, study.name), unconfirmed


def test_before_confirmation_the_values_are_the_searchs(study):
    text = study[1]["text"]
    assert "NOT CONFIRMED" in text
    assert "of the search, one training each" in text
    assert "confirmed: means" not in text


def test_before_confirmation_all_speak_of_the_same_trials(study):
    study, said = study
    verdict = said["json"]["verdict"]
    chosen, found = verdict["recommended"], study.trial(verdict["leading"]["winner"])
    assert said["json"]["best"]["trial"] == chosen["trial"]
    assert f"recommended ({chosen['reason']}):" in said["text"]
    assert f"# recommended: {chosen['reason']}" in said["code"]
    row = next(line for line in said["text"].splitlines() if line.startswith("dropout found"))
    assert row.split()[2] == str(found.training.number)
    assert f"dropout found ({found.training.name})" in said["panel"]
    assert f"{found.value:.5g}" in said["panel"]


def test_after_it_they_are_means_over_fresh_seeds(study):
    study, _ = study
    text = answer.text(study)
    assert "confirmed: means over fresh seeds" in text
    assert "of the search, one training each" not in text
    verdict = study.verdict()
    found = {one.label: one for one in answer.confirmed(study)}
    assert next(iter(found)) == "dropout found"
    for one in verdict["comparisons"]:
        member = found[one["against"]]
        assert member.seeds == len(one["seeds"])
        assert member.means["test/nll"] == pytest.approx(one["theirs"])
    assert verdict["sentence"] in text
    row = next(line for line in text.splitlines() if line.startswith("none "))
    assert row.split()[-4:] == [
        f"{found['none'].means[key]:.4f}"
        for key in ("val/nll", "test/nll", "test/accuracy", "test/ece")
    ]


def test_equal_baselines_are_said_to_be(study):
    study, _ = study
    assert "no row for half: its rates are the same as those of author here" in answer.text(study)
    assert json.loads(json.dumps(answer.to_json(study)))["merged_baselines"] == {"half": "author"}


def test_json_says_which_values_are_confirmed(study):
    study, _ = study
    found = answer.to_json(study)
    assert [one["seeds"] for one in found["confirmed"]] == [
        one.seeds for one in answer.confirmed(study)
    ]
    assert found["best"]["value"] == study.progress().best.value
    json.dumps(found, allow_nan=False)


def test_a_pruned_training_says_how_far_it_got_and_when_that_was_decided(study):
    study, _ = study
    record = study.trial(3)
    reason = "pruned at interval 2: predicted 0.29 ± 0.07, best 0.098"
    ended = replace(record, state=State.PRUNED, reason=reason, values=None)
    line = panel.event(study, ended)
    assert line.startswith(f"{record.training.name}: pruned, 4 of 4 intervals, lr ")
    assert "decided at interval 2: predicted 0.29" in line


def test_several_objectives_have_a_front_and_the_verdict_names_its_own(tmp_path):
    storage = Storage.open(f"sqlite:///{tmp_path}/droptune.db", create=True)
    study = make_study(storage, tmp_path, objective="[nll, accuracy]", baselines="{trials: 2}")
    train_here(study, tmp_path)
    study = Study.open(storage, study.name)
    said, found = answer.text(study), answer.to_json(study)["front"]
    assert "the verdict is about NLL, the first objective" in said
    assert "Pareto front of val/nll and val/accuracy" in said
    assert found[0]["trial"] == study.progress().best.training.number
    values = [(one["values"]["val/nll"], one["values"]["val/accuracy"]) for one in found]
    assert values == sorted(values)
    assert "Pareto front of val/nll and val/accuracy:" in shown(panel.panel(study))
    for write in (html, markdown, text):
        assert "several objectives" in write(study.evidence(), study.judge()).lower()
