"""What `study best` says: the rates and learning rate found, beside the baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from droptune.errors import DroptuneError
from droptune.progress import Progress
from droptune.training import Assignment, Record

if TYPE_CHECKING:
    from droptune.study import Study


def to_json(study: Study) -> dict[str, Any]:
    """The answer of a study as plain JSON values."""
    progress = study.progress()
    record = _best(study, progress)
    objective = study.objectives[0]
    return {
        "study": study.name,
        "phase": study.row.phase,
        "objective": {"metric": objective.key, "take": objective.take},
        "budget": {"intervals": study.intervals, "samples": study.row.meta["samples"]},
        "best": _record_json(record),
        "baselines": {
            label: found and _record_json(found) for label, found in progress.baselines.items()
        },
        "author_rates": {site.path: site.rate for site in study.sites},
        "author_lr": study.row.meta["author_lr"],
        "cost": {"intervals": progress.intervals, "device_seconds": progress.device_seconds},
        "verdict": study.verdict(),
    }


def _best(study: Study, progress: Progress) -> Record:
    if progress.best is None:
        raise DroptuneError(
            f"study {study.name!r} has no completed trial yet; "
            f"see `droptune study show {study.name}`"
        )
    return progress.best


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


def text(study: Study) -> str:
    """The answer of a study in a few lines."""
    progress = study.progress()
    best = _best(study, progress)
    verdict = study.verdict()
    lines = [_heading(study), _sentence(verdict), ""]
    if verdict is None or verdict["recommended"] is None:
        lines += [f"best of the search: {best.training.name}:", *_rates(study, _assignment(best))]
    else:
        reason = verdict["recommended"]["reason"]
        lines += [f"recommended ({reason}):", *_rates(study, _chosen(study, progress))]
        lines += [f"note: {hint}" for hint in (*verdict["warnings"], *verdict["hints"])]
    lines += ["", *_comparison(study, progress, best), _cost(progress)]
    return "\n".join(lines)


def _chosen(study: Study, progress: Progress) -> Assignment:
    """What is recommended; before a verdict, the best of the search."""
    verdict = study.verdict()
    if verdict is not None and verdict["recommended"] is not None:
        return Assignment.from_json(verdict["recommended"]["assignment"])
    return _assignment(_best(study, progress))


def _sentence(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return "NOT CONFIRMED: these are values of the search, on one seed each"
    return str(verdict["sentence"])


def _heading(study: Study) -> str:
    objective = study.objectives[0]
    samples = study.row.meta["samples"]["train"]
    return (
        f"{study.name}: {objective.key}, {objective.take} of {study.intervals} intervals, "
        f"{samples} training samples"
    )


def _rates(study: Study, assignment: Assignment) -> list[str]:
    lines = [f"  {'lr':<32} {assignment.lr:<10.4g} author's {study.row.meta['author_lr']:g}"]
    for site in study.sites:
        rate = assignment.rates.get(site.path, site.rate)
        lines.append(f"  {site.path:<32} {rate:<10.3f} author's {site.rate:g}")
    return lines + [f"  {key:<32} {value}" for key, value in assignment.values.items()]


def _comparison(study: Study, progress: Progress, best: Record) -> list[str]:
    keys = [key for key in _shown(study) if key in best.curves]
    head = "".join(f"{key:>14}" for key in keys)
    lines = [f"{'each at its own best lr':<26}{'lr':>10}{head}"]
    for name, record in {"best": best, **progress.baselines}.items():
        if record is None:
            lines.append(f"{name:<26}  no completed trial")
            continue
        at = (record.best_interval or record.intervals_done) - 1
        figures = "".join(f"{record.curves[key][at]:>14.4f}" for key in keys)
        lines.append(f"{name:<26}{_assignment(record).lr:>10.3g}{figures}")
    return lines


def _shown(study: Study) -> list[str]:
    """The objectives first, then what people compare by."""
    usual = ("val/nll", "val/accuracy", "val/ece", "val/rmse")
    return list(dict.fromkeys([*(objective.key for objective in study.objectives), *usual]))


def _cost(progress: Progress) -> str:
    return (
        f"cost: {progress.finished} trials and {progress.confirmations[0]} confirmations, "
        f"{progress.intervals} intervals, {progress.device_seconds:.0f} device-seconds"
    )


def code(study: Study) -> str:
    """Lines to paste into a training script: the rates, the learning rate, and where from."""
    assignment = _chosen(study, study.progress())
    rates = "\n".join(f"    {path!r}: {rate:.4g}," for path, rate in assignment.rates.items())
    return (
        f"# {_heading(study)}\n"
        f"# {_sentence(study.verdict())}\n"
        "import droptune\n\n"
        f"droptune.apply_rates(model, {{  # probability of zeroing\n{rates}\n}})\n"
        f"lr = {assignment.lr:.6g}"
    )
