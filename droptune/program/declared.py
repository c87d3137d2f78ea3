"""Values that a program declares to be searched, beside rates and the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from droptune.errors import ProgramError


def declared(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Declared values, checked: a (low, high) pair, a mapping with low, high and log, or a list of
    two or more choices. Raises ProgramError."""
    for name, values in (given or {}).items():
        if isinstance(values, Mapping):
            good = {"low", "high"} <= set(values) <= {"low", "high", "log"}
            good = good and values["low"] < values["high"]
        elif isinstance(values, tuple):
            good = len(values) == 2 and values[0] < values[1]
        else:
            good = isinstance(values, list) and len(values) > 1
        if not good:
            raise ProgramError(
                f"searched {name!r} is {values!r}: give (low, high), "
                "{'low': …, 'high': …, 'log': True} or a list of choices"
            )
    return dict(given or {})


def is_number(value: Any) -> bool:
    """Whether a loss may be given a 0-dim tensor in the place of this value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def branches(searched: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The default values, and each other word that a loss may branch on in the default's place."""
    default = default_values(searched)
    others = [
        {**default, name: value}
        for name, values in searched.items()
        if isinstance(values, list)
        for value in values[1:]
        if not is_number(value)
    ]
    return [default, *others]


def extremes(searched: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The default values; each other end and choice in the default's place; the last of all."""
    ends = {
        name: [values["low"], values["high"]] if isinstance(values, Mapping) else list(values)
        for name, values in searched.items()
    }
    default, last = default_values(searched), {name: values[-1] for name, values in ends.items()}
    single = [{**default, name: one} for name, values in ends.items() for one in values[1:]]
    return [default, *single, last]


def default_values(searched: Mapping[str, Any]) -> dict[str, Any]:
    """A value for each declared one where no training gives it: its first choice or lowest."""
    return {
        name: values["low"] if isinstance(values, Mapping) else values[0]
        for name, values in searched.items()
    }
