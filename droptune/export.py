"""A study as one flat table: a row per training and interval."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from droptune.errors import UsageError
from droptune.training import Record
from droptune.verdict.statistics import finite

FORMATS = (".csv", ".json", ".parquet")


def write(records: Sequence[Record], path: Path) -> int:
    """Write rows (training, its values, its end, one interval's measurements); returns how many."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path.name}: unknown format; possible: {', '.join(FORMATS)}")
    rows = [row for record in records for row in _rows(record)]
    temporary = path.with_name(f".{path.name}.part")
    try:
        _WRITERS[path.suffix](rows, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def _rows(record: Record) -> list[dict[str, Any]]:
    training = record.training
    head: dict[str, Any] = {
        "training": training.id,
        "kind": training.kind.value,
        "number": training.number,
        "label": training.label,
        "seed_index": training.seed_index,
        "state": record.state.value,
        "reason": record.reason,
        "objective": record.value,
        **{f"objective_{i}": value for i, value in enumerate(record.values or (), 1) if i > 1},
        "best_interval": record.best_interval,
        "attempt": training.attempt,
        "worker": record.worker,
        "started": record.started and record.started.isoformat(),
        "ended": record.ended and record.ended.isoformat(),
    }
    if training.assignment is not None:
        head["lr"] = training.assignment.lr
        head |= {f"dropout/{path}": rate for path, rate in training.assignment.rates.items()}
        head |= dict(training.assignment.values)
    intervals = range(record.intervals_done)
    return [
        head | {"interval": i + 1} | {k: c[i] for k, c in record.curves.items() if i < len(c)}
        for i in intervals
    ] or [head]


def _csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def _json(rows: Sequence[dict[str, Any]], path: Path) -> None:
    known = [{key: finite(value) for key, value in row.items()} for row in rows]
    path.write_text(json.dumps(known, allow_nan=False), encoding="utf-8")


def _parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import pandas

    pandas.DataFrame(rows).to_parquet(path, index=False)


_WRITERS = {".csv": _csv, ".json": _json, ".parquet": _parquet}
