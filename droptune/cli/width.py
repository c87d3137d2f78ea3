"""The option `--width` of every command that trains."""

from __future__ import annotations

from typing import Annotated

import typer

from droptune.errors import UsageError


def _checked(text: str) -> str:
    """The width as it was typed; refused before anything is made with it."""
    if text == "auto" or (text.isascii() and text.isdigit() and int(text) > 0):
        return text
    raise UsageError(f"--width {text}: possible are auto, 1, 2, 3, …")


WidthOption = Annotated[
    str,
    typer.Option(
        "--width", metavar="auto|K", callback=_checked, help="Trainings fused on each device."
    ),
]
