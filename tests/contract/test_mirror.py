"""What the mirror promises: every run and point exactly once, whatever happens in between.

Each promise is kept against a database that the mirror writes itself and against a server.
"""

from __future__ import annotations

import pytest
from mirrored import Trainings, copy_database, create, differences, serving

from droptune.errors import DroptuneError, UsageError
from droptune.mirror import Mirror, Tracking, set_aside
from droptune.mirror.server import Server
from droptune.storage import Budget, Storage
from droptune.training import Measurement, NewTraining, State, TrainingKind

pytestmark = pytest.mark.databases("sqlite")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """An MLflow database with its tables: creating them takes seconds."""
    path = tmp_path_factory.mktemp("prepared") / "mlflow.db"
    Tracking.resolve(f"sqlite:///{path}", "").connect()
    return path


@pytest.fixture(params=["database", "server"])
def tracking(request, tmp_path):
    if request.param == "server":
        server: Server = request.getfixturevalue("server")
        return Tracking.resolve(server.address, "")
    prepared = request.getfixturevalue("prepared")
    copy_database(prepared, tmp_path / "mlflow.db")
    return Tracking.resolve(f"sqlite:///{tmp_path / 'mlflow.db'}", "")


@pytest.fixture
def store(tmp_path):
    return Storage.open(f"sqlite:///{tmp_path / 'droptune.db'}", create=True)


@pytest.fixture
def name(request):
    """A study of its own for each test: the server is shared."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)[:80]


def test_every_run_and_point_is_there_once(store, tracking, name):
    create(store, name)
    Trainings(store, name).run(12)
    result = Mirror(store, name, tracking).sync_once(refresh=True)
    assert result.complete
    assert result.trainings == 12
    assert differences(store, name, tracking) == []


def test_a_second_round_writes_nothing(store, tracking, name):
    create(store, name)
    Trainings(store, name).run(4)
    mirror = Mirror(store, name, tracking)
    mirror.sync_once(refresh=True)
    again = mirror.sync_once(refresh=True)
    assert (again.trainings, again.points) == (0, 0)
    assert differences(store, name, tracking) == []


def test_curves_grow_while_trainings_run(store, tracking, name):
    create(store, name)
    worker = Trainings(store, name)
    mirror = Mirror(store, name, tracking)
    running = worker.claim(2)
    for first in (1, 3, 5):
        worker.measure(running, first, first + 1)
        assert mirror.sync_once().complete
        assert differences(store, name, tracking) == []
    worker.complete(running)
    mirror.sync_once()
    assert differences(store, name, tracking) == []


def test_gain_waits_for_the_baselines_and_is_then_there_for_all(store, tracking, name):
    create(store, name)
    worker = Trainings(store, name)
    mirror = Mirror(store, name, tracking)
    worker.run(4)
    mirror.sync_once()
    assert all("gain" not in run.data.metrics for run in children(store, tracking, name))
    worker.run(8)
    mirror.sync_once()
    assert differences(store, name, tracking) == []
    gains = [r.data.metrics["gain"] for r in children(store, tracking, name, "COMPLETE")]
    assert min(gains[:6]) < 0 <= max(gains)


def test_gain_waits_for_no_baseline_that_a_lower_budget_took_back(store, tracking, name):
    row = create(store, name)
    mirror = Mirror(store, name, tracking)
    Trainings(store, name).run(4)
    mirror.sync_once()
    store.update_study(row.id, budget=Budget(trials=4))
    mirror.sync_once()
    assert differences(store, name, tracking) == []
    assert all("gain" in run.data.metrics for run in children(store, tracking, name, "COMPLETE"))


def test_a_new_attempt_replaces_its_run(store, tracking, name):
    create(store, name)
    worker = Trainings(store, name)
    mirror = Mirror(store, name, tracking)
    (training,) = worker.claim(1)
    worker.measure([training], 1, 4)
    mirror.sync_once()
    again = store.restart(training)
    worker.measure([again], 1, 2)
    mirror.sync_once()
    assert differences(store, name, tracking) == []
    worker.measure([again], 3, 6)
    worker.complete([again])
    mirror.sync_once()
    assert differences(store, name, tracking) == []


def test_a_released_training_goes_on_in_its_run(store, tracking, name):
    create(store, name)
    worker = Trainings(store, name)
    mirror = Mirror(store, name, tracking)
    (training,) = worker.claim(1)
    worker.measure([training], 1, 3)
    mirror.sync_once()
    store.release([training])
    mirror.sync_once()
    (run,) = children(store, tracking, name)
    assert (run.info.status, run.data.tags["droptune.state"]) == ("RUNNING", "QUEUED")
    (again,) = worker.claim(1)
    worker.measure([again], 2, 6)  # from a checkpoint: interval 2 and 3 keep their first values
    worker.complete([again])
    mirror.sync_once()
    assert differences(store, name, tracking) == []


def test_confirmations_stand_beside_trials(store, tracking, name):
    row = create(store, name)
    worker = Trainings(store, name)
    best = worker.run(6)[0].assignment
    kind = TrainingKind.CONFIRMATION
    store.enqueue(row.id, [NewTraining(kind, best, "none", seed_index=i) for i in (0, 1)])
    worker.run(2)
    Mirror(store, name, tracking).sync_once(refresh=True)
    assert differences(store, name, tracking) == []
    roles = {r.info.run_name: r.data.tags["droptune.role"] for r in children(store, tracking, name)}
    assert roles["confirm none s1"] == "confirmation"
    assert roles["baseline none 0000"] == "trial"


def test_the_next_syncer_goes_on_where_the_last_one_died(store, tracking, name):
    create(store, name)
    worker = Trainings(store, name)
    worker.run(5)
    first = Mirror(store, name, tracking, lease_seconds=0.5)
    first.sync_once()
    worker.run(5)
    second = Mirror(store, name, tracking)
    while not (result := second.sync_once()).holder:
        pass
    assert result.trainings == 10  # 5 new ones, and the gain of the old ones
    assert differences(store, name, tracking) == []


def test_only_one_holds_the_lease(store, tracking, name):
    create(store, name)
    Trainings(store, name).run(2)
    holder, other = (Mirror(store, name, tracking) for _ in range(2))
    assert holder.sync_once().complete
    assert not other.sync_once().holder
    holder.release()
    assert other.sync_once().holder


@pytest.mark.parametrize("lost", ["links", "watermarks"])
def test_what_sql_forgot_is_found_again_in_mlflow(store, tracking, name, lost):
    """As after a database was restored from a backup that is older than MLflow's."""
    row = create(store, name)
    Trainings(store, name).run(7)
    Mirror(store, name, tracking).sync_once(refresh=True)
    if lost == "links":
        store.forget_mirror_links(row.id)
    else:
        for id_, link in store.mirror_links(row.id).items():
            kept = {key: link[key] for key in ("training_id", "attempt", "started")}
            store.put_mirror_link(row.id, id_, kept)
    second = Mirror(store, name, tracking)
    store.release_mirror_lease(row.id, _owner(store))
    assert second.sync_once(refresh=True).complete
    assert differences(store, name, tracking) == []


def _owner(store):
    import sqlalchemy as sa

    return store.database.read(
        lambda c: c.execute(sa.text("select owner from droptune_mirrors")).scalar()
    )


def test_rebuild_fills_an_empty_mlflow(store, tracking, name, tmp_path, prepared):
    create(store, name)
    Trainings(store, name).run(8)
    mirror = Mirror(store, name, tracking)
    mirror.sync_once(refresh=True)
    (tmp_path / "other").mkdir()
    copy_database(prepared, tmp_path / "other" / "mlflow.db")
    empty = Tracking.resolve(f"sqlite:///{tmp_path / 'other' / 'mlflow.db'}", "")
    mirror.release()
    moved = Mirror(store, name, empty)
    refused = moved.sync_once()
    assert "does not have this study" in refused.reason
    assert "droptune mirror rebuild" in refused.reason
    assert moved.rebuild().complete
    assert differences(store, name, empty) == []


def test_rebuild_repairs_in_place(store, tracking, name):
    create(store, name)
    Trainings(store, name).run(8)
    mirror = Mirror(store, name, tracking)
    mirror.sync_once(refresh=True)
    client = tracking.connect()
    victims = children(store, tracking, name)
    client.delete_run(victims[0].info.run_id)
    twin = client.create_run(victims[1].info.experiment_id, tags=victims[1].data.tags)
    client.create_run(
        twin.info.experiment_id, tags=twin.data.tags | {"droptune.uid": "of/nothing/1"}
    )
    wrong = " ".join(differences(store, name, tracking))
    assert all(word in wrong for word in ("no run", "2 runs", "of nothing"))
    assert mirror.rebuild().complete
    assert differences(store, name, tracking) == []


def test_what_mlflow_does_not_take_is_set_aside(store, tracking, name):
    create(store, name)
    worker = Trainings(store, name)
    running = worker.claim(3)
    worker.measure(running, 1, 2)
    mirror = Mirror(store, name, tracking)
    mirror.sync_once()
    victim = children(store, tracking, name)[0]
    tracking.connect().delete_run(victim.info.run_id)
    worker.measure(running, 3, 6)
    worker.complete(running)
    result = mirror.sync_once()
    assert len(result.set_aside) == 1
    assert set_aside(store, store.study(name).id) == result.set_aside
    assert "deleted" in next(iter(result.set_aside.values()))
    assert [line for line in differences(store, name, tracking) if "no run" not in line] == []
    assert mirror.sync_once().trainings == 0


def test_a_server_that_is_away_is_a_reason_in_sql(store, name):
    row = create(store, name)
    Trainings(store, name).run(1)
    away = Tracking.resolve("http://127.0.0.1:9", "")
    result = Mirror(store, name, away).sync_once()
    assert result.reason == "MLflow at http://127.0.0.1:9: nobody listens there"
    assert store.mirror_state(row.id)["reason"] == result.reason


def test_artifacts_that_cannot_be_written_hold_up_nothing_else(store, name, tmp_path, prepared):
    row = create(store, name)
    Trainings(store, name).run(7)
    copy_database(prepared, tmp_path / "mlflow.db")
    tracking = Tracking.resolve(f"sqlite:///{tmp_path / 'mlflow.db'}", "")
    (tmp_path / "mlartifacts").write_text("not a folder")
    mirror = Mirror(store, name, tracking)
    reason = mirror.sync_once(refresh=True).reason
    assert reason.startswith(f"MLflow's file {tmp_path / 'mlartifacts'}")
    assert reason.endswith(": Not a directory")
    assert store.mirror_state(row.id)["reason"] == reason
    assert differences(store, name, tracking) == []
    experiment = tracking.connect().get_experiment(store.mirror_state(row.id)["experiment_id"])
    assert sum(key.startswith("mlflow.sharedViewState.") for key in experiment.tags) == 2
    (tmp_path / "mlartifacts").unlink()
    assert mirror.sync_once(refresh=True).complete
    assert store.mirror_state(row.id)["reason"] is None


def test_a_database_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    """What a process leaves that is killed while it makes MLflow's tables stops nobody."""
    from mlflow.store.tracking import sqlalchemy_store

    tracking = Tracking.resolve(f"sqlite:///{tmp_path / 'mlflow.db'}", "")
    with monkeypatch.context() as patch:
        last = "_verify_schema"
        patch.setattr(sqlalchemy_store.mlflow.store.db.utils, last, lambda engine: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tracking.connect()
    assert not (tmp_path / "mlflow.db").exists()
    assert tracking.connect().search_experiments()
    assert not list(tmp_path.glob("*.new*"))


def test_the_parent_shows_what_it_is_given(store, tracking, name):
    row = create(store, name)
    Trainings(store, name).run(7)
    given = {"figures/../curves.svg": b"<svg/>", "report.md": b"# report"}
    mirror = Mirror(store, name, tracking, extras=lambda row, records: given)
    mirror.sync_once(refresh=True)
    state = store.mirror_state(row.id)
    client = tracking.connect()
    run = client.get_run(state["run_id"])
    first = run.data.tags["mlflow.note.content"].splitlines()[0]
    assert first.startswith(f"**{name}: NOT CONFIRMED · best val/nll ")
    paths = {file.path for file in client.list_artifacts(state["run_id"])}
    assert {"figures", "report.md", "study"} <= paths
    store.put_verdict(row.id, {"confirmed": True, "sentence": "no dropout is as good"})
    mirror.sync_once(refresh=True)
    note = client.get_run(state["run_id"]).data.tags["mlflow.note.content"]
    assert note.startswith(f"**{name}: no dropout is as good**\n")


def test_what_the_parent_shows_is_drawn_again_where_something_changed(store, tracking, name):
    row = create(store, name)
    worker, drawn = Trainings(store, name), []

    def draws():
        given = Mirror(store, name, tracking, extras=lambda row, records: drawn.append(1) or {})
        assert given.sync_once(refresh=True).complete
        given.release()
        made = len(drawn)
        drawn.clear()
        return made

    worker.run(7)
    assert [draws(), draws(), draws()] == [1, 0, 0]
    worker.run(1)
    assert [draws(), draws()] == [1, 0]
    store.put_verdict(row.id, {"confirmed": True, "sentence": "no dropout is as good"})
    assert [draws(), draws()] == [1, 0]
    store.update_study(row.id, phase="done")
    assert [draws(), draws()] == [1, 0]
    mirror = Mirror(store, name, tracking, extras=lambda row, records: drawn.append(1) or {})
    assert mirror.rebuild().complete
    assert drawn


def test_studies_of_one_model_can_share_an_experiment(store, tracking, name):
    shared = {"mlflow": {"experiment": f"shared {name}", "registered_model": "weekly"}}
    for week in ("a", "b"):
        create(store, f"{name}-{week}", **shared)
        Trainings(store, f"{name}-{week}").run(2)
        assert Mirror(store, f"{name}-{week}", tracking).sync_once(refresh=True).complete
    found = children(store, tracking, f"{name}-a")
    assert len({run.data.tags["droptune.study"] for run in found}) == 2


def test_values_that_are_not_finite_are_no_points(store, tracking, name):
    create(store, name)
    worker = Trainings(store, name)
    (training,) = worker.claim(1)
    store.record([(training, Measurement(1, {"val/nll": float("nan"), "lr": 0.1}))], ["val/nll"])
    store.record([(training, Measurement(2, {"val/nll": float("inf"), "lr": 0.1}))], ["val/nll"])
    store.finish(training, State.FAIL, reason="diverged")
    Mirror(store, name, tracking).sync_once()
    assert differences(store, name, tracking) == []
    (run,) = children(store, tracking, name)
    assert (run.info.status, set(run.data.metrics)) == ("FAILED", {"lr"})


def children(store, tracking, name, state=None):
    """The study's runs without the parent, in the order of their trainings."""
    client = tracking.connect()
    row = store.study(name)
    found = client.search_runs([store.mirror_state(row.id)["experiment_id"]], max_results=1000)
    kept = [run for run in found if "droptune.training" in run.data.tags]
    kept = [run for run in kept if state in (None, run.data.tags["droptune.state"])]
    return sorted(kept, key=lambda run: int(run.data.tags["droptune.training"]))


def test_a_study_is_mirrored_by_whom_its_file_says(store, tmp_path, monkeypatch, prepared):
    """`worker`: by workers' companions; `external`: only by the command; `none`: by nobody."""
    from typer.testing import CliRunner

    from droptune.cli.mirror import _followed, app

    for mirror in ("worker", "external", "none"):
        create(store, mirror, mlflow={"mirror": mirror})
        Trainings(store, mirror).run(1)
    assert _followed(store, [], companion=True)() == ["worker"]
    assert _followed(store, ["external", "none"], companion=True)() == []
    assert _followed(store, [], companion=False)() == ["worker", "external"]

    copy_database(prepared, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DROPTUNE_STORAGE", f"sqlite:///{tmp_path / 'droptune.db'}")
    synced = CliRunner().invoke(app, ["sync"])
    said = [line for line in synced.stdout.splitlines() if not line.startswith(" ")]
    assert [line.partition(":")[0] for line in said] == ["worker", "external"]
    for command in ("sync", "rebuild"):
        refused = CliRunner().invoke(app, [command, "none"])
        assert isinstance(refused.exception, UsageError)
        assert "mirror: none" in str(refused.exception)


@pytest.mark.parametrize("let_go", [True, False])
def test_a_rebuild_waits_for_the_lease_or_fails(store, tmp_path, monkeypatch, prepared, let_go):
    """That of a killed process runs out; a living one's does not."""
    from typer.testing import CliRunner

    from droptune.cli import mirror

    copy_database(prepared, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DROPTUNE_STORAGE", f"sqlite:///{tmp_path / 'droptune.db'}")
    row = create(store, "study")
    Trainings(store, "study").run(1)
    assert store.acquire_mirror_lease(row.id, "another", 2.0 if let_go else 60.0)
    synced = CliRunner().invoke(mirror.app, ["sync", "study"])
    assert (synced.exit_code, synced.stdout) == (0, "study: another process is mirroring it\n")
    monkeypatch.setattr(mirror, "_LEASE_PATIENCE_SECONDS", 30.0 if let_go else 0.0)
    rebuilt = CliRunner().invoke(mirror.app, ["rebuild", "study"])
    if let_go:
        assert (rebuilt.exit_code, rebuilt.exception) == (0, None)
        assert rebuilt.stdout.startswith("study: 1 trainings")
    else:
        assert isinstance(rebuilt.exception, DroptuneError)
        assert "stop its workers first, or try again" in str(rebuilt.exception)
