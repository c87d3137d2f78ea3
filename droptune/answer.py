"""What `study best` says: the rates and learning rate found, beside the baselines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from droptune.errors import DroptuneError
from droptune.program.declared import is_number
from droptune.progress import Progress, front
from droptune.scores import read_metrics
from droptune.script import script
from droptune.training import Assignment, Record, State, TrainingKind
from droptune.verdict.wording import counted, duration, winner_name

if TYPE_CHECKING:
    from droptune.study import Study

USUAL = ("nll", "accuracy", "ece", "rmse")  # what people compare by, beside the objectives


@dataclass(frozen=True)
class Confirmed:
    """A configuration on the verdict's fresh seeds: means of what was measured."""

    label: str
    assignment: Assignment
    seeds: int
    means: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        means = {"seeds": self.seeds, "means": dict(self.means)}
        return {"label": self.label, **means, **self.assignment.to_json()}


def to_json(study: Study) -> dict[str, Any]:
    """The answer of a study as plain JSON values; `best` and `baselines` are of the search."""
    progress = study.progress()
    found = leading(study, progress)
    best = _best(study, progress)
    objective = study.objectives[0]
    return {
        "study": study.name,
        "phase": study.phase(),
        "objective": {"metric": objective.key, "take": objective.take},
        "budget": {"intervals": study.intervals, "samples": study.row.meta["samples"]},
        "best": _record_json(best),
        "baselines": {
            label: record and _record_json(record)
            for label, record in found.items()
            if label not in ("best", winner_name(study.records()))
        },
        "merged_baselines": study.space.merged(study.spec.baselines),
        "confirmed": [one.to_json() for one in confirmed(study)],
        "author_rates": {site.path: site.rate for site in study.sites},
        "author_lr": study.row.meta["author_lr"],
        **_front_json(study),
        "cost": {"intervals": progress.intervals, "device_seconds": progress.device_seconds},
        "verdict": study.verdict(),
    }


def _front_json(study: Study) -> dict[str, Any]:
    """The Pareto front of several objectives."""
    keys = [objective.key for objective in study.objectives]
    if len(keys) < 2:
        return {}
    found = front(study.records(), study.objectives)
    return {
        "front": [
            {**_record_json(r), "values": dict(zip(keys, r.values or (), strict=True))}
            for r in found
        ]
    }


def leading(study: Study, progress: Progress) -> dict[str, Record | None]:
    """What leads the search, by label: as the verdict has it where it is from the search alone, the
    best values before and beside a confirmed one."""
    verdict = _of_search(study)
    if verdict is None:
        return {"best": progress.best, **progress.baselines}
    winner = winner_name(study.records())
    found: dict[str, Record | None] = {winner: None, **dict.fromkeys(progress.baselines)}
    for label, number in verdict["leading"].items():
        found[winner if label == "winner" else label] = study.trial(number)
    return found


def _of_search(study: Study) -> dict[str, Any] | None:
    """The verdict of a study that is done and not confirmed."""
    verdict = study.verdict()
    if verdict is None or verdict["confirmed"] or study.row.phase != "done":
        return None
    return verdict if "leading" in verdict else None  # one of an earlier version has it not


def _best(study: Study, progress: Progress) -> Record:
    """What a verdict from the search alone recommends; else the best value of the search."""
    chosen = (_of_search(study) or {}).get("recommended")
    if chosen:
        return study.trial(chosen["trial"])
    if progress.best is not None:
        return progress.best
    failed = [r for r in study.records() if r.state is State.FAIL and r.reason]
    if failed and progress.counts[State.FAIL] == progress.finished:
        why = f": all {progress.finished} failed, {failed[0].training.name} with {failed[0].reason}"
    else:
        why = f"; see `droptune study show {study.name}`"
    raise DroptuneError(f"study {study.name!r} has no completed trial yet{why}")


def _record_json(record: Record) -> dict[str, Any]:
    assignment = _assignment(record)
    return {
        "trial": record.training.number,
        "value": record.value,
        "interval": record.best_interval,
        **assignment.to_json(),
    }


def _assignment(record: Record) -> Assignment:
    assert record.training.assignment is not None
    return record.training.assignment


def confirmed(study: Study) -> list[Confirmed]:
    """The winner and what it was compared with, on the seeds that the verdict is made from."""
    verdict = study.verdict() or {}
    compared = verdict.get("comparisons", [])
    if not compared:
        return []
    records = study.records()
    winner = {"against": winner_name(records), "assignment": verdict["winner"]["assignment"]}
    winner["seeds"] = sorted({seed for one in compared for seed in one["seeds"]})
    trained = [r for r in records if r.training.kind is TrainingKind.CONFIRMATION]
    tests = read_metrics(study.storage, study.row.id)
    return [_confirmed(one, trained, tests) for one in (winner, *compared)]


def _confirmed(
    one: Mapping[str, Any], records: Sequence[Record], tests: Mapping[int, Mapping[str, float]]
) -> Confirmed:
    assignment = Assignment.from_json(one["assignment"])
    mine = [
        {**_measured(r), **{f"test/{k}": v for k, v in tests.get(r.training.id, {}).items()}}
        for r in records
        if r.training.assignment == assignment
        and r.training.seed_index in one["seeds"]
        and r.state is State.COMPLETE
    ]
    keys = [
        key
        for key in (mine[0] if mine else {})
        if all(math.isfinite(values.get(key, math.nan)) for values in mine)
    ]
    means = {key: fmean(values[key] for values in mine) for key in keys}
    return Confirmed(one["against"], assignment, len(mine), means)


def _measured(record: Record) -> dict[str, float]:
    """What was measured at the interval that the objective was taken at."""
    at = (record.best_interval or record.intervals_done) - 1
    return {key: curve[at] for key, curve in record.curves.items() if len(curve) > at}


# -- in words -------------------------------------------------------------------------------------


def text(study: Study) -> str:
    """The answer of a study in a few lines."""
    progress = study.progress()
    best = _best(study, progress)
    verdict = study.verdict()
    lines = [_heading(study), *_sentences(study, verdict), ""]
    if verdict is None or verdict["recommended"] is None:
        lines += [f"best of the search: {best.training.name}:", *_rates(study, _assignment(best))]
    else:
        reason = verdict["recommended"]["reason"]
        lines += [f"recommended ({reason}):", *_rates(study, _chosen(study, progress))]
        lines += [f"note: {hint}" for hint in (*verdict["warnings"], *verdict["hints"])]
    lines += ["", *_comparison(study, progress), *_front(study), "", _cost(progress)]
    return "\n".join(lines)


def _chosen(study: Study, progress: Progress) -> Assignment:
    """What is recommended; before a verdict, the best of the search."""
    verdict = study.verdict()
    if verdict is not None and verdict["recommended"] is not None:
        return Assignment.from_json(verdict["recommended"]["assignment"])
    return _assignment(_best(study, progress))


def _sentences(study: Study, verdict: Mapping[str, Any] | None) -> list[str]:
    """The verdict, the question of the study first; or that there is none yet."""
    phase = study.phase()
    if verdict is None:
        return [f"NOT CONFIRMED ({phase}): these are values of the search, on one seed each"]
    said = [verdict["sentence"], verdict["second"], *verdict["details"]]
    going_on = [] if phase == "done" else [f"The study is {phase}; its last verdict was:"]
    return [*going_on, *(str(sentence) for sentence in said if sentence)]


def _heading(study: Study) -> str:
    objective = study.objectives[0]
    samples = study.row.meta["samples"]["train"]
    return (
        f"{study.name}: {objective.key}, {objective.take} of {study.intervals} intervals, "
        f"{samples} training samples"
    )


def _rates(study: Study, assignment: Assignment) -> list[str]:
    rows = [("lr", f"{assignment.lr:.4g}", f"author's {study.row.meta['author_lr']:g}")]
    for site in study.sites:
        rate = assignment.rates.get(site.path, site.rate)
        whose = "inserted" if site.inserted else f"author's {site.rate:g}"
        rows.append((site.path, f"{rate:.3f}", whose))
    rows += [(key, shown(value), "") for key, value in assignment.values.items()]
    return [f"  {line}" for line in _aligned(rows)]


def shown(value: float | str) -> str:
    """A searched value as people read it."""
    return f"{value:.4g}" if is_number(value) else str(value)


def _comparison(study: Study, progress: Progress) -> Iterator[str]:
    """The confirmed means where there are any, else the values of the search."""
    known = confirmed(study)
    if known:
        yield (
            "confirmed: means over fresh seeds, each at the best learning rate of its own search "
            "(val: validation data, test: test data)"
        )
        keys = _keys(study, [one.means for one in known])
        head = ("", "seeds", "lr", *keys)
        yield from _aligned([head, *(_confirmed_row(one, keys) for one in known)])
    else:
        yield (
            "of the search, one training each, so the best looks better than it is "
            "(val: validation data; each at its own best learning rate)"
        )
        found = leading(study, progress)
        keys = _keys(study, [_measured(record) for record in found.values() if record])
        head = ("", "trial", "lr", *keys)
        yield from _aligned([head, *(_search_row(*item, keys) for item in found.items())])
        yield from luck(study, progress)
    yield from _left_out(study, progress, known)


def luck(study: Study, progress: Progress) -> Iterator[str]:
    """Why the best value of the search does not lead it, where that is so."""
    best = progress.best
    if best is not None and best not in leading(study, progress).values():
        value = f"{study.objectives[0].key} {best.value:.4f}"
        yield (
            f"{best.training.name} had {value}, the best of all; trials like it had worse, so it "
            "is held to be luck"
        )


def _front(study: Study) -> Iterator[str]:
    """The trials to choose from where there are several objectives."""
    keys = [objective.key for objective in study.objectives]
    if len(keys) < 2:
        return
    found = front(study.records(), study.objectives)
    yield ""
    yield (
        f"Pareto front of {' and '.join(keys)}: no other trial of the search equals or betters one "
        "of these in all of them (one training each)"
    )
    rows = [
        (
            record.training.name,
            f"{_assignment(record).lr:.3g}",
            f"{_assignment(record).mean_rate:.3f}",
            *(f"{value:.4f}" for value in record.values or ()),
        )
        for record in found
    ]
    yield from _aligned([("", "lr", "mean rate", *keys), *rows])


def _confirmed_row(one: Confirmed, keys: Sequence[str]) -> tuple[str, ...]:
    numbers = (f"{one.means[key]:.4f}" if key in one.means else "–" for key in keys)
    return (one.label, str(one.seeds), f"{one.assignment.lr:.3g}", *numbers)


def _search_row(label: str, record: Record | None, keys: Sequence[str]) -> tuple[str, ...]:
    if record is None:
        return (label, "no completed trial", *("" for _ in range(1 + len(keys))))
    values = _measured(record)
    numbers = (f"{values[key]:.4f}" if key in values else "–" for key in keys)
    return (label, str(record.training.number), f"{_assignment(record).lr:.3g}", *numbers)


def _left_out(study: Study, progress: Progress, confirmed: Sequence[Confirmed]) -> Iterator[str]:
    """Baselines without a row, and why."""
    for label, same in study.space.merged(study.spec.baselines).items():
        yield f"no row for {label}: its rates are the same as those of {same} here"
    labels = {one.label for one in confirmed}
    for label, record in progress.baselines.items():
        if not confirmed or label in labels or record is None:
            continue
        if _assignment(record).rates == confirmed[0].assignment.rates:
            yield f"no row for {label}: its rates are those of the {confirmed[0].label}"
        else:
            value = f"{study.objectives[0].key} {record.value:.4f}"
            yield f"no row for {label}: it was not confirmed; its best of the search had {value}"


def _keys(study: Study, measured: Sequence[Mapping[str, float]]) -> list[str]:
    """The objectives, then what people compare by: on test data where all have that."""
    known = [key for key in measured[0] if all(key in values for values in measured)]
    split = "test" if any(key.startswith("test/") for key in known) else "val"
    metrics = dict.fromkeys([*(objective.metric for objective in study.objectives), *USUAL])
    wanted = [objective.key for objective in study.objectives]
    wanted += [f"{split}/{metric}" for metric in metrics]
    return [key for key in dict.fromkeys(wanted) if key in known]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns: the first from the left, numbers from the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i > 0 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cost(progress: Progress) -> str:
    many = progress.confirmations[0]
    return (
        f"cost: {counted(progress.finished, 'trial')} and {counted(many, 'confirmation')}, "
        f"{counted(progress.intervals, 'interval')}, {duration(progress.device_seconds)} of "
        "training on the device"
    )


def code(study: Study) -> str:
    """Lines to paste into a training script: the whole configuration, and where it is from."""
    verdict = study.verdict()
    assignment = _chosen(study, study.progress())
    lines = _sentences(study, verdict)
    said = lines[: lines.index(verdict["sentence"]) + 1] if verdict else lines
    if verdict and verdict["recommended"]:
        said.append(f"recommended: {verdict['recommended']['reason']}")
    return script(assignment, study.sites, _heading(study), *said, _shape(study))


def _shape(study: Study) -> str:
    spec, objective = study.spec, study.objectives[0]
    keep = "keep the last" if objective.take == "last" else f"keep the best {objective.key}"
    return f"train {counted(spec.epochs or 0, 'epoch')} and {keep}; rates belong to that length"
