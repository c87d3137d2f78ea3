"""`droptune study`: create, run, watch and read studies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from droptune.cli.options import (
    JsonOption,
    NameArgument,
    StorageOption,
    config,
    open_storage,
    open_study,
    print_json,
)

if TYPE_CHECKING:
    from droptune.preparation import Prepared
    from droptune.spec.spec import StudySpec
    from droptune.storage import StudySummary
    from droptune.study import Study

app = typer.Typer(no_args_is_help=True)
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The study file (YAML).")]
RenameOption = Annotated[
    str | None, typer.Option("--name", help="Another name than the file says.")
]


@app.command()
def init(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="file.py[:name]")],
    output: Annotated[Path | None, typer.Option("-o", help="Default: beside the program.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a study file for PROGRAM, filled with its sites and the author's rates."""
    from droptune.errors import SpecError
    from droptune.program.program import load_program
    from droptune.program.source import project_root
    from droptune.sites.installed import find_program_sites
    from droptune.space.template import study_file

    path = output or Path(program.partition(":")[0]).with_suffix(".yaml")
    if path.exists() and not force:
        raise SpecError(f"{path} exists; give another file with -o, or replace it with --force")
    loaded = load_program(program, project_root(Path.cwd()))
    sites = find_program_sites(loaded).sites
    path.write_text(study_file(program, path, loaded, sites), encoding="utf-8")
    print(f"wrote {path}: {len(sites)} sites")
    print(f"next: droptune study run {path}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of study files."""
    from droptune.spec.spec import json_schema

    print_json(json_schema())


@app.command()
def create(file: FileArgument, name: RenameOption = None, storage: StorageOption = None) -> None:
    """Create the study in SQL; print its predicted cost and the next command."""
    study, prepared, created = _create(file, name, storage)
    introduce(study, prepared, created)
    print(f"next: droptune worker start {study.name} --until-done")


def _create(file: Path, name: str | None, url: str | None) -> tuple[Study, Prepared, bool]:
    from droptune.preparation import prepare
    from droptune.study import Study

    spec, root = _load(file, name)
    prepared = prepare(spec, root)
    study, created = Study.create(open_storage(url, create=True), prepared)
    return study, prepared, created


def _load(file: Path, name: str | None) -> tuple[StudySpec, Path]:
    from droptune.program.source import project_root
    from droptune.spec.spec import StudySpec

    spec = StudySpec.load(file)
    return (spec.renamed(name) if name else spec), project_root(file.resolve())


def introduce(study: Study, prepared: Prepared, created: bool) -> None:
    """Say what the study is and what it will cost."""
    print(f"study {study.name!r} {'created' if created else 'continued'}: {prepared.describe()}")
    for line in [*prepared.notes(), *prepared.space.describe()]:
        print(f"  {line}")
    if study.pruner.note:
        print(f"  {study.pruner.note}")
    trials = study.spec.budget.trials
    search = f"up to {trials} × {study.intervals}" if trials else f"trials of {study.intervals}"
    cost = study.cost()
    print(
        f"  cost: {search} intervals of search, then {cost.least} to {cost.most} confirmations "
        f"({cost.intervals_least} to {cost.intervals_most} intervals)"
    )


@app.command()
def run(
    file: FileArgument,
    name: RenameOption = None,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda:0,2", help="Devices of this machine.")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="CPU workers; default: the cores.")
    ] = None,
    width: Annotated[str, typer.Option("--width", metavar="auto|K")] = "auto",
    confirm: Annotated[
        bool, typer.Option("--confirm/--no-confirm", help="Confirm the winner on fresh seeds.")
    ] = True,
    storage: StorageOption = None,
) -> None:
    """Create or continue the study, train it here, confirm, and report."""
    from droptune.cli.running import run_here

    study, prepared, created = _create(file, name, storage)
    introduce(study, prepared, created)
    run_here(
        study, prepared.root, file, device=device, workers=workers, width=width, confirm=confirm
    )


@app.command("list")
def list_(json: JsonOption = False, storage: StorageOption = None) -> None:
    """List the studies of the database."""
    summaries = open_storage(storage).studies()
    if json:
        print_json([asdict(summary) for summary in summaries])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("study", "state", "trials", "running", "best", "created", box=None)
    for s in summaries:
        state = s.phase if s.status == "active" else s.status
        best = f"{s.best:.5g}" if s.best is not None else ""
        created = f"{s.created:%Y-%m-%d %H:%M}"
        table.add_row(s.name, state, str(_finished(s)), str(s.running), best, created)
    Console().print(table)


def _finished(summary: StudySummary) -> int:
    return sum(count for state, count in summary.trials.items() if state.finished)


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
        print_json({"name": study.name, "phase": study.phase(), "trainings": trainings})
        return
    from rich.console import Console

    from droptune.cli import panel

    if watch:
        panel.watch(study, lambda: study.phase() in ("done", "stopped"), seconds=1.0)
        return
    Console().print(panel.panel(study))
    for line in _news(study):
        print(line)


def _news(study: Study) -> Iterator[str]:
    """Who trains what, and what is wrong with the mirror."""
    for worker in study.storage.list_workers():
        mine = [h for h in worker.holds if h.study == study.name]
        if mine:
            trainings = ", ".join(h.training.name for h in mine[:6])
            more = f" and {len(mine) - 6} more" if len(mine) > 6 else ""
            yield f"worker {worker.id} ({worker.host}, {worker.device}): {trainings}{more}"
    reason = study.storage.mirror_state(study.row.id).get("reason")
    if reason:
        yield f"MLflow is behind: {reason}"


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
    top: Annotated[int | None, typer.Option("--top", min=1, help="Front runners.")] = None,
    max_seeds: Annotated[int | None, typer.Option("--max-seeds", min=3)] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Leave each group of sites out.")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Queue confirmations (or more of them) for the workers; trains nothing itself."""
    study = open_study(name, storage)
    queued = study.confirm(top=top, max_seeds=max_seeds, ablate=ablate)
    print(f"{queued} trainings queued; next: droptune worker start {name} --until-done")


@app.command()
def report(
    name: NameArgument,
    output: Annotated[Path | None, typer.Option("-o", help="Default: NAME.html.")] = None,
    format: Annotated[str, typer.Option("--format", metavar="html|markdown|text|json")] = "html",
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
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


@app.command()
def export(
    name: NameArgument,
    output: Annotated[Path, typer.Option("-o", help="FILE.csv, FILE.json or FILE.parquet")],
    storage: StorageOption = None,
) -> None:
    """Write every training with its assignment, measurements and end to a file."""
    from droptune.export import write

    rows = write(open_study(name, storage).records(), output)
    print(f"wrote {output}: {rows} rows")


@app.command()
def stop(name: NameArgument, storage: StorageOption = None) -> None:
    """Stop a study on every worker; nothing is lost, `study resume` goes on."""
    _set_status(name, storage, "stopped")
    print(f"study {name!r} stopped; go on with: droptune study resume {name}")


@app.command()
def resume(name: NameArgument, storage: StorageOption = None) -> None:
    """Let workers go on with a stopped study."""
    _set_status(name, storage, "active")
    print(f"study {name!r} is active; next: droptune worker start {name} --until-done")


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
    from droptune.trainers.checkpoint import CheckpointStore

    store = CheckpointStore.of(study, config(storage).root)
    ids = study.storage.delete_study(name)
    for training_id in ids:
        store.delete(training_id)
    forget_jobs(study.storage, name)
    print(f"study {name!r} deleted")
