"""Figures are drawn from whatever a study has, small, reproducible, and in the page's colours."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from simulated import confirm, fashion, make_spec, pruned, search

from droptune.figures import draw, inline, png, svg
from droptune.figures.course import pruning
from droptune.sites.site import Site
from droptune.training import State
from droptune.verdict.verdict import judge


@pytest.fixture(scope="module")
def searched():
    return pruned(search(fashion(0), trials=40), 0.4, np.random.default_rng(0))


@pytest.fixture(scope="module")
def confirmed(searched):
    return confirm(fashion(1), searched)


@pytest.fixture(scope="module")
def drawn(confirmed):
    return draw(confirmed, judge(confirmed))


def test_all_figures_of_a_confirmed_study(drawn):
    assert set(drawn) == {
        "learning_curves", "differences", "gap", "history", "pruning", "reliability", "timeline",
        "parallel", "interaction", "importance", "lengths",
        "slice/drop1", "slice/drop2", "slice/head.drop", "slice/lr",
    }  # fmt: skip


def test_files_are_svg_and_png(drawn):
    root = ElementTree.fromstring(svg(drawn["differences"]))
    assert root.tag.endswith("svg")
    assert png(drawn["importance"]).startswith(b"\x89PNG")


def test_the_same_study_gives_the_same_bytes(confirmed, drawn):
    again = draw(confirmed, judge(confirmed))
    assert svg(again["learning_curves"]) == svg(drawn["learning_curves"])


def test_inline_figures_take_the_colours_of_the_page(drawn):
    text = inline(drawn["learning_curves"], "curves")
    ElementTree.fromstring(text)
    assert "var(--winner, " in text
    assert "var(--ink, " in text
    assert 'id="curves-' in text
    assert "<metadata>" not in text
    assert "font-family" not in text


def test_the_words_below_the_differences_are_inside_the_figure(drawn):
    figure = drawn["differences"]
    figure.draw_without_rendering()
    words = figure.axes[0].xaxis.label.get_window_extent()
    assert 0 <= words.x0 < words.x1 <= figure.bbox.width
    assert words.y0 >= 0


def test_words_are_text_not_outlines(drawn):
    assert "dropout found" in inline(drawn["learning_curves"], "a")


def test_before_confirmation_there_are_curves_but_no_comparison(searched):
    names = set(draw(searched, judge(searched)))
    assert "learning_curves" in names
    assert "differences" not in names
    assert "reliability" not in names


def test_without_trials_nothing_is_drawn(searched):
    empty = replace(searched, records=())
    assert draw(empty, judge(empty)) == {}


def test_a_few_trials_have_no_surface(searched):
    few = replace(searched, records=searched.records[:7])
    names = set(draw(few, judge(few)))
    assert "history" in names
    assert not any(name.startswith("slice/") for name in names)


def test_no_times_no_time_line_and_no_pruning_no_audit(searched):
    records = tuple(
        replace(r, started=None, ended=None)
        for r in searched.records
        if r.state is not State.PRUNED
    )
    bare = replace(searched, records=records)
    assert not {"timeline", "pruning"} & set(draw(bare, judge(bare)))


@pytest.mark.parametrize("curves", [(np.nan,), (np.inf,), ()], ids=["NaN", "infinite", "none"])
@pytest.mark.parametrize("state", [State.FAIL, State.PRUNED])
def test_a_trial_without_finite_values_leaves_the_figures_of_the_others(searched, curves, state):
    records = list(searched.records)
    place = next(i for i, record in enumerate(records) if record.state is State.PRUNED)
    lost = {name: curves * 9 for name in records[place].curves if curves}
    records[place] = replace(records[place], state=state, curves=lost)
    evidence = replace(searched, records=tuple(records))
    figures = draw(evidence, judge(evidence))
    assert {"pruning", "history", "timeline"} <= set(figures)
    for name, figure in figures.items():
        assert "<svg" in inline(figure, name)


def test_without_a_finite_value_no_limits_are_drawn(searched):
    lost = [replace(r, curves={"val/nll": (np.nan,) * 9}) for r in searched.records]
    axes = pruning(replace(searched, records=tuple(lost))).axes[0]
    assert np.isfinite(axes.get_ylim()).all()


def test_a_slice_names_what_it_lies_along(searched):
    def decayed(record):
        value = 1e-4 * (1 + record.training.id % 7)
        assignment = replace(record.training.assignment, values={"weight_decay": value})
        return replace(record, training=replace(record.training, assignment=assignment))

    evidence = replace(searched, records=tuple(decayed(r) for r in searched.records))
    figures = draw(evidence, judge(evidence))
    axes = {name: figures[f"slice/{name}"].axes[0] for name in ("drop1", "lr", "weight_decay")}
    said = [each.get_xlabel() for each in axes.values()]
    assert said == ["rate", "learning rate", "weight_decay"]


def test_a_site_called_like_markup_stays_text(searched):
    rename = {"drop1": "<script>x</script>"}

    def renamed(record):
        training = record.training
        rates = {rename.get(p, p): r for p, r in training.assignment.rates.items()}
        assignment = replace(training.assignment, rates=rates)
        return replace(record, training=replace(training, assignment=assignment))

    odd = replace(
        searched,
        records=tuple(renamed(r) for r in searched.records),
        sites=(Site("<script>x</script>", "element", 0.2, (8,)), *searched.sites[1:]),
    )
    for name, figure in draw(odd, judge(odd)).items():
        assert "<script>" not in inline(figure, name)


def test_two_objectives_have_a_front(searched):
    objectives = [{"metric": "nll"}, {"metric": "accuracy"}]
    both = replace(
        searched,
        spec=make_spec(objective=objectives),
        records=tuple(
            replace(r, values=(r.value, r.curves["val/accuracy"][-1])) if r.values else r
            for r in searched.records
        ),
    )
    assert "pareto" in draw(both, judge(both))


def test_many_trials_stay_small():
    made = fashion(2)
    many = search(made, trials=280)
    figures = draw(many, judge(many))
    assert sum(len(inline(figure, "a")) for figure in figures.values()) < 1_500_000


def test_matplotlib_is_imported_only_to_draw():
    code = (
        "import sys, droptune.figures, droptune.report.report, droptune.verdict.verdict\n"
        "heavy = {'matplotlib', 'torch', 'mlflow', 'sqlalchemy', 'optuna', 'sklearn', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
