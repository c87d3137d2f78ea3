"""The mask's arithmetic as one CUDA kernel: one launch where tensor operations take six."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

log = logging.getLogger("droptune.sites")

Drawn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hashed indices [n], first and second word of the keys, thresholds), all int32, to 0 or 1."""

DEVICES = ("cuda",)  # that it is compiled for

TEXT = """
template <typename T> T drawn(T index, T first, T second, T threshold) {
    unsigned int x = static_cast<unsigned int>(index ^ first) * 0x7FEB352Du;
    x ^= x >> 16;
    x = (x ^ static_cast<unsigned int>(second)) * 0x846CA68Bu;
    return static_cast<T>(static_cast<int>(x) >= static_cast<int>(threshold));
}
"""

_SCHEMA = "drawn(Tensor indices, Tensor first, Tensor second, Tensor threshold) -> Tensor"
_operations = torch.library.Library("droptune", "DEF")  # type: ignore[no-untyped-call]
_operations.define(_SCHEMA)  # type: ignore[no-untyped-call]


def operation_for(reference: Drawn) -> Drawn:
    """The kernel as an operation of torch, which a recording of operations sees."""

    def drawn(*numbers: Tensor) -> Tensor:
        return kernel_for(numbers[0].device, reference)(*numbers)

    _operations.impl("drawn", drawn, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    return cast(Drawn, torch.ops.droptune.drawn.default)


@functools.cache
def kernel_for(device: torch.device, reference: Drawn) -> Drawn:
    """The kernel for a CUDA device, compiled by torch at its first call; `reference` where it
    cannot be compiled or does not give the same bits."""
    kernel = cast(Drawn, torch.cuda.jiterator._create_jit_fn(TEXT))
    return checked(kernel, reference, device)


def checked(kernel: Drawn, reference: Drawn, device: torch.device) -> Drawn:
    """`kernel` if it does on this device what `reference` does, else `reference`."""
    indices, *words = example(device)
    shapes = words, [word[0, 0] for word in words]  # of many slots, and of one alone
    try:
        if all(torch.equal(kernel(indices, *w), reference(indices, *w)) for w in shapes):
            return kernel
        reason = "it gives other bits"
    except Exception as error:  # whatever a driver or a compiler says
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    log.warning("masks are drawn without their CUDA kernel, slower: %s", reason)
    return reference


def example(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices [n], words and thresholds [slots, 1], negative ones among them."""
    words = torch.arange(-8, 8, dtype=torch.int32, device=device).unsqueeze(1) * 123_456_789
    indices = torch.arange(-500, 500, dtype=torch.int32, device=device) * 2_345_671
    return indices, words, words.flip(0), words
