"""Starting workers where an engine can: one launcher per engine, one line in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from droptune.errors import LaunchError, nearest
from droptune.launch.job import Job, Record
from droptune.launch.kubernetes import KubernetesLauncher
from droptune.launch.launcher import Launcher
from droptune.launch.local import LocalLauncher
from droptune.launch.order import Order
from droptune.launch.ray import RayLauncher
from droptune.launch.slurm import SlurmLauncher

LAUNCHERS: dict[str, type[Launcher]] = {
    launcher.name: launcher
    for launcher in (LocalLauncher, SlurmLauncher, KubernetesLauncher, RayLauncher)
}


def make_launcher(name: str, table: Mapping[str, Any], storage: str) -> Launcher:
    """The launcher of that name, as `[launch.<name>]` in droptune.toml describes it.

    Raises:
        LaunchError: no such launcher, a wrong line in the file, or SQLite with workers elsewhere.
    """
    if name not in LAUNCHERS:
        raise LaunchError(f"no launcher {name!r}{nearest(name, LAUNCHERS)}")
    launcher = LAUNCHERS[name].of(table)
    if not launcher.one_machine and storage.partition(":")[0].startswith("sqlite"):
        raise LaunchError(
            f"{name} starts workers on other machines and the storage is an SQLite file: use "
            "PostgreSQL or MySQL (storage in droptune.toml, or DROPTUNE_STORAGE), or "
            "`droptune launch local`"
        )
    return launcher


__all__ = ["LAUNCHERS", "Job", "Launcher", "Order", "Record", "make_launcher"]
