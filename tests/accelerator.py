"""An accelerator without hardware, to test what runs on one where there is none.

It is a device of its own for torch, made from `accelerator.cpp`: see there. A process that loads
it has it for good, as it is the only accelerator then.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("accelerator.cpp")
NAME = "sim"


def built(folder: Path) -> Path:
    """The library, compiled where this source was not before."""
    text = SOURCE.read_bytes() + torch.__version__.encode()
    library = folder / f"accelerator-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        includes = [f"-isystem{path}" for path in include_paths()]
        paths = [f"-L{path}" for path in library_paths()]
        options = ["-O1", "-std=c++20", "-shared", "-fPIC", *includes, *paths]
        command = ["g++", str(SOURCE), "-o", str(made), *options, "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True)
        made.rename(library)
    return library


def load(folder: Path) -> None:
    """Give this process the accelerator."""
    torch.ops.load_library(str(built(folder)))
    torch.ops.sim.start()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    # moving a model there would untie tied weights, other than on CUDA
    torch.__future__.set_swap_module_params_on_conversion(True)


def _module() -> types.ModuleType:
    """What torch asks a device's own module for."""
    module = types.ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "manual_seed_all": None,
        "get_amp_supported_dtype": [torch.bfloat16],
    }
    for name, answer in answers.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    return module
