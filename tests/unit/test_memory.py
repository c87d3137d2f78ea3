"""Host memory: kept between updates, handed back between studies."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from droptune.trainers.memory import keep_freed_memory, return_freed_memory, used_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
cpu = torch.device("cpu")
for update in range(25):
    if update == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 * 2**20)  # 160 MiB
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
held = used_memory(cpu)
return_freed_memory()
print(pages, (held - used_memory(cpu)) / 2**20)
"""


def freed(how: str) -> tuple[float, float]:
    """Pages mapped by twenty more allocations of the same size, and MiB that were handed back."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    pages, returned = ran.stdout.split()
    return float(pages), float(returned)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_what_tensors_free_is_kept_and_can_be_handed_back():
    usual, _ = freed("not")
    kept, returned = freed("keep")
    assert kept < usual / 4
    assert returned > 150
