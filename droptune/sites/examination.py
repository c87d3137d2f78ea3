"""The sites of what a command line names: a program, or a bare model with example inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from droptune.errors import SiteError
from droptune.program.loading import load_program_or_model
from droptune.program.program import Program
from droptune.program.soundness import check_model
from droptune.program.source import blamed, project_root
from droptune.sites.discovery import find_program_sites, find_sites
from droptune.sites.site import Discovery

_WRITTEN = re.compile(
    r"((?P<name>[^\W\d]\w*)=)?(?P<shape>\d+([x,]\d+)*)(:((?P<low>-?\d+)\.\.(?P<high>-?\d+)|bool))?"
)
HOW = (
    "--input 1,1,28,28 for floats, 2,16:0..999 for whole numbers such as tokens, 2,16:bool, "
    "attention_mask=2,16:1..1 by name; one --input for each"
)


@dataclass(frozen=True)
class ExampleInput:
    """One random input of a model: normal floats, whole numbers from `low` to `high`, or True."""

    name: str | None
    shape: tuple[int, ...]
    between: tuple[int, int] | None = None
    is_bool: bool = False

    @classmethod
    def parse(cls, text: str) -> ExampleInput:
        """`[NAME=]SHAPE[:LOW..HIGH]` or `[NAME=]SHAPE:bool`. Raises SiteError."""
        found = _WRITTEN.fullmatch(text.strip())
        if found is None:
            raise SiteError(f"{text!r} is no example input: write {HOW}")
        shape = tuple(int(n) for n in re.split("[x,]", found["shape"]))
        between = None if found["low"] is None else (int(found["low"]), int(found["high"]))
        if between is not None and between[0] > between[1]:
            raise SiteError(f"{text!r} goes from {between[0]} to {between[1]}: write {HOW}")
        return cls(found["name"], shape, between, text.endswith(":bool"))

    def tensor(self) -> Tensor:
        if self.is_bool:
            return torch.ones(self.shape, dtype=torch.bool)
        if self.between is not None:
            return torch.randint(self.between[0], self.between[1] + 1, self.shape)
        return torch.randn(self.shape)


def examine(reference: str, folder: Path, inputs: Sequence[ExampleInput] = ()) -> Discovery:
    """The sites of a program, or of a bare model (a class or function without arguments, or a
    built one) on random inputs. Raises ProgramError or SiteError in one line."""
    found = load_program_or_model(reference, project_root(folder))
    if isinstance(found, Program) and not inputs:
        found.check()
        return find_program_sites(found)
    if not inputs:
        raise SiteError(f"{reference} is a model without a program: say what it is given: {HOW}")
    with blamed("building the model"):
        model = found.model() if isinstance(found, Program) else found()
    check_model(model)
    given = [each.tensor() for each in inputs if each.name is None]
    named = {each.name: each.tensor() for each in inputs if each.name is not None}
    return find_sites(model, [given, named], forward=lambda model, _: model(*given, **named))
