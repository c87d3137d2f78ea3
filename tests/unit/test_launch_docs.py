"""docs/cluster.md says what is so: its commands parse, its tables are taken, its links lead on."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from droptune.cli import app
from droptune.launch import LAUNCHERS, make_launcher

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
TEXT = PAGE.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def droptune_commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line[line.index("droptune ") :] for line in lines if re.search(r"(^| )droptune ", line)]


@pytest.mark.parametrize("line", droptune_commands())
def test_commands_parse(line):
    command, words = get_command(app), shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)


def test_tables_are_taken_and_every_engine_is_described():
    tables = tomllib.loads("\n".join(blocks("toml")))["launch"]
    for name, table in tables.items():
        make_launcher(name, table, "postgresql://db/x")
    assert set(tables) | {"local"} == set(LAUNCHERS)
    assert all(f"droptune launch {name} " in TEXT for name in LAUNCHERS)


@pytest.mark.parametrize("target", re.findall(r"\]\((\.\./[^)]+)\)", TEXT))
def test_links_lead_to_files(target):
    assert (PAGE.parent / target).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bDROPTUNE_[A-Z_]+", TEXT))))
def test_variables_are_read(name):
    source = "".join(path.read_text() for path in (PAGE.parents[1] / "droptune").rglob("*.py"))
    assert f'"{name}"' in source
