"""Writes docs/cli.md from the commands themselves (`make docs`); a test checks for drift."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from droptune.cli import app

TARGET = Path(__file__).parent / "cli.md"


def commands(group: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command's words, groups before what is in them."""
    found = [path]
    for name, command in sorted(getattr(group, "commands", {}).items()):
        found += commands(command, (*path, name))
    return found


def text() -> str:
    runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"})
    parts = ["# Command line\n\nWritten by `make docs`; do not edit.\n"]
    for words in commands(typer.main.get_command(app)):
        help_text = runner.invoke(app, [*words, "--help"], prog_name="droptune").stdout
        lines = "\n".join(line.rstrip() for line in help_text.strip().splitlines())
        parts.append(
            f"## droptune {' '.join(words)}\n\n```\n{lines}\n```\n".replace(" \n\n", "\n\n", 1)
        )
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(text())
    print(f"wrote {TARGET}")
