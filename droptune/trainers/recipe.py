"""What all trainings of one study have in common: model, data, precision, objective."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from droptune.program.data import Batch, InMemory, Splits, Streamed, place, seeded, size_of
from droptune.program.program import Program
from droptune.sites.installed import Installed, Site, install
from droptune.spec.objective import DIRECTIONS, Objective
from droptune.trainers.feed import Feed
from droptune.trainers.schedule import Array, learning_rates
from droptune.training import Assignment

if TYPE_CHECKING:
    from droptune.spec.spec import StudySpec

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}
PROBE_SHARE = 8  # one in so many training examples is evaluated for the generalisation gap
PROBE_MOST = 2048
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the trainings of one study are trained: everything but assignments and seeds.

    `interval_updates` None means one pass over the training data; `accumulate` splits every
    batch into so many micro-batches (the results stay those of the whole batch where its loss is
    the mean of its examples' losses, except for what batch normalisation sees); `precision` is
    float32, float64 or bf16 (autocast); `mc_passes`: how often an evaluation also runs with
    dropout on.
    """

    program: Program
    sites: tuple[Site, ...]
    objective: Objective
    insert: tuple[Any, ...] = ()
    interval_updates: int | None = None
    precision: str = "float32"
    clip: float | None = None
    accumulate: int = 1
    mc_passes: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _kept: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, program: Program, sites: Sequence[Site], spec: StudySpec, device: torch.device
    ) -> Recipe:
        """The recipe that a study's spec states, for this device."""
        training = spec.training
        return cls(
            program=program,
            sites=tuple(sites),
            objective=spec.objectives[0],
            insert=tuple(spec.insert),
            interval_updates=spec.interval_updates or program.interval_updates,
            precision=training.precision,
            clip=program.clip if training.clip is None else training.clip,
            accumulate=training.accumulate,
            mc_passes=training.mc_passes,
            device=device,
        )

    def tiny(self, examples: int, updates: int = 1) -> Recipe:
        """The same on a few examples (of split seed 0) and with short intervals, to try it."""
        batch = self.program.example_batch(examples)
        data = InMemory(batch, size_of(batch))
        made = replace(self, interval_updates=updates, _kept={})
        made._kept["splits", 0] = Splits(train=data, validation=data, test=None)
        return made

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and of floating inputs."""
        return DTYPES[self.precision]

    @property
    def minimize(self) -> bool:
        return self.objective.direction == "minimize"

    @property
    def keeps_best(self) -> bool:
        """Whether a training's weights are those of its best interval, not of its last."""
        return self.objective.take == "best"

    def base_rates(self, assignment: Assignment) -> list[float]:
        """The rate of each site; the author's where the assignment has none."""
        return [assignment.rates.get(site.path, site.rate) for site in self.sites]

    @functools.cached_property
    def learning_rates(self) -> Callable[[Array], Array]:
        """The program's schedule: the factor on the learning rate at each progress."""
        return learning_rates(self.program.schedule)

    # -- models -------------------------------------------------------------------------------

    def fresh_model(self, seed: int) -> nn.Module:
        """A new model on the device; its weights depend on `seed` alone, not on the device."""
        with seeded(seed):
            model = self.program.model()
        if not any(tensor.is_complex() for tensor in tensors_of(model).values()):
            return model.to(device=self.device, dtype=self.dtype)
        model.to(device=self.device)._apply(self._in_precision)  # type: ignore[no-untyped-call]
        return model

    def _in_precision(self, tensor: Tensor) -> Tensor:
        """Complex numbers as such, where `Module.to` would take their real parts."""
        if tensor.is_complex():
            return tensor.to(self.dtype.to_complex())
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def install(self, model: nn.Module) -> Installed:
        """Make the study's sites tunable in one model."""
        return install(model, self.sites, self.insert)

    @functools.cached_property
    def _normalises(self) -> bool:
        """Whether the model has batch normalisation, which cannot train on a single example."""
        kinds = nn.modules.batchnorm._BatchNorm
        return any(isinstance(module, kinds) for module in self.fresh_model(0).modules())

    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward: half precision where the recipe asks for it."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def place(self, batch: Batch) -> Batch:
        """A batch on the device, floating inputs in the recipe's precision."""
        return place(batch, self.device, self.dtype)

    # -- data ---------------------------------------------------------------------------------

    def feed(self, split_seed: int) -> Feed:
        """The training data of a split, cut into updates."""
        return self._once("feed", split_seed, lambda: self._make_feed(split_seed))

    def _make_feed(self, split_seed: int) -> Feed:
        data = self.data(split_seed, "train")
        size = data.batch_size if isinstance(data, Streamed) else self.program.batch_size
        return Feed(data, size, self.accumulate, self._normalises, self.device, self.dtype)

    def updates(self, split_seed: int) -> int:
        """How many updates an interval has."""
        return self.interval_updates or self.feed(split_seed).updates

    def data(self, split_seed: int, split: str) -> InMemory | Streamed:
        """`train`, `validation` or `test` data, on the device where they fit in memory."""
        splits: Splits = self._once("splits", split_seed, lambda: self.program.splits(split_seed))
        data = getattr(splits, split)
        if isinstance(data, InMemory):
            on_device = data
            return self._once(split, split_seed, lambda: on_device.to(self.device, self.dtype))
        assert isinstance(data, Streamed), f"there are no {split} data"
        return data

    def has_test(self, split_seed: int) -> bool:
        self.data(split_seed, "train")
        return self._kept["splits", split_seed].test is not None

    def probe(self, split_seed: int) -> InMemory | None:
        """A fixed part of the training data, evaluated for the generalisation gap.

        Every eighth example (at most 2048); None where training data are streamed.
        """
        data = self.data(split_seed, "train")
        if not isinstance(data, InMemory):
            return None
        count = min(max(data.n // PROBE_SHARE, min(data.n, 64)), PROBE_MOST)
        indices = torch.arange(count, device=self.device) * (data.n // count)
        return self._once("probe", split_seed, lambda: InMemory(data.gather(indices), count))

    @functools.cached_property
    def gap(self) -> tuple[str, float] | None:
        """What the generalisation gap compares, and 1 where less of it is better, -1 where more is:
        the program's nll, or its first metric of which that is known (None: of none)."""
        directions = {**DIRECTIONS, self.objective.metric: self.objective.direction}
        known = [name for name in self.program.metric_names if name in directions]
        name = "nll" if "nll" in known else next(iter(known), None)
        return None if name is None else (name, 1.0 if directions[name] == "minimize" else -1.0)

    def keep_only(self, split_seeds: Collection[int]) -> None:
        """Let go of the data of all other splits."""
        for key in [key for key in self._kept if key[1] not in split_seeds]:
            del self._kept[key]

    def _once(self, name: str, seed: int, make: Callable[[], T]) -> T:
        if (name, seed) not in self._kept:
            self._kept[name, seed] = make()
        kept: T = self._kept[name, seed]
        return kept


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers by name; a tied one has the first of its names."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def writes_to(tensor: Tensor) -> int:
    """How often a tensor was written to; torch does not count it of those made for inference."""
    return 0 if tensor.is_inference() else tensor._version


def state_names(model: nn.Module) -> dict[str, str]:
    """For each key of the `state_dict` the name in `tensors_of` (they differ where tied)."""
    names = {id(tensor): name for name, tensor in tensors_of(model).items()}
    state = model.state_dict(keep_vars=True)
    return {k: names[id(t)] for k, t in state.items() if isinstance(t, Tensor)}


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory."""
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
