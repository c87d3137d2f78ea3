"""Linear layers of many slots, whose weights' gradients lie as the weights do.

What vmap makes of `nn.Linear` multiplies the bias by 1 and gives a weight's gradient transposed:
on a CPU slow products where a layer is narrow, and then a copy against the grain.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.nn import functional

from droptune.sites.masks import slots_first


def batch_linear(model: nn.Module) -> None:
    """Let the linear layers of a model that runs under vmap do so in training."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            vars(module)["forward"] = functools.partial(_forward, module)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    given = [weight] if bias is None else [weight, bias]
    under_vmap = len(functorch.get_interpreter_stack() or ()) == 1
    if not (module.training and under_vmap) or torch._C._is_any_autocast_enabled():
        return functional.linear(x, weight, bias)
    if weight.is_complex() or not all(map(functorch.is_batchedtensor, given)):  # or a frozen one
        return functional.linear(x, weight, bias)
    level, slots = functorch.maybe_get_level(weight), len(slots_first(weight))
    x = slots_first(x) if functorch.is_batchedtensor(x) else x.expand(slots, *x.shape)
    # what is applied inside of a transform goes through Python once more for each transform
    with temporarily_pop_interpreter_stack():
        examples = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        given = [examples, *map(slots_first, given)]
        y: Tensor = _Batched.apply(*given)  # type: ignore[no-untyped-call]
        y = y.view(*x.shape[:-1], y.shape[-1])
    return functorch._add_batch_dim(y, 0, level)


class _Batched(torch.autograd.Function):
    """x [k, n, in], weight [k, out, in] and bias [k, out] to [k, n, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = torch.bmm(x, weight.mT)
        return y if bias is None else y.add_(bias.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (for_x, for_weight, *for_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            gradient.bmm(weight) if for_x else None,
            gradient.mT.bmm(x) if for_weight else None,
            *(gradient.sum(1) if wanted else None for wanted in for_bias),
        )
