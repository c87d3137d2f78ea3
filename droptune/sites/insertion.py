"""New sites in places that the study file names: after modules by path or by type."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from droptune.errors import SiteError, nearest
from droptune.sites.dropout import KINDS


def insertions(
    paths: Mapping[nn.Module, str], rules: Iterable[Any]
) -> tuple[tuple[nn.Module, str], ...]:
    """The (module, kind) pairs that the rules name, each once, in the model's order.

    A rule has `after`, a glob on module paths or the name of a module type, and `kind`, both as
    fields or as keys. Raises SiteError where it names nothing.
    """
    found: dict[tuple[nn.Module, str], None] = {}
    for rule in rules:
        after, kind = _read(rule)
        _check_kind(kind)
        for module in _matching(paths, after):
            found[module, kind] = None
    order = {module: position for position, module in enumerate(paths)}
    return tuple(sorted(found, key=lambda pair: order[pair[0]]))


def _read(rule: Any) -> tuple[str, str]:
    if isinstance(rule, Mapping):
        return rule["after"], rule["kind"]
    return rule.after, rule.kind


def _check_kind(kind: str) -> None:
    possible = [name for name, entry in KINDS.items() if entry.insertable]
    if kind not in possible:
        raise SiteError(f"No dropout of kind {kind!r} can be inserted{nearest(kind, possible)}.")


def _matching(paths: Mapping[nn.Module, str], after: str) -> list[nn.Module]:
    modules = [
        module
        for module, path in paths.items()
        if fnmatch.fnmatchcase(path, after) or type(module).__name__ == after
    ]
    if not modules:
        types = {type(module).__name__ for module in paths}
        hint = nearest(after, types | set(paths.values()) - {""})
        raise SiteError(f"No module to insert dropout after matches {after!r}{hint}.")
    return modules
