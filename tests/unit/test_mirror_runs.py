"""What a training looks like in MLflow, where MLflow is, what its errors mean."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from crew import make_study
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from droptune.cli import running
from droptune.cli.mirror import app as mirror_app
from droptune.errors import UsageError
from droptune.mirror import MirroredStudy, Tracking, note, opening, runs, views
from droptune.mirror import SyncResult as Done
from droptune.mirror.answer import Answer, baselines
from droptune.mirror.links import Link
from droptune.mirror.parent import clean_path
from droptune.mirror.server import Server
from droptune.mirror.sync import Mirror
from droptune.mirror.tracking import Away, Missing, Refused, Rejected, plain_errors, redact
from droptune.progress import measure
from droptune.spec.objective import Objective
from droptune.storage import Storage
from droptune.training import Assignment, Record, Seeds, State, Training, TrainingKind

NLL = Objective("nll")
ACCURACY = Objective("accuracy")
START = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
MS = runs.milliseconds(START)
STUDY = MirroredStudy(id=1, name="digits", uuid="u", objectives=(NLL,))


def record(
    number=17,
    state=State.COMPLETE,
    curve=(0.5, 0.4, 0.45),
    *,
    kind=TrainingKind.SEARCH,
    label="",
    rates=None,
    value=None,
):
    assignment = Assignment(rates or {"fc1": 0.12345, "fc2": 0.0}, 1.8329999796e-5, {"l1": 2e-7})
    training = Training(
        id=number + 1,
        study_id=1,
        kind=kind,
        number=number if kind.is_trial else None,
        label=label,
        assignment=assignment,
        seeds=Seeds(1, 2, 3),
        seed_index=None if kind.is_trial else 2,
        intervals=len(curve),
        attempt=1,
        lease_epoch=1,
    )
    done = state is State.COMPLETE
    return Record(
        training,
        state,
        curves={
            "train/loss": curve,
            "val/nll": curve,
            "val/accuracy": tuple(1 - x for x in curve),
            "time/seconds": (1.25,) * len(curve),
        },
        values=(curve[-1] if value is None else value,) if done else None,
        best_interval=2 if done else None,
        started=START,
        ended=START + timedelta(seconds=9) if state.finished else None,
        worker="host:1",
    )


# -- a run ------------------------------------------------------------------------------------


def test_params_are_short_strings():
    assert runs.params(record().training.assignment) == {
        "lr": "1.833e-05",
        "dropout_mean": "0.0617",
        "schedule": "constant",
        "l1": "2e-07",
        "dropout/fc1": "0.1235",
        "dropout/fc2": "0.0000",
    }


def test_tags_tell_whose_run_it_is_and_how_it_ended():
    tags = runs.tags(record(), study_name="digits", study_uuid="u", device="cuda:0")
    assert tags["droptune.uid"] == "u/18/1"
    assert (tags["droptune.state"], tags["droptune.role"]) == ("COMPLETE", "trial")
    assert (tags["droptune.worker"], tags["droptune.device"]) == ("host:1", "cuda:0")
    assert "droptune.label" not in tags


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (State.RUNNING, "RUNNING"),
        (State.QUEUED, "RUNNING"),
        (State.COMPLETE, "FINISHED"),
        (State.PRUNED, "FINISHED"),
        (State.FAIL, "FAILED"),
    ],
)
def test_pruned_is_not_shown_as_broken(state, status):
    assert runs.status(state) == status


def test_colours_tell_baselines_pruned_and_failed_apart():
    shown = {
        runs.colour(kind, state)
        for kind in (TrainingKind.SEARCH, TrainingKind.BASELINE, TrainingKind.CONFIRMATION)
        for state in (State.COMPLETE, State.PRUNED, State.FAIL)
    }
    assert len(shown) == 5


def test_points_have_the_objective_first_and_the_training_s_own_clock():
    points = list(runs.curve_points(record(), (NLL,), started=MS, after=0))
    assert [p.key for p in points[:4]] == ["val/nll", "val/accuracy", "train/loss", "time/seconds"]
    assert [(p.step, p.time - MS) for p in points[::4]] == [(1, 1250), (2, 2500), (3, 3750)]


def test_points_after_a_watermark_are_the_rest():
    every = list(runs.curve_points(record(), (NLL,), started=MS, after=0))
    rest = list(runs.curve_points(record(), (NLL,), started=MS, after=2))
    assert rest == every[8:]


def test_the_end_of_a_complete_training():
    found = {p.key: p.value for p in runs.final_points(record(), (NLL,), time=5)}
    assert found == {
        "objective": 0.45,
        "best/interval": 2,
        "best/nll": 0.4,
        "best/accuracy": 0.6,
    }


def test_the_end_of_a_pruned_training_has_no_objective():
    points = list(runs.final_points(record(state=State.PRUNED), (NLL,), time=5))
    assert points == [runs.Point("pruned_at", 3.0, 5, 0)]


def test_test_scores_are_written_once_at_the_end():
    done = record()
    done.curves["test/nll"] = (math.nan, math.nan, 0.7)
    assert not [p for p in runs.curve_points(done, (NLL,), started=MS, after=0) if "test" in p.key]
    assert runs.Point("test/nll", 0.7, 5, 3) in list(runs.final_points(done, (NLL,), time=5))


def test_several_objectives_are_told_apart():
    two = record()
    object.__setattr__(two, "values", (0.45, 0.6))
    found = {p.key: p.value for p in runs.final_points(two, (NLL, ACCURACY), time=5)}
    assert found["objective"] == found["objective/val/nll"] == 0.45
    assert found["objective/val/accuracy"] == 0.6


@settings(deadline=None)  # the first example imports MLflow
@given(st.lists(st.text(max_size=300), max_size=20))
def test_keys_are_what_mlflow_takes_and_stay_different(keys):
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    cleaned = runs.clean_keys(keys)
    assert len(set(cleaned)) == len(keys)
    for key in cleaned:
        _validate_metric_name(key)
        _validate_param_name(key)


def test_indexed_sites_keep_readable_names():
    assert runs.clean_keys(["dropout/blocks[0].drop", "dropout/blocks.0.drop"]) == [
        "dropout/blocks.0.drop",
        "dropout/blocks.0.drop-2",
    ]
    assert runs.renamed(["a[0]", "b"]) == {"a[0]": "a.0"}


@given(st.text(max_size=80))
def test_artifact_paths_stay_inside(path):
    cleaned = Path("/run", clean_path(path))
    assert cleaned.resolve().is_relative_to("/run")
    assert len(cleaned.parts) > 2


def test_gain_is_measured_against_the_best_baseline_when_all_are_finished():
    found = [
        record(1, kind=TrainingKind.BASELINE, label="none", rates={"fc1": 0.0}, value=0.5),
        record(2, kind=TrainingKind.BASELINE, label="half", rates={"fc1": 0.5}, value=0.4),
        record(3, value=0.3),
    ]
    reference = runs.reference_of(found, NLL)
    assert reference.value == 0.4
    (point,) = runs.gain_points(found[2], NLL, reference, time=0)
    assert point.value == pytest.approx(0.1)
    assert runs.gain_points(record(state=State.PRUNED), NLL, reference, time=0)
    waiting = record(4, State.QUEUED, kind=TrainingKind.BASELINE, label="author")
    assert runs.reference_of([*found, waiting], NLL) is None


def test_a_search_trial_with_a_baselines_rates_counts_for_it_in_mlflow_too():
    none = {"fc1": 0.0, "fc2": 0.0}
    found = [
        record(1, kind=TrainingKind.BASELINE, label="none", rates=none, value=0.5),
        record(2, value=0.3),
        replace(record(3, rates=none, value=0.4), ended=START + timedelta(hours=1)),
    ]
    assert baselines(found, NLL) == {"none": found[2]}
    assert baselines(found, NLL) == measure(found, "minimize", 9, START).baselines
    assert runs.reference_of(found, NLL) == runs.Reference(0.4, MS + 3600 * 1000)


def test_the_best_is_never_a_nan_and_the_first_of_equals():
    found = [record(1, value=math.nan), record(2, value=0.3), record(3, value=0.3)]
    assert runs.best_of(found, NLL).training.number == 2
    assert runs.best_of(found[:1], NLL) is None


def test_a_link_covers_what_has_arrived():
    done = record()
    link = Link.begin(done, START)
    assert not link.covers(done, None)
    arrived = Link(18, 1, MS, run_id="r", intervals=3, state="COMPLETE")
    assert arrived.covers(done, None)
    assert not arrived.covers(done, runs.Reference(0.4, 0))
    assert Link.from_json(json.loads(json.dumps(arrived.to_json()))) == arrived


# -- the study's run ---------------------------------------------------------------------------


def test_the_first_line_says_not_confirmed_until_it_is():
    found = [
        record(1, kind=TrainingKind.BASELINE, label="none", rates={"fc1": 0.0}, value=0.5),
        record(2, value=0.4),
    ]
    first = note.note(STUDY, found, Answer()).splitlines()[0]
    expected = "**digits: NOT CONFIRMED · best val/nll 0.4 (trial 0002) against none 0.5**"
    assert first == expected
    verdict = {"confirmed": True, "sentence": "rates beat no dropout by 0.1"}
    said = Answer.of(verdict, done=False)
    confirmed = note.note(STUDY, found, said).splitlines()[0]
    assert confirmed == "**digits: rates beat no dropout by 0.1**"
    assert "no completed trial" in note.note(STUDY, [], Answer())


def test_a_study_that_is_done_says_what_its_search_says_without_confirmation():
    assignment = {"rates": {"fc1": 0.0}, "lr": 0.001, "values": {}}
    verdict = {
        "confirmed": False,
        "sentence": "NOT CONFIRMED: the leading trial",
        "recommended": {"assignment": assignment, "reason": "no dropout leads; not confirmed"},
    }
    found = [record(2, value=0.4, rates={"fc1": 0.7})]
    text = note.note(STUDY, found, Answer.of(verdict, done=True))
    assert text.startswith("**digits: NOT CONFIRMED: the leading trial**")
    assert "Recommended: no dropout leads; not confirmed" in text
    assert "| `fc1` | 0.000 |" in text
    assert Answer.of(verdict, done=True).champion(found, NLL) is None
    assert Answer.of(verdict, done=False) == Answer()  # it is searched again: no longer true


def test_saved_views_fit_into_a_tag_however_many_sites_there_are():
    rates = {f"transformer.encoder.layers.{i}.attention.dropout": i / 200 for i in range(120)}
    found = [record(i, rates={p: (r + i / 9) % 1 for p, r in rates.items()}) for i in range(8)]
    tags = views.experiment_tags(STUDY, found, "digits: better " * 100)
    assert len(tags) == 2
    for value in tags.values():
        assert len(value) < 20_000
        assert json.loads(json.loads(value)["state"])["orderByKey"] == "metrics.`objective`"


def test_the_answer_stands_above_the_charts_and_losses_have_a_logarithmic_axis():
    curves = {"val/nll": [2.0, 0.1], "val/accuracy": [0.2, 0.9], "train/loss": [2.0, -1.0]}
    found = [replace(record(1), curves=curves)]
    tags = views.experiment_tags(STUDY, found, "digits: no difference")
    state = json.loads(json.loads(tags[_tag(views.CHARTS)])["state"])
    assert [section["name"] for section in state["compareRunSections"]] == ["digits: no difference"]
    scales = {c["metricKey"]: c["scaleType"] for c in state["compareRunCharts"] if "scaleType" in c}
    assert scales == {"val/nll": "log", "val/accuracy": "linear", "train/loss": "linear"}


def test_columns_of_the_leaderboard_are_in_order_and_wide_enough_for_their_titles():
    found = [record(i, rates={"encoder.layers.0.attention": i / 9}) for i in range(4)]
    tags = views.experiment_tags(STUDY, found, "digits")
    state = json.loads(json.loads(tags[_tag(views.LEADERBOARD)])["state"])
    assert state["columnOrder"] == state["selectedColumns"]
    assert state["columnOrder"][0] == "metrics.`objective`"
    widths = state["columnWidths"]
    assert widths["params.`lr`"] < widths["params.`dropout/encoder.layers.0.attention`"]


def _tag(view):
    return f"mlflow.sharedViewState.{views.view_id(STUDY, view)}"


def test_the_study_s_run_has_no_metrics_before_there_is_an_objective():
    assert note.summary(STUDY, [record(1, state=State.PRUNED)]) == {}
    assert next(iter(note.summary(STUDY, [record(1)]))) == "objective"


def test_the_site_that_matters_comes_first():
    found = [
        record(i, rates={"idle": (i * 7 % 11) / 20, "matters": i / 20}, value=(i / 20 - 0.3) ** 2)
        for i in range(1, 14)
    ]
    assert views.important_rates(found, NLL) == ["dropout/matters", "dropout/idle"]


@pytest.mark.parametrize(
    ("version", "key"),
    [("3.17.2", "viewStateShareKey="), ("4.0.0", "orderByKey="), ("", "orderBy")],
)
def test_links_fall_back_to_a_sorted_list(version, key):
    link = views.link(
        STUDY, views.LEADERBOARD, base="http://h:1/", experiment_id="5", version=version
    )
    assert link.startswith("http://h:1/#/experiments/5/runs?workflowType=machine_learning&")
    assert key in link


# -- where MLflow is -----------------------------------------------------------------------------


def test_without_configuration_mlflow_is_beside_the_database(tmp_path):
    found = Tracking.resolve(None, f"sqlite:///{tmp_path / 'droptune.db'}")
    assert found.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert (
        found.artifact_location("droptune/a b") == (tmp_path / "mlartifacts/droptune-a-b").as_uri()
    )


def test_without_a_file_it_is_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Tracking.resolve(None, "postgresql://db/droptune")
    assert found.database == tmp_path / "mlflow.db"


def test_drivers_that_droptune_installs_are_used():
    assert Tracking.resolve("postgresql://u@h/m", "").uri == "postgresql+psycopg://u@h/m"
    assert Tracking.resolve("mysql://u@h/m", "").uri == "mysql+pymysql://u@h/m"
    assert Tracking.resolve("mariadb://u:[@h/m", "").uri == "mysql+pymysql://u:%5B@h/m"
    assert Tracking.resolve("mariadb+pymysql://u@h/m", "").uri == "mysql+pymysql://u@h/m"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("./mlruns", "file store"),
        ("file:///tmp/mlruns", "file store"),
        ("sqlite://", "no file"),
        ("http://me:pw@host:5000", r"http://\*\*\*@host.*MLFLOW_TRACKING_USERNAME"),
        ("oracle://me:pw@host/db", r"'oracle://\*\*\*@host/db' cannot be used"),
        ("mysql:me:p/pw@host/db?password=pw", r"'mysql:\*\*\*@host/db.*' cannot be used"),
        ("mysql://me:p/pw@host:port/db", r"'mysql://\*\*\*@host:port/db' is not a database URL"),
        ("sqlite:////tmp/x/droptune.db", "alembic_version"),
    ],
)
def test_addresses_that_cannot_work_are_refused(given, words):
    with pytest.raises(UsageError, match=words) as refused:
        Tracking.resolve(given, "sqlite:////tmp/x/droptune.db")
    assert "pw" not in str(refused.value)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("postgresql", "another database .* or another schema"), ("mariadb", "another database")],
)
def test_the_studies_database_is_refused_before_anything_is_written(monkeypatch, scheme, words):
    """By the companion of a worker too, which is the command `mirror sync --follow`."""
    studies, given = f"{scheme}://me:pw@localhost/d", f"{scheme}://other:pw@127.0.0.1/d"
    with pytest.raises(UsageError, match=f"alembic_version.*{words}") as refused:
        Tracking.resolve(given, studies)
    assert "pw" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert Tracking.resolve(f"{scheme}://me@localhost:1/d", studies).uri
    monkeypatch.setenv("DROPTUNE_STORAGE", studies)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    followed = CliRunner().invoke(mirror_app, ["sync", "--follow", "--until-input-closes"])
    assert str(followed.exception) == str(refused.value)


@pytest.mark.parametrize("password", ["secret", "sec/ret", "sec@ret"])
def test_passwords_are_not_shown(password):
    shown = redact(f"x postgresql://me:{password}@host/db y")
    assert shown == "x postgresql://me:***@host/db y"
    assert redact("mysql://h/d?password=secret&a=b") == "mysql://h/d?password=***&a=b"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        ({"code": "UNAUTHENTICATED"}, Refused, "MLFLOW_TRACKING_USERNAME"),
        ({"code": "PERMISSION_DENIED"}, Refused, "EDIT permission"),
        ({"message": "error code 403: Invalid Host header"}, Refused, "--allowed"),
        ({"code": "RESOURCE_DOES_NOT_EXIST"}, Missing, "?"),
        ({"code": "INVALID_PARAMETER_VALUE"}, Rejected, "?"),
        ({"message": "CERTIFICATE_VERIFY_FAILED"}, Away, "SERVER_CERT_PATH"),
        ({"message": "SSLError WRONG_VERSION"}, Away, "http://"),
        ({"message": "NameResolutionError"}, Away, "no such host"),
        ({"message": "Connection refused"}, Away, "nobody listens"),
        ({"message": "Read timed out"}, Away, "in time"),
        ({"message": "Bad gateway\nhtml"}, Away, "Bad gateway html"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(error, kind, words):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    code = ErrorCode.Value(error.get("code", "INTERNAL_ERROR"))
    raised = MlflowException(error.get("message", "?"), error_code=code)
    with pytest.raises(kind) as caught, plain_errors(Tracking("mysql+pymysql://u:pw@host/m")):
        raise raised
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pw" not in str(caught.value)


def test_the_server_gets_its_database_by_the_environment(tmp_path):
    tracking = Tracking.resolve(f"sqlite:///{tmp_path / 'mlflow.db'}", "")
    server = Server(tracking, host="0.0.0.0", port=1234, allowed_hosts=("gpu-1",))
    command = " ".join(server.command())
    assert "--workers 1 --host 0.0.0.0 --port 1234" in command
    assert "gpu-1,gpu-1:*" in command
    assert str(tmp_path / "mlflow.db") not in command
    assert server.environment()["MLFLOW_BACKEND_STORE_URI"] == tracking.uri
    assert server.environment()["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    with pytest.raises(UsageError, match="is a server already"):
        Server(Tracking("http://h:1"))


@pytest.mark.parametrize(
    ("results", "rounds", "said"),
    [
        ([Done(True, reason="503"), Done(True, reason="503"), Done(True)], 3, ""),
        ([Done(True, reason="401", refused=True)], 1, "MLflow is behind (401)"),
        ([Done(True, reason="503")] * 20, 6, "MLflow is behind (503)"),
        ([Done(False)], 1, "another process is writing"),
    ],
)
def test_a_server_away_for_a_moment_is_asked_again(monkeypatch, capsys, results, rounds, said):
    now, left = [0.0], list(results)
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)
    )
    monkeypatch.setattr(running, "time", clock)
    mirror = SimpleNamespace(sync_once=lambda refresh: left.pop(0), release=lambda: None)
    monkeypatch.setattr(opening, "open_mirror", lambda *given: mirror)
    study, where = SimpleNamespace(name="digits"), SimpleNamespace(redacted="http://mlflow")
    running.finish_mirror(study, where, Path())
    assert len(results) - len(left) == rounds
    assert now[0] <= running.PATIENCE_SECONDS
    _, *rest = capsys.readouterr().out.splitlines()
    assert "\n".join(rest).startswith(said)
    assert bool(rest) == bool(said)


def test_the_mirror_imports_mlflow_only_when_it_writes():
    code = "import sys, droptune.mirror, droptune.cli.mirror; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"mlflow", "torch", "optuna"} & set(done.stdout.split())


def test_where_the_project_lies_is_not_told_to_mlflow(tmp_path):
    storage = Storage.open(f"sqlite:///{tmp_path}/droptune.db", create=True)
    row = make_study(storage, tmp_path, name="placed").row
    assert row.meta["root"] == str(tmp_path)
    shown = MirroredStudy.of(row)
    assert "root" not in json.loads(note.files(shown, [])["study/environment.json"])
    assert not [value for value in note.settings(shown).values() if str(tmp_path) in value]


def test_who_lost_the_lease_leaves_the_others_state_alone(tmp_path):
    storage = Storage.open(f"sqlite:///{tmp_path}/droptune.db", create=True)
    study = make_study(storage, tmp_path)
    mirror = Mirror(storage, study.name, Tracking("http://127.0.0.1:1"))
    storage.put_mirror_state(study.row.id, {"run": "another's"})
    mirror._tell("MLflow is away")
    assert storage.mirror_state(study.row.id) == {"run": "another's"}
    assert mirror._lease.take()
    mirror._tell("MLflow is away")
    assert storage.mirror_state(study.row.id)["reason"] == "MLflow is away"
