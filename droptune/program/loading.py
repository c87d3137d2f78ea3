"""Programs by reference: `file.py[:name]` or `package.module[:name]`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from droptune.errors import ProgramError
from droptune.program.long_form import adapt, is_long_form
from droptune.program.program import Program
from droptune.program.short_form import fresh
from droptune.program.source import defined_in, import_source, pick


def load_program(reference: str, root: Path) -> Program:
    """The program that `file.py[:name]` or `package.module[:name]` names.

    The file must lie under `root`, the project's folder. A file that would start training when
    imported is refused before it runs. Raises ProgramError.
    """
    source = import_source(reference, root)
    found = pick(source, _is_program, "program")
    if _is_model(found) or _is_built(found):
        raise ProgramError(
            f"{reference} is a model without a program: write one:\n\n{source.text.skeleton}"
        )
    try:
        return adapt(found)
    except ProgramError as error:
        raise ProgramError(f"{source.where}: {error}") from error


def load_program_or_model(reference: str, root: Path) -> Program | Callable[[], nn.Module]:
    """What a reference names, or the file's program, or its only model: a built `nn.Module`, or
    a class of one. A named function without arguments builds a model. Raises ProgramError."""
    source = import_source(reference, root)
    own = [value for value in vars(source.module).values() if defined_in(value, source)]
    fits = next((fits for fits in (_is_program, _is_built) if any(map(fits, own))), _is_model)
    found = pick(source, fits, "program or model")
    if _is_program(found):
        return adapt(found)
    if _is_built(found):
        return lambda: found
    return fresh(found, None)


def _is_program(value: Any) -> bool:
    return isinstance(value, Program) or is_long_form(value)


def _is_built(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)
