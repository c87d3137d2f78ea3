"""What every launcher holds to, whatever its engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_worker import make_fake_python

from droptune.errors import LaunchError
from droptune.launch import LAUNCHERS, Order, make_launcher

URL = "postgresql://somebody:hunter2@db.example.org/trials"

# A stand-in for every engine's client: it answers as sbatch does, the others say nothing useful
CLIENT = """
import os, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write(" ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print("4711")
"""
NEEDED = {"kubernetes": {"image": "droptune-worker:0.1.0"}}
ENGINES = [name for name, launcher in LAUNCHERS.items() if not launcher.one_machine]


@pytest.fixture(autouse=True)
def engines(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("DROPTUNE_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "kubectl", "ray"):
        (folder / name).write_text(f"#!{sys.executable} -IS\n{CLIENT}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))


@pytest.fixture
def order(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    return Order("digits", project, URL, workers=3, device="cpu")


def make(name, tmp_path, **table):
    if name == "local":
        table = {"python": str(make_fake_python(tmp_path / "fake", "0")), **table}
    return make_launcher(name, {**NEEDED.get(name, {}), **table}, URL)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_one_job_per_worker_with_a_name_of_its_own(name, tmp_path, order):
    recorded = []
    jobs = make(name, tmp_path).submit(order, recorded.extend)
    assert recorded == list(jobs)
    assert [job.worker for job in jobs] == [0, 1, 2]
    assert len({job.name for job in jobs}) == 3
    assert all(job.name.startswith(f"{name} ") and job.study == "digits" for job in jobs)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_describing_writes_and_starts_nothing(name, tmp_path, order):
    said = make(name, tmp_path).describe(order)
    assert said.endswith("\n")
    assert "droptune" in said
    assert "digits" in said
    assert list(order.project.iterdir()) == []
    assert not (tmp_path / "notes").exists()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_database_url_is_in_no_command_line_and_no_description(name, tmp_path, order):
    launcher = make(name, tmp_path)
    launcher.submit(order, lambda jobs: None)
    notes = tmp_path / "notes"
    seen = launcher.describe(order) + (notes.read_text() if notes.exists() else "")
    assert "hunter2" not in seen + repr(order) + repr(launcher)


@pytest.mark.parametrize("name", ENGINES)
def test_options_after_two_dashes_reach_the_engine_as_they_are(name, tmp_path, order):
    given = Order("digits", order.project, URL, options=("--account=a b", "-x", "$(no)"))
    make(name, tmp_path).submit(given, lambda jobs: None)
    for line in (tmp_path / "notes").read_text().splitlines():
        assert "--account=a b -x $(no)" in line


@pytest.mark.parametrize("name", LAUNCHERS)
def test_setup_lines_come_before_the_worker(name, tmp_path, order):
    said = make(name, tmp_path, setup=["source /opt/env.sh", "ulimit -n 4096"]).describe(order)
    assert said.index("source /opt/env.sh") < said.index("ulimit -n 4096") < said.index("--project")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("url", ["sqlite:///droptune.db", "sqlite+pysqlite:////srv/t.db"])
def test_sqlite_is_refused_where_workers_are_elsewhere(name, url):
    with pytest.raises(LaunchError, match="SQLite file: use PostgreSQL or MySQL"):
        make_launcher(name, NEEDED.get(name, {}), url)


def test_sqlite_is_fine_on_one_machine():
    assert make_launcher("local", {}, "sqlite:///droptune.db").name == "local"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_lines_of_the_configuration_are_checked(name):
    with pytest.raises(LaunchError, match=rf"\[launch\.{name}\] has no key 'setpu' \(did you mean"):
        make_launcher(name, {"setpu": []}, URL)
    with pytest.raises(LaunchError, match=r"setup = 'module load' is not a list of strings"):
        make_launcher(name, {"setup": "module load"}, URL)
    with pytest.raises(LaunchError, match=r"restarts = True is not a whole number"):
        make_launcher(name, {"restarts": True}, URL)


def test_an_unknown_launcher_is_answered_with_the_nearest():
    with pytest.raises(LaunchError, match=r"no launcher 'slrum' \(did you mean 'slurm'\?\)"):
        make_launcher("slrum", {}, URL)


@pytest.mark.parametrize("values", [{"workers": 0}, {"study": "a\0b"}])
def test_impossible_orders_are_refused(values):
    with pytest.raises(LaunchError):
        Order(**{"study": "digits", "project": Path("/"), "storage": URL, **values})


def test_launchers_import_neither_torch_nor_optuna_nor_sqlalchemy():
    """One starts workers from a login node with little memory, many times a day."""
    heavy = ["torch", "optuna", "sqlalchemy", "mlflow", "ray", "kubernetes", "numpy"]
    program = f"import sys, droptune.launch; print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"[]\n"
