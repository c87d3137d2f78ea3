"""Linear layers of many slots at once give what vmap makes of `nn.Linear`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from droptune.trainers.linear import batch_linear

SLOTS = 3


def numbers(number: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def results(layer: nn.Module, x: Tensor, shared: tuple[str, ...] = (), transform=lambda f: f):
    """Outputs of all slots, and the gradients of weights and inputs."""
    tensors = {
        name: numbers(i, *(() if name in shared else (SLOTS,)), *tensor.shape).requires_grad_()
        for i, (name, tensor) in enumerate(layer.named_parameters())
    }
    x = x.clone().requires_grad_()

    def one(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return transform(lambda x: torch.func.functional_call(layer, given, (x,)))(x)

    of_slots = {name: None if name in shared else 0 for name in tensors}
    y = torch.func.vmap(one, in_dims=(of_slots, 0 if len(x) == SLOTS else None))(tensors, x)
    return [y, *torch.autograd.grad((y.sin() * y).sum(), [x, *tensors.values()])]


SHAPES = [(SLOTS, 5, 4), (5, 4), (SLOTS, 4), (SLOTS, 5, 2, 4), (5, 2, 4)]
CASES = [
    *((bias, shape, {}) for bias in (True, False) for shape in SHAPES),
    *((True, shape, {"shared": ("weight",)}) for shape in SHAPES),
    *((True, shape, {"transform": torch.func.vmap}) for shape in SHAPES if shape != (SLOTS, 4)),
]


@pytest.mark.parametrize(("bias", "shape", "more"), CASES)
def test_it_gives_what_vmap_gives(bias, shape, more):
    layers = [nn.Linear(4, 6, bias=bias) for _ in range(2)]
    batch_linear(layers[0])
    x = numbers(9, *shape)
    for found, expected in zip(*(results(layer, x, **more) for layer in layers), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_gradients_of_weights_lie_as_the_weights_do():
    layer = nn.Linear(4, 6)
    batch_linear(layer)
    assert all(gradient.is_contiguous() for gradient in results(layer, numbers(9, 5, 4))[2:])


def test_out_of_vmap_and_in_evaluation_it_is_as_it_was():
    layer, x = nn.Linear(4, 6).double(), numbers(9, 5, 4)
    expected = layer(x)
    batch_linear(layer)
    assert torch.equal(layer(x), expected)
    (y, *_) = results(layer.eval(), x)
    (other, *_) = results(nn.Linear(4, 6), x)
    assert torch.equal(y, other)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_inputs_gives_its_bias():
    layer = nn.Linear(0, 6)
    batch_linear(layer)
    y, *_ = results(layer, numbers(9, 5, 0))
    assert y.shape == (SLOTS, 5, 6)


def test_only_plain_linear_layers_are_changed():
    class Own(nn.Linear):
        pass

    own, hooked = Own(4, 6), nn.Linear(4, 6)
    hooked.forward = forward = lambda x: x
    batch_linear(nn.Sequential(own, hooked))
    assert "forward" not in vars(own)
    assert hooked.forward is forward
