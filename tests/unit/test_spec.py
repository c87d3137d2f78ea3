"""Study files: reading, faults in one line, round trips, changes."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from droptune.errors import SpecError
from droptune.spec.sections import PRUNERS, SAMPLERS
from droptune.spec.spec import Objective, StudySpec, json_schema

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
PLAIN = {"name": "x", "program": "x.py"}


def spec(**changes):
    return StudySpec.parse({**PLAIN, **changes})


def program(**changes):
    given = {
        "task": "classification",
        "epochs": 20,
        "batch_size": 10,
        "interval_updates": None,
        "metric_names": ("nll", "accuracy"),
    }
    return SimpleNamespace(**{**given, **changes})


@pytest.fixture
def write(tmp_path):
    (tmp_path / "droptune.toml").touch()

    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


# --- objectives ---------------------------------------------------------------------------


def test_directions_follow_from_the_metric():
    assert Objective("nll").direction == "minimize"
    assert Objective("accuracy").direction == "maximize"
    assert Objective("own", direction="maximize").direction == "maximize"
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        Objective("acuracy")
    with pytest.raises(ValueError, match="there to minimize"):
        Objective("nll", direction="maximize")


def test_keys_of_measurements():
    assert Objective("nll").key == "val/nll"
    assert Objective("seconds").key == "time/seconds"


@pytest.mark.parametrize(
    ("objective", "curve", "expected"),
    [
        (Objective("nll"), (3.0, 1.0, 2.0), (2.0, 3)),
        (Objective("nll", "best"), (3.0, 1.0, 2.0, 1.0), (1.0, 2)),
        (Objective("accuracy", "best"), (0.1, 0.9, 0.5), (0.9, 2)),
        (Objective("nll", "best"), (float("nan"), 2.0), (2.0, 2)),
    ],
)
def test_values_of_curves(objective, curve, expected):
    assert objective.value(curve) == expected


def test_no_value_without_a_measurement():
    with pytest.raises(ValueError, match="no measurement of val/nll"):
        Objective("nll").value(())


# --- reading ------------------------------------------------------------------------------


def test_defaults(write):
    read = StudySpec.load(write("program: mine.py"))
    assert (read.name, read.program, read.seed) == ("mine", "mine.py", 0)
    assert read.budget.trials == 60
    assert (read.sampler.name, read.pruner.name) == ("auto", "fair")
    assert (read.space.groups, read.space.schedule) == ("auto", ("constant",))
    assert read.baselines.trials == 5
    assert (read.confirm.top, read.confirm.min_seeds, read.confirm.max_seeds) == (3, 3, 10)
    assert (read.experiment, read.registered_model) == ("droptune/mine", "droptune-mine")


def test_everything(write):
    read = StudySpec.load(
        write(
            """
            name: full
            program: ../studies/mine.py:net
            objective: [nll, {metric: own, direction: maximize, take: best}]
            interval: 200 updates
            budget: {device_hours: 2, deadline: 2027-01-01T12:00:00}
            sampler: {name: tpe, n_startup_trials: 20}
            pruner: median
            space:
              rates:
                encoder.*: {high: 0.6, scale: logit}
                kind:attention: {low: 1e-3, high: 3e-1}
              groups: {all: "*", heads: [head.a, head.b]}
              linear_in_depth: blocks.*
              fixed: {stem.drop: 0.1}
              lr: {low: 1e-4, high: 1e-2}
              weight_decay: {low: 1e-5, high: 0.1}
              label_smoothing: {high: 0.3}
              values: {temperature: {low: 1, high: 2, log: true}, steps: [1, 2, 4]}
              schedule: [constant, early]
            insert: [{after: "*.act", kind: channel}, {after: ReLU}]
            training: {trainer: fused, width: 16, clip: 1.0}
            """,
            "files/full.yaml",
        )
    )
    assert read.program == "studies/mine.py:net"
    assert [o.metric for o in read.objectives] == ["nll", "own"]
    assert read.interval_updates == 200
    assert read.budget.trials is None
    assert read.budget.deadline == datetime(2027, 1, 1, 12, tzinfo=UTC)
    assert read.sampler.options == {"n_startup_trials": 20}
    assert read.space.groups == {"all": ("*",), "heads": ("head.a", "head.b")}
    assert read.space.linear_in_depth == ("blocks.*",)
    assert read.space.rates["kind:attention"].low == 1e-3
    assert read.space.values["steps"] == (1, 2, 4)
    assert [i.kind for i in read.insert] == ["channel", "element"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies(path):
    read = StudySpec.load(path)
    assert read.name == path.stem
    assert (path.parent.parent / read.program).is_file()
    assert StudySpec.from_json(read.to_json()) == read
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objectiv": {}}, r"unknown key objectiv \(did you mean 'objective'"),
        (
            {"space": {"rates": {"a.b": {"hihg": 0.5}}}},
            r"space.rates.a.b.hihg \(did you mean 'high'",
        ),
        (
            {"space": {"rates": {"a": {"high": 0.95}}}},
            "space.rates.a.high: .*equal to 0.9, got 0.95",
        ),
        ({"space": {"rates": {"a": {"high": 1.5}}}}, "space.rates.a.high"),
        ({"space": {"rates": {"a": {"low": -0.1}}}}, "space.rates.a.low"),
        ({"space": {"rates": {"a": {"low": 0.5, "high": 0.2}}}}, "low 0.5 must be below high 0.2"),
        ({"space": {"fixed": {"a": 1.0}}}, "space.fixed.a: .*less than 1"),
        (
            {"space": {"batch_size": [16, 32]}},
            "space.batch_size: is not searched, because it changes",
        ),
        ({"space": {"hidden": {}}}, "make a study for each"),
        ({"space": {"optimizer": []}}, "make a study for each optimizer"),
        ({"space": {"schedule": ["up"]}}, "schedule must hold 'constant'"),
        ({"space": {"groups": "atuo"}}, "space.groups: .*got 'atuo'"),
        ({"space": {"values": {"a": {"low": 1, "hgh": 2}}}}, r"a.hgh \(did you mean 'high'"),
        ({"space": {"values": {"a": [1, 1]}}}, "space.values.a: .*two or more different numbers"),
        ({"space": {"values": {"a": [None, 0.5]}}}, "space.values.a: .None, 0.5.: give two"),
        (
            {"space": {"values": {"a": ["no", 1]}}},
            r"words are declared in the program, with searched",
        ),
        (
            {"space": {"values": {"a": {"low": 0, "high": 1, "log": True}}}},
            "must be above 0 on a log",
        ),
        ({"space": {"lr": {"low": 0, "high": 1}}}, "space.lr.low: .*greater than 0"),
        ({"space": {"lr": {"low": 0.1}}}, "space.lr.high is missing"),
        ({"sampler": "tpee"}, r"unknown sampler 'tpee' \(did you mean 'tpe'"),
        ({"pruner": {"name": "fare"}}, r"unknown pruner 'fare' \(did you mean 'fair'"),
        ({"objective": "acuracy"}, r"unknown metric 'acuracy' \(did you mean 'accuracy'"),
        ({"objective": [{"metric": "nll", "tak": "last"}]}, r"tak \(did you mean 'take'"),
        (
            {"objective": ["nll", "acuracy"]},
            r"objective.1: unknown metric 'acuracy' \(did you mean",
        ),
        ({"objective": ["nll", 3]}, "objective.1"),
        ({"objective": ["nll", "nll"]}, "a metric twice"),
        ({"objective": [{"metric": "nll"}, {"metric": "nll"}]}, "a metric twice"),
        ({"interval": "every day"}, "interval: give 'epoch' or 'N updates'"),
        ({"insert": [{"afetr": "x"}]}, "afetr"),
        ({"confirm": {"min_seeds": 5, "max_seeds": 4}}, "min_seeds 5 is above max_seeds 4"),
        ({"training": {"width": 0}}, "training.width: .*got 0"),
        ({"epochs": "many"}, "epochs: .*got 'many'"),
        ({"name": "a b"}, "name: 'a b': a name may hold letters"),
        ({"name": "my 'own' \"one\""}, "name: 'my 'own' \"one\"': a name may hold"),
        ({"mlflow": {"registered_model": "a/b"}}, "mlflow.registered_model: 'a/b': the name of"),
        ({"mlflow": {"mirror": "sometimes"}}, "mlflow.mirror: .*got 'sometimes'"),
    ],
)
def test_faults_are_one_line_with_their_place(given, said):
    with pytest.raises(SpecError, match=said) as caught:
        spec(**given)
    assert "\n" not in str(caught.value)


def test_a_fault_in_a_file_has_its_line(write):
    path = write("program: mine.py\nspace:\n  rates:\n    a: {low: 0,\n        hihg: 0.5}\n")
    with pytest.raises(SpecError, match=r"mine.yaml:5: unknown key space.rates.a.hihg"):
        StudySpec.load(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("program: [", "mine.yaml:1: "),
        ("program: a.py\nprogram: b.py", "mine.yaml:2: 'program' twice"),
        ("", "holds no keys"),
        ("- a", "holds no keys"),
        ("seed: 3", "program is missing"),
        ("program: ../../../mine.py", "lies outside the project"),
        ("program: a.py\nspace: {rates: 3}", "mine.yaml:2: space.rates"),
        ("program: !!python/object:os.system {}", "mine.yaml:1: could not determine a constructor"),
    ],
)
def test_files_that_cannot_be_read(write, text, said):
    with pytest.raises(SpecError, match=said) as caught:
        StudySpec.load(write(text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_has_near_names(write):
    path = write("program: x.py")
    with pytest.raises(SpecError, match=r"no study file .*did you mean 'mine.yaml'.*study init"):
        StudySpec.load(path.with_name("mime.yaml"))


# --- what follows -------------------------------------------------------------------------


def test_resolved_takes_what_is_open_from_the_program():
    resolved = spec().resolved(program(interval_updates=50))
    assert resolved.objectives == (Objective("nll"),)
    assert (resolved.epochs, resolved.interval) == (20, "50 updates")
    closed = spec(objective="accuracy", epochs=3, interval="epoch").resolved(program())
    assert (closed.objectives[0].metric, closed.epochs, closed.interval) == ("accuracy", 3, "epoch")
    assert spec().resolved(program(task="regression", metric_names=("rmse",))).objectives == (
        Objective("rmse"),
    )
    assert spec().resolved(program(task="custom", metric_names=("loss",))).objectives == (
        Objective("loss"),
    )


def test_resolved_knows_what_the_program_measures():
    with pytest.raises(SpecError, match="does not measure 'rmse'"):
        spec(objective="rmse").resolved(program())
    with pytest.raises(SpecError, match="choose a metric"):
        spec().resolved(program(task="custom", metric_names=("own",)))
    own = {"metric": "own", "direction": "maximize"}
    assert spec(objective=own).resolved(program(metric_names=("own",))).objectives


@pytest.mark.parametrize(
    ("given", "of_program", "examples", "expected"),
    [
        ({}, {}, 95, 20),
        ({"epochs": 7}, {}, 95, 7),
        ({"interval": "25 updates"}, {}, 95, 8),  # 20 epochs of 10 updates
        ({"interval": 30}, {}, 95, 7),
        ({}, {"interval_updates": 100}, 95, 2),
        ({"interval": "epoch"}, {"interval_updates": 100}, 95, 20),
    ],
)
def test_intervals(given, of_program, examples, expected):
    assert spec(**given).intervals(program(**of_program), examples) == expected


@pytest.mark.parametrize(
    ("budget", "trials"),
    [
        ({}, 60),
        ({"epochs": 45}, 2),
        ({"epochs": 19}, 0),
        ({"epochs": 45, "trials": 1}, 1),
        ({"device_hours": 1}, None),
    ],
)
def test_full_trials_of_a_budget(budget, trials):
    assert spec(epochs=20, budget=budget).full_trials == trials


def test_changes_and_what_may_change():
    one = spec()
    other = spec(seed=3, budget={"trials": 9}, space={"rates": {"a": {"high": 0.5}}})
    assert one.changes(one) == ()
    assert set(one.changes(other)) == {
        "seed",
        "budget.trials",
        "space.rates",
        "space.rates.a.low",
        "space.rates.a.high",
        "space.rates.a.scale",
    }
    assert StudySpec.is_free("budget.trials")
    assert StudySpec.is_free("mlflow.mirror")
    assert not StudySpec.is_free("mlflow.experiment")
    assert not StudySpec.is_free("seed")
    assert StudySpec.is_free("confirm.top")
    assert not StudySpec.is_free("confirm.splits")


def test_renamed():
    assert spec().renamed("y-2").name == "y-2"
    with pytest.raises(SpecError):
        spec().renamed("y 2")


# --- round trips --------------------------------------------------------------------------

rates = st.floats(0, 0.4).flatmap(
    lambda low: st.fixed_dictionaries(
        {"low": st.just(low), "high": st.floats(0.5, 0.9)},
        optional={"scale": st.sampled_from(["linear", "logit", "log"])},
    )
)
words = st.text("abc.*_", min_size=1, max_size=6)
specs = st.fixed_dictionaries(
    {"name": st.from_regex(r"[a-zé0-9_][a-z.\-]{0,9}", fullmatch=True), "program": st.just("a.py")},
    optional={
        "seed": st.integers(0, 2**40),
        "objective": st.sampled_from(
            [
                "nll",
                {"metric": "own", "direction": "minimize"},
                ["nll", "accuracy"],
                ["nll", {"metric": "own", "direction": "minimize"}],
            ]
        ),
        "epochs": st.integers(1, 100),
        "interval": st.one_of(st.just("epoch"), st.integers(1, 999)),
        "budget": st.fixed_dictionaries(
            {},
            optional={
                "trials": st.integers(1, 99),
                "device_hours": st.floats(0.1, 9),
                "deadline": st.datetimes(timezones=st.just(UTC)),
            },
        ),
        "sampler": st.sampled_from([*SAMPLERS, {"name": "tpe", "seed": 3}]),
        "pruner": st.sampled_from(PRUNERS),
        "space": st.fixed_dictionaries(
            {},
            optional={
                "rates": st.dictionaries(words, rates, max_size=3),
                "groups": st.one_of(
                    st.sampled_from(["auto", "none"]), st.dictionaries(words, words, max_size=2)
                ),
                "fixed": st.dictionaries(words, st.floats(0, 0.99), max_size=2),
                "values": st.dictionaries(
                    words,
                    st.one_of(st.just({"low": 0, "high": 1}), st.just([1, 2.5])),
                    max_size=2,
                ),
                "schedule": st.just(["constant", "late"]),
            },
        ),
    },
)


@settings(max_examples=60, deadline=None)
@given(specs)
def test_json_round_trip(content):
    made = StudySpec.parse(content)
    written = json.loads(json.dumps(made.to_json()))
    assert StudySpec.from_json(written) == made
    assert StudySpec.from_json(written).to_json() == written
    assert made.changes(StudySpec.from_json(written)) == ()


@settings(max_examples=30, deadline=None)
@given(specs)
def test_the_schema_allows_what_is_read(content):
    StudySpec.parse(content)
    as_json = json.loads(json.dumps(content, default=lambda moment: moment.isoformat()))
    jsonschema.validate(as_json, json_schema())


def test_the_schema_refuses_unknown_keys():
    validator = jsonschema.Draft202012Validator(json_schema())
    assert not list(validator.iter_errors({"program": "a.py"}))
    assert list(validator.iter_errors({"program": "a.py", "objectiv": "nll"}))
    assert list(validator.iter_errors({"program": "a.py", "space": {"lr": {"low": 1}}}))


def test_neither_torch_nor_optuna_is_imported():
    code = "import sys, droptune.spec.spec, droptune.space.space, droptune.spec.config; "
    code += "import droptune.space.template; "
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "optuna", "sqlalchemy", "mlflow", "typer"} & set(done.stdout.split())
