"""A training's results do not depend on the trainer, its width, the slot or the neighbours."""

from __future__ import annotations

import functools
import math
import os
import random
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from droptune.errors import ProgramError
from droptune.program.data import InMemory, Streamed
from droptune.program.long_form import adapt
from droptune.program.program import Program
from droptune.program.short_form import classification, regression
from droptune.sites.installed import find_program_sites
from droptune.spec.objective import Objective
from droptune.trainers import batched, evaluation
from droptune.trainers.captured import Captured
from droptune.trainers.checkpoint import CheckpointStore
from droptune.trainers.fused import Fused
from droptune.trainers.fusibility import fusible
from droptune.trainers.interval import Chunk, Interval
from droptune.trainers.memory import is_out_of_memory
from droptune.trainers.recipe import Recipe
from droptune.trainers.resumption import what_is_lost
from droptune.trainers.slot import Interrupted, Outcome, Snapshot, Trainer
from droptune.trainers.solo import Solo
from droptune.trainers.stack import take_apart
from droptune.trainers.tape import Tape
from droptune.training import Assignment, Seeds, Training, TrainingKind

NOT_SIMULATED = "the simulated accelerator has no sparse or complex tensors"
TOLERANCE = 1e-9
DEVICE = torch.device(os.environ.get("DROPTUNE_TEST_DEVICE", "cpu"))
dense_and_real = pytest.mark.skipif(DEVICE.type == "sim", reason=NOT_SIMULATED)
Replay = Tape if DEVICE.type == "cpu" else Captured
INTERVALS = 4
CLASSES = 3


# -- programs -------------------------------------------------------------------------------------


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(16, 8),
            nn.SELU(),
            nn.AlphaDropout(0.1),
            nn.Linear(8, CLASSES),
        )


class Cnn(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.25),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(16, CLASSES),
        )


class DropPath(nn.Module):
    """Stochastic depth as timm writes it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep


class Block(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norm_1, self.norm_2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm_1(self.first(x)))
        return functional.relu(x + self.path(self.norm_2(self.second(y))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(0.1), Block(0.2))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Encoder(nn.Module):
    """Token ids, 0 is padding; the embedding is tied to a second use of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.tied = nn.Linear(8, 11, bias=False)
        self.tied.weight = self.embed.weight
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(11, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        hidden = hidden.masked_fill(padding.unsqueeze(-1), 0.0)
        return self.head(self.tied(hidden.mean(1)))


def _labels(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _tokens(n: int, length: int = 5) -> Tensor:
    ids = torch.randint(1, 11, (n, length), generator=torch.Generator().manual_seed(7))
    ids[::3, -2:] = 0
    return ids


def _classify(model, inputs, n: int = 22, **more) -> Program:
    batch = {**inputs, "labels": _labels(n)} if isinstance(inputs, dict) else (inputs, _labels(n))
    options = {"batch_size": 8, "epochs": INTERVALS, "lr": 0.02, "test": False, **more}
    return classification(model=model, train=batch, **options)


def _bert() -> Program:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=8, num_labels=CLASSES,
    )  # fmt: skip
    ids = _tokens(12)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return _classify(lambda: transformers.BertForSequenceClassification(config), inputs, 12)


def _gpt2() -> Program:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    ids = _tokens(12)

    class Language:
        batch_size, epochs, lr = 4, INTERVALS, 0.02

        def model(self):
            return transformers.GPT2LMHeadModel(config)

        def data(self):
            return {"train": (ids,), "test": False}

        def loss(self, model, batch):
            logits = model(batch[0], use_cache=False).logits[:, :-1]
            return functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    return adapt(Language())


def _vit() -> Program:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=16, num_labels=CLASSES,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    inputs = {"pixel_values": _noise(12, 1, 8, 8)}
    return _classify(lambda: transformers.ViTForImageClassification(config), inputs, 12)


def _alike() -> Program:
    """Three updates to a pass, all of the same size."""
    validation = _noise(6, 1, 8, 8), _labels(6)
    return _classify(Cnn, _noise(24, 1, 8, 8), 24, lr=1e-3, validation=validation)


PROGRAMS = {
    "mlp with batch norm": lambda: _classify(Mlp, _noise(22, 6), optimizer=_grouped, lr=2e-3),
    "cnn": lambda: _classify(Cnn, _noise(22, 1, 8, 8), optimizer="sgd", lr=0.05),
    "transformer with padding": lambda: _classify(Encoder, _tokens(22), schedule="cosine"),
    "resnet with drop path": lambda: _classify(ResNet, _noise(22, 1, 6, 6), optimizer="rmsprop"),
    "bert": _bert,
    "gpt2": _gpt2,
    "vit": _vit,
}


def _grouped(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Biases and norms are not decayed and learn at a tenth."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0, "lr": lr / 10, "betas": (0.8, 0.99)},
    ]
    return torch.optim.AdamW(groups, lr=lr)


@functools.cache
def recipe_of(name: str) -> Recipe:
    return make_recipe(PROGRAMS[name]())


def make_recipe(program: Program, take: str = "best", **more) -> Recipe:
    metric = {"custom": "loss", "regression": "mse"}.get(program.task, "nll")
    sites = find_program_sites(program).sites
    options = {"precision": "float64", "device": DEVICE, **more}
    return Recipe(program, sites, Objective(metric, take), **options)


def training(recipe: Recipe, number: int, *, data: int | None = None, **changes) -> Training:
    """Trainings whose rates, lr, weight decay and seeds all differ."""
    seeds = Seeds(weights=1000 + number, data=number if data is None else data, split=0)
    rates = {s.path: (0.1 + 0.13 * number + 0.07 * i) % 0.7 for i, s in enumerate(recipe.sites)}
    values = {"weight_decay": 0.05 * number, **changes.pop("values", {})}
    lr = changes.pop("lr", recipe.program.lr * (1 + number))
    return Training(
        id=number,
        study_id=1,
        kind=TrainingKind.SEARCH,
        number=number,
        label=f"trial {number}",
        assignment=Assignment(rates, lr, values),
        seeds=seeds,
        seed_index=None,
        intervals=INTERVALS,
        attempt=1,
        lease_epoch=1,
        **changes,
    )


# -- comparing ------------------------------------------------------------------------------------


def assert_same(a: Snapshot, b: Snapshot, tolerance: float = TOLERANCE) -> None:
    assert a.interval == b.interval
    assert a.tensors.keys() == b.tensors.keys()
    assert a.meta["updates"] == b.meta["updates"]
    assert a.meta["best_interval"] == b.meta["best_interval"]
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        assert tensor.dtype == other.dtype, name
        assert tensor.shape == other.shape, name
        difference = (tensor.double() - other.double()).abs().max().item() if tensor.numel() else 0
        assert difference < tolerance, f"{name}: {difference}"


def assert_same_outcome(a: Outcome, b: Outcome, tolerance: float = TOLERANCE) -> None:
    assert a.failure == b.failure
    assert a.measurement.interval == b.measurement.interval
    assert a.measurement.values.keys() == b.measurement.values.keys()
    for key, value in a.measurement.values.items():
        if key != "time/seconds":
            assert value == pytest.approx(b.measurement.values[key], abs=tolerance), key


def alone(recipe: Recipe, wanted: Training, intervals: int) -> tuple[Snapshot, list[Outcome]]:
    """A training in a trainer of its own."""
    solo = Solo(recipe)
    solo.fill(0, wanted)
    outcomes = [solo.train_interval()[0] for _ in range(intervals)]
    return solo.snapshot(0), outcomes


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _graphs_are_kept(monkeypatch):
    """Whatever they cost on this device."""
    monkeypatch.setattr("droptune.trainers.replays._is_faster", lambda _: True)


# -- the suite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_fused_equals_solo_through_refill_empty_slot_failure_and_resume(name, tmp_path):
    recipe = recipe_of(name)
    first, second, late = (training(recipe, number) for number in (0, 1, 2))
    broken = training(recipe, 3, lr=1e300)
    fused = Fused(recipe, 4)
    fused.fill(3, first)  # slot 0 stays empty
    fused.fill(1, broken)
    fused.fill(2, second)
    outcomes = [fused.train_interval()]
    assert outcomes[0][1].failure is not None
    assert outcomes[0][3].failure is None
    fused.empty(1)
    fused.fill(1, late)
    outcomes.append(fused.train_interval())

    store = CheckpointStore.at(tmp_path)
    store.save(second.id, 1, fused.snapshot(2))
    fused.empty(2)
    solo = Solo(recipe)
    solo.fill(0, second, store.load(second.id, 1))
    outcomes_second = [outcomes[0][2], outcomes[1][2], solo.train_interval()[0]]
    store.save(second.id, 1, solo.snapshot(0))
    outcomes.append(fused.train_interval())
    fused.fill(0, second, store.load(second.id, 1))
    outcomes.append(fused.train_interval())
    outcomes_second.append(outcomes[3][0])

    for index, wanted, seen in (
        (3, first, [each[3] for each in outcomes]),
        (1, late, [each[1] for each in outcomes[1:]]),
        (0, second, outcomes_second),
    ):
        expected, expected_outcomes = alone(recipe, wanted, len(seen))
        assert_same(fused.snapshot(index), expected)
        for a, b in zip(seen, expected_outcomes, strict=True):
            assert_same_outcome(a, b)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_is_found_fusible_by_trying(name):
    found = fusible(recipe_of(name))
    assert found.ok, found.reason


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ("bert", "gpt2")])
def test_what_is_tried_is_replayed_as_well(name, monkeypatch):
    played, play = [], Replay.play
    monkeypatch.setattr(Replay, "play", lambda *given: (played.append(1), play(*given))[1])
    assert fusible(recipe_of(name)).ok
    assert played


class UnreadNorm(nn.Module):
    """Statistics that move although nothing reads them in training."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        h = self.drop(self.hidden(x).relu())
        aside = self.norm(h.detach() + 3)
        return self.out(h if self.training else h + aside)


def test_statistics_that_nothing_reads_move_in_replayed_updates():
    recipe = make_recipe(replace(PROGRAMS["mlp with batch norm"](), model=UnreadNorm))
    (fused, left), (_, expected) = (left_after(recipe, replayed=each) for each in (True, False))
    assert fused._model.replays.replayed > 0
    for tensors, others in zip(left, expected, strict=True):
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def on_meta(recipe: Recipe, monkeypatch) -> Recipe:
    """The recipe on a device without numbers: to ask for one there is an error, as it is to bring
    a tensor of another device along."""
    meta, program, model = torch.device("meta"), recipe.program, recipe.fresh_model(0)
    parts = take_apart(recipe, model, recipe.install(model))  # looks at numbers, once
    varying, shared = ({n: t.to(meta) for n, t in p.items()} for p in (parts.varying, parts.shared))
    moved = replace(parts, varying=varying, shared=shared)
    monkeypatch.setattr(batched, "take_apart", lambda *_: moved)

    def made() -> nn.Module:
        with meta:  # to move a model there would untie its weights
            return program.model()

    return replace(recipe, program=replace(program, model=made), device=meta, _kept={})


class _Operations(TorchDispatchMode):
    """Counts operations, views among them; none may be of tensors on two devices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
        assert len({tensor.device for tensor in tensors}) <= 1, func
        return func(*args, **(kwargs or {}))


def filled(recipe: Recipe, width: int) -> tuple[Fused, Chunk]:
    """So many slots, each at a place of its own where intervals are not whole passes."""
    fused = Fused(recipe, width)
    for slot in range(width):
        fused.fill(slot, training(recipe, slot))
        fused._slots[slot].updates = slot * (recipe.interval_updates or 0)
    return fused, Chunk(slice(0, width), tuple(range(width)), tuple(fused._slots.values()))


def numbers_asked_for():
    return pytest.raises(NotImplementedError, match="out of meta tensor")


def launches(recipe: Recipe, width: int) -> list[int]:
    """The operations of each update but the first of an interval of so many slots, which may ask
    for numbers only at its end."""
    fused, chunk = filled(recipe, width)
    interval, operations, at = Interval(fused._model, fused._optimizer, chunk), _Operations(), []
    step = interval._optimizer.step
    interval._optimizer.step = lambda *a: (step(*a), at.append(operations.count))
    with numbers_asked_for(), operations:
        interval.train(lambda: None)
    assert len(at) == recipe.updates(0)
    return np.diff(at).tolist()


LOOKING = ("bert", "gpt2")  # at numbers themselves, in every forward: whether a mask masks


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in LOOKING])
def test_no_update_waits_for_the_device_or_has_more_operations_for_more_slots(name, monkeypatch):
    recipe = on_meta(recipe_of(name), monkeypatch)
    launches(recipe, 1)  # what is made once and kept
    assert launches(recipe, 2) == launches(recipe, 5)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in LOOKING])
def test_an_evaluation_asks_for_numbers_only_at_its_end(name, monkeypatch):
    fused, chunk = filled(on_meta(recipe_of(name), monkeypatch), 3)

    def measured(stacked):
        with numbers_asked_for():
            rows(stacked)
        return [{}] * 3

    rows = evaluation._rows
    monkeypatch.setattr(evaluation, "_rows", measured)
    with _Operations():
        assert fused._evaluate(chunk) == ([{}] * 3, [{}] * 3)


def left_after(recipe: Recipe, *, replayed: bool) -> tuple[Fused, list[dict[str, Tensor]]]:
    """Some slots after some intervals, one of which is empty in the last."""
    fused = Fused(recipe, 3)
    if not replayed:
        fused._model.replays.stop()
    for slot in range(3):
        fused.fill(slot, replace(training(recipe, slot), intervals=8))
    for _ in range(6):
        fused.train_interval()
    fused.empty(1)
    fused.train_interval()
    return fused, [fused.snapshot(slot).tensors for slot in (0, 2)]


@pytest.mark.parametrize(
    "more", [{}, {"accumulate": 3, "clip": 0.05}, {"precision": "bf16"}], ids=str
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_replayed_updates_are_the_same_bit_for_bit(name, more):
    recipe = make_recipe(PROGRAMS[name](), **more)
    (fused, left), (_, expected) = (left_after(recipe, replayed=each) for each in (True, False))
    assert (fused._model.replays.replayed > 0) == (name not in LOOKING)
    for tensors, others in zip(left, expected, strict=True):
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def test_an_interval_whose_replay_fails_is_trained_as_it_is_written(monkeypatch):
    recipe = recipe_of("mlp with batch norm")
    _, expected = left_after(recipe, replayed=False)

    def failing(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Replay, "play", failing)
    fused, left = left_after(recipe, replayed=True)
    assert fused.alone is fused.shares_batches is None
    for tensors, others in zip(left, expected, strict=True):
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def test_no_update_waits_where_slots_are_at_places_of_their_own(monkeypatch):
    recipe = on_meta(make_recipe(_alike(), interval_updates=4), monkeypatch)
    launches(recipe, 1)
    assert launches(recipe, 2) == launches(recipe, 5)


@pytest.mark.parametrize("name", ["mlp with batch norm", "transformer with padding"])
def test_neighbours_and_slot_numbers_do_not_matter(name):
    recipe = recipe_of(name)
    wanted = training(recipe, 0)
    snapshots = []
    for width, index, others in ((2, 1, [(0, 1)]), (4, 0, [(1, 2), (2, 3), (3, 4)])):
        fused = Fused(recipe, width)
        fused.fill(index, wanted)
        for slot, number in others:
            fused.fill(slot, training(recipe, number))
        for _ in range(2):
            fused.train_interval()
        snapshots.append(fused.snapshot(index))
    assert_same(*snapshots)


# -- ways of training -----------------------------------------------------------------------------


def assert_fused_is_solo(recipe: Recipe, trainings: list[Training], intervals: int = 2) -> None:
    fused = Fused(recipe, len(trainings))
    for index, each in enumerate(trainings):
        fused.fill(index, each)
    outcomes = [fused.train_interval() for _ in range(intervals)]
    for index, each in enumerate(trainings):
        snapshot, expected = alone(recipe, each, intervals)
        assert_same(fused.snapshot(index), snapshot)
        for a, b in zip(outcomes, expected, strict=True):
            assert_same_outcome(a[index], b)
        solo = Solo(recipe)
        solo.fill(0, each, fused.snapshot(index))
        for key, tensor in solo.weights(0).items():
            torch.testing.assert_close(fused.weights(index)[key], tensor, rtol=0, atol=0)


def test_last_weights_clipping_accumulation_and_searched_values():
    program = _classify(Mlp, _noise(21, 6), 21, lr=2e-3, clip=0.05, optimizer="adam")
    values = [
        {"l1": 1e-2, "label_smoothing": 0.1, "schedule": "up"},
        {"l1": 1e-3, "label_smoothing": 0.0, "schedule": "early", "cutoff": 0.3},
        {"l1": 0.0, "label_smoothing": 0.2, "schedule": "late", "cutoff": 0.4},
    ]
    for accumulate in (1, 3):
        recipe = make_recipe(program, "last", clip=0.05, accumulate=accumulate)
        assert [u.size for u in recipe.feed(0).interval([0], [0], 2)] == [8, 9]
        trainings = [training(recipe, k, values=v) for k, v in enumerate(values)]
        assert_fused_is_solo(recipe, trainings)


def test_accumulated_micro_batches_equal_the_whole_batch():
    program = _classify(Cnn, _noise(22, 1, 8, 8), lr=1e-3)
    outcomes = []
    for accumulate in (1, 2):
        recipe = make_recipe(program, accumulate=accumulate)
        still = replace(
            training(recipe, 0),
            assignment=Assignment({s.path: 0.0 for s in recipe.sites}, 1e-3),
        )
        outcomes.append(alone(recipe, still, 2)[0])
    assert_same(*outcomes)


def test_intervals_of_some_updates_go_over_the_ends_of_passes():
    recipe = make_recipe(_classify(Cnn, _noise(22, 1, 8, 8), lr=1e-3), interval_updates=4)
    first, second = training(recipe, 0), training(recipe, 1)
    fused = Fused(recipe, 2)
    fused.fill(0, first)
    fused.train_interval()  # now a pass of 3 updates is behind it, and one of the next
    fused.fill(1, second)
    fused.train_interval()
    assert_same(fused.snapshot(0), alone(recipe, first, 2)[0])
    assert_same(fused.snapshot(1), alone(recipe, second, 1)[0])


def test_refills_inside_a_pass_of_equal_batches_see_their_own_examples():
    recipe = make_recipe(_alike(), interval_updates=2)
    first, second = training(recipe, 0), training(recipe, 1)
    fused = Fused(recipe, 2)
    fused.fill(0, first)
    fused.train_interval()  # two of the pass's three updates are behind it
    fused.fill(1, second)
    for _ in range(2):
        fused.train_interval()
    assert_same(fused.snapshot(0), alone(recipe, first, 3)[0])
    assert_same(fused.snapshot(1), alone(recipe, second, 2)[0])


class _Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.extra, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x, depth="plain"):
        h = self.drop(self.hidden(x).relu())
        return self.out(self.extra(h).relu() if depth == "deep" else h)


def test_weights_that_only_another_choice_trains_are_noticed():
    class Long:
        task, batch_size, epochs, lr = "classification", 8, 2, 1e-2
        searched = {"depth": ["plain", "deep"]}  # noqa: RUF012
        model = _Branching

        def data(self):
            return {"train": (_noise(16, 6), _labels(16)), "validation": (_noise(8, 6), _labels(8))}

        def loss(self, model, batch, values):
            inputs, targets = batch
            return functional.cross_entropy(model(inputs, values["depth"]), targets)

    assert not fusible(make_recipe(adapt(Long()))).ok


def test_trainings_that_share_data_share_batches():
    recipe = recipe_of("mlp with batch norm")
    assert_fused_is_solo(recipe, [training(recipe, k, data=5) for k in range(3)])


def test_each_split_has_its_own_data():
    recipe = recipe_of("cnn")
    trainings = [training(recipe, k) for k in range(4)]
    trainings = [replace(t, seeds=replace(t.seeds, split=k % 2)) for k, t in enumerate(trainings)]
    assert_fused_is_solo(recipe, trainings)


def test_streamed_data_are_shared_by_trainings_at_the_same_place():
    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 25

        def __getitem__(self, index):
            return torch.full((6,), float(index)) / 25 + torch.randn(6), index % CLASSES

    program = classification(
        model=Mlp, train=Examples(), validation=(_noise(9, 6), _labels(9)), test=False,
        batch_size=8, epochs=INTERVALS, lr=2e-3,
    )  # fmt: skip
    recipe = make_recipe(program)
    assert isinstance(recipe.data(0, "train"), Streamed)
    trainings = [training(recipe, k, data=k // 2) for k in range(4)]
    assert_fused_is_solo(recipe, trainings)
    assert "val/gap" not in alone(recipe, trainings[0], 1)[1][0].measurement.values


def test_padding_gets_no_gradient_where_each_training_has_its_own_batch():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 6, padding_idx=-1)
            self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, CLASSES))

        def forward(self, tokens):
            return self.head(self.embedding(tokens).mean(1))

    tokens = _tokens(22).clamp(max=6)
    tokens[6:, 2:] = 6  # none in the first examples, on which fusing is tried
    recipe = make_recipe(_classify(Padded, tokens))
    assert_fused_is_solo(recipe, [training(recipe, k, data=k) for k in range(3)])


@dense_and_real
@pytest.mark.parametrize("optimizer", ["sgd", torch.optim.Adagrad])
def test_embeddings_with_sparse_gradients_are_fused_and_resumed(optimizer):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6, sparse=True)
            self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, CLASSES))

        def forward(self, tokens):
            return self.head(self.embedding(tokens).mean(1))

    recipe = make_recipe(_classify(Bag, _tokens(22), optimizer=optimizer))
    found = fusible(recipe)
    assert found.ok, found.reason
    assert what_is_lost(recipe) == []
    undecayed = {"weight_decay": 0.0}  # of sparse gradients torch decays no weights
    assert_fused_is_solo(recipe, [training(recipe, k, values=undecayed) for k in range(2)])


@pytest.mark.parametrize("normalised", [spectral_norm, parametrizations.spectral_norm])
def test_spectral_normalisation_is_fused(normalised):
    def model():
        first, last = nn.Conv1d(2, 4, 3), nn.Linear(16, CLASSES)
        parts = normalised(first), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), normalised(last)
        return nn.Sequential(*parts)

    recipe = make_recipe(_classify(model, _noise(22, 2, 6)))
    found = fusible(recipe)
    assert found.ok, found.reason
    assert_fused_is_solo(recipe, [training(recipe, k) for k in range(2)])


def test_an_optimizer_that_is_not_written_out_is_stepped_slot_by_slot():
    program = _classify(Cnn, _noise(22, 1, 8, 8), lr=1e-3, optimizer=torch.optim.NAdam)
    recipe = make_recipe(program)
    first, second, third = (training(recipe, number) for number in range(3))
    assert_fused_is_solo(recipe, [first, second, third])
    fused = Fused(recipe, 3)
    for index, each in enumerate((first, second, third)):
        fused.fill(index, each)
    fused.train_interval()
    fused.empty(0)  # the others move to other rows
    fused.train_interval()
    assert_same(fused.snapshot(1), alone(recipe, second, 2)[0])
    assert_same(fused.snapshot(2), alone(recipe, third, 2)[0])


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, torch.optim.NAdam, torch.optim.SGD])
def test_what_an_optimizer_begins_with_and_its_hooks_are_each_slots_own(optimizer):
    def make(model, lr):
        made = optimizer(model.parameters(), lr)
        made.register_step_post_hook(lambda *_: _clamp(model))
        return made

    recipe = make_recipe(_classify(Cnn, _noise(22, 1, 8, 8), lr=1e-2, optimizer=make))
    assert fusible(recipe).ok
    first, second, late = (training(recipe, number) for number in range(3))
    fused = Fused(recipe, 2)
    fused.fill(0, first)
    fused.fill(1, second)
    fused.train_interval()
    fused.empty(0)
    fused.train_interval()  # the second moves to another row
    fused.fill(0, late)
    fused.train_interval()
    assert_same(fused.snapshot(1), alone(recipe, second, 3)[0])
    assert_same(fused.snapshot(0), alone(recipe, late, 1)[0])


@torch.no_grad()
def _clamp(model):
    for weight in model.parameters():
        weight.clamp_(-0.3, 0.3)


def test_searched_words_and_numbers_reach_the_loss():
    class Worded:
        batch_size, epochs, lr = 8, INTERVALS, 1e-2
        searched: ClassVar = {"kind": ["squared", "absolute"], "power": (0.5, 2.0)}
        task = "regression"

        def model(self):
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

        def data(self):
            return {"train": (_noise(22, 6), _noise(22, 1)), "test": False}

        def loss(self, model, batch, values):
            apart = model(batch[0]) - batch[1]
            each = apart.square() if values["kind"] == "squared" else apart.abs()
            return (each + 1e-3).pow(values["power"]).mean()

    program = adapt(Worded())
    recipe = make_recipe(program)
    values = [("squared", 1.0), ("absolute", 1.5), ("squared", 0.7)]
    trainings = [
        training(recipe, k, values={"kind": kind, "power": power})
        for k, (kind, power) in enumerate(values)
    ]
    assert_fused_is_solo(recipe, trainings)


def test_frozen_weights_are_shared_and_unused_ones_left_alone():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(6, 8)
            self.frozen.load_state_dict({"weight": torch.ones(8, 6), "bias": torch.ones(8)})
            self.frozen.requires_grad_(False)
            self.random = nn.Linear(8, 8).requires_grad_(False)
            self.unused = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.tensor(0.5))
            self.drop, self.head = nn.Dropout(0.4), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(self.drop(torch.tanh(self.random(self.frozen(x)) * self.scale)))

    recipe = make_recipe(_classify(Partly, _noise(22, 6), weight_decay=0.1))
    assert_fused_is_solo(recipe, [training(recipe, k) for k in range(2)])
    parts = Fused(recipe, 2)._stack.parts
    assert set(parts.shared) == {"frozen.weight", "frozen.bias"}
    assert set(parts.trained.names) == {"head.weight", "head.bias", "scale"}
    assert parts.idle == {"unused.weight", "unused.bias"}


def test_a_buffer_that_is_assigned_anew_is_kept_for_each_slot():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, CLASSES))
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("evaluations", torch.tensor(0))

        def forward(self, x):
            hidden = self.net[0](x)
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
            else:
                self.evaluations += 1
            return self.net[2](self.net[1](hidden - self.mean + 0.1 * self.evaluations))

    recipe = make_recipe(_classify(Counting, _noise(22, 6)))
    first, late = training(recipe, 0), training(recipe, 1)
    fused = Fused(recipe, 2)
    fused.fill(0, first)
    fused.train_interval()
    fused.fill(1, late)
    fused.train_interval()
    assert_same(fused.snapshot(0), alone(recipe, first, 2)[0])
    assert_same(fused.snapshot(1), alone(recipe, late, 1)[0])


def test_half_precision_runs_fused_and_solo_and_agrees_to_its_rounding():
    recipe = make_recipe(_classify(Cnn, _noise(22, 1, 8, 8), lr=1e-3), precision="bf16")
    each = training(recipe, 0)
    fused = Fused(recipe, 1)
    fused.fill(0, each)
    outcome = fused.train_interval()[0]
    expected = alone(recipe, each, 1)[1][0]
    assert outcome.failure is None
    loss, other = (o.measurement.values["train/loss"] for o in (outcome, expected))
    assert loss == pytest.approx(other, abs=0.05)
    assert all(t.dtype == torch.float32 for t in fused.weights(0).values())


def test_other_randomness_of_a_model_is_seeded_by_the_update_and_makes_it_solo():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.head(self.drop(x + torch.randn(x.shape, dtype=x.dtype, device=x.device)))

    recipe = make_recipe(_classify(Noisy, _noise(22, 6)))
    found = fusible(recipe)
    assert not found.ok
    assert "random" in found.reason
    assert "\n" not in found.reason
    each = training(recipe, 0)
    torch.manual_seed(1)
    first = alone(recipe, each, 2)[0]
    state = torch.get_rng_state()
    solo = Solo(recipe)
    solo.fill(0, each)
    solo.train_interval()
    resumed = Solo(recipe)
    resumed.fill(0, each, solo.snapshot(0))
    resumed.train_interval()
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(resumed.snapshot(0), first, tolerance=1e-12)


# -- what cannot be fused -------------------------------------------------------------------------


class _Sly(nn.Module):
    """Looks harmless in its first update."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.hidden, self.drop, self.head = nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, CLASSES)
        self.shift = nn.Parameter(torch.zeros(6))
        self.how, self.calls, self.ready = how, 0, False
        self.count = torch.tensor(0)
        if how == "hook":
            self.hidden.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))

    def forward(self, x):
        if self.how == "input" and self.training:
            x += self.shift
        h = self.hidden(x + self.shift)
        if self.how == "calls" and self.training:
            self.calls += 1
            h = h * 2 if self.calls > 5 else h
        if self.how == "count" and self.training:
            self.count += 1
            h = h * torch.where(self.count > 50, 2, 1)
        if self.how == "once" and not self.ready:
            self.ready = True
            self.shift.data.copy_(-x.mean(0))
        if self.how == "generator" and random.random() < 1e-3:
            h = -h
        return self.head(self.drop(h))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("calls", "_Sly.calls"),
        ("count", "_Sly.count"),
        ("hook", "a hook on the gradient of hidden.weight"),
        ("generator", "Python's generator"),
        ("input", "broadcast shape"),
        ("once", ""),
    ],
)
def test_what_would_show_only_later_or_after_a_refill_is_found_out(how, reason):
    recipe = make_recipe(_classify(functools.partial(_Sly, how), _noise(22, 6)))
    found = fusible(recipe)
    assert not found.ok
    assert reason in found.reason
    assert "\n" not in found.reason


class _Lookahead(torch.optim.SGD):
    """Remembers slow weights beside its state."""

    def __init__(self, weights, lr):
        super().__init__(weights, lr)
        self.slow = [weight.detach().clone() for weight in self.param_groups[0]["params"]]

    def step(self, closure=None):
        super().step(closure)
        for weight, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
            slow.lerp_(weight.detach(), 0.5)
            weight.data.copy_(slow)


def test_what_a_resumed_training_would_lose_is_found_out():
    assert what_is_lost(recipe_of("mlp with batch norm")) == []
    counting = _classify(functools.partial(_Sly, "calls"), _noise(22, 6))
    assert "_Sly.calls is in no state_dict" in what_is_lost(make_recipe(counting))[0]
    slow = _classify(Cnn, _noise(22, 1, 8, 8), optimizer=_Lookahead)
    assert "its optimizer remembers" in what_is_lost(make_recipe(slow))[0]


class _Seldom(nn.Module):
    """Its `extra` is trained where an input is large, as in the first batches or not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.extra = nn.Linear(6, 8), nn.Linear(8, 8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.hidden(x)
        return self.head(self.drop(self.extra(h) if (x > 5).any() else h))


@pytest.mark.parametrize("large", [0, 17])
def test_weights_that_some_updates_leave_alone_are_left_alone(large):
    x = _noise(22, 6)
    x[large, 0] = 6.0
    program = _classify(_Seldom, x, optimizer="adam", validation=(x[:5], _labels(5)))
    recipe = make_recipe(program)
    assert fusible(recipe).ok  # so it seems
    trainings = [training(recipe, k) for k in range(2)]
    fused = Fused(recipe, 2)
    for index, each in enumerate(trainings):
        fused.fill(index, each)
    fused.train_interval()
    assert fused.alone is not None
    again = Fused(recipe, 2)  # another worker goes on with them
    for index, each in enumerate(trainings):
        again.fill(index, each, fused.snapshot(index))
    again.train_interval()
    for index, each in enumerate(trainings):
        assert_same(again.snapshot(index), alone(recipe, each, 2)[0])


class _SeldomCounting(nn.Module):
    """Counts the batches in which an input is large, as in the first ones or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, CLASSES))
        self.register_buffer("seen", torch.tensor(1.0))
        self.in_place = in_place

    def forward(self, x):
        if self.training and (x > 5).any():
            if self.in_place:
                self.seen += 1
            else:
                self.seen = self.seen + 1
        return self.net(x) * self.seen


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_that_only_some_updates_change_is_each_slots_own(in_place):
    x = _noise(22, 6)
    x[17, 0] = 6.0
    model = functools.partial(_SeldomCounting, in_place)
    recipe = make_recipe(_classify(model, x, validation=(x[:5], _labels(5))))
    assert fusible(recipe).ok
    first, second, late = (training(recipe, k, data=5) for k in range(3))
    fused = Fused(recipe, 2)
    assert set(fused._stack.parts.shared) == {"seen"}  # so it seems
    fused.fill(0, first)
    fused.fill(1, second)
    fused.train_interval()
    middle = fused.snapshot(1)
    fused.fill(0, late)
    fused.train_interval()
    assert fused.alone is None
    again = Fused(recipe, 2)  # another worker goes on with one
    again.fill(1, second, middle)
    again.train_interval()
    for trainer in (fused, again):
        assert_same(trainer.snapshot(1), alone(recipe, second, 2)[0])
    assert_same(fused.snapshot(0), alone(recipe, late, 1)[0])


class _Warming(nn.Module):
    """A buffer that moves after some updates, written to in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, CLASSES))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x):
        if self.training:
            self.updates += 1
            self.scale.mul_(torch.where(self.updates > 4, 0.9, 1.0))
        return self.net(x) * self.scale


def test_a_buffer_that_is_written_to_is_each_slots_own_whatever_the_numbers():
    recipe = make_recipe(_classify(_Warming, _noise(22, 6)))
    found = fusible(recipe)
    assert found.ok, found.reason
    assert_fused_is_solo(recipe, [training(recipe, k) for k in range(2)], intervals=3)


class _Spectral(nn.Module):
    """Complex weights that its loss would take for real ones without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.cfloat))
        self.register_buffer("turn", torch.tensor(1j))
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.drop(torch.fft.irfft(torch.fft.rfft(x) * self.filter * self.turn, 6)))


@dense_and_real
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_complex_weights_stay_complex_and_train_solo(precision):
    recipe = make_recipe(_classify(_Spectral, _noise(22, 6)), precision=precision)
    assert fusible(recipe).reason.startswith("filter is complex")
    assert what_is_lost(recipe) == []
    begun, drawn = recipe.fresh_model(3), recipe.program.model
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = drawn().filter
    assert begun.filter.dtype == recipe.dtype.to_complex()
    assert torch.equal(begun.filter.to(torch.cfloat), expected)
    left, outcomes = alone(recipe, training(recipe, 0), 2)
    assert outcomes[-1].failure is None
    assert (left.tensors["model/filter"].imag != 0).all()


def _by_autograd(loss, inputs):
    inputs = inputs.clone().requires_grad_()
    return torch.autograd.grad(loss(inputs), inputs, create_graph=True)[0]


def _by_transform(loss, inputs):
    return torch.func.grad(loss)(inputs)


@pytest.mark.parametrize("slope", [_by_autograd, _by_transform])
def test_a_loss_may_take_gradients_itself(slope):
    class Penalised:
        task, batch_size, epochs, lr = "classification", 8, INTERVALS, 1e-2

        def model(self):
            layers = nn.Linear(6, 8), nn.Softmax(-1), nn.Dropout(0.2), nn.Linear(8, CLASSES)
            return nn.Sequential(*layers)

        def data(self):
            return {"train": (_noise(22, 6), _labels(22)), "test": False}

        def loss(self, model, batch):
            def plain(inputs):
                return functional.cross_entropy(model(inputs), batch[1])

            return plain(batch[0]) + 0.1 * slope(plain, batch[0]).square().sum()

    recipe = make_recipe(adapt(Penalised()))
    assert [site.path for site in recipe.sites] == ["2"]
    fusible(recipe)  # or not: it trains
    weights = alone(recipe, training(recipe, 0), 1)[0].part("model")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


class _Caching(nn.Module):
    """Makes a mask when it first knows its size."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, CLASSES)

    def forward(self, x):
        if not hasattr(self, "mask"):
            self.register_buffer("mask", x.new_ones(x.shape[-1]), persistent=False)
        return self.head(self.drop(x * self.mask))


def test_a_buffer_that_is_made_in_the_first_forward_is_named():
    found = fusible(make_recipe(_classify(_Caching, _noise(22, 6))))
    assert not found.ok
    assert found.reason.startswith("the model makes mask when it first runs")


_CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5])  # float32: with them nothing is tried in float64


def _weighed(penalty: float, model=Mlp, **more) -> Recipe:
    program = _classify(model, _noise(22, 6), **more)

    def loss(model, batch, values):
        asked = [weight for weight in model.parameters() if weight.requires_grad]
        total = sum(weight.square().sum() for weight in asked)  # of none side by side
        weight = _CLASS_WEIGHTS.to(batch[1].device)
        losses = functional.cross_entropy(model(batch[0]), batch[1], weight=weight)
        return losses + penalty * total

    return make_recipe(replace(program, loss=loss), precision="float32")


def test_what_rounding_does_not_explain_is_found_in_the_models_own_precision():
    def plain():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, CLASSES))

    found = fusible(_weighed(1e-4, plain, optimizer="sgd"))
    assert not found.ok
    assert "differ from alone" in found.reason
    for lr in (2e-3, 2e-2):  # a bias in front of a norm moves by rounding alone
        found = fusible(_weighed(0.0, lr=lr, optimizer=_grouped))
        assert found.ok, found.reason


class _Inferred(nn.Module):
    """What it holds was computed in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, CLASSES)
        with torch.inference_mode():
            self.register_buffer("scale", torch.arange(1.0, 7.0) / 6)
            self.shift = torch.tensor(0.5)

    def forward(self, x):
        return self.head(self.drop(x * self.scale.clone() + self.shift.clone().to(x)))


def test_tensors_made_in_inference_mode_are_like_others():
    recipe = make_recipe(_classify(_Inferred, _noise(22, 6)), precision="float32")
    assert fusible(recipe).ok
    assert Fused(recipe, 2)._stack.parts.shared.keys() == {"scale"}


def test_a_training_that_fails_changes_nothing_for_the_others():
    class Probability(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, 1)

        def forward(self, x):
            return self.head(self.drop(x)).sigmoid().squeeze(-1)

    class Binary:
        batch_size, epochs, lr = 8, INTERVALS, 1e-2

        def model(self):
            return Probability()

        def data(self):
            return {"train": (_noise(22, 6), (_noise(22) > 0).float()), "test": False}

        def loss(self, model, batch):
            return functional.binary_cross_entropy(model(batch[0]), batch[1])

    recipe = make_recipe(adapt(Binary()))
    good, bad = training(recipe, 0), training(recipe, 1, lr=1e300)
    fused = Fused(recipe, 2)
    fused.fill(0, good)
    fused.fill(1, bad)
    before = fused.snapshot(0)
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        fused.train_interval()
    assert_same(fused.snapshot(0), before, tolerance=1e-300)
    assert not fused.shares_batches
    assert fused.alone is None
    fused.empty(1)
    fused.train_interval()
    assert_same(fused.snapshot(0), alone(recipe, good, 1)[0])


def test_an_optimizer_of_other_tensors_than_the_models_is_refused():
    def make(model, lr):
        return torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr)

    recipe = make_recipe(_classify(Mlp, _noise(22, 6), optimizer=make))
    with pytest.raises(ProgramError, match=r"1 tensors .* no parameters of the model"):
        fusible(recipe)


def test_an_optimizer_that_is_none_is_refused():
    def make(model, lr):
        optimizer = torch.optim.SGD(model.parameters(), lr)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)

    recipe = make_recipe(_classify(Mlp, _noise(22, 6), optimizer=make))
    with pytest.raises(ProgramError, match=r"returned a tuple: .* schedule\(progress\)"):
        fusible(recipe)


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU())
        self.reentrant = reentrant

    def forward(self, x):
        h = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        return self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_are_run_once_where_they_are_fused(reentrant):
    model = functools.partial(_Checkpointed, reentrant)
    recipe = make_recipe(_classify(model, _noise(22, 6)))
    assert fusible(recipe).ok
    assert_fused_is_solo(recipe, [training(recipe, k) for k in range(2)])


# -- what interrupts ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Solo, functools.partial(Fused, width=2)])
def test_an_interrupted_interval_leaves_the_last_boundary(make):
    recipe = recipe_of("mlp with batch norm")
    trainer: Trainer = make(recipe)
    trainer.fill(0, training(recipe, 0))
    trainer.train_interval()
    before = trainer.snapshot(0)
    stopped = _stop_at(trainer, 2)
    with pytest.raises(Interrupted):
        trainer.train_interval()
    assert stopped()
    assert_same(trainer.snapshot(0), before, tolerance=1e-300)
    trainer.train_interval()
    assert_same(trainer.snapshot(0), alone(recipe, training(recipe, 0), 2)[0])


def _stop_at(trainer: Trainer, update: int):
    """Interrupt the trainer before its update of that number."""
    count = 0
    check = trainer._stop_if_interrupted

    def counted():
        nonlocal count
        count += 1
        if count == update:
            trainer.interrupt()
        check()

    trainer._stop_if_interrupted = counted
    return lambda: count == update


def test_too_little_memory_narrows_the_group_and_loses_nothing(monkeypatch):
    recipe = recipe_of("mlp with batch norm")
    trainings = [training(recipe, k) for k in range(5)]
    fused = Fused(recipe, 5)
    for index, each in enumerate(trainings):
        fused.fill(index, each)
    check, count = fused._stop_if_interrupted, 0

    def scarce():
        nonlocal count
        count += 1
        if count in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        check()

    monkeypatch.setattr(fused, "_stop_if_interrupted", scarce)
    outcomes = fused.train_interval()
    assert sorted(outcomes) == [0, 1, 2, 3, 4]
    assert fused._limit == 1
    for index, each in enumerate(trainings):
        assert_same(fused.snapshot(index), alone(recipe, each, 1)[0])


def test_memory_errors_of_device_and_host_are_told_from_others():
    host = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(host)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_scores_are_of_the_kept_weights_on_the_test_set():
    program = classification(
        model=Mlp, train=(_noise(22, 6), _labels(22)), validation=(_noise(9, 6), _labels(9)),
        test=(_noise(13, 6), _labels(13)), batch_size=8, epochs=INTERVALS, lr=2e-3,
    )  # fmt: skip
    recipe = make_recipe(program)
    fused, solo = Fused(recipe, 2), Solo(recipe)
    fused.fill(1, training(recipe, 0))
    solo.fill(0, training(recipe, 0))
    for _ in range(2):
        fused.train_interval()
        solo.train_interval()
    scores = fused.score(1)
    assert scores.split == "test"
    assert scores.examples["nll"].shape == (13,)
    assert scores.metrics["nll"] == pytest.approx(float(scores.examples["nll"].mean()))
    assert scores.examples["logits"].shape == (13, 3)
    assert scores.examples["targets"].tolist() == program.splits(0).test.tree[1].tolist()
    assert scores.metrics == pytest.approx(solo.score(0).metrics, abs=TOLERANCE)


class _Ragged(torch.utils.data.Dataset):
    """Sequences of tokens, each with a class for every one of them."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        length = 2 + i % 5
        return torch.arange(length) % 7, (torch.arange(length) + i) % CLASSES


def _padded(examples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ids, labels = zip(*examples, strict=True)
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(ids), pad(labels, padding_value=-100)


def _tagging(**more) -> Program:
    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(7, 8), nn.Dropout(0.2), nn.Linear(8, CLASSES))

    data = DataLoader(_Ragged(), batch_size=4, collate_fn=_padded)
    return classification(model=model, train=data, validation=data, epochs=3, lr=1e-2, **more)


@pytest.mark.parametrize("passes", [0, 2])
def test_batches_of_sequences_need_not_be_equally_long(passes):
    recipe = make_recipe(_tagging(), mc_passes=passes)
    trainings = [training(recipe, number, data=0) for number in range(3)]
    fused = Fused(recipe, 3)
    for slot, wanted in enumerate(trainings):
        fused.fill(slot, wanted)
    outcomes = fused.train_interval()
    for slot, wanted in enumerate(trainings):
        _, (expected,) = alone(recipe, wanted, 1)
        assert_same_outcome(outcomes[slot], expected)
    scores, examples = fused.score(0), fused.score(0).examples
    assert len(examples["nll"]) == recipe.data(0, "test").n
    assert float(examples["nll"].mean()) == pytest.approx(scores.metrics["nll"])
    assert "logits" not in examples


class _Named(torch.utils.data.Dataset):
    """Examples with a name each, first in every batch."""

    def __len__(self) -> int:
        return 25

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"name": f"image {i}", "x": torch.full((6,), i / 25), "labels": i % CLASSES}

    @staticmethod
    def collate(examples: list[dict[str, object]]) -> dict[str, object]:
        x, labels = torch.utils.data.default_collate([(e["x"], e["labels"]) for e in examples])
        return {"name": [each["name"] for each in examples], "x": x, "labels": labels}


class _Reading(Mlp):
    def forward(self, x, name):
        assert len(name) == len(x)
        assert name[-1].startswith("image")
        return super().forward(x)


def test_what_is_no_tensor_comes_with_its_examples():
    data = DataLoader(_Named(), batch_size=8, collate_fn=_Named.collate)
    program = classification(
        model=_Reading, train=data, validation=data, test=False,
        optimizer="sgd", epochs=3, lr=2e-3,
    )  # fmt: skip
    program.check()
    recipe = make_recipe(program, accumulate=3)
    assert [update.size for update in recipe.feed(0).interval([0], [0], 3)] == [8, 8, 9]
    assert fusible(recipe).ok
    assert_fused_is_solo(recipe, [training(recipe, k, data=0) for k in range(2)])


def test_own_metrics_need_batches_of_one_length():
    own = {"largest": lambda logits, targets: logits.max()}
    recipe = make_recipe(_tagging(metrics=own))
    with pytest.raises(ProgramError, match=r"in one tensor, .* \(4, 5, 3\) and \(4, 6, 3\)"):
        alone(recipe, training(recipe, 0), 1)


def test_a_regression_may_lose_its_last_dimensions():
    """As where a model squeezes, and the last batch holds a single example."""

    class Squeezing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x).squeeze()

    data = _noise(33, 6), torch.arange(33.0)
    program = regression(
        model=Squeezing, train=data, validation=data, test=False, batch_size=8, epochs=3, lr=1e-2
    )
    recipe = make_recipe(program)
    wanted, fused = training(recipe, 0), Fused(recipe, 2)
    fused.fill(0, wanted)
    _, (expected,) = alone(recipe, wanted, 1)
    assert_same_outcome(fused.train_interval()[0], expected)
    assert fused.score(0).examples["mse"].shape == (33,)


def test_many_predictions_are_summed_up_in_parts(monkeypatch):
    recipe = recipe_of("cnn")
    _, (whole,) = alone(recipe, training(recipe, 0), 1)
    monkeypatch.setattr(evaluation, "HELD", 1)
    _, (parts,) = alone(recipe, training(recipe, 0), 1)
    assert_same_outcome(parts, whole)
    fused = Fused(recipe, 2)
    fused.fill(0, training(recipe, 0))
    assert_same_outcome(fused.train_interval()[0], whole)


def test_the_measured_values_are_what_they_say():
    recipe = recipe_of("cnn")
    each = training(recipe, 1)
    values = alone(recipe, each, 1)[1][0].measurement.values
    assert values["lr"] == each.assignment.lr
    assert values["val/gap"] == pytest.approx(values["val/nll"] - values["train/nll"])
    assert values["time/seconds"] > 0
    assert math.isfinite(values["train/loss"])
    assert isinstance(recipe.data(0, "train"), InMemory)


def test_the_objective_is_measured_in_training_too():
    recipe = replace(recipe_of("cnn"), objective=Objective("accuracy"))
    values = alone(recipe, training(recipe, 1), 1)[1][0].measurement.values
    assert {"train/nll", "train/accuracy", "val/gap"} <= set(values)
    assert "train/error" not in values
