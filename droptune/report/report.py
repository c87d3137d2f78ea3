"""The report of a study: one HTML file without anything from elsewhere, Markdown, text or JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from droptune.errors import UsageError, nearest
from droptune.report import tables
from droptune.report.tables import Table
from droptune.script import script
from droptune.search.audit import Audit
from droptune.verdict.evidence import Evidence
from droptune.verdict.verdict import Verdict, members
from droptune.verdict.wording import (
    better_word,
    counted,
    difference,
    duration,
    level,
    metric_name,
)

FORMATS = ("html", "markdown", "text", "json")
MEANINGS = {
    "nll": "negative log likelihood",
    "rmse": "root mean squared error",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "ece": "expected calibration error",
}
BADGES = {
    "better": "dropout helps",
    "worse": "dropout hurts",
    "undetected": "no detectable difference",
    "learning_rate": "not shown to be dropout's gain",
    "none": "no dropout failed",
}


def render(evidence: Evidence, verdict: Verdict, format: str = "html") -> str:
    """The report in one of `FORMATS`; UsageError for another word."""
    writers = {"html": html, "markdown": markdown, "text": text, "json": as_json}
    if format not in writers:
        raise UsageError(f"unknown report format {format!r}{nearest(format, writers)}")
    return writers[format](evidence, verdict)


def as_json(evidence: Evidence, verdict: Verdict) -> str:
    """The verdict as JSON, with the pruning audit."""
    audit = vars(Audit.of(evidence.records, evidence.spec.objectives))
    return json.dumps({**verdict.to_json(), "audit": audit}, indent=2, allow_nan=False)


# -- what all formats say -------------------------------------------------------------------------


def badge(verdict: Verdict) -> str:
    """The state of the study in two or three words."""
    return BADGES[verdict.outcome] if verdict.confirmed else "not confirmed"


def standing(verdict: Verdict) -> str:
    """On what the verdict stands."""
    if not verdict.confirmed:
        return "from the search alone"
    seeds = verdict.comparisons[0].difference.seeds
    data = verdict.objective["data"]
    return f"confirmed on {counted(seeds, 'fresh seed')}, {data} data; in brackets: 95 % intervals"


def conditions(evidence: Evidence) -> str:
    """What the rates hold for: objective, length, data."""
    objective = evidence.objective
    taken = "at the end" if objective.take == "last" else "at its best interval"
    train = evidence.sizes.get("train")
    samples = f", {train} training examples" if train else ""
    means = [MEANINGS[objective.metric]] if objective.metric in MEANINGS else []
    said = "; ".join([*means, f"{better_word(objective)} is better"])
    many = len(evidence.spec.objectives)
    first = f", the first of {many}" if many > 1 else ""
    return (
        f"objective {metric_name(objective.metric)}{first} ({said}), {taken} of "
        f"{evidence.intervals} intervals{samples}; the rates hold for this length and this data"
    )


def cost(evidence: Evidence, verdict: Verdict) -> str:
    """What was spent."""
    counts = verdict.counts
    seconds = sum(
        (r.ended - r.started).total_seconds() for r in evidence.records if r.started and r.ended
    )
    ended = f"{counts['completed']} completed, {counts['pruned']} pruned, {counts['failed']} failed"
    return (
        f"{counts['trials']} trials ({ended}) and {counts['confirmations']} confirmations: "
        f"{counts['intervals']} intervals, {duration(seconds)} of slot time"
    )


def curse(evidence: Evidence, verdict: Verdict) -> str:
    """How far the search flattered the winner."""
    found = verdict.curse
    if found is None:
        return ""
    metric = evidence.objective.metric
    judged = "flattered it" if found.excess > 0 else "was too hard on it"
    scale = max(found.error, abs(found.excess) / 10)
    common = ""
    if found.none is not None:
        turned = "" if found.none * found.excess >= 0 else ", the other way"
        common = f" (no dropout by {difference(metric, found.none, scale)}{turned}; all "
        common += "trials share one data order)"
    return (
        f"In the search the winner had {metric_name(metric)} {level(metric, found.promised)}; on "
        f"fresh seeds it has {level(metric, found.delivered)} in validation: the search "
        f"{judged} by {difference(metric, found.excess, scale)}{common}."
    )


def price(verdict: Verdict) -> str:
    """What masks cost in time."""
    found = verdict.cost
    if found is None or found.none <= 0:
        return ""
    ratios = (found.winner / found.none, found.low, found.high)
    more, low, high = (round(100 * (ratio - 1)) for ratio in ratios)
    return (
        f"An interval takes {found.winner:.3g} s with dropout and {found.none:.3g} s without "
        f"({more:+d} %, [{low:+d}, {high:+d}] over pairs of one seed; what else ran on the machine "
        "counts)."
    )


def code(evidence: Evidence, verdict: Verdict) -> str:
    """Lines to paste into a training script."""
    if verdict.recommended is None:
        return ""
    return script(
        verdict.recommended.assignment, evidence.sites, f"{verdict.study}: {verdict.sentence}"
    )


# -- Markdown and text ----------------------------------------------------------------------------


def _sections(evidence: Evidence, verdict: Verdict) -> list[tuple[str, list[str | Table | None]]]:
    use = "Rates to use" if verdict.confirmed else "Best rates so far"
    reason = verdict.recommended.reason if verdict.recommended else ""
    overfit = verdict.overfitting.sentence if verdict.overfitting else ""
    together = verdict.interaction.sentence if verdict.interaction else ""
    shown = tables.comparisons(evidence, verdict.comparisons) if verdict.comparisons else None
    left_out = tables.comparisons(evidence, verdict.ablation) if verdict.ablation else None
    audit = Audit.of(evidence.records, evidence.spec.objectives).sentence
    sections: list[tuple[str, list[str | Table | None]]] = [
        ("", [verdict.sentence, verdict.second, *verdict.details, overfit]),
        (use, [f"{_capitalised(reason)}." if reason else "", tables.rates(evidence, verdict)]),
        ("What limits this study", [f"- {line}" for line in (*verdict.warnings, *verdict.hints)]),
        ("Comparisons", [shown, curse(evidence, verdict)]),
        ("All metrics", [tables.metrics(evidence, members(evidence, verdict))]),
        ("Several objectives", [tables.pareto(evidence)]),
        ("One group left out", [left_out]),
        ("Importance", [tables.importance(evidence, verdict), together]),
        ("Calibration", [tables.calibration(evidence, verdict)]),
        ("The search", [cost(evidence, verdict), f"{audit}.", price(verdict)]),
    ]
    return [(title, [part for part in parts if part]) for title, parts in sections]


def markdown(evidence: Evidence, verdict: Verdict) -> str:
    """The report in Markdown."""
    lines = [
        f"# {verdict.study}: {badge(verdict)}",
        "",
        f"*{standing(verdict)}; {conditions(evidence)}*",
    ]
    for title, parts in _sections(evidence, verdict):
        if parts and title:
            lines += ["", f"## {title}"]
        for part in parts:
            lines += ["", part.markdown() if isinstance(part, Table) else str(part)]
    return "\n".join(lines) + "\n"


def text(evidence: Evidence, verdict: Verdict) -> str:
    """The report for a terminal."""
    lines = [f"{verdict.study}: {badge(verdict).upper()}", standing(verdict), conditions(evidence)]
    for title, parts in _sections(evidence, verdict):
        lines += ["", title.upper()] if parts and title else [""] if parts else []
        lines += [part.text() if isinstance(part, Table) else str(part) for part in parts]
    return "\n".join(lines) + "\n"


# -- HTML -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """One figure of the first screen."""

    value: str
    name: str


def html(evidence: Evidence, verdict: Verdict) -> str:
    """The report as one HTML file: no scripts, nothing loaded, light and dark, printable."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from droptune.figures import draw, inline

    drawn = {name: inline(f, name) for name, f in draw(evidence, verdict).items()}
    environment = Environment(
        loader=PackageLoader("droptune"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"sentence": _capitalised, "unbroken": _unbroken, "coded": _coded}
    return environment.get_template("report.html.j2").render(
        verdict=verdict,
        evidence=evidence,
        badge=badge(verdict),
        standing=standing(verdict),
        conditions=conditions(evidence),
        tiles=_tiles(evidence, verdict),
        figures=drawn,
        slices={k.removeprefix("slice/"): v for k, v in drawn.items() if k.startswith("slice/")},
        tables=_tables(evidence, verdict),
        audit=Audit.of(evidence.records, evidence.spec.objectives).sentence,
        cost=cost(evidence, verdict),
        curse=curse(evidence, verdict),
        price=price(verdict),
        code=code(evidence, verdict),
        metric=metric_name(evidence.objective.metric),
    )


def _capitalised(words: str) -> str:
    return words[:1].upper() + words[1:]


def _unbroken(words: str) -> str:
    """With no line break inside an interval or between a figure and its unit."""
    inside = re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", "\u00a0"), words)
    return re.sub(r"(\d) (nats|points|%)", "\\1\u00a0\\2", inside)


def _coded(words: str) -> Any:
    """As HTML: what stands between backticks is code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(words))))


def _tables(evidence: Evidence, verdict: Verdict) -> dict[str, Any]:
    return {
        "rates": tables.rates(evidence, verdict),
        "comparisons": tables.comparisons(evidence, verdict.comparisons),
        "ablation": tables.comparisons(evidence, verdict.ablation),
        "metrics": tables.metrics(evidence, members(evidence, verdict)),
        "calibration": tables.calibration(evidence, verdict),
        "pareto": tables.pareto(evidence),
    }


def _tiles(evidence: Evidence, verdict: Verdict) -> tuple[Tile, ...]:
    """The winner's figure beside the baselines', each at its own best learning rate."""
    metric = evidence.objective.metric
    if not verdict.comparisons:
        return ()
    ours = verdict.comparison("none") or verdict.comparisons[0]
    data = f"{ours.data} {metric_name(metric)} with"
    others = [
        Tile(level(metric, one.theirs), evidence.name(one.against))
        for one in verdict.comparisons
        if one.against in ("none", "author", "half")
    ]
    return (Tile(level(metric, ours.ours), f"{data} {evidence.name('winner')}"), *others)
