"""One model run with the weights of many slots at once, by `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from droptune.program.data import Batch
from droptune.trainers.evaluation import Predict
from droptune.trainers.linear import batch_linear
from droptune.trainers.monte_carlo import Draw
from droptune.trainers.recipe import Recipe, state_names, tensors_of
from droptune.trainers.replays import Replays
from droptune.trainers.stack import Stack, take_apart

Tensors = dict[str, Tensor]
Step = Callable[[Tensors, Tensors, Tensor, Tensor, Tensors, Batch], tuple[Tensor, Tensors]]


class Bound:
    """Runs any function of a model with a slot's tensors in the model's place.

    The whole function runs so: it may call the model, or parts of it, as often as it likes. (What
    `torch.func.functional_call` does, without looking every tensor up again at each call.)
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        names = {id(tensor): name for name, tensor in tensors_of(model).items()}
        self._places: list[tuple[Any, Any, str]] = []  # a container, its key, the tensor's name
        for module in model.modules():
            containers: list[Any] = [module._parameters, module._buffers]
            for container in containers:
                held = [(k, t) for k, t in container.items() if t is not None]
                self._places += [(container, key, names[id(tensor)]) for key, tensor in held]
            if isinstance(module, nn.RNNBase):  # keeps a list of its weights besides
                flat: list[Any] = module._flat_weights
                self._places += [(flat, i, names[id(tensor)]) for i, tensor in enumerate(flat)]

    def run(
        self, tensors: Mapping[str, Tensor], function: Callable[..., Any], *arguments: Any
    ) -> tuple[Any, Tensors]:
        """`function(model, *arguments)`, and the tensors that the model replaced meanwhile
        (buffers that are assigned, not changed in place)."""
        own = [container[key] for container, key, _ in self._places]
        for container, key, name in self._places:
            container[key] = tensors[name]
        try:
            result = function(self._model, *arguments)
            replaced = {
                name: container[key]
                for container, key, name in self._places
                if container[key] is not tensors[name]
            }
        finally:
            for (container, key, _), tensor in zip(self._places, own, strict=True):
                container[key] = tensor
        return result, replaced


class BatchedModel:
    """A program's model, its sites installed, and the stack of the slots' weights.

    A random operation that is no site raises (`randomness="error"`): under vmap it would draw
    for all slots together.
    """

    def __init__(self, recipe: Recipe, width: int) -> None:
        self.recipe = recipe
        self.module = recipe.fresh_model(0)
        self.state_names = state_names(self.module)
        self._installed = recipe.install(self.module)
        parts = take_apart(recipe, self.module, self._installed)
        like = torch.empty(0, dtype=recipe.dtype, device=recipe.device)
        self.stack = Stack(parts, width, like, keeps_best=recipe.keeps_best)
        batch_linear(self.module)
        self._bound = Bound(self.module)
        self.replays = Replays(self._installed.forget)

    def step(self, words: Mapping[str, Any], *, shared: bool) -> Step:
        """A function of a chunk's (weights, varying, rates, keys, numbers, batch).

        All have the slots first, except for the batch where it is `shared`. Returns the losses
        [k] and the buffers that the model replaced. `words` are searched values that are no
        numbers.
        """
        constants, program = self.stack.parts.shared, self.recipe.program

        def one(
            weights: Tensors,
            varying: Tensors,
            rates: Tensor,
            keys: Tensor,
            numbers: Tensors,
            batch: Batch,
        ) -> tuple[Tensor, Tensors]:
            with self._installed.active(rates, keys):
                tensors, values = {**weights, **varying, **constants}, {**words, **numbers}
                return self._bound.run(tensors, program.loss, batch, values)

        self.module.train()
        step: Step = _over_slots(one, 5, shared=shared)
        return step

    def predictor(self, rows: slice) -> Predict:
        """Predictions and targets [k, B, ...] of the slots in these rows, dropout off."""

        def one(tensors: Tensors, batch: Batch) -> tuple[Tensor, Tensor]:
            with self._installed.active(training=False):
                return self._predict(tensors, batch)

        self.module.eval()
        batched, tensors = _over_slots(one, 1, shared=True), self._tensors(rows)

        def predict(batch: Batch) -> tuple[Tensor, Tensor]:
            with self.recipe.autocast():
                pair: tuple[Tensor, Tensor] = batched(tensors, batch)
            return pair

        return predict

    def draw(self, rows: slice) -> Draw:
        """The same with dropout on, at rates and keys that are given for each batch."""

        def one(
            tensors: Tensors, rates: Tensor, keys: Tensor, batch: Batch
        ) -> tuple[Tensor, Tensor]:
            with self._installed.active(rates, keys):
                return self._predict(tensors, batch)

        batched, tensors = _over_slots(one, 3, shared=True), self._tensors(rows)

        def draw(batch: Batch, rates: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
            with self.recipe.autocast():
                pair: tuple[Tensor, Tensor] = batched(tensors, rates, keys, batch)
            return pair

        return draw

    def _tensors(self, rows: slice) -> Tensors:
        """Weights and varying buffers of the slots in these rows."""
        weights = self.stack.parts.trained.views(self.stack.weights[rows])
        return {**weights, **{name: tensor[rows] for name, tensor in self.stack.varying.items()}}

    def _predict(self, tensors: Tensors, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions and targets of one slot."""
        whole = {**tensors, **self.stack.parts.shared}
        (predicted, targets), _ = self._bound.run(whole, self.recipe.program.predict, batch)
        return predicted, targets


def _over_slots(function: Callable[..., Any], arguments: int, *, shared: bool) -> Any:
    """`function` over the slots in so many arguments, and in the batch behind them or not."""
    in_dims = (*(0 for _ in range(arguments)), None if shared else 0)
    return torch.func.vmap(function, in_dims=in_dims, randomness="error")
