"""How much memory a device has left, how much is used, and whether it was too little."""

from __future__ import annotations

import os
from pathlib import Path

import torch

SHARE_OF_HOST = 0.25  # of the memory that is free may be used
SHARE_OF_DEVICE = 0.85


def free_memory(device: torch.device) -> int:
    """Bytes that a group may use on this device: a share of what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * SHARE_OF_DEVICE)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        return int(kilobytes * 1024 * SHARE_OF_HOST)
    except (OSError, StopIteration):
        return 4 * 2**30


def used_memory(device: torch.device, *, reset: bool = False) -> int:
    """Bytes in use: the device's peak since `reset`, or the process's resident memory."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )
