"""droptune.toml, the environment and flags."""

from __future__ import annotations

import pytest

from droptune.errors import SpecError
from droptune.spec.config import DEFAULT_STORAGE, Config


@pytest.fixture
def project(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)

    def write(text):
        (tmp_path / "droptune.toml").write_text(text)
        return inner

    return write


def find(folder, environment=(), **flags):
    return Config.find(folder, environment=dict(environment), **flags)


def test_defaults_where_nothing_is_said(tmp_path):
    found = find(tmp_path)
    assert (found.storage, found.tracking, found.launch) == (DEFAULT_STORAGE, None, {})
    assert found.root == tmp_path
    assert found.file is None


def test_flag_counts_before_environment_before_file(project):
    folder = project('storage = "postgresql://file/x"\ntracking = "http://file"')
    named = {"DROPTUNE_STORAGE": "postgresql://env/x", "MLFLOW_TRACKING_URI": "http://env"}
    assert find(folder).storage == "postgresql://file/x"
    assert find(folder, named).storage == "postgresql://env/x"
    assert find(folder, named, storage="postgresql://flag/x").storage == "postgresql://flag/x"
    assert [find(folder).tracking, find(folder, named).tracking] == ["http://file", "http://env"]
    assert find(folder, named, tracking="http://flag").tracking == "http://flag"


def test_a_file_may_hold_the_url(project, tmp_path):
    folder = project("")
    (tmp_path / "secret").write_text("postgresql://user:word@host/x\n")
    environment = {"DROPTUNE_STORAGE_FILE": str(tmp_path / "secret")}
    found = find(folder, environment)
    assert found.storage == "postgresql://user:word@host/x"
    assert "word" not in repr(found)
    with pytest.raises(SpecError, match=r"DROPTUNE_STORAGE_FILE=.*must hold the database URL"):
        find(folder, {"DROPTUNE_STORAGE_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///runs.db", "sqlite:///{root}/runs.db"),
        ("sqlite:///sub/runs.db?timeout=5", "sqlite:///{root}/sub/runs.db?timeout=5"),
        ("sqlite+pysqlite:///runs.db", "sqlite+pysqlite:///{root}/runs.db"),
        ("sqlite:////srv/runs.db", "sqlite:////srv/runs.db"),
        ("sqlite:///~/runs.db", "sqlite:///~/runs.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql:///local", "postgresql:///local"),
    ],
)
def test_relative_files_lie_beside_the_configuration(project, tmp_path, url, expected):
    folder = project(f'storage = "{url}"')
    assert find(folder).storage == expected.format(root=tmp_path)
    assert find(folder, storage="sqlite:///here.db").storage == "sqlite:///here.db"


def test_launch_lines_are_handed_on(project, tmp_path):
    folder = project('[launch.slurm]\nsetup = ["module load cuda"]\n[launch.ray]\nrestarts = 2')
    found = find(folder)
    assert found.launch == {"slurm": {"setup": ["module load cuda"]}, "ray": {"restarts": 2}}
    assert found.root == tmp_path
    assert found.file == tmp_path / "droptune.toml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('storrage = "x"', r"unknown key storrage \(did you mean 'storage'"),
        ("storage = 3", "storage must be a string"),
        ('launch = "slurm"', "launch must be a table"),
        ("[launch]\nslurm = 3", "launch.slurm must be a table"),
        ("storage = ", "droptune.toml: Invalid value"),
    ],
)
def test_faults_are_one_line(project, text, said):
    with pytest.raises(SpecError, match=said) as caught:
        find(project(text))
    assert "\n" not in str(caught.value)
