"""`droptune trial`: one trial of a study."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from droptune.cli.options import (
    JsonOption,
    NameArgument,
    ProjectOption,
    StorageOption,
    config,
    open_study,
    print_json,
)

if TYPE_CHECKING:
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
    from rich.console import Console

    console = Console()
    training = record.training
    console.print(f"{training.name}: {record.state}{_because(record.reason)}")
    if training.assignment is not None:
        console.print(f"lr {training.assignment.lr:.6g}")
        for site, rate in training.assignment.rates.items():
            console.print(f"rate {rate:.4f}  {site}")
        for key, value in training.assignment.values.items():
            console.print(f"{key} {value}")
    seeds = ", ".join(f"{name} {seed}" for name, seed in training.seeds.to_json().items())
    console.print(f"attempt {training.attempt}, seeds: {seeds}")
    console.print(f"worker {record.worker}, {_time(record.started)} to {_time(record.ended)}")
    console.print(_curve_table(record, [objective.key for objective in study.objectives]))


def _time(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC" if moment else "…"


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


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
    device: Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda[:N]")] = "auto",
    project: ProjectOption = None,
    storage: StorageOption = None,
) -> None:
    """Train a trial again, solo, and compare it with what was recorded; exit 1 where it differs."""
    from droptune.workers.device import find_device
    from droptune.workers.replay import replay as train_again

    root = (project or config(storage).root).resolve()
    replayed = train_again(open_study(name, storage), number, root, find_device(device))
    print(replayed.text())
    if not replayed.agrees:
        raise typer.Exit(1)
