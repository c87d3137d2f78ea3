"""The promises of docs/architecture.md that an import or a file name can break."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import droptune

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "mlflow", "matplotlib", "sklearn", "transformers")


def imported_by(*arguments: str, cwd: Path) -> set[str]:
    """Top-level packages that a command of ours imports."""
    code = (
        "import sys\n"
        f"sys.argv = ['droptune', *{list(arguments)!r}]\n"
        "from droptune.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('\\nIMPORTED', *{name.partition('.')[0] for name in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=True
    )
    return set(result.stdout.rpartition("IMPORTED")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("study", "--help"),
        ("study", "list"),
        ("worker", "list"),
        ("study", "best", "x"),
    ],
)
def test_commands_that_do_not_train_import_nothing_heavy(arguments, tmp_path):
    from droptune.storage import Storage

    Storage.open(f"sqlite:///{tmp_path / 'droptune.db'}", create=True)
    assert not imported_by(*arguments, cwd=tmp_path) & set(HEAVY)


def test_launchers_import_neither_torch_nor_optuna():
    code = "import sys, droptune.launch.slurm, droptune.launch.local; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "optuna", "sqlalchemy"} & set(done.stdout.split())


def test_public_names_are_guarded_and_exist():
    assert droptune.__all__ == [
        "FairPruner", "Program", "Study", "apply_rates", "classification", "find_sites",
        "regression", "restore", "tune",
    ]  # fmt: skip
    for name in droptune.__all__:
        assert getattr(droptune, name).__doc__, name


def test_no_grab_bags():
    names = {path.stem for path in (ROOT / "droptune").rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def test_command_line_page_is_current():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate
    finally:
        sys.path.pop(0)
    assert generate.TARGET.read_text() == generate.text(), "run `make docs`"
