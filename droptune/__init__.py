"""droptune tunes the dropout rate of every site of a PyTorch model, alongside the learning rate.

    program = droptune.classification(model=Net, train=(x, y), batch_size=128, epochs=20, lr=1e-3)

describes what is trained; `droptune study run` tunes it from a study file, `tune` from Python.
Names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from droptune.program.program import Program
    from droptune.program.short_form import classification, regression
    from droptune.search.pruning import FairPruner
    from droptune.sites.installed import apply_rates, find_sites, restore
    from droptune.study import Study
    from droptune.tuning import tune

__all__ = [
    "FairPruner",
    "Program",
    "Study",
    "apply_rates",
    "classification",
    "find_sites",
    "regression",
    "restore",
    "tune",
]

_HOMES = {
    "FairPruner": "droptune.search.pruning",
    "Program": "droptune.program.program",
    "Study": "droptune.study",
    "apply_rates": "droptune.sites.installed",
    "classification": "droptune.program.short_form",
    "find_sites": "droptune.sites.installed",
    "regression": "droptune.program.short_form",
    "restore": "droptune.sites.installed",
    "tune": "droptune.tuning",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'droptune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
