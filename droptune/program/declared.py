"""Values that a program declares to be searched, beside rates and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from droptune.errors import ProgramError


def declared(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Declared values, checked: a (low, high) pair, a mapping with low, high and log, or a list of
    two or more choices. Raises ProgramError."""
    for name, values in (given or {}).items():
        if not _searchable(values):
            raise ProgramError(
                f"searched {name!r} is {values!r}: give (low, high) with low < high, "
                "{'low': …, 'high': …, 'log': True} with low > 0, or a list of choices, "
                "two or more different words or numbers"
            )
    return dict(given or {})


def _searchable(values: Any) -> bool:
    if isinstance(values, list):
        return _are_choices(values)
    if isinstance(values, Mapping):
        if not {"low", "high"} <= set(values) <= {"low", "high", "log"}:
            return False
        return _is_range((values["low"], values["high"]), log=bool(values.get("log")))
    return isinstance(values, tuple) and _is_range(values, log=False)


def _is_range(ends: tuple[Any, ...], *, log: bool) -> bool:
    if len(ends) != 2 or not all(is_number(end) and math.isfinite(end) for end in ends):
        return False
    low, high = ends
    return bool(low < high and (low > 0 or not log))


def _are_choices(values: list[Any]) -> bool:
    """Choices of one kind: mixed ones have no order, and no place on a response surface."""
    numbers = all(is_number(value) and math.isfinite(value) for value in values)
    alike = numbers or any(all(isinstance(v, kind) for v in values) for kind in (str, bool))
    return alike and len(set(values)) == len(values) > 1


def is_number(value: Any) -> bool:
    """Whether a value is a number, for which a loss may be given a 0-dim tensor."""
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
