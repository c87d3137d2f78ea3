"""Calls from a tape give what the function gives, bit for bit, or are not from a tape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from droptune.trainers.recording import record
from droptune.trainers.replays import FORGOTTEN, KEPT, ReplayError, Replays
from droptune.trainers.tape import Pool, Tape

CALLS = 20


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *inputs):
        self.calls += 1
        return self.function(*inputs)


def numbers(number: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def calls_of(function, shape=(3, 4)) -> int:
    """How often a function is called while it is run on 20 inputs: a tape does the rest."""
    replays, counted = Replays(lambda: None), Counted(function)
    for number in range(CALLS):
        x = numbers(number, *shape)
        expected = [output.clone() for output in function(x.clone())]
        found = replays.run(counted, (x,), "kind")
        assert all(map(torch.equal, found, expected))
    return counted.calls


WRITTEN = 4  # calls of 20: the first three and the tenth


STEADY = {
    "in place": lambda x: [(x * 2).add_(1).relu_()],
    "operand read again": lambda x: [x.exp().mul(3) + x.exp()],
    "view of a result": lambda x: [(x + 1).t()[1:].contiguous(), (x - 1).sum(0)],
    "transposed operand": lambda x: [(y := x @ x.t()) + y.t()],
    "broadcast": lambda x: [x.sum(1, keepdim=True) + x],
    "types": lambda x: [(x > 0).to(torch.int32).mul_(3).to(torch.float64)],
    "several results": lambda x: list(torch.max(x.exp(), 1)),
    "no out=": lambda x: [functional.layer_norm(x, (4,)), functional.gelu(x)],
    "input given back": lambda x: [x, x.view(-1)],
    "nothing reads it": lambda x: [x.cos(), (x.sin(), x)[1]],
    "no numbers": lambda x: [x[:0].sum(0), x.exp()],
    "a constant": lambda x: [x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.ones(4)],
    "convolution": lambda x: [functional.conv2d(x[None, None], torch.ones(1, 1, 2, 2))],
    "batched": lambda x: [torch.func.vmap(lambda row: functional.softmax(row, 0))(x)],
    "gradient": lambda x: torch.func.grad_and_value(lambda y: (y.tanh() ** 2).sum())(x),
}


@pytest.mark.parametrize("name", STEADY)
def test_a_tape_gives_what_the_function_gives(name):
    assert calls_of(STEADY[name]) == WRITTEN


UNSTEADY = {
    "a branch on numbers": lambda x: [x + 1 if x.sum() > 0 else x - 1],
    "a number": lambda x: [x * x.max().item()],
    "a list": lambda x: [x * x.tolist()[0][0]],
    "an array": lambda x: [x + torch.from_numpy(np.asarray(x) * 2)],
    "a shape": lambda x: [x[x > 0]],
    "equality": lambda x: [x + torch.equal(x, x)],
}


@pytest.mark.parametrize("name", UNSTEADY)
def test_what_looks_at_numbers_is_never_replayed(name):
    assert calls_of(UNSTEADY[name]) == CALLS


def test_random_numbers_are_never_replayed():
    replays, counted = Replays(lambda: None), Counted(lambda x: [x + torch.rand(3)])
    found = [replays.run(counted, (torch.zeros(3),), "kind")[0] for _ in range(CALLS)]
    assert len({tuple(each.tolist()) for each in found}) == counted.calls == CALLS


def test_a_number_that_moves_between_calls_is_never_frozen():
    counter = iter(range(1000))
    replays, counted = Replays(lambda: None), Counted(lambda x: [x + next(counter)])
    found = [replays.run(counted, (torch.zeros(()),), "kind")[0].item() for _ in range(CALLS)]
    assert found == list(range(CALLS))


def test_a_tape_ends_when_the_function_does_something_else():
    factor = 1
    replays, function = Replays(lambda: None), Counted(lambda x: [x * factor])
    found = []
    for number in range(1, 1001):
        factor = 1 if number < 5 else 2
        found.append(replays.run(function, (torch.ones(()),), "kind")[0].item())
    assert found[:9] == [1.0] * 9
    assert found[9:] == [2.0] * 991  # seen at the tenth call
    assert replays.replayed == 1  # of what it does now


def test_memory_outside_is_changed_in_place():
    total, expected = torch.zeros(3), torch.zeros(3)

    def add(x):
        total.add_(x)
        return [total * 2]

    replays = Replays(lambda: None)
    for number in range(CALLS):
        x = numbers(number, 3)
        expected += x
        assert torch.equal(replays.run(add, (x,), "kind")[0], expected * 2)
        assert torch.equal(total, expected)
    assert replays.replayed == 1


def test_a_gradient_with_autograd_and_vmap():
    weights = numbers(0, 5, 4, 3).requires_grad_()

    def one(w, x):
        return functional.cross_entropy(x @ w, torch.tensor([0, 2]))

    def gradients(x):
        losses = torch.func.vmap(one, in_dims=(0, None))(weights, x)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), weights)]

    assert calls_of(gradients, shape=(2, 4)) == WRITTEN


def test_kinds_shapes_and_types_are_apart():
    replays, double = Replays(lambda: None), Counted(lambda x: [x * 2])
    for number in range(CALLS):
        for size in (2, 3):
            for dtype in (torch.float32, torch.float64):
                x = numbers(number, size).to(dtype)
                assert torch.equal(replays.run(double, (x,), "double")[0], x * 2)
                assert torch.equal(replays.run(lambda y: [y * 3], (x,), "triple")[0], x * 3)
    assert (replays.replayed, double.calls) == (8, 4 * WRITTEN)


def test_only_tensors_in_host_memory_are_replayed():
    replays, counted = Replays(lambda: None), Counted(lambda x, y: [x])
    for _ in range(CALLS):
        replays.run(counted, (torch.ones(2), "word"), "word")
        replays.run(counted, (torch.ones(2), torch.ones(2, device="meta")), "device")
    assert counted.calls == 2 * CALLS


def test_what_is_known_is_bounded_and_can_be_given_back():
    replays = Replays(lambda: None)
    for number in range(KEPT + 1):
        for _ in range(5):
            replays.run(lambda x: [x + 1], (torch.ones(2),), number)
    assert replays.replayed == KEPT
    replays.stop()
    counted = Counted(lambda x: [x + 1])
    for _ in range(CALLS):
        replays.run(counted, (torch.ones(2),), "kind")
    assert (replays.replayed, counted.calls) == (0, CALLS)
    replays.clear()
    for _ in range(3):
        replays.run(counted, (torch.ones(2),), "kind")
    assert replays.replayed == 1


def test_with_more_kinds_than_are_known_the_others_are_run_as_written(monkeypatch):
    recorded = Counted(record)
    monkeypatch.setattr("droptune.trainers.replays.record", recorded)
    replays = Replays(lambda: None)
    for _ in range(CALLS):
        for number in range(KEPT + 8):
            replays.run(lambda x: [x + 1], (torch.ones(2),), number)
    assert recorded.calls == 3 * KEPT  # of 20 calls the second, the third and the tenth
    for _ in range(FORGOTTEN):
        replays.run(lambda x: [x + 1], (torch.ones(2),), "another")
    assert replays.replayed == KEPT
    assert "another" in {key[0] for key in replays._known}


def test_what_touches_much_memory_is_not_replayed(monkeypatch):
    monkeypatch.setattr("droptune.trainers.replays.LIMIT", 100)
    assert calls_of(lambda x: [x + 1], shape=(26,)) == CALLS
    assert calls_of(lambda x: [x + 1], shape=(25,)) == WRITTEN


def test_the_most_memory_that_is_needed_at_once():
    def chain(x):
        y = (x + 1) * 2  # the first is over when the second is there
        return [y.sum() + (y * y).sum()]

    _, recording = record(chain, [torch.zeros(100)])
    assert recording.peak == 2 * 400 + 4


def test_what_changes_unread_is_changed():
    """`native_batch_norm` does not say that it changes the statistics."""
    norms = [torch.nn.BatchNorm1d(4) for _ in range(2)]
    replays = Replays(lambda: None)
    for number in range(CALLS):
        x = numbers(number, 3, 4)
        replays.run(lambda x: [norms[0](x.detach()) * 0 + x, x][1:], (x,), "kind")
        norms[1](x)
        assert torch.equal(norms[0].running_mean, norms[1].running_mean)
        assert torch.equal(norms[0].running_var, norms[1].running_var)
    assert replays.replayed == 1


def test_a_tensor_that_is_put_on_other_memory_is_not_frozen():
    total = torch.zeros(1)

    def moved(x):
        total.data = total.data + 1
        return [x + total]

    replays = Replays(lambda: None)
    found = [replays.run(moved, (torch.zeros(1),), "kind")[0].item() for _ in range(CALLS)]
    assert found == list(range(1, CALLS + 1))


def test_outputs_of_tapes_share_memory_and_are_right_until_the_next():
    replays = Replays(lambda: None)
    for number in range(CALLS):
        for kind, factor in (("double", 2), ("triple", 3)):
            x = numbers(number, 50)
            y, z = replays.run(lambda x, f=factor: [x * f, x - f], (x,), kind)
            assert torch.equal(y, x * factor)
            assert torch.equal(z, x - factor)
    assert replays.replayed == 2
    assert len(replays._pool._free) == 2


def test_a_tape_that_fails_says_so(monkeypatch):
    def failing(*_):
        raise OSError("no such kernel")

    monkeypatch.setattr(Tape, "play", failing)
    replays = Replays(lambda: None)
    for _ in range(3):
        replays.run(lambda x: [x + 1], (torch.ones(2),), "kind")
    with pytest.raises(ReplayError, match="no such kernel"):
        replays.run(lambda x: [x + 1], (torch.ones(2),), "kind")


def test_a_tape_that_cannot_be_made_says_so(monkeypatch):
    def failing(*_):
        raise OSError("no such memory")

    monkeypatch.setattr(Pool, "take", failing)
    replays = Replays(lambda: None)
    for _ in range(2):
        replays.run(lambda x: [x + 1], (torch.ones(2),), "kind")
    with pytest.raises(ReplayError, match="no such memory"):
        replays.run(lambda x: [x + 1], (torch.ones(2),), "kind")


def test_what_is_remembered_is_computed_anew_where_it_is_recorded():
    known: dict[str, Tensor] = {}

    def remembering(x):
        if "key" not in known or not torch.equal(known["x"], x):
            known.update(x=x.clone(), key=x.exp())
        return [known["key"] + 1]

    replays = Replays(known.clear)
    for number in range(CALLS):
        x = numbers(number // 3, 2)
        assert torch.equal(replays.run(remembering, (x,), "kind")[0], x.exp() + 1)
    assert replays.replayed == 1


def test_tapes_share_memory_and_need_no_more_than_lives_at_once():
    pool = Pool()

    def chain(x):
        for _ in range(50):
            x = (x @ x).relu()
        return [x.sum()]

    for size in (64, 60):
        _, recording = record(chain, [torch.zeros(size, size)])
        tape = Tape(recording, pool)
        x = numbers(1, size, size) / 100
        assert torch.equal(tape.play([x])[0], chain(x)[0])
    assert len(pool._free) <= 3  # two matrices and the sum
