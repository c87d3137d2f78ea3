"""What the study's own run says to whoever opens it: the answer first, as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from droptune.mirror import runs
from droptune.mirror.answer import Answer, baselines, trials
from droptune.mirror.study import MirroredStudy
from droptune.training import Record, State


def note(study: MirroredStudy, records: Sequence[Record], answer: Answer) -> str:
    """The note of the parent run."""
    objective = study.objectives[0]
    best = runs.best_of(trials(records), objective)
    first = answer.line(study.name, records, objective)
    blocks = [
        f"**{first}**",  # no heading: MLflow draws those badly where they take two lines
        _rates(study, best, answer),  # near the top: MLflow folds all but a few lines
        *answer.details,
        _table(study, records, best),
        "\n".join(f"- {warning}" for warning in answer.warnings),
        _progress(study, records),
        _next(study, best),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _table(study: MirroredStudy, records: Sequence[Record], best: Record | None) -> str:
    if best is None:
        return ""
    objective = study.objectives[0]
    rows = {"best found": best, **baselines(records, objective)}
    lines = [
        f"Validation, each at its own best learning rate (objective `{objective.key}`):",
        "",
        "| | objective | lr | mean rate | run |",
        "|---|---|---|---|---|",
    ]
    for label, record in rows.items():
        assignment = record.training.assignment
        assert assignment is not None
        lines.append(
            f"| {label} | {record.value:.5g} | {assignment.lr:.3g} "
            f"| {assignment.mean_rate:.3f} | {record.training.name} |"
        )
    return "\n".join(lines)


def _rates(study: MirroredStudy, best: Record | None, answer: Answer) -> str:
    """The rates to use: what is recommended, or the search's best until something is."""
    assignment = answer.recommended or (best.training.assignment if best else None)
    if assignment is None:
        return ""
    what = f"Recommended: {answer.reason}" if answer.recommended else "Best of the search"
    authors = {str(site.get("path")): site.get("rate") for site in study.sites}
    lines = [f"{what}, with learning rate {assignment.lr:.4g}:", ""]
    lines += ["| site | rate (probability of zeroing) | author's |", "|---|---|---|"]
    for path, rate in assignment.rates.items():
        author = authors.get(path)
        lines.append(f"| `{path}` | {rate:.3f} | {'' if author is None else f'{author:g}'} |")
    return "\n".join(lines)


def _progress(study: MirroredStudy, records: Sequence[Record]) -> str:
    counts = Counter(record.state for record in trials(records))
    words = {State.COMPLETE: "complete", State.PRUNED: "pruned (grey)", State.FAIL: "failed"}
    found = [f"{counts[state]} {word}" for state, word in words.items() if counts[state]]
    others = sum(not r.training.kind.is_trial and r.state.finished for r in records)
    found += [f"{others} confirmations"] if others else []
    return f"Phase: {study.phase}. Trials: {', '.join(found) or 'none yet'}."


def _next(study: MirroredStudy, best: Record | None) -> str:
    lines = [
        f"`droptune study show {study.name}` shows the study, "
        f"`droptune study report {study.name}` writes its report."
    ]
    if best is not None:
        lines.append(f"`droptune study best {study.name} --code` prints the rates to paste.")
    return "\n".join(lines)


def files(study: MirroredStudy, records: Sequence[Record]) -> dict[str, bytes]:
    """The artifacts that every study has: its file, sites, environment, and renamed keys."""
    found: dict[str, object] = {
        "study/study.json": study.spec,
        "study/sites.json": list(study.sites),
        "study/environment.json": study.meta,
    }
    keys = {key for record in records for key in record.curves}
    keys |= {f"dropout/{site['path']}" for site in study.sites if "path" in site}
    if changed := runs.renamed(sorted(keys)):
        found["study/keys.json"] = changed
    return {path: _json(value) for path, value in found.items() if value}


def settings(study: MirroredStudy) -> dict[str, str]:
    """The parent run's params: what cannot change in a study."""
    spec = study.spec
    found = {
        "program": spec.get("program"),
        "objective": ", ".join(f"{o.metric} ({o.take})" for o in study.objectives),
        "intervals": study.meta.get("intervals"),
        "sampler": _name(spec.get("sampler")),
        "pruner": _name(spec.get("pruner")),
        "seed": spec.get("seed"),
        "sites": len(study.sites),
        "trainer": study.meta.get("trainer"),
    }
    return {key: str(value)[:500] for key, value in found.items() if value not in (None, "")}


def _name(choice: object) -> object:
    return choice.get("name") if isinstance(choice, Mapping) else choice


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n").encode()


def summary(study: MirroredStudy, records: Sequence[Record]) -> Mapping[str, float]:
    """The parent run's metrics: the best objective and how it compares, and the counts.

    Nothing before there is a best: MLflow lists metrics in the order of their first value.
    """
    objective = study.objectives[0]
    counts = Counter(record.state for record in trials(records))
    best = runs.best_of(trials(records), objective)
    if best is None or best.value is None:
        return {}
    found = {"objective": best.value}
    reference = runs.reference_of(records, objective)
    if reference is not None:
        found["gain"] = runs.better_by(objective, best.value, reference.value)
    for label, record in baselines(records, objective).items():
        found[f"baseline/{runs.clean_key(label)}"] = record.value or 0.0
    for state in (State.COMPLETE, State.PRUNED, State.FAIL):
        found[f"trials/{state.value.lower()}"] = float(counts[state])
    return found
