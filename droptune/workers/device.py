"""The device that a worker owns, and its share of the cores."""

from __future__ import annotations

import os
from contextlib import suppress

import torch

from droptune.errors import ConfigurationError


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first GPU that was assigned, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"device {name!r} cannot be used here ({reason}); "
            "possible: auto, cpu, cuda, cuda:N, mps"
        ) from None
    return device


def describe_device(device: torch.device) -> str:
    """`cpu`, or the GPU's name and index."""
    if device.type != "cuda":
        return str(device)
    return f"cuda:{device.index or 0} {torch.cuda.get_device_name(device)}"


def set_threads(asked: int | None, cores: int, workers: int) -> int:
    """Let torch use `asked` threads, else this worker's share of the cores; returns how many.

    More threads than cores make small steps ten times slower, so workers share the cores out.
    What OMP_NUM_THREADS says stands: launchers and engines set it.
    """
    if asked is not None:
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(cores // max(workers, 1), 1))
    with suppress(RuntimeError):  # once per process only
        torch.set_num_interop_threads(1)
    return torch.get_num_threads()
