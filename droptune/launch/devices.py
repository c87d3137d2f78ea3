"""Which devices an engine assigned to a process: pure functions over its environment.

CUDA takes indices, `GPU-…` and `MIG-…` ids in CUDA_VISIBLE_DEVICES and stops reading at the first
entry that names no device ("-1", "NoDevFiles"): an entry is passed on as it is, never through
`int`. Slurm may assign a GPU and leave CUDA_VISIBLE_DEVICES unset.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence

from droptune.errors import ConfigurationError, LaunchError

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ENTRY = re.compile(r"\d+|GPU-[0-9A-Za-z-]+|MIG-[0-9A-Za-z/-]+")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_visible(value: str) -> tuple[str, ...]:
    """Entries of CUDA_VISIBLE_DEVICES that CUDA will use; () where it hides every device."""
    entries: list[str] = []
    for part in value.split(","):
        entry = part.strip()
        if not _ENTRY.fullmatch(entry):
            break
        entries.append(entry)
    return tuple(entries)


def parse_indices(value: str) -> tuple[str, ...]:
    """Slurm's list of indices: "0,2-3" is ("0", "2", "3"); () where it is no such list."""
    indices: list[str] = []
    for part in value.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            return ()
        first, last = int(match[1]), int(match[2] or match[1])
        indices.extend(str(index) for index in range(first, last + 1))
    return tuple(indices)


def assigned_devices(environ: Mapping[str, str], present: int) -> tuple[str, ...] | None:
    """The CUDA devices that are this process's own, as entries of CUDA_VISIBLE_DEVICES.

    `present` is how many GPUs the process can see (`len(present_gpus())`). None: nobody assigned
    any, or the engine hides the others already: all that are seen may be used.

    Raises:
        ConfigurationError: Slurm assigned some of the GPUs and does not say which.
    """
    if VISIBLE in environ:
        return parse_visible(environ[VISIBLE])
    listed = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS") or ""
    if indices := parse_indices(listed):
        return None if len(indices) == present else indices
    count = environ.get("SLURM_GPUS_ON_NODE", "")
    if count.isdigit() and 0 < int(count) < present:
        raise ConfigurationError(
            f"Slurm assigned {count} of {present} GPUs and does not say which "
            "(neither CUDA_VISIBLE_DEVICES nor SLURM_JOB_GPUS is set): set Flags=nvidia_gpu_env "
            "in gres.conf, or start the worker with CUDA_VISIBLE_DEVICES"
        )
    return None


def restrict_devices(environ: MutableMapping[str, str], present: int) -> None:
    """Make CUDA see the assigned devices only; call before torch is imported."""
    entries = assigned_devices(environ, present)
    if entries is not None and VISIBLE not in environ:
        environ[VISIBLE] = ",".join(entries)
        environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # Slurm counts as the driver does


def parse_nvidia_smi(listing: str) -> tuple[str, ...]:
    """UUIDs in `nvidia-smi -L`: of each GPU, or of its MIG instances where it has any."""
    devices: list[str] = []
    for line in listing.splitlines():
        match = re.search(r"\(UUID: ([^)]+)\)", line)
        if match is None:
            continue
        whole_gpu = devices and devices[-1].startswith("GPU-")
        if match[1].startswith("MIG-") and whole_gpu:
            devices.pop()
        devices.append(match[1])
    return tuple(devices)


def present_gpus() -> tuple[str, ...]:
    """UUIDs of the NVIDIA GPUs that this process may use, whatever CUDA_VISIBLE_DEVICES says."""
    program = shutil.which("nvidia-smi")
    return () if program is None else _listed(program)


@functools.cache  # it may take seconds, and a command asks when it checks and when it starts
def _listed(program: str) -> tuple[str, ...]:
    try:
        result = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_nvidia_smi(result.stdout) if result.returncode == 0 else ()


def own_gpus(environ: Mapping[str, str], present: Sequence[str]) -> tuple[str, ...]:
    """The GPUs of this process, each as one entry of CUDA_VISIBLE_DEVICES."""
    entries = assigned_devices(environ, len(present))
    return tuple(present) if entries is None else entries


def select_gpus(device: str, gpus: Sequence[str]) -> tuple[str, ...]:
    """Those of `gpus` that `device` names; () where it means no CUDA device.

    `device` is auto, cpu, mps, cuda or cuda:0,2 (positions in `gpus`).

    Raises:
        LaunchError: no such device.
    """
    if device in ("cpu", "mps") or (device == "auto" and not gpus):
        return ()
    positions = parse_indices(device.removeprefix("cuda:")) if device.startswith("cuda:") else ()
    if not positions and device not in ("auto", "cuda"):
        raise LaunchError(f"--device {device}: possible are auto, cpu, mps, cuda, cuda:0,2")
    if not gpus:
        raise LaunchError(f"--device {device}: no NVIDIA GPU was found here; use --device cpu")
    if device in ("auto", "cuda"):
        return tuple(gpus)
    beyond = [index for index in positions if int(index) >= len(gpus)]
    if beyond or len(set(positions)) < len(positions):
        wrong = beyond[0] if beyond else next(i for i in positions if positions.count(i) > 1)
        raise LaunchError(f"--device {device}: {wrong} is not one of 0 to {len(gpus) - 1}, once")
    return tuple(gpus[int(index)] for index in positions)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
