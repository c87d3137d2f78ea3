"""How much memory a device has left, how much is used, and whether it was too little."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

SHARE_OF_HOST = 0.25  # of the memory that is free may be used
SHARE_OF_DEVICE = 0.85
# mallopt(3): M_MMAP_MAX (no block is mapped by itself), M_TRIM_THRESHOLD, M_TOP_PAD
_KEEP = {-4: 0, -1: 2**31 - 1, -2: 64 * 2**20}


def has_own_memory(device: torch.device) -> bool:
    """Whether it is an accelerator with a memory of its own, as a CUDA device is."""
    return device.type not in ("cpu", "mps", "meta")


def free_memory(device: torch.device) -> int:
    """Bytes that a group may use on this device: a share of what is free."""
    if has_own_memory(device):
        free, _ = torch.accelerator.get_memory_info(device)
        return int(free * SHARE_OF_DEVICE)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
        return int(kilobytes * 1024 * SHARE_OF_HOST)
    except (OSError, StopIteration):
        return 4 * 2**30


def used_memory(device: torch.device, *, reset: bool = False) -> int:
    """Bytes in use: the device's peak since `reset`, or the process's resident memory."""
    if has_own_memory(device):
        if reset:
            torch.accelerator.reset_peak_memory_stats(device)
            return torch.accelerator.memory_allocated(device)
        return torch.accelerator.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Let this process keep the host memory that tensors free, for the next update's tensors.

    By default glibc's malloc hands larger blocks back to the kernel at once, which then clears
    and maps every page of them anew, update for update: on a CPU a fifth of the time of a small
    convolutional network, a third of an LSTM's. Other allocators keep what they freed anyway.
    """
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _KEEP.items():
            mallopt(option, value)


def return_freed_memory() -> None:
    """Give the kernel back what was freed until now."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def empty_cache(device: torch.device) -> None:
    """Give back what the device keeps for tensors to come."""
    if has_own_memory(device):
        torch.accelerator.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )
