"""What the README says to copy and paste runs as it stands, with a small budget."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from command import run

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.partition("## Your model in 15 lines")[2].partition("\n## ")[0]
SMALL = {"epochs: 20": "epochs: 2", "trials: 60": "trials: 4", "trials: 5": "trials: 1"}


def test_the_readmes_own_model_is_tuned_by_the_readmes_own_commands(tmp_path):
    program, commands = re.findall(r"```(?:python)?\n(.*?)```", SECTION, re.DOTALL)
    assert len([line for line in program.splitlines() if line]) <= 15
    (tmp_path / "my_model.py").write_text(program)
    said = {}
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)[1:]
        if words[:2] == ["mirror", "ui"]:  # serves until it is interrupted
            continue
        said[words[1]] = run(tmp_path, *words)
        if words[1] == "init":
            shrink(tmp_path / "my_model.yaml")
    assert "layers.2" in said["my_model.py"]  # of `droptune sites`
    assert "recommended" in said["run"]
    assert "lr = " in said["best"]
    assert list(tmp_path.glob("*.html"))


def shrink(path):
    text = path.read_text()
    for found, instead in SMALL.items():
        assert found in text
        text = text.replace(found, instead)
    path.write_text(f"{text}\nmlflow: {{mirror: none}}\n")
