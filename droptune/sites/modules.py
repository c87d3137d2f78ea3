"""The modules of a model: how they are called, and which of them are nothing but dropout."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from droptune.sites.dropout import Recognised, recognise

# What wrappers put in front of the names of a model's modules.
_WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def module_paths(model: nn.Module) -> dict[nn.Module, str]:
    """Each module's path, without what wrappers put in front of it. A module that is registered
    twice has the first."""
    named = dict(model.named_modules())
    wrapping = {name for name in named if _is_wrapped(named, name)}
    return {module: _unwrapped(name, wrapping) for name, module in named.items()}


def _is_wrapped(named: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module is all that its parent holds, under the name that wrappers give."""
    parent, _, own = name.rpartition(".")
    if own not in _WRAPPERS or parent not in named:
        return False
    children = list(named[parent].named_children())
    return len(children) == 1 and not list(named[parent].named_parameters(recurse=False))


def _unwrapped(name: str, wrapping: set[str]) -> str:
    parts = name.split(".")
    prefixes = (".".join(parts[: end + 1]) for end in range(len(parts)))
    return ".".join(
        part for part, whole in zip(parts, prefixes, strict=True) if whole not in wrapping
    )


def recognised_modules(paths: Mapping[nn.Module, str]) -> list[tuple[nn.Module, Recognised]]:
    """The modules that are nothing but dropout."""
    found = ((module, recognise(module)) for module in paths)
    return [(module, what) for module, what in found if what is not None]
