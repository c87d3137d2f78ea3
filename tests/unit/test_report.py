"""The report in its formats, and the HTML in a real browser."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated import confirm, fashion, make_spec, pruned, search

from droptune.errors import UsageError
from droptune.report.report import _coded, badge, code, curse, html, markdown, render, text
from droptune.report.tables import Table, comparisons
from droptune.verdict.sentences import headline
from droptune.verdict.verdict import judge
from droptune.verdict.wording import change, difference, interval, level, rate

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def searched():
    made = search(fashion(0), make_spec("fashion-mlp"), trials=40)
    return pruned(made, 0.4, np.random.default_rng(0))


@pytest.fixture(scope="module")
def study(searched):
    evidence = confirm(fashion(1), searched)
    return evidence, judge(evidence)


@pytest.fixture(scope="module")
def page(study):
    return html(*study)


def test_the_page_needs_nothing_from_elsewhere(page):
    assert "<script" not in page
    assert "<link" not in page
    outside = re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", page)
    assert outside == []
    assert "url(http" not in page


def test_the_page_follows_light_dark_print_and_phone(page):
    for rule in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert rule in page


def test_ids_are_unique(page):
    ids = re.findall(r"\bid=\"([^\"]+)\"", page)
    assert len(ids) == len(set(ids))
    used = re.findall(r"(?:url\(#|href=\"#)([^\")]+)", page)
    assert set(used) <= set(ids)


def test_the_verdict_comes_first(study, page):
    heading = re.search(r"<h1>(.*?)</h1>", page)[1].replace("\u00a0", " ")
    assert heading == study[1].sentence
    assert page.index("<h1>") < page.index("Rates to use") < page.index("How sure is that?")


def test_sentences_and_table_give_a_difference_one_sign(study):
    evidence, verdict = study
    one = verdict.comparisons[0]
    turned = replace(one.difference, mean=-0.015, low=-0.066, high=0.036)
    one = replace(one, difference=turned)
    assert one.outcome == "undetected"
    row = comparisons(evidence, [one]).rows[0]
    assert row[3:5] == ("+0.015", "[−0.036, +0.066]")
    assert "by +0.015 nats [−0.036, +0.066]" in headline(evidence, "undetected", {"none": one})


def test_what_stands_between_backticks_is_code():
    assert _coded("1 < 2: `droptune study`") == "1 &lt; 2: <code>droptune study</code>"


def test_an_unconfirmed_study_says_so(searched):
    verdict = judge(searched)
    assert badge(verdict) == "not confirmed"
    page = html(searched, verdict)
    assert "NOT CONFIRMED" in page
    assert "Best rates so far" in page
    assert "How sure is that?" not in page


def test_markdown_and_text_tell_the_same(study):
    for write in (markdown, text):
        written = write(*study)
        assert study[1].sentence in written
        assert "drop2" in written
        assert "no dropout" in written


def test_json_is_the_verdict_with_the_audit(study):
    data = json.loads(render(*study, "json"))
    assert data["sentence"] == study[1].sentence
    assert data["recommended"]["assignment"]["rates"]
    assert data["audit"]["pruned"] == 16


def test_an_unknown_format_is_refused_in_one_line(study):
    with pytest.raises(UsageError, match=r"unknown report format 'htm' \(did you mean 'html'"):
        render(*study, "htm")


def test_a_study_without_trials_has_a_report(searched):
    empty = replace(searched, records=())
    for format in ("html", "markdown", "text", "json"):
        assert "no trial with dropout has completed" in render(empty, judge(empty), format)


def test_a_study_of_few_trials_has_a_report(searched):
    few = replace(searched, records=searched.records[:8])
    for format in ("html", "markdown", "text", "json"):
        assert render(few, judge(few), format)


def test_the_code_is_python(study):
    lines = code(*study)
    compile(lines, "pasted", "exec")
    assert "droptune.apply_rates(model" in lines


@pytest.mark.parametrize(
    ("excess", "none", "said"),
    [
        (0.02, 0.01, "flattered it by 0.020 nats (no dropout by 0.010 nats; all"),
        (0.02, -0.01, "flattered it by 0.020 nats (no dropout by 0.010 nats, the other way; all"),
        (-0.02, -0.01, "was too hard on it by 0.020 nats (no dropout by 0.010 nats; all"),
    ],
)
def test_which_way_the_search_was_wrong(study, excess, none, said):
    evidence, verdict = study
    found = replace(verdict.curse, excess=excess, none=none, error=0.01)
    assert said in curse(evidence, replace(verdict, curse=found))


def test_tables_escape_what_would_break_them():
    table = Table(("a|b", "c"), (("x|y", "z"),))
    assert table.markdown().splitlines()[0] == "| a\\|b | c |"
    assert table.text().splitlines()[1].startswith("x|y")


def test_figures_are_said_with_the_digits_that_they_have():
    assert difference("nll", -0.2741, 0.023) == "0.274 nats"
    assert difference("accuracy", 0.0123, 0.004) == "1.23 points"
    assert interval("nll", 0.2512, 0.2973) == "[0.251, 0.297]"
    assert change("accuracy", -0.0035, -0.0128, 0.0058) == "−0.35 points [−1.28, +0.58]"
    assert level("accuracy", 0.8412) == "84.1 %"
    assert level("nll", 0.45) == "0.450"
    assert level("mse", 1234.5) == "1234"
    assert (rate(0.0), rate(0.005), rate(0.5), rate(0.476)) == ("0", "0.005", "0.5", "0.48")
    assert interval("nll", 0.0004, 0.22) == "[0.0004, 0.2200]"
    assert interval("nll", 0.0, 0.22) == "[0.00, 0.22]"
    assert interval("nll", float("-inf"), float("inf")) == "[no interval]"


def test_what_six_decimals_cannot_show_has_an_exponent():
    assert difference("mse", 3.12e-8, 1.1e-8) == "3.1e-08"
    assert interval("mse", 1.9e-8, 4.3e-8) == "[1.9e-08, 4.3e-08]"
    assert change("mse", -3e-8, -5e-8, -1e-8) == "−3.0e-08 [−5.0e-08, −1.0e-08]"
    assert interval("mse", 5.0123e-5, 5.0341e-5) == "[5.012e-05, 5.034e-05]"
    assert interval("mse", 1e-7, 2e-4) == "[1.0e-07, 0.000200]"
    assert interval("nll", 0.2512, 0.2512 + 4e-8) == "[0.251200, 0.251200]"


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium")
def test_the_page_in_a_browser(page, study, tmp_path):
    from playwright.sync_api import sync_playwright

    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=options)
        colours = {}
        for scheme, width in (("light", 1200), ("dark", 1200), ("light", 390)):
            context = browser.new_context(
                color_scheme=scheme, viewport={"width": width, "height": 844}, offline=True
            )
            opened = context.new_page()
            complaints = []
            opened.on("console", lambda message, held=complaints: held.append(message.text))
            opened.goto(file.as_uri())
            assert complaints == []
            assert opened.evaluate("document.documentElement.scrollWidth") <= width
            seen = opened.evaluate("document.elementFromPoint(100, 120).closest('header') !== null")
            assert seen
            if width == 1200:
                assert opened.locator("h1").bounding_box()["y"] < 100
                assert opened.get_by_text("Rates to use").bounding_box()["y"] < 844
                colours[scheme] = opened.evaluate(
                    "[getComputedStyle(document.body).backgroundColor,"
                    " getComputedStyle(document.querySelector('figure svg text')).fill]"
                )
            context.close()
        browser.close()
    assert colours["light"][0] != colours["dark"][0]
    assert colours["light"][1] != colours["dark"][1]
