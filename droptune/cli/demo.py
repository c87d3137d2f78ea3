"""`droptune demo`: the whole job on data that ships with a dependency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from droptune.cli.options import StorageOption, command, open_storage, writing


def demo(
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="CPU workers; default: the cores."),
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Tune a small network on scikit-learn's digits: sites, study, confirmation, verdict, MLflow.

    Writes droptune.db, mlflow.db and droptune-demo/ in the working directory; needs no network
    and no GPU.
    """
    from droptune.cli.running import check_devices, run_here
    from droptune.cli.sites import show
    from droptune.cli.study import introduce
    from droptune.preparation import prepare
    from droptune.program.source import project_root
    from droptune.space.grouping import suggest_groups
    from droptune.spec.spec import StudySpec
    from droptune.study import Study

    check_devices("auto", workers)
    file = _unpack(Path.cwd() / "droptune-demo")
    root = project_root(file)
    prepared = prepare(StudySpec.load(file), root)
    shown = file.relative_to(Path.cwd())
    print(f"the model and its data: {shown.with_suffix('.py')}, the study file: {shown}\n")
    show(prepared.discovery, suggest_groups(prepared.sites))
    study, before = Study.create(open_storage(storage, create=True), prepared)
    introduce(study, prepared, before)
    run_here(study, root, storage=storage, workers=workers)
    print("\nyour own model, where FILE.py holds `program = droptune.classification(model=…, …)`:")
    for words in (("sites", "FILE.py"), ("study", "init", "FILE.py")):
        print(f"  {command(*words)}")
    print(f"  {command('study', 'run', 'FILE.yaml', storage=storage)}")


def _unpack(folder: Path) -> Path:
    """Copy the demo's program and study file where the user can read and change them."""
    from importlib.resources import files

    with writing(folder, "run the demo in a folder of your own"):
        folder.mkdir(exist_ok=True)
        for name in ("digits_mlp.py", "digits_mlp.yaml"):
            target = folder / name
            if not target.exists():
                content = files("droptune.studies").joinpath(name).read_bytes()
                target.write_bytes(content)
    return folder / "digits_mlp.yaml"
