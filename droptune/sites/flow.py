"""Where activations come from and go to in a dry step: what a site acts on and what it feeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

Key = tuple[str, str]  # of a site: the path of its owner, and which call there

_NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
_LAYERS = _NORMS | {
    *("linear", "bilinear", "addmm", "baddbmm", "matmul", "mm", "bmm", "einsum"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
    *("cross_entropy", "nll_loss", "mse_loss", "binary_cross_entropy_with_logits"),
}
_WEIGHTED = {"linear", "addmm", "conv1d", "conv2d", "conv3d"}
_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"}
_SUMS = {"add", "iadd", "radd", "sub", "isub", "rsub"}


@dataclass(frozen=True)
class _Reach:
    """How a site's output got into a tensor."""

    open: bool = True  # no layer met yet
    whole: bool = True  # nothing else was added to it
    layers: int = 0  # weighted layers passed


class Flow:
    """Follows tensors by identity through the functions that torch shows.

    `feeds` maps a site's key to the layer its output reaches first, `norms` to the BatchNorm that
    sees it undiluted (at most one weighted layer between, nothing added).
    """

    def __init__(self, batch: Any) -> None:
        self.feeds: dict[Key, str] = {}
        self.norms: dict[Key, nn.Module | None] = {}
        self._alive: list[Tensor] = []  # identities stay unique while all of them live
        self._roles: dict[int, str] = {}
        self._reach: dict[int, dict[Key, _Reach]] = {}
        self._softmax: set[int] = set()
        for tensor in _tensors(batch):
            self._mark(tensor, "input")

    def role(self, x: Tensor) -> str:
        """ "input" or "embedding" where `x` is one of these, up to elementwise operations."""
        role = self._roles.get(id(x), "")
        return "" if role == "hidden" else role

    def is_attention(self, x: Tensor) -> bool:
        """Whether `x` are weights [batch, ..., queries, keys], just out of a softmax."""
        return x.dim() > 2 and _address(x) in self._softmax

    def _are_weights(self, operands: list[Tensor]) -> bool:
        return any(_address(tensor) in self._softmax for tensor in operands)

    def leaves(self, site: Key, y: Tensor) -> None:
        """`y` is what a site made."""
        self._alive.append(y)
        self._reach.setdefault(id(y), {})[site] = _Reach()

    def passed(
        self, name: str, given: Any, result: Any, drawn: set[Key], module: nn.Module | None
    ) -> None:
        """A function of torch ran in `module`; `drawn` are the sites that acted inside it."""
        name = name.strip("_")
        operands = list(_tensors(given))
        reach = self._reach_after(name, operands, module)
        role = self._role_after(name, operands)
        for tensor in _tensors(result):
            known = self._reach.get(id(tensor), {})
            self._mark(tensor, role)
            inside = {site: _Reach() for site in drawn if site not in self.feeds}
            if not (drawn and known):  # inner calls have said more already
                self._reach[id(tensor)] = {**reach, **inside, **known}
            if name == "softmax" or (name in _CASTS and self._are_weights(operands)):
                self._softmax.add(_address(tensor))

    def _mark(self, tensor: Tensor, role: str) -> None:
        self._alive.append(tensor)
        self._roles.pop(id(tensor), None)
        if role:
            self._roles[id(tensor)] = role

    def _role_after(self, name: str, operands: list[Tensor]) -> str:
        if name == "embedding":
            return "embedding"
        roles = {self._roles.get(id(tensor), "") for tensor in operands}
        if name in _LAYERS - _NORMS or "hidden" in roles:
            return "hidden"
        return max(roles, key=("", "input", "embedding").index, default="")

    def _reach_after(
        self, name: str, operands: list[Tensor], module: nn.Module | None
    ) -> dict[Key, _Reach]:
        after: dict[Key, _Reach] = {}
        for tensor in operands:
            for site, reach in self._reach.get(id(tensor), {}).items():
                moved = self._step(site, reach, name, len(operands), module)
                if moved.open or (moved.whole and moved.layers < 2):
                    after[site] = moved
        return after

    def _step(
        self, site: Key, reach: _Reach, name: str, operands: int, module: nn.Module | None
    ) -> _Reach:
        if name in _SUMS and operands > 1:
            return _Reach(reach.open, False, reach.layers)
        if name not in _LAYERS:
            return reach
        if reach.open:
            self.feeds.setdefault(site, _layer_name(name, module))
        if name == "batch_norm" and reach.whole:
            self.norms.setdefault(site, module)
        goes_on = name in _WEIGHTED and reach.whole
        return _Reach(False, goes_on, reach.layers + 1)


def _layer_name(name: str, module: nn.Module | None) -> str:
    is_leaf = module is not None and not any(True for _ in module.children())
    return type(module).__name__ if is_leaf else name


def _address(tensor: Tensor) -> int:
    """Where the numbers of a tensor lie, also of one inside of a transform (`torch.func.grad`)."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.data_ptr()


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
