"""What a person sees while a study runs: a live panel, or a line per event when piped.

Both read SQL only, so they show all workers, wherever they run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from droptune.training import Record, State

if TYPE_CHECKING:
    from droptune.progress import Progress
    from droptune.study import Study


def watch(study: Study, done: Callable[[], bool], *, seconds: float = 0.5) -> None:
    """Show the study until `done()`; Ctrl-C is the caller's."""
    if sys.stdout.isatty():
        _live(study, done, seconds)
    else:
        _lines(study, done, seconds)


def _live(study: Study, done: Callable[[], bool], seconds: float) -> None:
    console = Console()
    with Live(panel(study), console=console, refresh_per_second=4, transient=True) as live:
        while not done():
            time.sleep(seconds)
            live.update(panel(study))
    console.print(panel(study))


def _lines(study: Study, done: Callable[[], bool], seconds: float) -> None:
    seen = {r.training.id for r in study.records() if r.state.finished}
    phase = study.phase()
    while True:
        last = done()
        for record in study.records():
            if record.state.finished and record.training.id not in seen:
                seen.add(record.training.id)
                print(event(study, record), flush=True)
        if study.phase() != phase:
            phase = study.phase()
            print(f"{study.name}: {phase}", flush=True)
        if last:
            return
        time.sleep(seconds)


def event(study: Study, record: Record) -> str:
    """One line for one training that ended."""
    objective = study.objectives[0]
    value = f" {objective.key} {record.value:.5g}" if record.value is not None else ""
    rate = ""
    if record.training.assignment is not None:
        assignment = record.training.assignment
        rate = f"  lr {assignment.lr:.3g}  mean rate {assignment.mean_rate:.2f}"
    because = f" ({record.reason})" if record.reason else ""
    state = record.state.value.lower()
    return f"{record.training.name}: {state}{because}{value}  after {record.intervals_done}{rate}"


def panel(study: Study) -> Panel:
    """The study at this moment."""
    progress = study.progress()
    rows: list[object] = [_bar(progress), _counts(progress)]
    if progress.best is not None:
        rows.append(_standings(study, progress))
    title = f"{study.name} · {study.phase()}"
    return Panel(Group(*rows), title=title, title_align="left")  # type: ignore[arg-type]


def _bar(progress: Progress) -> Table:
    row = Table.grid(padding=(0, 1))
    total = progress.total or max(progress.finished, 1)
    row.add_row(
        ProgressBar(total=total, completed=min(progress.finished, total), width=40),
        f"{progress.finished}/{progress.total or '?'} trials",
        f"{progress.per_minute:.1f} trainings/min",
        f"about {_duration(progress.seconds_left)} left" if progress.seconds_left else "",
    )
    return row


def _counts(progress: Progress) -> Text:
    counts = progress.counts
    words = [
        f"complete {counts[State.COMPLETE]}",
        f"pruned {counts[State.PRUNED]}",
        f"running {counts[State.RUNNING]}",
        f"queued {counts[State.QUEUED]}",
        f"failed {counts[State.FAIL]}",
    ]
    done, queued = progress.confirmations
    if queued:
        words.append(f"confirmations {done}/{queued}")
    return Text("  ".join(words))


def _standings(study: Study, progress: Progress) -> Table:
    table = Table("", study.objectives[0].key, "lr", "mean rate", box=None)
    rows = [("best", progress.best), *progress.baselines.items()]
    for name, record in rows:
        if record is None or record.training.assignment is None:
            table.add_row(name, "…", "", "")
            continue
        assignment = record.training.assignment
        label = f"best ({record.training.name})" if name == "best" else name
        numbers = f"{record.value:.5g}", f"{assignment.lr:.3g}", f"{assignment.mean_rate:.2f}"
        table.add_row(label, *numbers)
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
