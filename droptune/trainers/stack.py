"""The weights of K slots in one stack: what is trained, what differs by slot, what is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from droptune.errors import ProgramError
from droptune.program.declared import default_values
from droptune.sites.installed import Installed
from droptune.trainers.optimizer_state import build, names_of
from droptune.trainers.recipe import Recipe, tensors_of, writes_to
from droptune.trainers.updates import Layout
from droptune.training import Assignment

_TRIED_EXAMPLES = 4


@dataclass(frozen=True)
class Parts:
    """What becomes of each weight and buffer of a model in a stack.

    `trained` is laid out in rows; `varying` (buffers that training changes, frozen weights that
    the seed decides) has one tensor [K, ...] for each name; `shared` one tensor for all slots.
    `idle` names those of `varying` that the optimizer would train, and the loss did not reach.
    """

    trained: Layout
    varying: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    idle: frozenset[str]


def take_apart(recipe: Recipe, model: nn.Module, installed: Installed) -> Parts:
    """What training does to each weight and buffer, as one step and one evaluation show.

    `model` is used up: its buffers move as they do in training. Raises ProgramError where a
    weight has hooks on its gradient, which would see no slot's.
    """
    for name, weight in model.named_parameters():
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            raise ProgramError(f"a hook on the gradient of {name} is of one training's weight")
    optimizer = build(recipe.program.optimizer, model, Assignment({}, recipe.program.lr))
    own = tensors_of(model)
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    written = {name: writes_to(tensor) for name, tensor in own.items()}
    trained, names = _train_once(recipe, model, installed), names_of(model)
    for name in trained:
        if own[name].is_complex():
            raise ProgramError(f"{name} is complex: trainings side by side hold real numbers")
    layout = Layout.of(optimizer, {k: n for k, n in names.items() if n in trained})
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    idle = {names[id(weight)] for weight in weights if weight.requires_grad} - trained
    made = next((name for name in tensors_of(model) if name not in own), None)
    if made is not None:
        raise ProgramError(f"the model makes {made} when it first runs: make it in __init__")
    now, other = tensors_of(model), tensors_of(recipe.fresh_model(1))
    fixed = {name: tensor for name, tensor in before.items() if name not in layout.names}
    shared = {
        name
        for name, tensor in fixed.items()
        if now[name] is own[name]  # what is written to may change with other numbers
        and writes_to(now[name]) == written[name]
        and torch.equal(tensor, now[name])
        and torch.equal(tensor, other[name])
    } - idle
    return Parts(
        trained=layout,
        varying={name: tensor for name, tensor in fixed.items() if name not in shared},
        shared={name: tensor for name, tensor in fixed.items() if name in shared},
        idle=frozenset(idle),
    )


def _train_once(recipe: Recipe, model: nn.Module, installed: Installed) -> set[str]:
    """The names of the weights that the loss of a few examples reaches."""
    program, sites = recipe.program, len(recipe.sites)
    batch = recipe.place(program.example_batch(_TRIED_EXAMPLES))
    rates = torch.zeros(sites, device=recipe.device)
    keys = torch.zeros(sites, 2, dtype=torch.int32, device=recipe.device)
    seeded = torch.random.fork_rng(devices=[])  # for what is random and no site
    with seeded:
        with installed.active(rates, keys), recipe.autocast():
            loss = program.loss(model.train(), batch, default_values(program.searched))
        loss.backward()  # type: ignore[no-untyped-call]
        with installed.active(training=False), recipe.autocast(), torch.no_grad():
            program.predict(model.eval(), batch)
    reached = {name for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad()
    return reached


class Stack:
    """The weights and buffers of K slots, row by row, and where wanted those of best intervals."""

    def __init__(self, parts: Parts, width: int, like: Tensor, *, keeps_best: bool) -> None:
        self.parts = parts
        self.weights = like.new_zeros(width, parts.trained.size)
        self.varying = {n: t.new_zeros(width, *t.shape) for n, t in parts.varying.items()}
        self._best: dict[str, Tensor] = {}
        if keeps_best:
            self._best = {name: torch.zeros_like(tensor) for name, tensor in self._all().items()}
        self._written = {name: writes_to(tensor) for name, tensor in parts.shared.items()}
        self._replaced: set[str] = set()

    # -- what is shared, until a slot changes it --------------------------------------------------

    def replace(self, name: str) -> None:
        """The model has put another tensor in the place of a shared one."""
        self._replaced.add(name)

    def changed(self) -> set[str]:
        """The shared tensors that are no longer what they were: for all slots together."""
        shared = self.parts.shared.items()
        return self._replaced | {n for n, t in shared if writes_to(t) != self._written[n]}

    def differing(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """The shared tensors that are others among these."""
        shared = self.parts.shared.items()
        return {n for n, t in shared if n in tensors and not torch.equal(t, tensors[n].to(t))}

    def separate(self, fresh: Mapping[str, Tensor]) -> None:
        """Give each slot its own of tensors that were shared, as they are in a fresh model."""
        parts, width = self.parts, len(self.weights)
        shared = {name: tensor for name, tensor in parts.shared.items() if name not in fresh}
        self.parts = replace(parts, shared=shared, varying={**parts.varying, **fresh})
        for places in (self.varying, self._best) if self._best else (self.varying,):
            places |= {n: t.detach().expand(width, *t.shape).clone() for n, t in fresh.items()}
        self._replaced.clear()

    # -- rows -------------------------------------------------------------------------------------

    def _all(self) -> dict[str, Tensor]:
        return {"": self.weights, **self.varying}

    def write(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        """Put weights and buffers into a row; what is missing stays as it is."""
        for name, view in self._named(row, self._all()).items():
            if name in tensors:
                view.copy_(tensors[name])

    def write_best(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        for name, view in self._named(row, self._best).items():
            if name in tensors:
                view.copy_(tensors[name])

    def read(self, row: int) -> dict[str, Tensor]:
        """All weights and buffers of a row, as views."""
        return {**self._named(row, self._all()), **self.parts.shared}

    def read_best(self, row: int) -> dict[str, Tensor]:
        """Those of the best interval (whatever they are before the first)."""
        return {**self._named(row, self._best), **self.parts.shared}

    def _named(self, row: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not tensors:
            return {}
        varying = {name: tensor[row] for name, tensor in tensors.items() if name}
        return {**self.parts.trained.views(tensors[""][row]), **varying}

    def keep_best(self, rows: Sequence[int]) -> None:
        """These rows have had their best interval."""
        if rows:
            index = list(rows)
            for name, tensor in self._all().items():
                self._best[name][index] = tensor[index]

    def permute(self, order: Sequence[int]) -> None:
        """Row i becomes what row `order[i]` was."""
        for tensor in (*self._all().values(), *self._best.values()):
            tensor[: len(order)] = tensor[list(order)]

    def keep(self, rows: int) -> dict[str, Tensor]:
        """A copy of the first rows in host memory, for `put_back`."""
        return {name: t[:rows].to("cpu", copy=True) for name, t in self._all().items()}

    def put_back(self, kept: Mapping[str, Tensor]) -> None:
        everything = self._all()
        for name, tensor in kept.items():
            everything[name][: len(tensor)].copy_(tensor)  # takes no memory of the device
