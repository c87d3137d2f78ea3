"""`droptune study`: create, run, watch and read studies."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from droptune.cli.mirror import behind, unusable
from droptune.cli.options import (
    JsonOption,
    NameArgument,
    StorageOption,
    command,
    config,
    display,
    open_storage,
    open_study,
    print_json,
    writing,
)
from droptune.cli.width import WidthOption
from droptune.training import State
from droptune.verdict.wording import counted

if TYPE_CHECKING:
    from droptune.preparation import Prepared
    from droptune.spec.spec import StudySpec
    from droptune.storage import StudySummary
    from droptune.study import Study

app = typer.Typer(no_args_is_help=True)
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The study file (YAML).")]
RenameOption = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Another name than the file says.")
]


@app.command()
def init(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="file.py[:name]")],
    output: Annotated[
        Path | None, typer.Option("-o", metavar="FILE", help="Default: beside the program.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a study file for PROGRAM, filled with its sites and the author's rates.

    Where PROGRAM has no dropout, the file inserts some after its activations.
    """
    from droptune.errors import SpecError
    from droptune.program.loading import load_program
    from droptune.program.source import project_root
    from droptune.sites.installed import find_or_insert_sites
    from droptune.space.template import study_file

    path = output or Path(program.partition(":")[0]).with_suffix(".yaml")
    if path.exists() and not force:
        raise SpecError(f"{path} exists; give another file with -o, or replace it with --force")
    loaded = load_program(program, project_root(Path.cwd()))
    loaded.check()
    sites, insert = find_or_insert_sites(loaded)
    text = study_file(program, path, loaded, sites, insert)
    with writing(path):
        path.write_text(text, encoding="utf-8")
    added = ", inserted: the model has no dropout of its own" if insert else ""
    print(f"wrote {path}: {counted(len(sites), 'site')}{added}")
    print(f"next: {command('study', 'run', str(path))}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of study files."""
    from droptune.spec.spec import json_schema

    print_json(json_schema())


@app.command()
def create(file: FileArgument, name: RenameOption = None, storage: StorageOption = None) -> None:
    """Create the study in SQL; print its predicted cost and the next command."""
    study, prepared, before = _create(file, name, storage)
    introduce(study, prepared, before)
    print(f"next: {_worker(study, storage, prepared.root)}")


def _worker(study: Study, storage: str | None, root: Path | None = None) -> str:
    """The command that trains a study from here."""
    root = root or study.project(config().root)
    project = () if root == config().root else ("--project", str(root))
    return command("worker", "start", study.name, "--until-done", *project, storage=storage)


def _create(
    file: Path, name: str | None, url: str | None, *, confirm: bool | None = None
) -> tuple[Study, Prepared, StudySpec | None]:
    from droptune.errors import SpecError
    from droptune.preparation import prepare
    from droptune.spec.document import Document
    from droptune.study import Study

    spec, root = _load(file, name)
    if confirm is not None:
        spec = replace(spec, confirm=replace(spec.confirm, enabled=confirm))
    try:
        prepared = prepare(spec, root)
    except SpecError as error:
        raise Document.read(file).located(error) from error
    study, before = Study.create(open_storage(url, create=True), prepared)
    return study, prepared, before


def _load(file: Path, name: str | None) -> tuple[StudySpec, Path]:
    from droptune.program.source import project_root
    from droptune.spec.spec import StudySpec

    spec = StudySpec.load(file)
    return (spec.renamed(name) if name else spec), project_root(file.resolve())


def introduce(study: Study, prepared: Prepared, before: StudySpec | None) -> None:
    """Say what the study is, what has changed where it is continued, and what it will cost."""
    done = "created" if before is None else "continued"
    print(f"study {study.name!r} {done}: {prepared.describe()}")
    if before is not None and (changed := before.describe_changes(study.spec)):
        print(f"  changed: {changed}")
    for line in [*prepared.notes(), *prepared.space.describe()]:
        print(f"  {line}")
    if study.pruner.note:
        print(f"  {study.pruner.note}")
    trials = study.spec.budget.trials
    search = f"up to {trials} trials" if trials else "trials"
    length = counted(study.intervals, "interval")
    print(f"  cost: {search} of {length} to search, then {_confirming(study)}")


def _confirming(study: Study) -> str:
    """What confirming will cost."""
    if not study.spec.confirm.enabled:
        return "no confirmation"
    cost = study.cost()
    many, intervals = f"{cost.least}", f"{cost.intervals_least}"
    if cost.least < cost.most:
        many, intervals = f"{many} to {cost.most}", f"{intervals} to {cost.intervals_most}"
    return f"{many} confirmations ({intervals} intervals)"


@app.command()
def run(
    file: FileArgument,
    name: RenameOption = None,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda:0,2", help="Devices of this machine.")
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="CPU workers; default: the cores."),
    ] = None,
    width: WidthOption = "auto",
    confirm: Annotated[
        bool | None,
        typer.Option(
            "--confirm/--no-confirm",
            help="Confirm the winner on fresh seeds; default: what the file says.",
        ),
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Create or continue the study, train it here, confirm, and report."""
    from droptune.cli.running import check_devices, run_here

    check_devices(device, workers)
    study, prepared, before = _create(file, name, storage, confirm=confirm)
    introduce(study, prepared, before)
    run_here(study, prepared.root, storage=storage, device=device, workers=workers, width=width)


@app.command("list")
def list_(json: JsonOption = False, storage: StorageOption = None) -> None:
    """List the studies of the database."""
    summaries = open_storage(storage).studies()
    if json:
        print_json([asdict(summary) for summary in summaries])
        return
    if not summaries:
        print(f"no studies yet; create one: {command('study', 'create', 'FILE', storage=storage)}")
        return
    from rich.table import Table

    table = Table("study", "state", "trials", "running", "best of search", "created", box=None)
    for s in summaries:
        state = s.phase if s.status == "active" else s.status
        best = f"{s.best:.5g}" if s.best is not None else ""
        created = f"{s.created.astimezone():%Y-%m-%d %H:%M}"
        table.add_row(s.name, state, _trials(s), str(s.running), best, created)
    display(table)


def _trials(summary: StudySummary) -> str:
    """How many have ended, of how many where that is known."""
    ended = sum(count for state, count in summary.trials.items() if state.finished)
    return f"{ended} of {summary.budget.trials}" if summary.budget.trials else str(ended)


@app.command()
def show(
    name: NameArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and refresh.")] = False,
    json: JsonOption = False,
    storage: StorageOption = None,
) -> None:
    """Show how far a study is, what is best so far, and who trains what."""
    study = open_study(name, storage)
    study.storage.requeue_stale()
    if json:
        from droptune.cli.trial import to_json

        trainings = [to_json(record) for record in study.records()]
        mirror = [*unusable(study, storage), *behind(study.storage, name)]
        found = {"name": study.name, "phase": study.phase(), "mirror": mirror}
        print_json({**found, "trainings": trainings})
        return
    from droptune.cli import panel

    if watch:
        panel.watch(study, lambda: study.phase() in ("done", "stopped"), seconds=1.0)
        return
    display(panel.panel(study, piped=not sys.stdout.isatty()))
    for line in (*_news(study), *unusable(study, storage), *behind(study.storage, name)):
        print(line)
    if study.phase() in ("done", "stopped"):
        then = "best" if study.phase() == "done" else "resume"
        print(f"next: {command('study', then, name, storage=storage)}")
    elif all(worker.state != "alive" for worker in study.storage.list_workers()):
        print(f"no worker is alive; go on with: {_worker(study, storage)}")


def _news(study: Study) -> Iterator[str]:
    """Who trains what, and what has failed."""
    for worker in study.storage.list_workers():
        mine = [h for h in worker.holds if h.study == study.name]
        if mine:
            trainings = ", ".join(h.training.name for h in mine[:6])
            more = f" and {len(mine) - 6} more" if len(mine) > 6 else ""
            yield f"worker {worker.id} ({worker.host}, {worker.device}): {trainings}{more}"
    failed = [r for r in study.records() if r.state is State.FAIL]
    if failed:
        last = failed[-1]
        why = f" ({last.reason})" if last.reason else ""
        yield f"{counted(len(failed), 'training')} failed, at last {last.training.name}{why}"


@app.command()
def best(
    name: NameArgument,
    code: Annotated[
        bool, typer.Option("--code", help="Lines to paste into your own training script.")
    ] = False,
    json: JsonOption = False,
    storage: StorageOption = None,
) -> None:
    """Print the best rates and learning rate, against each baseline at its own best."""
    from droptune import answer

    study = open_study(name, storage)
    if json:
        print_json(answer.to_json(study))
    elif code:
        print(answer.code(study))
    else:
        print(answer.text(study))


@app.command()
def confirm(
    name: NameArgument,
    top: Annotated[
        int | None, typer.Option("--top", metavar="N", min=1, help="How many front runners.")
    ] = None,
    max_seeds: Annotated[
        int | None,
        typer.Option("--max-seeds", metavar="N", min=3, help="At most so many seeds each."),
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also the winner without each group of sites.")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Queue confirmations (or more of them) for the workers; trains nothing itself."""
    study = open_study(name, storage)
    queued = study.confirm(top=top, max_seeds=max_seeds, ablate=ablate)
    going_on = _worker(study, storage)
    if study.phase() == "stopped":
        going_on = command("study", "resume", name, storage=storage)
    if queued is None:
        print("no new trials; confirmations are queued when those begun have ended")
        print(f"next: {going_on}")
    elif queued:
        print(f"{counted(queued, 'training')} queued; next: {going_on}")
    else:
        print("nothing to queue: what was asked for is confirmed or queued already")


@app.command()
def report(
    name: NameArgument,
    output: Annotated[
        Path | None, typer.Option("-o", metavar="FILE", help="Default: NAME.html.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="html|markdown|text|json",
            help="All but html are printed without -o.",
        ),
    ] = "html",
    storage: StorageOption = None,
) -> None:
    """Write the report of a study as one self-contained HTML file (or print it)."""
    from droptune.report.report import render

    study = open_study(name, storage)
    text = render(study.evidence(), study.judge(), format)
    if format != "html" and output is None:
        print(text)
        return
    path = output or Path(f"{study.file_name}.html")
    with writing(path):
        path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


@app.command()
def export(
    name: NameArgument,
    output: Annotated[
        Path, typer.Option("-o", metavar="FILE", help="FILE.csv, FILE.json or FILE.parquet")
    ],
    storage: StorageOption = None,
) -> None:
    """Write every training with its assignment, measurements and end to a file."""
    from droptune.export import write

    records = open_study(name, storage).records()
    with writing(output):
        rows = write(records, output)
    print(f"wrote {output}: {counted(rows, 'row')}")


@app.command()
def stop(name: NameArgument, storage: StorageOption = None) -> None:
    """Stop a study on every worker; nothing is lost, `study resume` goes on."""
    _set_status(name, storage, "stopped")
    resuming = command("study", "resume", name, storage=storage)
    print(f"study {name!r} stopped; go on with: {resuming}")


@app.command()
def resume(name: NameArgument, storage: StorageOption = None) -> None:
    """Let workers go on with a stopped study."""
    _set_status(name, storage, "active")
    study = open_study(name, storage)
    if study.phase() == "done":
        print(f"study {name!r} is done; next: {command('study', 'best', name, storage=storage)}")
    else:
        print(f"study {name!r} is active; next: {_worker(study, storage)}")


def _set_status(name: str, url: str | None, status: str) -> None:
    study = open_study(name, url)
    study.storage.update_study(study.row.id, status=status)


@app.command()
def delete(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: StorageOption = None,
) -> None:
    """Delete a study with all its trainings from SQL (its mirror in MLflow stays)."""
    study = open_study(name, storage)
    if not yes:
        typer.confirm(f"Delete study {name!r} with {len(study.records())} trainings?", abort=True)
    from droptune.launch.recorded import forget_jobs

    ids = study.storage.delete_study(name)
    for root in {config().root, study.project(config().root)}:
        _delete_checkpoints(study, root, ids)
    forget_jobs(study.storage, name)
    print(f"study {name!r} deleted")


def _delete_checkpoints(study: Study, root: Path, ids: Sequence[int]) -> None:
    from droptune.trainers.checkpoint import CheckpointStore

    store = CheckpointStore.of(study, root)
    try:
        for training_id in ids:
            store.delete(training_id)
    except OSError as error:  # another user's
        print(f"checkpoints are left behind: {error.filename}: {error.strerror}")
