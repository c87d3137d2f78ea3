"""New sites in places that the study file names: after modules by path or by type."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from droptune.errors import SiteError, nearest
from droptune.sites.dropout import KINDS

# Activations that make a gate or an output of what they are given: dropout follows the others.
_GATES = (
    *(nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.MultiheadAttention),
    *(nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax),
)
_LAYERS = tuple(f"torch.nn.modules.{name}" for name in ("linear", "conv", "rnn"))


def suggested_insertions(paths: Mapping[nn.Module, str]) -> list[dict[str, str]]:
    """Rules for a model without dropout: after its activations, by their types.

    Where those are calls in its code, after each layer but the last: dropout in front of a
    rectifier does what it does behind it.
    """
    places = [type(module).__name__ for module in paths if _is_activation(module)]
    if not places:
        layers = [path for m, path in paths.items() if path and type(m).__module__ in _LAYERS]
        places = layers[:-1]
    return [{"after": place, "kind": "element"} for place in dict.fromkeys(places)]


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, _GATES)


def written(rules: Iterable[Mapping[str, str]]) -> str:
    """Rules as a line of the study file."""
    each = (f'{{after: "{rule["after"]}", kind: {rule["kind"]}}}' for rule in rules)
    return f"insert: [{', '.join(each)}]"


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
