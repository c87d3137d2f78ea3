"""The search space: groups, ranges, the exact zero, baselines, and the way there and back."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import optuna
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution, json_to_distribution

from droptune.errors import SiteError, SpecError
from droptune.sites.site import Site
from droptune.space.grouping import depth_profile, matches, patterns, suggest_groups
from droptune.space.parameters import ZERO_SHARE, RateParameter, ValueParameter
from droptune.space.space import Space
from droptune.space.template import study_file
from droptune.spec.sections import Baselines
from droptune.spec.spec import StudySpec
from droptune.training import Assignment

KINDS = ("element", "channel", "attention", "recurrent", "path")


def site(path, kind="element", rate=0.1, role=""):
    return Site(path, kind, rate, (2, 4), role=role)


def program(**changes):
    given = {
        "task": "classification",
        "epochs": 20,
        "batch_size": 10,
        "lr": 1e-3,
        "interval_updates": None,
        "searched": {},
        "loss_values": ("label_smoothing",),
        "metric_names": ("nll", "accuracy"),
    }
    return SimpleNamespace(**{**given, **changes})


def study(space=None, **changes):
    return StudySpec.parse({"name": "x", "program": "x.py", "space": space or {}, **changes})


def made(sites, space=None, of_program=None, **changes):
    return Space.of(sites, study(space, **changes), of_program or program())


TWO = (site("fc1.drop", rate=0.2), site("fc2.drop", rate=0.5))


# --- parameters ---------------------------------------------------------------------------


@given(
    st.sampled_from(["linear", "log", "logit"]),
    st.sampled_from([0.0, 0.05, 0.2]),
    st.floats(0.3, 0.9),
    st.floats(0, 1),
)
def test_what_a_sampler_draws_is_a_rate_of_the_range(scale, low, high, share):
    parameter = RateParameter("dropout/x", ("x",), (1.0,), low, high, scale)
    drawn = parameter.sampler_distribution()
    if drawn.log:
        raw = math.exp(math.log(drawn.low) * (1 - share) + math.log(drawn.high) * share)
    else:
        raw = drawn.low * (1 - share) + drawn.high * share
    rate = parameter.from_sampler(min(max(raw, drawn.low), drawn.high))
    assert low <= rate <= high
    again = parameter.to_sampler(rate)
    assert drawn._contains(again)
    assert parameter.from_sampler(again) == pytest.approx(rate, abs=1e-12)
    assert parameter.distribution()._contains(rate)


@pytest.mark.parametrize("scale", ["linear", "logit", "log"])
def test_a_uniform_draw_is_zero_for_a_tenth(scale):
    parameter = RateParameter("dropout/x", ("x",), (1.0,), 0.0, 0.8, scale)
    drawn = parameter.sampler_distribution()
    low, high = (math.log(v) if drawn.log else v for v in (drawn.low, drawn.high))
    raws = [low + (high - low) * (i + 0.5) / 1000 for i in range(1000)]
    zeros = [parameter.from_sampler(math.exp(raw) if drawn.log else raw) == 0 for raw in raws]
    assert sum(zeros) / 1000 == pytest.approx(ZERO_SHARE, abs=0.01)


def test_zero_is_exact_and_stored_as_zero():
    space = made(TWO)
    names = {"dropout/fc1.drop": -0.05, "dropout/fc2.drop": 0.3, "lr": 1e-3}
    assignment = space.assignment(names)
    assert assignment.rates == {"fc1.drop": 0.0, "fc2.drop": 0.3}
    assert space.params(assignment)["dropout/fc1.drop"] == 0.0


def test_no_dead_zone_where_zero_is_not_allowed():
    parameter = RateParameter("dropout/x", ("x",), (1.0,), 0.1, 0.5)
    assert parameter.distribution() == FloatDistribution(0.1, 0.5)
    assert parameter.clamped(0.0) == 0.1


# --- there and back -----------------------------------------------------------------------

paths = st.lists(
    st.from_regex(r"(enc|dec)(\.[0-9]){0,2}\.(drop|attn)[12]?", fullmatch=True),
    min_size=1,
    max_size=14,
    unique=True,
)
sites_of = paths.flatmap(
    lambda names: st.tuples(
        *(
            st.builds(site, st.just(name), st.sampled_from(KINDS), st.sampled_from([0, 0.1, 0.5]))
            for name in names
        )
    )
)
spaces = st.fixed_dictionaries(
    {},
    optional={
        "groups": st.sampled_from(["auto", "none", {"all": "*"}, {"front": "enc*"}]),
        "rates": st.sampled_from([{}, {"*": {"scale": "log"}}, {"*": {"scale": "logit"}}]),
        "fixed": st.sampled_from([{}, {"*.drop*": 0.3}]),
        "weight_decay": st.just({"low": 1e-5, "high": 0.1}),
        "label_smoothing": st.just({"high": 0.3}),
        "schedule": st.sampled_from([["constant"], ["constant", "up"], ["constant", "late"]]),
    },
)


def space_or_none(sites, given_space):
    try:
        return made(sites, given_space)
    except SpecError:
        return None


@settings(max_examples=120, deadline=None)
@given(sites_of, spaces, st.integers(0, 10**6))
def test_params_to_assignment_and_back(sites, given_space, seed):
    space = space_or_none(sites, given_space)
    assume(space is not None)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    raw = search.ask(space.sampler_distributions()).params
    assignment = space.sampled(raw)
    assert list(assignment.rates) == [s.path for s in sites]
    params = space.params(assignment)
    assert space.assignment(params) == assignment
    assert space.params(space.assignment(params)) == params
    assert set(params) == set(space.distributions()) == set(raw)
    for name, distribution in space.distributions().items():
        assert distribution._contains(distribution.to_internal_repr(params[name])), name
    seen = space.sampler_params(assignment)
    for name, distribution in space.sampler_distributions().items():
        assert distribution._contains(distribution.to_internal_repr(seen[name])), name
    for path, rate in space.sampled(seen).rates.items():
        assert rate == pytest.approx(assignment.rates[path], abs=1e-12)
    assert Assignment.from_json(json.loads(json.dumps(assignment.to_json()))) == assignment


@settings(max_examples=80, deadline=None)
@given(sites_of, spaces)
def test_every_baseline_lies_inside(sites, given_space):
    space = space_or_none(sites, given_space)
    assume(space is not None)
    wanted = study().baselines
    for training in space.baselines(wanted):
        for name, (internal, kind) in space.stored(training.assignment).items():
            assert json_to_distribution(kind)._contains(internal), name
    again = Space.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert again.baselines(wanted) == space.baselines(wanted)


# --- ranges -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_site", "high"),
    [
        (site("x"), 0.8),
        (site("x", "channel"), 0.6),
        (site("x", "attention"), 0.5),
        (site("x", "path"), 0.5),
        (site("x", role="input"), 0.5),  # 0.3, but the baseline half needs 0.5
        (site("x", "attention", role="embedding"), 0.5),
        (site("x", "attention", rate=0.7), 0.7),  # the author's rate must be inside
    ],
)
def test_default_ranges(of_site, high):
    (parameter,) = made([of_site]).rates
    assert (parameter.low, parameter.high) == (0.0, high)


def test_an_input_keeps_its_range_without_half():
    (parameter,) = made([site("x", role="input")], baselines={"half": False}).rates
    assert parameter.high == 0.3


def test_the_learning_rate_is_searched_around_the_programs():
    lr = made(TWO, of_program=program(lr=3e-4)).lr
    assert (lr.low, lr.high, lr.log) == (pytest.approx(3e-5), pytest.approx(3e-3), True)
    written = made(TWO, {"lr": {"low": 1e-4, "high": 1e-2}}).lr
    assert (written.low, written.high) == (1e-4, 1e-2)


def test_a_path_counts_before_a_glob_before_a_kind():
    space = made(
        TWO,
        {
            "rates": {
                "fc1.drop": {"high": 0.55},
                "fc*": {"high": 0.65},
                "kind:element": {"high": 0.75, "scale": "log"},
            }
        },
    )
    assert [(p.high, p.scale) for p in space.rates] == [(0.55, "linear"), (0.65, "linear")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rates": {"fc3.drop": {"high": 0.6}}}, r"names no site or group \(did you mean 'fc"),
        ({"rates": {"kind:channel": {"high": 0.6}}}, "names no site or group"),
        ({"rates": {"fc1.drop": {"low": 0.2}}}, r"leaves out the baseline 'none' at 0: widen it"),
        ({"rates": {"fc1.drop": {"high": 0.3}}}, r"leaves out the baseline 'half' at 0.5"),
        ({"rates": {"fc1.drop": {"low": 0.85}}}, "is left with .0.85, 0.8."),
        ({"groups": {"a": "fc9*"}}, r"space.groups.a: 'fc9\*' names no site"),
        ({"groups": {"a": "*", "b": "fc1*"}}, "the sites of 'b' are in groups before it"),
        ({"groups": {"fc2.drop": "fc1*"}}, "'fc2.drop' is a site too"),
        ({"linear_in_depth": "kind:path"}, "space.linear_in_depth: 'kind:path' names no site"),
        ({"fixed": {"fc7": 0.1}}, "space.fixed: 'fc7' names no site"),
        ({"fixed": {"*": 0.3}}, "space.fixed: '.': no site is left whose rate is searched; leave"),
        ({"fixed": {"fc1*": 0, "fc2*": 0}}, r"'fc1.' and 'fc2.': no site .* at least one of 2"),
        ({"values": {"t": [1, 2]}}, "the program declares no 't'"),
        (
            {"groups": {"a": "*"}, "rates": {"fc1.drop": {"high": 0.6}}},
            "gives the sites of the group 'a' different ranges",
        ),
    ],
)
def test_faults_are_one_line(given, said):
    with pytest.raises(SpecError, match=said) as caught:
        made(TWO, given)
    assert "\n" not in str(caught.value)


def test_sites_that_cannot_be_searched():
    with pytest.raises(SiteError, match=r"no dropout site: add some with `insert:`"):
        made([])
    with pytest.raises(SiteError, match="site x has the rate 1"):
        made([site("x", rate=1.0)])


def test_label_smoothing_needs_a_loss_that_knows_it():
    space = {"label_smoothing": {"high": 0.3}}
    assert [p.name for p in made(TWO, space).values] == ["label_smoothing"]
    with pytest.raises(SpecError, match="the program's loss knows none"):
        made(TWO, space, program(loss_values=()))


def test_values_that_the_program_declares():
    declared = {
        "temperature": (0.5, 2.0),
        "decay": {"low": 1e-4, "high": 1, "log": True},
        "steps": [1, 2, 4],
    }
    space = made(TWO, {"values": {"steps": [1, 8]}}, program(searched=declared))
    assert space.values == (
        ValueParameter("temperature", 0.5, 2.0),
        ValueParameter("decay", 1e-4, 1, log=True),
        ValueParameter("steps", choices=(1.0, 8.0)),
    )


def test_fixed_sites_are_not_searched_nor_changed_by_baselines():
    space = made(TWO, {"fixed": {"fc1.drop": 0.15}})
    assert [p.name for p in space.rates] == ["dropout/fc2.drop"]
    assert all(t.assignment.rates["fc1.drop"] == 0.15 for t in space.baselines(study().baselines))


def test_a_cutoff_only_where_the_schedule_has_one():
    space = made(TWO, {"schedule": ["constant", "up", "early", "late"]})
    rates = {"fc1.drop": 0.1, "fc2.drop": 0.2}
    params = space.params(Assignment(rates, 1e-3, {"schedule": "up"}))
    assert (params["schedule"], params["cutoff"]) == ("up", 0.5)
    assert space.assignment({**params, "cutoff": 0.3}).values == {"schedule": "up"}
    late = space.assignment({**params, "schedule": "late", "cutoff": 0.3})
    assert late.values == {"schedule": "late", "cutoff": 0.3}
    assert "cutoff" not in made(TWO, {"schedule": ["constant", "up"]}).distributions()


# --- baselines ----------------------------------------------------------------------------


def test_baselines_each_over_the_learning_rate():
    space = made(TWO)
    trainings = space.baselines(study().baselines)
    assert len(trainings) == 15
    assert [t.label for t in trainings[:3]] == ["none", "author", "half"]
    assert [t.assignment.lr for t in trainings[:3]] == [1e-3] * 3
    by_label = {t.label: t.assignment.rates for t in trainings}
    assert by_label == {
        "none": {"fc1.drop": 0.0, "fc2.drop": 0.0},
        "author": {"fc1.drop": 0.2, "fc2.drop": 0.5},
        "half": {"fc1.drop": 0.5, "fc2.drop": 0.5},
    }
    lrs = sorted(t.assignment.lr for t in trainings if t.label == "none")
    assert lrs == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2])


@pytest.mark.parametrize("trials", [1, 2, 4, 7])
def test_the_authors_learning_rate_is_always_among_them(trials):
    space = made(TWO, {"lr": {"low": 2e-4, "high": 5e-2}}, baselines={"trials": trials})
    lrs = [t.assignment.lr for t in space.baselines(study(baselines={"trials": trials}).baselines)]
    assert len(set(lrs)) == trials
    assert 1e-3 in lrs
    outside = made(TWO, {"lr": {"low": 2e-3, "high": 5e-2}}, baselines={"trials": trials})
    lrs = [
        t.assignment.lr for t in outside.baselines(Baselines(trials=trials)) if t.label == "none"
    ]
    assert len(set(lrs)) == trials
    assert lrs[0] == sorted(lrs)[trials // 2]


def test_equal_baselines_are_one():
    halves = [site("a", rate=0.5), site("b", "attention", rate=0.1)]
    space = made(halves)
    wanted = study().baselines
    assert {t.label for t in space.baselines(wanted)} == {"none", "author"}
    assert space.merged(wanted) == {"half": "author"}
    zeros = made([site("a", "attention", rate=0.0)])
    assert zeros.merged(wanted) == {"author": "none", "half": "none"}
    assert made(TWO).merged(wanted) == {}


def test_half_leaves_other_kinds_at_the_authors_rate():
    sites = [site("a"), site("b", "channel"), site("c", "attention"), site("d", "recurrent", 0.3)]
    half = next(t for t in made(sites).baselines(study().baselines) if t.label == "half")
    assert half.assignment.rates == {"a": 0.5, "b": 0.5, "c": 0.1, "d": 0.3}


def test_other_values_fill_their_ranges():
    space = made(TWO, {"weight_decay": {"low": 1e-4, "high": 1e-2}, "schedule": ["constant", "up"]})
    values = [t.assignment.values for t in space.baselines(study().baselines) if t.label == "none"]
    decays = [v["weight_decay"] for v in values]
    assert decays[0] == pytest.approx(1e-3)
    assert len(set(decays)) == 5
    assert {v["schedule"] for v in values} == {"constant"}


def test_tied_sites_keep_the_authors_own_rates():
    space = made(TWO, {"groups": {"all": "*"}})
    author = next(t for t in space.baselines(study().baselines) if t.label == "author")
    assert author.assignment.rates == {"fc1.drop": 0.2, "fc2.drop": 0.5}
    assert space.params(author.assignment)["dropout/all"] == pytest.approx(0.35)


def test_groups_and_ranges_for_reports():
    space = made(TWO, {"groups": {"all": "*"}})
    assert space.groups() == {"all": ("fc1.drop", "fc2.drop")}
    assert space.ranges() == {"lr": (1e-4, 1e-2), "fc1.drop": (0, 0.8), "fc2.drop": (0, 0.8)}
    assert space.describe()[0] == "dropout/all (2 sites): 0 to 0.8"


# --- groups -------------------------------------------------------------------------------


def encoder(layers):
    parts = [("self_attn.attention", "attention"), ("dropout", "element"), ("mlp.drop", "element")]
    return [site(f"enc.layers.{i}.{name}", kind) for i in range(layers) for name, kind in parts]


def test_few_sites_are_searched_one_by_one():
    assert suggest_groups(encoder(2)) == {}
    assert len(made(encoder(2)).rates) == 6


def test_a_big_transformer_has_few_rates():
    sites = [site("embed.drop", role="embedding"), *encoder(66), site("head.drop")]
    groups = suggest_groups(sites)
    assert {name: len(members) for name, members in groups.items()} == {
        "embed.drop": 1,
        "enc.layers.self_attn.attention": 66,
        "enc.layers.dropout": 66,
        "enc.layers.mlp.drop": 66,
        "head.drop": 1,
    }
    space = made(sites)
    assert len(space.rates) == 5
    assert all(re.fullmatch(r"[\w.\-/ ]+", p.name) for p in space.parameters)  # as MLflow allows


def test_different_rates_of_the_author_are_kept_apart():
    sites = [site(f"l.{i}.drop", rate=0.1 if i < 5 else 0.3) for i in range(10)]
    assert [len(members) for members in suggest_groups(sites).values()] == [5, 5]


def test_depth_is_cut_into_thirds_where_all_sites_are_alike():
    groups = suggest_groups([site(f"net.{i}") for i in range(200)])
    assert {name: len(members) for name, members in groups.items()} == {
        "first third": 67,
        "middle third": 66,
        "last third": 67,
    }


def test_stochastic_depth_is_one_rate():
    sites = [site(f"b.{i}.path", "path", i * 0.02) for i in range(11)]
    space = made(sites)
    (parameter,) = space.rates
    assert parameter.name == "dropout/stochastic depth"
    author = next(t for t in space.baselines(study().baselines) if t.label == "author")
    assert space.assignment(space.params(author.assignment)) == author.assignment
    assert space.params(author.assignment)["dropout/stochastic depth"] == pytest.approx(0.2)


def test_linear_in_depth():
    sites = [site(f"b.{i}.path", "path", 0.1) for i in range(4)]
    (parameter,) = made(sites, {"linear_in_depth": "b.*"}).rates
    assert parameter.weights == (0.25, 0.5, 0.75, 1.0)
    assert parameter.rates(0.4)["b.0.path"] == pytest.approx(0.1)
    assert depth_profile([0.0, 0.1, 0.2]) == (0.0, 0.5, 1.0)


@settings(max_examples=80, deadline=None)
@given(sites_of)
def test_suggested_groups_hold_every_site_once_and_never_mix_kinds(sites):
    groups = suggest_groups(sites)
    if not groups:
        assert len(sites) <= 8
        return
    assert sorted(p for members in groups.values() for p in members) == sorted(
        s.path for s in sites
    )
    kind = {s.path: s.kind for s in sites}
    assert all(len({kind[p] for p in members}) == 1 for members in groups.values())
    assert len(groups) <= max(6, len(set(kind.values())))


@settings(max_examples=80, deadline=None)
@given(sites_of)
def test_patterns_name_the_groups(sites):
    groups = suggest_groups(sites)
    left = list(sites)
    for name, globs in patterns(groups, sites).items():
        taken = [s for s in left if any(matches(glob, s) for glob in globs)]
        assert sorted(s.path for s in taken) == sorted(groups[name])
        left = [s for s in left if s not in taken]


# --- the study file -----------------------------------------------------------------------

NETWORKS = {
    "mlp": TWO,
    "transformer": [site("embed.drop", role="embedding"), *encoder(12)],
    "residual": [*encoder(3), *(site(f"b.{i}.path", "path", i * 0.02) for i in range(6))],
    "deep": [site(f"net.{i}") for i in range(40)],
    "one of few": [site(f"b.{i}.path", "path", i * 0.02) for i in range(5)],
    "strong": [site("a", rate=0.95), site("b", "attention", rate=1 / 3)],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_written_file_says_what_the_defaults_do(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sites, path = NETWORKS[name], tmp_path / "sub" / "mine.yaml"
    (tmp_path / "droptune.toml").touch()
    path.parent.mkdir()
    text = study_file("models/net.py:net", path, program(), sites)
    path.write_text(text)
    read = StudySpec.load(path)
    assert read.program == "models/net.py:net"
    assert "probability of ZEROING" in text
    assert "objective: [nll, accuracy]" in text
    assert all(s.path in text for s in sites)
    written, default = (
        [(p.sites, p.weights, p.low, p.high) for p in space.rates]
        for space in (Space.of(sites, read, program()), made(sites))
    )
    assert written == default
