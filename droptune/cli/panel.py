"""What a person sees while a study runs: a live panel, or a line per event when piped.

Both read SQL only, so they show all workers, wherever they run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from droptune import answer
from droptune.cli.trial import because
from droptune.errors import StorageError, UnknownStudyError
from droptune.progress import front
from droptune.training import Record, State
from droptune.verdict.wording import counted, duration, winner_name

if TYPE_CHECKING:
    from droptune.progress import Progress
    from droptune.study import Study


def watch(study: Study, done: Callable[[], bool], *, seconds: float = 0.5) -> None:
    """Show the study until `done()` or until it is deleted; Ctrl-C is the caller's.

    While the database is away the last state stays.
    """
    show = _live if sys.stdout.isatty() else _lines
    with suppress(UnknownStudyError):
        show(study, done, seconds)


def _live(study: Study, done: Callable[[], bool], seconds: float) -> None:
    console = Console(force_terminal=True)  # or it falls silent where the terminal is closed
    redirect = sys.stderr.isatty()
    live = Live(
        panel(study), console=console, auto_refresh=False, transient=True, redirect_stderr=redirect
    )
    with _silent_keys(), live:
        while not done():
            time.sleep(seconds)
            with _patience():
                live.update(panel(study), refresh=True)
    with _patience():
        console.print(panel(study))


@contextmanager
def _silent_keys() -> Iterator[None]:
    """No ^C in the midst of the panel, which would leave pieces of it behind."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] &= ~termios.ECHOCTL
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        with suppress(termios.error):  # it may have been closed
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _lines(study: Study, done: Callable[[], bool], seconds: float) -> None:
    seen = {r.training.id for r in study.records() if r.state.finished}
    phase = study.phase()
    last = False
    while not last:
        last = done()
        with _patience():
            for record in study.records():
                if record.state.finished and record.training.id not in seen:
                    seen.add(record.training.id)
                    print(event(study, record), flush=True)
            if study.phase() != phase:
                phase = study.phase()
                if phase != "confirming" or study.spec.confirm.enabled:
                    print(f"{study.name}: {phase}", flush=True)
        if not last:
            time.sleep(seconds)


@contextmanager
def _patience() -> Iterator[None]:
    """A database that is away for a moment is asked again at the next look."""
    try:
        yield
    except UnknownStudyError:
        raise
    except StorageError:
        pass


def event(study: Study, record: Record) -> str:
    """One line for one training that ended."""
    training = record.training
    words = [f"{record.intervals_done} of {counted(training.intervals, 'interval')}"]
    words += [
        f"{objective.key} {value:.5g}"
        for objective, value in zip(study.objectives, record.values or (), strict=False)
    ]
    if training.assignment is not None:
        words.append(f"lr {training.assignment.lr:.3g}")
        words.append(f"mean rate {training.assignment.mean_rate:.2f}")
    if record.reason:
        words.append(because(record.reason))
    return f"{training.name}: {record.state.value.lower()}, {', '.join(words)}"


def panel(study: Study, *, piped: bool = False) -> Panel:
    """The study at this moment; as wide as the terminal, or as its text where it is piped."""
    progress, phase = study.progress(), study.phase()
    rows: list[object] = [Text(" · ".join(_headline(study, progress, phase)))]
    if phase in ("searching", "confirming") and not piped:
        rows.append(_bar(study, progress, phase))
    rows.append(Text(" · ".join(_counts(progress))))
    if progress.best is not None:
        rows.append(_standings(study, progress))
        rows += [Text(line) for line in (*answer.luck(study, progress), *_front(study))]
    title = f"{study.name} · {phase}"
    body = Group(*rows)  # type: ignore[arg-type]
    return Panel(body, title=title, title_align="left", expand=not piped)


def _headline(study: Study, progress: Progress, phase: str) -> Iterator[str]:
    """How far it is, how fast it goes, how long it takes."""
    done, queued = progress.confirmations
    many = f"{progress.finished} of {progress.total}" if progress.total else str(progress.finished)
    yield f"{many} trials"
    if queued:
        yield f"{done} of {counted(queued, 'confirmation')}"
    if phase not in ("searching", "confirming"):
        return
    if progress.intervals:
        yield f"{counted(progress.intervals, 'interval')} trained"
    if not progress.running:
        yield "no worker is training"
        return
    if progress.per_minute:
        digits = 0 if progress.per_minute >= 10 else 1
        yield f"{progress.per_minute:.{digits}f} trainings a minute"
    if progress.seconds_left:
        confirms = phase == "searching" and study.spec.confirm.enabled
        rest = ", then confirming" if confirms else ""
        yield f"about {duration(progress.seconds_left)} left{rest}"


def _bar(study: Study, progress: Progress, phase: str) -> Table:
    done, total = progress.finished, progress.total or 0
    if phase == "confirming":
        done, total = progress.confirmations
    elif not total:  # a budget of time or of intervals
        done, total = int(1000 * _share(study, progress)), 1000
    line = Table.grid(expand=True)  # a line of its own, as wide as there is room
    line.add_row(ProgressBar(total=max(total, 1), completed=min(done, total)))
    return line


def _share(study: Study, progress: Progress) -> float:
    limit = study.row.budget.intervals
    spent = progress.intervals / limit if limit else 0.0
    return min(max(spent, study.storage.progress(study.row.id).share), 1.0)


def _counts(progress: Progress) -> list[str]:
    counts = progress.counts
    return [
        f"running {progress.running}",
        f"complete {counts[State.COMPLETE]}",
        f"pruned {counts[State.PRUNED]}",
        f"failed {counts[State.FAIL]}",
        f"queued {counts[State.QUEUED]}",
    ]


def _front(study: Study) -> Iterator[str]:
    """How many compromises there are where there are several objectives."""
    if len(study.objectives) > 1:
        keys = " and ".join(objective.key for objective in study.objectives)
        count = counted(len(front(study.records(), study.objectives)), "trial")
        yield f"Pareto front of {keys}: {count}"


def _standings(study: Study, progress: Progress) -> Table:
    """What leads the search beside the baselines, one training each."""
    table = Table("of the search", study.objectives[0].key, "lr", "mean rate", box=None)
    first = ("best", winner_name(study.records()))
    for name, record in answer.leading(study, progress).items():
        if record is None or record.training.assignment is None:
            table.add_row(name, "…", "", "")
            continue
        assignment = record.training.assignment
        label = f"{name} ({record.training.name})" if name in first else name
        numbers = f"{record.value:.5g}", f"{assignment.lr:.3g}", f"{assignment.mean_rate:.2f}"
        table.add_row(label, *numbers)
    return table
