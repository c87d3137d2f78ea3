"""`droptune trial`: one trial of a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from droptune.answer import shown
from droptune.cli.options import (
    JsonOption,
    NameArgument,
    ProjectOption,
    StorageOption,
    config,
    display,
    open_study,
    print_json,
)

if TYPE_CHECKING:
    from droptune.study import Study
    from droptune.training import Record

app = typer.Typer(no_args_is_help=True)
NumberArgument = Annotated[int, typer.Argument(metavar="NUMBER", help="The trial's number.")]


@app.command()
def show(
    name: NameArgument,
    number: NumberArgument,
    json: JsonOption = False,
    storage: StorageOption = None,
) -> None:
    """Show the rates, learning rate, seeds, curve and end of one trial."""
    study = open_study(name, storage)
    record = study.trial(number)
    if json:
        print_json(to_json(record))
        return
    for line in _lines(study, record):
        print(line)
    display(_curve_table(record, [objective.key for objective in study.objectives]))


def _lines(study: Study, record: Record) -> Iterator[str]:
    """What the trial is, how it ended, and what it was trained with."""
    training = record.training
    why = f" ({because(record.reason)})" if record.reason else ""
    yield f"{training.name}: {record.state.value.lower()}{why}"
    for objective in study.objectives if record.values else ():
        taken, interval = objective.value(record.curves[objective.key])
        yield f"{objective.key} {taken:.5g}, taken at interval {interval}"
    if training.assignment is not None:
        yield f"lr {training.assignment.lr:.4g}"
        authors = {site.path: site.rate for site in study.sites}
        for site, rate in training.assignment.rates.items():
            yield f"rate {rate:.3f}  {site} (author's {authors.get(site, 0.0):g})"
        for key, value in training.assignment.values.items():
            yield f"{key} {shown(value)}"
    seeds = ", ".join(f"{name} {seed}" for name, seed in training.seeds.to_json().items())
    again = f", attempt {training.attempt}" if training.attempt > 1 else ""
    yield f"seeds: {seeds}{again}"
    if record.started is not None:
        yield f"worker {record.worker}, {_time(record.started)} to {_time(record.ended)}"


def because(reason: str) -> str:
    """Why a training ended; a pruned one trains on for the interval in which that is decided."""
    words = reason.removeprefix("pruned at ")
    return reason if words == reason else f"decided at {words}"


def _time(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if moment else "…"


SHOWN = ("train/loss", "val/nll", "val/accuracy", "val/rmse", "gap", "lr", "time/seconds")


def _curve_table(record: Record, objectives: Sequence[str]) -> Any:
    from rich.table import Table

    keys = [key for key in dict.fromkeys([*objectives, *SHOWN]) if key in record.curves]
    table = Table("interval", *keys, box=None)
    for i in range(record.intervals_done):
        row = [f"{record.curves[k][i]:.5g}" if i < len(record.curves[k]) else "" for k in keys]
        table.add_row(str(i + 1), *row)
    return table


def to_json(record: Record) -> dict[str, Any]:
    """A training as plain JSON values."""
    training = record.training
    return {
        "name": training.name,
        "kind": training.kind,
        "number": training.number,
        "state": record.state,
        "reason": record.reason,
        "values": record.values,
        "best_interval": record.best_interval,
        "assignment": training.assignment and training.assignment.to_json(),
        "seeds": training.seeds.to_json(),
        "attempt": training.attempt,
        "worker": record.worker,
        "started": record.started and record.started.isoformat(),
        "ended": record.ended and record.ended.isoformat(),
        "curves": {key: list(curve) for key, curve in record.curves.items()},
    }


@app.command()
def replay(
    name: NameArgument,
    number: NumberArgument,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda[:N]|mps", help="Where to train.")
    ] = "auto",
    project: ProjectOption = None,
    storage: StorageOption = None,
) -> None:
    """Train a trial again, solo, and compare it with what was recorded; exit 1 where it differs."""
    from droptune.workers.device import find_device
    from droptune.workers.replay import replay as train_again

    study = open_study(name, storage)
    root = (project or study.project(config(storage).root)).resolve()
    replayed = train_again(study, number, root, find_device(device))
    print(replayed.text())
    if not replayed.agrees:
        raise typer.Exit(1)
