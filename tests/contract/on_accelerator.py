"""What is special about an accelerator; `test_accelerator.py` runs it on one that is simulated.

On a GPU: `DROPTUNE_TEST_DEVICE=cuda pytest` with this file and `test_trainer.py`.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from test_trainer import (
    DEVICE,
    LOOKING,
    PROGRAMS,
    Mlp,
    _classify,
    _noise,
    alone,
    assert_same,
    assert_same_outcome,
    filled,
    left_after,
    make_recipe,
    recipe_of,
    training,
)
from torch import Tensor, nn
from torch.nn import functional

from droptune.sites import kernel, masks
from droptune.trainers import replays
from droptune.trainers.captured import Captured, GraphPool
from droptune.trainers.fused import Fused, trainer_of
from droptune.trainers.interval import Interval
from droptune.trainers.memory import empty_cache, free_memory, used_memory
from droptune.trainers.recipe import Recipe
from droptune.trainers.recording import record
from droptune.trainers.replays import TRIED, WRITTEN, Replays, _is_faster
from droptune.trainers.solo import Solo
from droptune.trainers.tape import Pool, Tape
from droptune.trainers.width import choose_width

HOST = torch.device("cpu")
SIMULATED = DEVICE.type == "sim"
CALLS = 20


@pytest.fixture(autouse=True)
def _graphs_are_kept(monkeypatch):
    """Whatever they cost on this device."""
    monkeypatch.setattr(replays, "_is_faster", lambda _: True)


def on_host(recipe: Recipe) -> Recipe:
    return replace(recipe, device=HOST, _kept={})


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# -- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"accumulate": 3, "clip": 0.05}], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_trainings_are_the_same_as_on_the_host(name, more):
    recipe = make_recipe(PROGRAMS[name](), **more)
    found, expected = (alone(each, training(recipe, 1), 3) for each in (recipe, on_host(recipe)))
    assert_same(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        assert_same_outcome(a, b)
    (fused, found), (_, expected) = (
        left_after(each, replayed=True) for each in (recipe, on_host(recipe))
    )
    assert (fused._model.replays.replayed > 0) == (name not in LOOKING)
    for tensors, others in zip(found, expected, strict=True):
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, others[key], rtol=0, atol=1e-9)


def test_a_training_goes_on_where_another_device_left_it():
    recipe = recipe_of("mlp with batch norm")
    first, second = Solo(on_host(recipe)), Fused(recipe, 2)
    first.fill(0, training(recipe, 0))
    first.train_interval()
    second.fill(1, training(recipe, 0), first.snapshot(0))
    second.train_interval()
    first.fill(0, training(recipe, 0), second.snapshot(1))
    first.train_interval()
    assert_same(first.snapshot(0), alone(on_host(recipe), training(recipe, 0), 3)[0])


def test_masks_are_those_of_the_host():
    rates, keys = torch.tensor([0.0, 0.3, 0.9]), torch.arange(6, dtype=torch.int32).view(3, 2)
    for one, other in zip(
        masks.noises(rates, keys), masks.noises(rates.to(DEVICE), keys.to(DEVICE)), strict=True
    ):
        assert torch.equal(one.keep((50, 40), HOST), other.keep((50, 40), DEVICE).cpu())


# -- launches and waits ---------------------------------------------------------------------------


def launched(recipe: Recipe, width: int, monkeypatch) -> list[tuple[int, int]]:
    """Launches and reads on the host of each update of the third interval of a group."""
    fused, _ = filled(recipe, width)
    seen, update = [], Interval._update

    def counted(*given):
        before = torch.ops.sim.launches(), torch.ops.sim.reads()
        result = update(*given)
        seen.append((torch.ops.sim.launches() - before[0], torch.ops.sim.reads() - before[1]))
        return result

    monkeypatch.setattr(Interval, "_update", counted)
    for _ in range(4):
        fused.train_interval()
    monkeypatch.setattr(Interval, "_update", update)
    return seen[-recipe.updates(0) :]


@pytest.mark.skipif(not SIMULATED, reason="a GPU does not count its launches")
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in LOOKING])
def test_an_update_is_few_launches_whatever_the_width_and_waits_for_nothing(name, monkeypatch):
    program = replace(PROGRAMS[name](), batch_size=2)  # enough updates to an interval
    recipe = make_recipe(program)
    narrow, wide = (launched(recipe, width, monkeypatch) for width in (2, 5))
    assert narrow == wide
    assert {reads for _, reads in narrow} == {0}
    # one graph; the batch, its place, and what goes into the graph; the optimizer
    weights = len(list(program.model().parameters()))
    assert min(count for count, _ in narrow) <= 30 + 2 * weights


# -- graphs ---------------------------------------------------------------------------------------

STEADY = {
    "in place": lambda x: [(x * 2).add_(1).relu_()],
    "views": lambda x: [(x + 1).t()[1:].contiguous(), (x - 1).sum(0), x.view(-1)],
    "types": lambda x: [(x > 0).to(torch.int32).mul_(3).to(torch.float64)],
    "several results": lambda x: list(torch.max(x.exp(), 1)),
    "a constant": lambda x: [x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)],
    "what is made on the device": lambda x: [x + torch.arange(4.0, device=x.device)],
    "no numbers": lambda x: [x[:0].sum(0), x.exp()],
    "batched": lambda x: [torch.func.vmap(lambda row: row.softmax(0))(x)],
    "gradient": lambda x: torch.func.grad_and_value(lambda y: (y.tanh() ** 2).sum())(x),
}


@pytest.mark.parametrize("name", STEADY)
def test_a_graph_gives_what_the_function_gives(name):
    calls, function, known = [], STEADY[name], Replays(lambda: None)
    for number in range(CALLS):
        x = numbers(number, 3, 4)
        expected = [output.clone() for output in function(x.clone())]
        found = known.run(lambda y: (calls.append(1), function(y))[1], (x,), "kind")
        assert all(map(torch.equal, found, expected))
    assert known.replayed == 1
    assert len(calls) == 7  # three first, three to compare times with, the tenth


def test_what_a_function_remembers_is_computed_in_the_graph_and_not_left_to_others():
    known: dict[str, Tensor] = {}

    def remembering(x):
        if "key" not in known or not torch.equal(known["x"].cpu(), host[-1]):
            known.update(x=x.clone(), key=x.exp())
        return [known["key"] + 1]

    host: list[Tensor] = []
    replayed = Replays(known.clear)
    for number in range(CALLS):
        x = numbers(number // 3, 2)
        host.append(x.cpu())
        assert torch.equal(replayed.run(remembering, (x,), "kind")[0], x.exp() + 1)


def test_what_libraries_do_at_a_first_call_is_not_left_to_a_capture():
    """The recorded convolutions of the backward pass were done by another thread."""
    weights, replayed = numbers(0, 3, 1, 2, 2).requires_grad_(), Replays(lambda: None)

    def gradient(x):
        return torch.autograd.grad(functional.conv2d(x, weights).square().sum(), weights)

    for number in range(CALLS):
        x = numbers(number, 4, 1, 7, 7)
        torch.testing.assert_close(replayed.run(gradient, (x,), "kind"), gradient(x))
    assert [type(known.replay) for known in replayed._known.values()] == [Captured]


def test_graphs_of_one_pool_are_right_in_turn():
    replayed = Replays(lambda: None)
    for number in range(CALLS):
        for kind, factor in (("double", 2), ("triple", 3)):
            x = numbers(number, 50)
            y, z = replayed.run(lambda x, f=factor: [x * f, (x - f).exp()], (x,), kind)
            assert torch.equal(y, x * factor)
            assert torch.equal(z, (x - factor).exp())
    assert replayed.replayed == 2


def test_a_graph_is_captured_after_all_others_of_its_pool_have_gone():
    pool = GraphPool()
    for number in range(3):
        x = numbers(number, 3)
        _, recording = record(lambda x: [x.exp()], [x.clone()])
        graph = Captured(Tape(recording, Pool()), DEVICE, pool)
        assert torch.equal(graph.play([x])[0], x.exp())
        del graph


def test_a_graph_that_is_not_faster_is_given_up(monkeypatch):
    monkeypatch.setattr(replays, "_is_faster", lambda seconds: not seconds)
    calls, replayed = [], Replays(lambda: None)
    for _ in range(CALLS):
        replayed.run(lambda x: (calls.append(1), [x + 1])[1], (numbers(0, 3),), "kind")
    assert replayed.replayed == 0
    assert len(calls) == CALLS - 3  # three were tried


def test_what_is_given_up_holds_no_memory(monkeypatch):
    replayed, x = Replays(lambda: None), numbers(0, 1000)
    for kind in (False, True):  # the second one is replayed
        before = used_memory(DEVICE, reset=True)
        monkeypatch.setattr(replays, "_is_faster", lambda _, kept=kind: kept)
        for _ in range(9):
            replayed.run(lambda x: [(x.exp() + x.sin()).sum()], (x,), kind)
        gc.collect()
        assert (used_memory(DEVICE, reset=True) - before > 8000) == kind


def test_replays_that_are_made_late_are_tried_as_well(monkeypatch):
    """As of a function that does something else in its third call."""
    monkeypatch.setattr(replays, "_is_faster", lambda seconds: seconds.keys() != {TRIED, WRITTEN})
    calls, replayed = [], Replays(lambda: None)
    for _ in range(CALLS):
        replayed.run(
            lambda x: (calls.append(1), [x + 1 if len(calls) > 2 else x - 1])[1],
            (numbers(0, 3),),
            "kind",
        )
    assert replayed.replayed == 0
    assert len(calls) == CALLS - 3


def test_times_are_compared():
    assert _is_faster({TRIED: 1.0, WRITTEN: 2.0})
    assert not _is_faster({TRIED: 2.0, WRITTEN: 2.0})


def test_numbers_of_the_host_are_read_and_changed_in_every_call():
    """A graph would keep the number, and change nothing."""
    count, factor = torch.zeros(()), torch.tensor(3.0)
    replayed, x = Replays(lambda: None), numbers(0, 2)
    for number in range(1, CALLS):
        found = replayed.run(lambda x: [x * count.add_(1) * factor], (x,), "changed")
        assert torch.equal(found[0], x * number * 3)
        found = replayed.run(lambda x: [x * (factor * 2)], (x,), "read")
        assert torch.equal(found[0], x * 6)
    kinds = [type(known.replay) for known in replayed._known.values()]
    assert kinds == [Tape, Captured]


def test_what_cannot_be_captured_is_not_tried(monkeypatch):
    """torch keeps the memory of a capture that fails."""
    tried: list[int] = []
    monkeypatch.setattr(replays, "Captured", lambda *_: tried.append(1))
    table, replayed = torch.arange(3.0), Replays(lambda: None)
    for number in range(CALLS):
        x = numbers(number, 3)
        found = replayed.run(lambda x: [x + table.to(x.device), x.cpu()], (x,), "kind")
        assert all(map(torch.equal, found, [x + table.to(DEVICE), x.cpu()]))
    assert (replayed.replayed, tried) == (1, [])


def test_what_waits_for_the_device_is_replayed_without_a_graph():
    def zeroed(x):
        x = x.clone()
        x[x > 0] = x.new_zeros(1)
        return [x, x[:1] * 2]

    replayed = Replays(lambda: None)
    for number in range(CALLS):
        for shape in ((3,), (4,)):
            x = numbers(number, *shape)
            found = replayed.run(zeroed, (x,), "kind")
            assert all(map(torch.equal, found, zeroed(x)))
            y = replayed.run(lambda x: [x * 2], (x,), "another")
            assert torch.equal(y[0], x * 2)
    kinds = [type(known.replay) for known in replayed._known.values()]
    assert kinds == [Tape, Captured, Tape, Captured]
    empty_cache(DEVICE)


def test_memory_that_a_graph_uses_stays():
    weights, x = [numbers(0, 3)], numbers(1, 3)
    expected = x * weights[0]

    def captured() -> Captured:
        _, recording = record(lambda x: [x * weights[0]], [x.clone()])
        return Captured(Tape(recording, Pool()), DEVICE, GraphPool())

    graph = captured()
    weights.clear()
    numbers(2, 3)  # might take its place
    assert torch.equal(graph.play([x])[0], expected)


class Scaled(Mlp):
    """Makes numbers on the device in every call."""

    def forward(self, x):
        return super().forward(x * torch.tensor([1.0, 2.0] * 3, device=x.device, dtype=x.dtype))


class FromHost(Mlp):
    """Brings numbers of the host along in every call, which no graph can."""

    def forward(self, x):
        return super().forward(x * torch.tensor([1.0, 2.0] * 3).to(x.device, x.dtype))


@pytest.mark.parametrize(("model", "kind"), [(Scaled, Captured), (FromHost, Tape)])
def test_updates_with_numbers_of_the_host_are_replayed_in_a_graph_or_without(model, kind):
    recipe = make_recipe(_classify(model, _noise(22, 6), lr=2e-3))
    (fused, found), (_, expected) = (left_after(recipe, replayed=each) for each in (True, False))
    kinds = {type(known.replay) for known in fused._model.replays._known.values()}
    assert kinds - {type(None)} == {kind}  # None of what was seen too rarely
    for tensors, others in zip(found, expected, strict=True):
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


class UnseenKernel:
    """A kernel in one launch that torch's dispatcher does not see, as a compiled one."""

    def __call__(self, *given: Tensor) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return masks._draw(*given)


def test_updates_with_a_kernel_of_its_own_are_replayed(monkeypatch):
    recipe = recipe_of("cnn")
    expected = alone(recipe, training(recipe, 0), 4)[0]
    if SIMULATED:
        kernel.kernel_for.cache_clear()
        monkeypatch.setattr(kernel, "DEVICES", ("sim",))
        monkeypatch.setattr(torch.cuda.jiterator, "_create_jit_fn", lambda _: UnseenKernel())
    fused, _ = filled(recipe, 2)
    for _ in range(4):
        fused.train_interval()
    assert fused._model.replays.replayed > 0
    assert_same(fused.snapshot(0), expected)
    kernel.kernel_for.cache_clear()


# -- memory ---------------------------------------------------------------------------------------


class Large(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 3000), nn.ReLU(), nn.Dropout(0.2), nn.Linear(3000, 3))


@pytest.fixture
def limited():
    """A function that leaves so many bytes free."""
    if not SIMULATED:
        pytest.skip("takes the memory of a GPU")
    before = free_memory(DEVICE)
    yield lambda free: torch.ops.sim.limit(used_memory(DEVICE, reset=True) + free)
    torch.ops.sim.limit(int(before / 0.85) + used_memory(DEVICE, reset=True))


def test_memory_is_that_of_the_device():
    empty_cache(DEVICE)
    before = used_memory(DEVICE, reset=True)
    kept = torch.zeros(1000, device=DEVICE)
    assert used_memory(DEVICE) >= before + 4000
    assert free_memory(DEVICE) > 0
    del kept


def test_out_of_memory_narrows_the_group_and_loses_nothing(limited):
    recipe = make_recipe(_classify(Large, _noise(256, 6), 256, batch_size=256))
    fused, _ = filled(recipe, 4)
    expected = [alone(recipe, training(recipe, k), 2)[0] for k in range(4)]
    limited(60 * 2**20)
    for _ in range(2):
        fused.train_interval()
    assert 1 <= fused._limit < 4
    assert fused.alone is None
    for slot in range(4):
        assert_same(fused.snapshot(slot), expected[slot])


@pytest.mark.parametrize("name", ["Captured", "Tape"])
def test_replays_for_which_memory_is_too_small_do_not_narrow_the_group(name, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("sim out of memory")

    recipe = recipe_of("cnn")
    _, expected = left_after(recipe, replayed=True)
    monkeypatch.setattr(replays, name, full)
    fused, found = left_after(recipe, replayed=True)
    assert fused._limit == fused.width
    assert (fused._model.replays.replayed > 0) == (name == "Captured")
    for tensors, others in zip(found, expected, strict=True):
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def test_replays_are_given_up_before_the_group_is_made_narrower(monkeypatch):
    """Where the memory that they hold is missing elsewhere."""
    recipe = recipe_of("cnn")
    _, expected = left_after(recipe, replayed=True)
    seen, looked = [], replays.Replays._look

    def look(known, *given):
        seen.append(known.replayed)
        if known.replayed:
            raise torch.OutOfMemoryError("sim out of memory")
        return looked(known, *given)

    monkeypatch.setattr(replays.Replays, "_look", look)
    fused, found = left_after(recipe, replayed=True)
    assert any(seen)
    assert fused._limit == fused.width
    assert fused._model.replays.replayed == 0
    for tensors, others in zip(found, expected, strict=True):
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def test_a_width_is_measured_within_the_memory_of_the_device(limited):
    recipe = make_recipe(_classify(Large, _noise(256, 6), 256, batch_size=256))
    limited(100 * 2**20)
    choice = choose_width(recipe, trainer_of, most=64)
    assert choice.width < 64
    assert "memory" in choice.ended or "GiB" in choice.ended
    assert all(tried.memory > 0 for tried in choice.tried)
