"""One update of a stack is what torch.optim does in each slot."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from droptune.errors import ProgramError
from droptune.program.optimizers import make_optimizer
from droptune.trainers.optimizer_state import (
    build,
    export_state,
    import_state,
    names_of,
    settings_of,
)
from droptune.trainers.updates import (
    Layout,
    RowwiseAdam,
    SlotwiseOptimizer,
    VectorOptimizer,
    stack_optimizer,
)
from droptune.training import Assignment

K, UPDATES = 3, 5
CASES = {
    "sgd": (SGD, {"weight_decay": 0.1}),
    "sgd momentum": (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd nesterov": (SGD, {"momentum": 0.8, "nesterov": True}),
    "sgd maximize": (SGD, {"momentum": 0.8, "maximize": True}),
    "adam": (Adam, {"weight_decay": 0.1}),
    "adam amsgrad": (Adam, {"amsgrad": True, "betas": (0.8, 0.95), "eps": 1e-3}),
    "adam decoupled": (Adam, {"decoupled_weight_decay": True, "weight_decay": 0.3}),
    "adamw": (AdamW, {"weight_decay": 0.3}),
    "adamw undecayed": (AdamW, {"weight_decay": 0.0, "maximize": True}),
    "rmsprop": (RMSprop, {"alpha": 0.9, "weight_decay": 0.1}),
    "rmsprop centered": (RMSprop, {"centered": True, "momentum": 0.7, "eps": 1e-3}),
    "nadam": (NAdam, {"weight_decay": 0.1}),
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def two_groups(kind, options):
    """Weights and biases in groups of their own, the second at a tenth of the lr."""

    def make(model, lr):
        biases = [p for p in model.parameters() if p.ndim == 1]
        matrices = [p for p in model.parameters() if p.ndim > 1]
        groups = [{"params": biases, "lr": lr / 10}, {"params": matrices}]
        return kind(groups, lr=lr, **options)

    return make


class Stacked:
    """K networks as rows, and the same networks one by one with torch.optim."""

    def __init__(self, make, lrs) -> None:
        self.models = [network(k) for k in range(K)]
        self.optimizers = [make(m, lr) for m, lr in zip(self.models, lrs, strict=True)]
        self.base = [settings_of(optimizer) for optimizer in self.optimizers]
        made = make(self.models[0], lrs[0])
        self.layout = Layout.of(made, names_of(self.models[0]))
        self.stack = torch.zeros(K + 1, self.layout.size, dtype=torch.float64)
        self.optimizer = stack_optimizer(self.stack, self.layout, made)
        for row, (model, lr) in enumerate(zip(self.models, lrs, strict=True)):
            self.layout.write(self.stack[row], dict(model.named_parameters()))
            template = copy.deepcopy(model)
            self.optimizer.fill(row, make(template, lr), {}, {})
        self.generator = torch.Generator().manual_seed(3)

    def run(self, updates: int, done: int, factors: np.ndarray) -> None:
        self.optimizer.prepare(slice(0, K), factors, np.full(K, float(done)))
        for update in range(updates):
            gradients = torch.randn(
                K, self.layout.size, generator=self.generator, dtype=torch.float64
            )
            for k, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
                views = self.layout.views(gradients[k].clone())
                for name, parameter in model.named_parameters():
                    parameter.grad = views[name]
                for group, base in zip(optimizer.param_groups, self.base[k], strict=True):
                    group["lr"] = base["lr"] * factors[update, k]
                optimizer.step()
            with torch.no_grad():
                self.optimizer.step(update, gradients)

    def assert_equal(self, done: int) -> None:
        for k, model in enumerate(self.models):
            views = self.layout.views(self.stack[k])
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(views[name], parameter.detach(), rtol=0, atol=1e-13)
            state, _ = export_state(self.optimizers[k], names_of(model))
            exported, _ = self.optimizer.export(k, done)
            assert exported.keys() == state.keys()
            for path, tensor in state.items():
                assert exported[path].dtype == tensor.dtype
                torch.testing.assert_close(exported[path], tensor, rtol=0, atol=1e-13)


@pytest.fixture(params=["whole stack", "row by row"])
def adam(request, monkeypatch):
    """Both ways in which Adam is written out."""
    monkeypatch.setattr(
        "droptune.trainers.updates.LONG_ROW", 0 if request.param == "row by row" else 2048
    )


@pytest.mark.usefixtures("adam")
@pytest.mark.parametrize("case", CASES)
def test_a_stack_is_updated_as_each_slot_alone(case):
    stacked = Stacked(two_groups(*CASES[case]), [0.01, 0.03, 0.1])
    factors = np.linspace(1.0, 0.2, UPDATES * K).reshape(UPDATES, K)
    with torch.no_grad():
        stacked.run(UPDATES, 0, factors)
        stacked.assert_equal(UPDATES)
        stacked.run(UPDATES, UPDATES, np.ones((UPDATES, K)))
        stacked.assert_equal(2 * UPDATES)
    assert torch.equal(stacked.stack[K], torch.zeros(stacked.layout.size, dtype=torch.float64))


@pytest.mark.usefixtures("adam")
def test_hyperparameters_may_differ_from_slot_to_slot():
    decays, betas = [0.0, 0.1, 0.5], [(0.9, 0.99), (0.8, 0.9), (0.7, 0.95)]
    stacked = Stacked(lambda model, lr: AdamW(model.parameters(), lr=lr), [0.01] * K)
    for k in range(K):
        made = AdamW(network().parameters(), lr=0.01, weight_decay=decays[k], betas=betas[k])
        stacked.optimizer.fill(k, made, {}, {})
        stacked.optimizers[k].param_groups[0].update(weight_decay=decays[k], betas=betas[k])
    with torch.no_grad():
        stacked.run(UPDATES, 0, np.ones((UPDATES, K)))
        stacked.assert_equal(UPDATES)


def test_long_rows_of_adam_are_updated_one_by_one():
    model = nn.Linear(64, 64)
    stack = torch.zeros(2, 64 * 65)
    for kind, expected in ((Adam, RowwiseAdam), (AdamW, RowwiseAdam), (SGD, VectorOptimizer)):
        made = kind(model.parameters(), lr=0.1)
        layout = Layout.of(made, names_of(model))
        assert type(stack_optimizer(stack, layout, made)) is expected


def test_which_optimizers_are_written_out():
    model = network()
    layout = Layout.of(SGD(model.parameters(), lr=1), names_of(model))
    stack = torch.zeros(2, layout.size)
    made = {kind: kind(model.parameters(), lr=0.1) for kind in (SGD, Adam, AdamW, RMSprop, NAdam)}
    vectorised = {
        kind
        for kind, optimizer in made.items()
        if isinstance(stack_optimizer(stack, layout, optimizer), VectorOptimizer)
    }
    assert vectorised == {SGD, Adam, AdamW, RMSprop}

    class MyAdam(Adam):
        pass

    mine = MyAdam(model.parameters(), lr=0.1)
    assert isinstance(stack_optimizer(stack, layout, mine), SlotwiseOptimizer)


@pytest.mark.usefixtures("adam")
@pytest.mark.parametrize("case", ["adamw", "sgd momentum", "nadam"])
def test_rows_can_be_permuted_kept_and_put_back(case):
    stacked = Stacked(two_groups(*CASES[case]), [0.01, 0.03, 0.1])
    with torch.no_grad():
        stacked.run(UPDATES, 0, np.ones((UPDATES, K)))
        before = [_copied(stacked.optimizer.export(k, UPDATES)[0]) for k in range(K)]
        kept = stacked.optimizer.keep(K)
        stacked.run(UPDATES, UPDATES, np.ones((UPDATES, K)))
        stacked.optimizer.put_back(kept)
        after = [stacked.optimizer.export(k, UPDATES)[0] for k in range(K)]
        _assert_equal(before, after)
        stacked.optimizer.permute([2, 0])
        moved = [stacked.optimizer.export(k, UPDATES)[0] for k in range(2)]
        _assert_equal([before[2], before[0]], moved)
        assert stacked.optimizer.first_lr(0) == pytest.approx(0.01)


def _copied(tensors):
    return {path: tensor.clone() for path, tensor in tensors.items()}


def _assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[path], b[path]) for path in a)


@pytest.mark.parametrize("case", CASES)
def test_exported_state_starts_another_optimizer_where_it_was(case):
    make = two_groups(*CASES[case])
    model = network()
    optimizer = make(model, 0.1)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    other = network()
    other.load_state_dict(model.state_dict())
    again = make(other, 0.1)
    tensors, rest = export_state(optimizer, names_of(model))
    import_state(again, names_of(other), tensors, rest)
    for made, net in ((optimizer, model), (again, other)):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        made.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_searched_weight_decay_spares_the_groups_that_the_author_spared():
    def make(model, lr):
        first, second = list(model.parameters())[:2], list(model.parameters())[2:]
        return AdamW([{"params": first, "weight_decay": 0.0}, {"params": second}], lr=lr)

    made = build(make, network(), Assignment({}, 0.1, {"weight_decay": 0.7}))
    assert [group["weight_decay"] for group in made.param_groups] == [0.0, 0.7]
    plain = build(make_optimizer("adam"), network(), Assignment({}, 0.1, {"weight_decay": 0.7}))
    assert [group["weight_decay"] for group in plain.param_groups] == [0.7]


def test_weight_decay_of_an_optimizer_without_one_is_refused():
    def make(model, lr):
        return torch.optim.LBFGS(model.parameters(), lr=lr)

    with pytest.raises(ProgramError, match="LBFGS has none"):
        build(make, network(), Assignment({}, 0.1, {"weight_decay": 0.7}))


def test_options_that_change_with_the_lr_are_refused():
    stacked = Stacked(lambda model, lr: SGD(model.parameters(), lr=lr), [0.1] * K)
    for made in (SGD(network().parameters(), lr=0.1, momentum=0.9), Adam(network().parameters())):
        with pytest.raises(ProgramError, match="only numbers may differ"):
            stacked.optimizer.fill(0, made, {}, {})
