"""`droptune demo`: the whole job on data that ships with a dependency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from droptune.cli.options import StorageOption, open_storage


def demo(
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="CPU workers; default: the cores.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Tune a small network on scikit-learn's digits: sites, study, confirmation, verdict, MLflow.

    Writes droptune.db, mlflow.db and droptune-demo/ in the working directory; needs no network
    and no GPU.
    """
    from droptune.cli.running import run_here
    from droptune.cli.sites import show
    from droptune.cli.study import introduce
    from droptune.preparation import prepare
    from droptune.program.source import project_root
    from droptune.space.grouping import suggest_groups
    from droptune.spec.spec import StudySpec
    from droptune.study import Study

    file = _unpack(Path.cwd() / "droptune-demo")
    root = project_root(file)
    prepared = prepare(StudySpec.load(file), root)
    print(f"the model and its data: {file.with_suffix('.py')}, the study: {file}\n")
    show(prepared.discovery, suggest_groups(prepared.sites))
    study, created = Study.create(open_storage(storage, create=True), prepared)
    introduce(study, prepared, created)
    run_here(study, root, file, workers=workers)
    print(_NEXT)


_NEXT = """
your own model, where FILE.py holds `program = droptune.classification(model=…, train=…, …)`:
  droptune sites FILE.py
  droptune study init FILE.py
  droptune study run FILE.yaml"""


def _unpack(folder: Path) -> Path:
    """Copy the demo's program and study file where the user can read and change them."""
    from importlib.resources import files

    folder.mkdir(exist_ok=True)
    for name in ("digits_mlp.py", "digits_mlp.yaml"):
        target = folder / name
        if not target.exists():
            content = files("droptune.studies").joinpath(name).read_bytes()
            target.write_bytes(content)
    return folder / "digits_mlp.yaml"
