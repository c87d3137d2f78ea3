"""Sites: found wherever dropout acts, made tunable, and taken away again without a trace."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from droptune.errors import SiteError
from droptune.sites.dropout import KINDS, Kind
from droptune.sites.insertion import suggested_insertions
from droptune.sites.installed import (
    Discovery,
    Site,
    Untunable,
    apply_rates,
    find_sites,
    install,
    restore,
)
from droptune.sites.masks import derive_keys, split_seed
from droptune.sites.modules import module_paths


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def keys_of(sites, update=0, seed=17):
    words = torch.tensor(split_seed(seed), dtype=torch.int32)
    return derive_keys(words, torch.tensor(update, dtype=torch.int32), 0, sites)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def brief(discovery):
    return [(site.path, site.kind, site.rate) for site in discovery.sites]


class Functional(nn.Module):
    """Functional calls, one module called twice, and one module at two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(self.first(x))
        for _ in range(3):
            x = F.dropout(x, 0.1, self.training)
        x = self.drop(self.second(x).tanh())
        return torch.dropout(x, 0.2, self.training)


def test_functional_calls_and_shared_modules():
    found = find_sites(Functional(), torch.randn(4, 6))
    assert brief(found) == [
        ("drop", "element", 0.5),
        ("dropout", "element", 0.1),
        ("dropout_1", "element", 0.2),
    ]
    assert [site.calls for site in found] == [2, 3, 1]
    assert [site.shape for site in found] == [(4, 8)] * 3
    assert found.untunable == found.warnings == ()


def test_names_survive_another_run_and_every_wrapper():
    model, x = Functional(), torch.randn(4, 6)
    plain = find_sites(model, x)
    assert find_sites(Functional(), torch.randn(9, 6)) == Discovery(
        tuple(Site.from_json(s.to_json() | {"shape": [9, 8]}) for s in plain)
    )
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(model),
        torch.optim.swa_utils.AveragedModel(model),
        nn.DataParallel(torch.compile(model)),
    ):
        again = find_sites(wrapped, x)
        assert brief(again) == brief(plain)
        assert [site.call for site in again] == [site.call for site in plain]


def test_a_child_that_is_called_module_is_no_wrapper():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.other = nn.Dropout(0.3), nn.Linear(3, 3)

        def forward(self, x):
            return self.other(self.module(x))

    assert brief(find_sites(Holder(), torch.randn(2, 3))) == [("module", "element", 0.3)]


def test_every_stock_module():
    model = nn.Sequential(
        nn.Dropout(0.0),
        nn.Dropout1d(0.1),
        nn.Dropout2d(0.2),
        nn.Dropout3d(0.3),
        nn.AlphaDropout(0.4),
        nn.FeatureAlphaDropout(0.5),
        nn.Dropout(0.6, inplace=True),
    )
    batches = [torch.randn(2, 3, *[4] * n) for n in range(1, 4)]

    def forward(model, batch):
        for index, module in enumerate(model):
            module(batch[{1: 0, 2: 1, 3: 2}.get(index, 1)])

    assert brief(find_sites(model, batches, forward=forward)) == [
        ("0", "element", 0.0),
        ("1", "channel", 0.1),
        ("2", "channel", 0.2),
        ("3", "channel", 0.3),
        ("4", "alpha", 0.4),
        ("5", "feature_alpha", 0.5),
        ("6", "element", 0.6),
    ]


def test_every_functional_call():
    def forward(model, x):
        F.dropout(x, 0.1, training=True)
        F.dropout1d(x[:, :, 0], 0.2)
        F.dropout2d(x, 0.3)
        F.dropout3d(x[None], 0.4)
        F.alpha_dropout(x, 0.5, training=True)
        F.feature_alpha_dropout(x, 0.6, training=True)
        torch.feature_dropout(x, 0.7, True)
        F.dropout(x, 0.8, training=False)  # acts never
        return torch.dropout_(x.clone(), 0.9, True)

    found = find_sites(nn.Identity(), torch.randn(2, 3, 4, 4), forward=forward)
    assert brief(found) == [
        ("dropout", "element", 0.1),
        ("channel", "channel", 0.2),
        ("channel_1", "channel", 0.3),
        ("channel_2", "channel", 0.4),
        ("alpha", "alpha", 0.5),
        ("feature_alpha", "feature_alpha", 0.6),
        ("channel_3", "channel", 0.7),
        ("dropout_1", "element", 0.9),
    ]


def test_one_place_with_several_rates_is_told():
    def forward(model, x):
        for rate in (0.1, 0.1, 0.3):
            x = F.dropout(x, rate)
        return x

    found = find_sites(nn.Identity().eval(), torch.randn(3), forward=forward)
    assert brief(found) == [("dropout", "element", 0.1)]
    assert "is called with the rates 0.1 and 0.3" in found.warnings[0]


class OwnAttention(nn.Module):
    def __init__(self, rate=0.0):
        super().__init__()
        self.rate, self.weights_drop = rate, nn.Dropout(0.2)

    def forward(self, x):
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=self.rate if self.training else 0.0)
        weights = self.weights_drop((y @ y.transpose(-2, -1)).softmax(-1))
        return F.dropout(weights.softmax(-1), 0.1, self.training) @ y


def test_attention_is_known_by_its_softmax():
    assert brief(find_sites(OwnAttention(), torch.randn(2, 3, 5, 4))) == [
        ("attention", "attention", 0.0),
        ("weights_drop", "attention", 0.2),
        ("attention_1", "attention", 0.1),
    ]


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_one_site(need_weights, rate):
    model = nn.MultiheadAttention(8, 2, dropout=rate)
    found = find_sites(
        model, torch.randn(5, 2, 8), forward=lambda m, x: m(x, x, x, need_weights=need_weights)
    )
    assert brief(found) == [("attention", "attention", rate)]
    assert found.sites[0].attribute == "dropout"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_one_site(kind):
    model = nn.ModuleDict({"rnn": kind(4, 4, num_layers=3, dropout=0.0)})
    found = find_sites(model, torch.randn(5, 2, 4), forward=lambda m, x: m["rnn"](x))
    assert brief(found) == [("rnn.recurrent", "recurrent", 0.0)]
    assert found.sites[0].calls == 2
    single = nn.ModuleDict({"rnn": kind(4, 4)})
    assert not find_sites(single, torch.randn(5, 2, 4), forward=lambda m, x: m["rnn"](x)).sites


# Dropout as libraries write it


class DropPath(nn.Module):  # timm
    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)


def drop_path(x, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True):
    if drop_prob == 0.0 or not training:
        return x
    random_tensor = x.new_empty((x.shape[0], *[1] * (x.ndim - 1))).bernoulli_(1 - drop_prob)
    if scale_by_keep:
        random_tensor.div_(1 - drop_prob)
    return x * random_tensor


class StochasticDepth(nn.Module):  # torchvision
    def __init__(self, p, mode):
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, input):
        return stochastic_depth(input, self.p, self.mode, self.training)


def stochastic_depth(input, p: float, mode: str, training: bool = True):
    if not training or p == 0.0:
        return input
    size = [input.shape[0]] if mode == "row" else [1]
    noise = torch.empty([*size, *[1] * (input.ndim - 1)]).bernoulli_(1 - p).div_(1 - p)
    return input * noise


class DropBlock2d(nn.Module):  # torchvision
    def __init__(self, p, block_size):
        super().__init__()
        self.p, self.block_size = p, block_size

    def forward(self, input):
        assert not self.training, "the author's own code does not run"
        return input


class LockedDropout(nn.Module):  # AWD-LSTM: the rate is an argument
    def forward(self, x, dropout=0.5):
        if not self.training or not dropout:
            return x
        return x * x.new_empty(1, x.size(1), x.size(2)).bernoulli_(1 - dropout) / (1 - dropout)


class Libraries(nn.Module):
    def __init__(self):
        super().__init__()
        self.path, self.depth = DropPath(0.0), StochasticDepth(0.1, "batch")
        self.block = DropBlock2d(0.2, 3)
        self.locked = LockedDropout()

    def forward(self, x):
        x = self.block(self.depth(self.path(x)))
        x = stochastic_depth(drop_path(x, 0.3, self.training), p=0.4, mode="row")
        x = self.locked(x.flatten(2), 0.5)
        return self.locked(x, 0.6) + self.locked(x)


def test_dropout_as_libraries_write_it():
    found = find_sites(Libraries(), torch.randn(4, 3, 8, 8))
    assert brief(found) == [
        ("path", "path", 0.0),
        ("depth", "path", 0.1),
        ("block", "block", 0.2),
        ("path_1", "path", 0.3),
        ("path_2", "path", 0.4),
        ("locked.variational", "variational", 0.5),
        ("locked.variational_1", "variational", 0.6),
        ("locked.variational_2", "variational", 0.5),
    ]
    assert found.untunable == ()
    assert "path_2 drops in evaluation mode too" in found.warnings[0]


def test_options_of_the_authors_modules_are_kept():
    model, x = Libraries().double(), torch.ones(4, 3, 8, 8, dtype=torch.float64)
    sites = find_sites(model, x).sites
    rates = torch.zeros(len(sites), dtype=torch.float64)
    rates[1] = 0.5
    installed = install(model, sites)
    rows = set()
    for update in range(20):
        with installed.active(rates, keys_of(len(sites), update)):
            y = model(x)
        assert torch.equal(y, y[:1].expand_as(y))  # mode "batch": all rows alike
        rows.add(y.unique().numel() and float(y.flatten()[0]))
    assert rows == {0.0, 4.0}


def test_a_plain_function_is_replaced_only_while_the_model_runs():
    model, x, before = Libraries(), torch.randn(4, 3, 8, 8), drop_path
    installed = install(model, find_sites(model, x).sites)
    assert drop_path is before
    with installed.active(torch.zeros(8), keys_of(8)):
        assert drop_path is not before
    assert drop_path is before


# What is random and no site


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.code, self.drop, self.act = nn.Linear(4, 4), nn.Dropout(0.2), nn.RReLU()

    def forward(self, x):
        x = self.drop(self.code(x))
        x = x + torch.randn_like(x) * random.random() + float(np.random.rand())
        return self.act(x)


def test_everything_random_is_listed_and_every_generator_put_back():
    model, x = Noisy(), torch.randn(3, 4)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    found = find_sites(model, x)
    assert brief(found) == [("drop", "element", 0.2)]
    assert {(item.module, item.operation) for item in found.untunable} == {
        ("", "randn_like"),
        ("act", "rrelu_with_noise"),
        ("", "Python"),
        ("", "NumPy"),
    }
    assert all(item.reason for item in found.untunable)
    assert "test_sites.py:" in found.untunable[0].reason
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tobytes()


def test_layers_that_are_dropped_at_random_are_found_all_the_same():
    class LayerDrop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Dropout(0.1) for _ in range(8))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) if torch.rand([]) > 0.3 else x
            return x

    for seed in range(3):
        torch.manual_seed(seed)
        found = find_sites(LayerDrop(), torch.randn(3))
        assert sorted(site.path for site in found) == [f"layers.{i}" for i in range(8)]
        assert {site.calls for site in found} == {1}
        assert [item.operation for item in found.untunable] == ["rand"]


def test_a_hand_made_mask_is_listed():
    def forward(model, x):
        return x * torch.bernoulli(torch.full_like(x, 0.5)) + (torch.rand(3) > 0.5)

    found = find_sites(nn.Identity(), torch.randn(3), forward=forward)
    assert [item.operation for item in found.untunable] == ["bernoulli", "rand"]


def test_scripted_code_is_listed():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    found = find_sites(scripted, torch.randn(2, 4))
    assert not found.sites
    assert found.untunable[0].operation == "bernoulli_"


def test_attention_without_dropout_is_not_called_random():
    model = nn.Identity().eval()

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def train(self, mode=True):
            return self

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    frozen = Frozen()
    frozen.training = False
    assert find_sites(frozen, torch.randn(2, 2, 3, 4)) == Discovery(())


def test_dropout_that_evaluation_does_not_turn_off():
    def forward(model, x):
        return model(F.dropout(x, 0.3))

    found = find_sites(nn.Linear(3, 3), torch.randn(2, 3), forward=forward)
    assert "drops in evaluation mode too" in found.warnings[0]


# What a site acts on and feeds


class Feeding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.conv = nn.Embedding(9, 4), nn.Conv1d(4, 4, 1)
        self.norm, self.late_norm = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.a, self.b, self.c, self.d = (nn.Dropout(0.1) for _ in range(4))

    def forward(self, tokens, values):
        x = self.a(self.embedding(tokens) * 2 + self.b(values)).transpose(1, 2)
        x = self.norm(F.relu(x))
        y = self.c(x.relu())
        y = self.conv(y) + x  # the shortcut dilutes what dropout does to the statistics
        return self.d(self.late_norm(y))


def test_roles_and_what_is_fed():
    found = find_sites(Feeding(), (torch.randint(0, 9, (2, 5)), torch.randn(2, 5, 4)))
    by_path = {site.path: site for site in found}
    assert {path: site.feeds for path, site in by_path.items()} == {
        "b": "BatchNorm1d",
        "a": "BatchNorm1d",
        "c": "Conv1d",
        "d": None,
    }
    assert [by_path[path].role for path in "bacd"] == ["input", "embedding", "embedding", ""]
    assert [warning.split()[0] for warning in found.warnings] == ["a"]
    assert "BatchNorm norm" in found.warnings[0]


def test_dropout_before_a_convolution_before_batchnorm_is_warned_about():
    model = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.1))
    found = find_sites(model, torch.randn(2, 3, 4, 4))
    assert [warning.split()[0] for warning in found.warnings] == ["0"]


# The dry step leaves nothing behind


def test_the_dry_step_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
    model[0].train()
    before = copy.deepcopy(model.state_dict())
    find_sites(model, torch.randn(4, 3))
    assert [module.training for module in model.modules()] == [False, True, False, False]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model[2].p == 0.5
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_does_not_run_is_told_in_one_line():
    with pytest.raises(
        SiteError, match=r"does not run on this batch \(RuntimeError: mat1 and mat2"
    ):
        find_sites(nn.Linear(3, 3), torch.randn(2, 4))


def test_what_a_forward_raises_is_told_with_its_place():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x)

    line = Narrow.forward.__code__.co_firstlineno + 1
    with pytest.raises(SiteError, match=rf"test_sites.py:{line}: RuntimeError: mat1 and mat2"):
        find_sites(Narrow(), torch.randn(2, 4))


def test_values_survive_json():
    found = find_sites(Noisy(), torch.randn(3, 4))
    assert Discovery.from_json(found.to_json()) == found
    assert Untunable("a", "b", "c").to_json() == {"module": "a", "operation": "b", "reason": "c"}


# Installed


def test_rates_act_where_they_should():
    model, x = Functional().double(), double(4, 6)
    sites = find_sites(model, x).sites
    installed = install(model, sites)
    none = torch.zeros(3, dtype=torch.float64)
    with installed.active(none, keys_of(3)):
        clean = model(x)
    assert torch.equal(clean, model.eval()(x))
    model.train()
    only_last = torch.tensor([0.0, 0.0, 0.75], dtype=torch.float64)
    with installed.active(only_last, keys_of(3)):
        y = model(x)
    assert torch.equal(y[y != 0], clean[y != 0] * 4)
    assert 0 < (y == 0).sum() < y.numel()


def test_masks_depend_on_key_and_call_and_on_nothing_else():
    model, x = Functional().double(), double(64, 6)
    installed = install(model, find_sites(model, x).sites)
    rates = torch.full((3,), 0.5, dtype=torch.float64)

    def run(update):
        with installed.active(rates, keys_of(3, update)):
            return model(x)

    first = run(0)
    torch.manual_seed(123)
    other = run(1)
    assert torch.equal(run(0), first)
    assert not torch.equal(other, first)


def test_calls_of_one_site_draw_their_own_masks():
    model = nn.Dropout(0.5)
    x = torch.ones(4000)
    installed = install(model, find_sites(model, x).sites)
    with installed.active(torch.tensor([0.5]), keys_of(1)):
        masks = torch.stack([model(x) for _ in range(3)]) != 0
    agree = (masks[0] == masks[1]).double().mean(), (masks[1] == masks[2]).double().mean()
    assert all(0.46 < share < 0.54 for share in agree)


def test_in_evaluation_nothing_drops():
    model, x = Libraries(), torch.randn(4, 3, 8, 8)
    installed = install(model, find_sites(model, x).sites)
    model.eval()
    with installed.active(training=False):
        first, second = model(x), model(x)
    assert torch.equal(first, second)  # its stochastic_depth(p=0.4) is always on by itself
    assert not torch.equal(model(x), model(x))


def test_a_dropout_module_may_be_called_by_keyword():
    model, x = nn.Dropout(0.5), torch.ones(50)
    found = find_sites(model, {"input": x})
    installed = install(model, found.sites)
    assert torch.equal(model.eval()(input=x), x)
    model.train()
    with installed.active(torch.tensor([0.5]), keys_of(1)):
        assert sorted(model(input=x).unique().tolist()) == [0.0, 2.0]


def test_under_grad_nothing_of_a_transform_is_kept():
    model, x = nn.Dropout(0.5), torch.ones(7919)  # a size that nothing else has drawn
    installed = install(model, find_sites(model, torch.ones(3)).sites)

    def run(x):
        with installed.active(torch.tensor([0.5]), keys_of(1)):
            return model(x).sum()

    first = torch.func.grad(run)(x)
    assert torch.equal(torch.func.grad(run)(x), first)
    assert run(x) == first.sum()


def test_in_place_dropout_writes_where_the_author_wrote():
    def forward(model, x):
        y = x * 1
        F.dropout(y, 0.5, inplace=True)
        return y

    model = nn.Identity()
    installed = install(model, find_sites(model, torch.ones(100), forward=forward).sites)
    with installed.active(torch.tensor([0.5]), keys_of(1)):
        assert sorted(forward(model, torch.ones(100)).unique().tolist()) == [0.0, 2.0]


def test_a_call_that_was_not_found_is_refused():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Dropout(0.1), nn.Dropout(0.2)

        def forward(self, x, deep=False):
            x = F.dropout(self.a(x), 0.1)
            if deep == "functional":
                return F.dropout(x, 0.3)
            return self.b(x) if deep else x

    model, x = Sometimes(), torch.randn(3)
    installed = install(model, find_sites(model, x).sites)
    for deep in (True, "functional"):
        with (
            installed.active(torch.zeros(2), keys_of(2)),
            pytest.raises(SiteError, match="was not passed when the sites were found"),
        ):
            model(x, deep)


def test_wrong_numbers_of_rates_are_refused():
    model = nn.Dropout(0.5)
    installed = install(model, find_sites(model, torch.ones(3)).sites)
    with pytest.raises(SiteError, match="1 sites are installed; rates given: 2"):
        installed.active(torch.zeros(2), keys_of(2)).__enter__()


def test_sites_of_another_model_are_refused():
    sites = find_sites(nn.Sequential(nn.Dropout(0.5)), torch.ones(3)).sites
    with pytest.raises(SiteError, match="of a module this model lacks"):
        install(nn.ModuleDict({"drop": nn.Dropout(0.5)}), sites)


def test_installing_twice_or_copying_an_installed_model_is_refused():
    model = nn.Sequential(nn.Dropout(0.5))
    sites = find_sites(model, torch.ones(3)).sites
    install(model, sites)
    with pytest.raises(SiteError, match="installed already"):
        install(model, sites)
    with pytest.raises(SiteError, match="before copying"):
        copy.deepcopy(model)
    restore(model)
    copy.deepcopy(model)
    restore(model)  # nothing happens


def test_restore_leaves_no_trace():
    model, x = nn.Sequential(Functional(), nn.BatchNorm1d(8)).eval(), torch.randn(4, 6)
    own_forward = model[0].drop.forward
    vars(model[0].drop)["forward"] = lambda x: own_forward(x)  # somebody else's patch stays
    patched = dict(vars(model[0].drop))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    output = model(x)
    install(model, find_sites(model, x).sites)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), output)
    restore(model)
    assert torch.equal(model(x), output)
    assert vars(model[0].drop) == patched
    assert all(vars(m).keys() == before[n].keys() for n, m in model.named_modules())


# Solo and under vmap


def train_step(model, installed, parameters, buffers, rates, keys, loss):
    with installed.active(rates, keys):
        return loss(lambda *args: functional_call(model, (parameters, buffers), args))


def assert_fused_is_solo(model, sites, loss, slots=3, tolerance=1e-11, evaluation=True):
    """One training step and one evaluation under vmap, and slot by slot, in float64."""
    installed = install(model, sites)
    seeds = torch.tensor([split_seed(100 + k) for k in range(slots)], dtype=torch.int32)
    keys = derive_keys(seeds, torch.arange(slots, dtype=torch.int32), 0, len(sites))
    rates = torch.rand(slots, len(sites), dtype=torch.float64) * 0.8
    own = dict(model.named_parameters())
    stack = {
        name: torch.stack([p.detach() * (1 + 0.1 * k) for k in range(slots)]).requires_grad_()
        for name, p in own.items()
    }

    def buffers():
        return {n: torch.stack([b.clone()] * slots) for n, b in model.named_buffers()}

    def step(parameters, buffers, rates, keys):
        return train_step(model, installed, parameters, buffers, rates, keys, loss)

    model.train()
    together = buffers()
    losses = vmap(step, randomness="error")(stack, together, rates, keys)
    losses.sum().backward()
    alone = buffers()
    for k in range(slots):
        parameters = {n: p[k].detach().clone().requires_grad_() for n, p in stack.items()}
        mine = {n: b[k] for n, b in alone.items()}
        value = step(parameters, mine, rates[k], keys[k])
        value.backward()
        assert abs(value - losses[k]) < tolerance
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                assert (parameter.grad - stack[name].grad[k]).abs().max() < tolerance, name
        for name, buffer in mine.items():
            assert torch.allclose(buffer.double(), together[name][k].double()), name
    model.eval()

    def evaluate(parameters, buffers):
        with installed.active(training=False):
            return loss(lambda *args: functional_call(model, (parameters, buffers), args))

    if evaluation:
        scores = vmap(evaluate, randomness="error")(stack, together)
        for k in range(slots):
            mine = evaluate(*({n: t[k] for n, t in tree.items()} for tree in (stack, together)))
            assert abs(mine - scores[k]) < tolerance
    restore(model)
    model.train()


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(12, 5), nn.Dropout(0.1)
        self.rnn = kind(5, 6, num_layers=3, dropout=0.2, **options)

    def forward(self, tokens):
        return self.rnn(self.drop(self.embedding(tokens)))[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"batch_first": True}),
        (nn.LSTM, {"bidirectional": True, "proj_size": 3, "bias": False}),
        (nn.GRU, {"bidirectional": True}),
        (nn.RNN, {"nonlinearity": "relu", "batch_first": True}),
    ],
)
def test_recurrent_layers_train_fused(kind, options):
    model, tokens = Recurrent(kind, **options).double(), torch.randint(0, 12, (3, 4))
    sites = find_sites(model, tokens).sites
    assert_fused_is_solo(model, sites, lambda run: run(tokens).square().mean())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_between_recurrent_layers_nothing_but_the_mask_is_ours(kind):
    model, tokens = Recurrent(kind).double(), torch.randint(0, 12, (7, 4))
    installed = install(model, find_sites(model, tokens).sites)
    with installed.active(torch.zeros(2, dtype=torch.float64), keys_of(2)):
        ours = model(tokens)
    assert torch.allclose(ours, model.eval()(tokens), atol=1e-14)


def test_packed_sequences_have_their_site_too():
    model = nn.LSTM(3, 4, num_layers=2, dropout=0.5).double()
    packed = nn.utils.rnn.pack_sequence([double(5, 3), double(3, 3)])

    def forward(model, batch):
        return model(packed)[0].data

    installed = install(model, find_sites(model, None, forward=forward).sites)
    with installed.active(torch.zeros(1, dtype=torch.float64), keys_of(1)):
        clean = forward(model, None)
    with installed.active(torch.tensor([0.5], dtype=torch.float64), keys_of(1)):
        dropped = forward(model, None)
    assert torch.allclose(clean, forward(model.eval(), None), atol=1e-14)
    assert not torch.allclose(clean, dropped)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_train_fused(cell):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.drop = cell(4, 4), nn.Dropout(0.1)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(self.drop(step), state)
            return state[0] if isinstance(state, tuple) else state

    model, x = Steps().double(), double(3, 5, 4)
    assert_fused_is_solo(model, find_sites(model, x).sites, lambda run: run(x).square().mean())


class Everything(nn.Module):
    """All kinds of sites, functional and not, in one image model."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.channel, self.block = nn.Dropout2d(0.1), DropBlock2d(0.1, 3)
        self.path, self.locked = DropPath(0.1), LockedDropout()
        self.alpha, self.feature = nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        x = self.block(self.channel(self.norm(self.conv(x))))
        x = x + self.path(x.tanh())
        x = self.feature(self.alpha(x)).flatten(2).transpose(1, 2)
        x = self.locked(x, 0.2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = drop_path(x, 0.1, self.training)
        return F.dropout(self.out(x), 0.1, self.training)


def test_every_kind_trains_fused():
    model, x = Everything().double(), double(3, 3, 6, 6)
    sites = find_sites(model, x).sites
    assert {site.kind for site in sites} == set(KINDS) - {"recurrent"}
    assert_fused_is_solo(model, sites, lambda run: run(x).square().mean())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, False, True, True, False]] * 4)},
        {"attn_mask": torch.linspace(-3, 3, 40, dtype=torch.float64).view(2, 1, 4, 5)},
        {"attn_mask": torch.tensor([[True] * 5] * 3 + [[False] * 5])},
        {"enable_gqa": True},
    ],
)  # fmt: skip
def test_attention_written_out_is_torchs(options):
    from droptune.sites import written_out

    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = double(2, 4, 4, 6), double(2, heads, 5, 6), double(2, heads, 5, 6)
    ours = written_out.attention(q, k, v, **options)
    theirs = F.scaled_dot_product_attention(q, k, v, **options)
    assert torch.allclose(ours, theirs, atol=1e-13)


def test_padding_masks_and_the_fast_path_of_evaluation():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double()
    x, padding = double(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True

    def loss(run):
        return run(x, None, padding).masked_fill(padding[..., None], 0).square().mean()

    sites = find_sites(model, x).sites
    assert len(sites) == 8
    assert_fused_is_solo(model, sites, loss)


# Checkpointing and compiling


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 6), reentrant
        self.drop = nn.Dropout(0.4)

    def first(self, x):
        return F.dropout(self.drop(self.a(x).tanh()), 0.3, self.training)

    def second(self, x):
        return self.drop(self.b(x).tanh())

    def _run(self, function, x):
        if self.reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x):
        return self.drop(self._run(self.second, self._run(self.first, x)))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_see_the_same_masks(reentrant, inside):
    plain, model = Checkpointed(None).double(), Checkpointed(reentrant).double()
    model.load_state_dict(plain.state_dict())
    x, gradients = double(5, 6).requires_grad_(), []
    for each in (plain, model):
        sites = find_sites(each, x).sites
        installed = install(each, sites)
        rates = torch.tensor([0.4, 0.6], dtype=torch.float64)
        with installed.active(rates, keys_of(2)):
            loss = each(x).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([parameter.grad for parameter in each.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_is_left_as_it_was():
    import torch.utils.checkpoint as torch_checkpoint

    vars(torch_checkpoint).setdefault("__warningregistry__", {})  # torch warns of this model
    before = dict(vars(torch_checkpoint))
    model = Checkpointed(True)
    installed = install(model, find_sites(model, torch.randn(2, 6)).sites)
    with installed.active(torch.zeros(2), keys_of(2)):
        model(torch.randn(2, 6))
    assert vars(torch_checkpoint) == before


def test_compiled_parts_show_their_sites_and_take_rates():
    inner = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)))
    model = nn.Sequential(nn.Linear(6, 6), inner, nn.Dropout(0.2))
    model.compile()
    found = find_sites(model, torch.randn(2, 6))
    assert brief(found) == [("1.1", "element", 0.3), ("2", "element", 0.2)]
    installed = install(model, found.sites)
    with installed.active(torch.tensor([0.0, 0.9]), keys_of(2)):
        assert (model(torch.randn(50, 6)) == 0).double().mean() > 0.8
    with installed.active(training=False):
        assert (model(torch.randn(50, 6)) == 0).sum() == 0


# Production


def test_rates_are_applied_to_a_plain_model():
    model = nn.Module()
    model.encoder = nn.TransformerEncoderLayer(8, 2, 16)
    model.rnn = nn.LSTM(8, 8, num_layers=2, dropout=0.1)
    model.path = DropPath(0.1)

    def forward(model, x):
        return F.dropout(model.path(model.rnn(model.encoder(x))[0]), 0.3, model.training)

    sites = find_sites(model, torch.randn(5, 2, 8), forward=forward).sites
    rates = {site.path: 0.1 * (index + 1) for index, site in enumerate(sites)}
    for known in (sites, ()):
        with pytest.warns(UserWarning, match="'dropout' is not set"):
            applied = apply_rates(model, rates, sites=known)
        assert applied.set == {
            "encoder.self_attn.attention": "encoder.self_attn.dropout",
            "encoder.dropout1": "encoder.dropout1.p",
            "encoder.dropout": "encoder.dropout.p",
            "encoder.dropout2": "encoder.dropout2.p",
            "rnn.recurrent": "rnn.dropout",
            "path": "path.drop_prob",
        }
        assert list(applied.not_set) == ["dropout"]
        assert "change it in the code" in applied.not_set["dropout"]
    again = find_sites(model, torch.randn(5, 2, 8), forward=forward)
    expected = {path: rate for path, rate in rates.items() if path != "dropout"}
    assert {s.path: s.rate for s in again if s.path != "dropout"} == pytest.approx(expected)


def test_an_attribute_that_feeds_two_sites():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden_dropout = 0.1

        def forward(self, x):
            x = F.dropout(x, self.hidden_dropout, self.training)
            return F.dropout(x * 2, self.hidden_dropout, self.training)

    model = Twice()
    sites = find_sites(model, torch.randn(3)).sites
    assert [site.attribute for site in sites] == ["hidden_dropout"] * 2
    assert apply_rates(model, {"dropout": 0.3, "dropout_1": 0.3}, sites=sites).not_set == {}
    assert model.hidden_dropout == 0.3
    with pytest.warns(UserWarning, match="holds the rate of several sites"):
        applied = apply_rates(model, {"dropout": 0.1, "dropout_1": 0.2}, sites=sites)
    assert set(applied.not_set) == {"dropout", "dropout_1"}
    assert model.hidden_dropout == 0.3


def test_impossible_rates_and_paths_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    with pytest.raises(SiteError, match=r"Rate 1.0 of '1' is no probability of zeroing"):
        apply_rates(model, {"1": 1.0})
    with pytest.raises(SiteError, match=r"No site 'drop.out' in this model"):
        apply_rates(model, {"drop.out": 0.1})


@pytest.mark.parametrize("known", [True, False], ids=["sites known", "sites unknown"])
@pytest.mark.parametrize("path", ["dorp", "layer", "drop.x", "drop.dropout", "layer.drop", ""])
def test_a_path_that_is_no_site_is_refused_and_nothing_is_set(path, known):
    model = nn.Sequential()
    model.layer, model.drop = nn.Linear(4, 4), nn.Dropout(0.5)
    sites = find_sites(model, torch.randn(2, 4)).sites if known else ()
    with pytest.raises(SiteError, match=r"No site .* \((did you mean|possible:) '?drop"):
        apply_rates(model, {"drop": 0.1, path: 0.2}, sites=sites)
    assert model.drop.p == 0.5


def test_what_cannot_be_set_in_place_is_warned_of():
    class Literal(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.1, self.training)

    with pytest.warns(UserWarning, match=r"rate 0.3 of 'dropout' is not set: .* in the code"):
        assert list(apply_rates(Literal(), {"dropout": 0.3}).not_set) == ["dropout"]


# Insertion


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

    def forward(self, x):
        return x + self.act(self.conv(x))


def residual_net():
    return nn.Sequential(Residual(), Residual(), nn.Flatten(), nn.Linear(48, 2))


def test_sites_are_inserted_by_path_and_by_type():
    model, x = residual_net().double(), double(4, 3, 4, 4)
    rules = [
        {"after": "*.act", "kind": "block"},
        {"after": "Residual", "kind": "path"},
        {"after": "0.conv", "kind": "channel"},
        {"after": "2", "kind": "element"},
    ]
    found = find_sites(model, x, insert=rules)
    assert brief(found) == [
        ("0.conv.inserted-channel", "channel", 0.0),
        ("0.act.inserted-block", "block", 0.0),
        ("0.inserted-path", "path", 0.0),
        ("1.act.inserted-block", "block", 0.0),
        ("1.inserted-path", "path", 0.0),
        ("2.inserted-element", "element", 0.0),
    ]
    assert all(site.inserted for site in found)
    before = model(x)
    installed = install(model, found.sites, rules)
    assert torch.equal(model(x), before)
    with installed.active(torch.zeros(6, dtype=torch.float64), keys_of(6)):
        assert torch.equal(model(x), before)
    restore(model)
    sites = tuple(Site.from_json(site.to_json()) for site in found)
    assert_fused_is_solo(model, sites, lambda run: run(x).square().mean())
    with pytest.warns(UserWarning, match="is not set: inserted"):
        told = apply_rates(model, {sites[0].path: 0.1}, sites=sites).not_set
    assert "add dropout of kind channel after '0.conv'" in told[sites[0].path]


@pytest.mark.parametrize(
    ("model", "places"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh()), ["GELU", "Tanh"]),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(4, 1), nn.Sigmoid()), ["0"]),
        (nn.Sequential(nn.Linear(4, 1), nn.Softmax(-1)), []),
    ],
)
def test_a_model_without_dropout_gets_it_after_its_activations_or_layers(model, places):
    rules = suggested_insertions(module_paths(model))
    assert [rule["after"] for rule in rules] == places


def test_variational_dropout_after_a_recurrent_layer_knows_its_time():
    for batch_first, time in ((True, 1), (False, 0)):
        model = nn.Sequential(nn.LSTM(4, 50, batch_first=batch_first))
        x, rules = torch.randn(3, 6, 4), [{"after": "LSTM", "kind": "variational"}]
        installed = install(model, find_sites(model, x, insert=rules).sites)
        with installed.active(torch.tensor([0.5]), keys_of(1)):
            dropped = model(x)[0] == 0
        assert torch.equal(dropped, dropped.select(time, 0).unsqueeze(time).expand_as(dropped))
        assert 0 < dropped.sum() < dropped.numel()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"after": "*.acts", "kind": "element"}, "No module to insert dropout after matches"),
        ({"after": "Residul", "kind": "path"}, "did you mean 'Residual'"),
        ({"after": "Residual", "kind": "elment"}, "did you mean 'element'"),
        ({"after": "Residual", "kind": "attention"}, "No dropout of kind 'attention'"),
        ({"after": "3", "kind": "path"}, "a residual block has one input"),
    ],
)
def test_rules_that_cannot_be_followed(rule, message):
    with pytest.raises(SiteError, match=message):
        find_sites(residual_net(), torch.randn(2, 3, 4, 4), insert=[rule])


def test_a_new_kind_is_one_entry_of_the_table(monkeypatch):
    """A kind that drops whole columns: recognised, inserted, drawn; nothing else is touched."""
    columns = Kind(
        "column",
        "nobody, 2026",
        mask_shape=lambda shape: (*(1 for _ in shape[:-1]), *shape[-1:]),
        modules={"ColumnDrop": {}},
        insertable=True,
    )
    monkeypatch.setitem(KINDS, "column", columns)

    class ColumnDrop(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = 0.2

        def forward(self, x):
            assert not self.training
            return x

    model, x = nn.Sequential(nn.Linear(40, 40), ColumnDrop()).double(), double(5, 40)
    found = find_sites(model, x, insert=[{"after": "0", "kind": "column"}])
    assert brief(found) == [("0.inserted-column", "column", 0.0), ("1", "column", 0.2)]
    installed = install(model, found.sites)
    with installed.active(torch.tensor([0.5, 0.0]).double(), keys_of(2)):
        dropped = model(x) == 0
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))
    assert 5 < dropped[0].sum() < 35
    restore(model)
    assert_fused_is_solo(model, found.sites, lambda run: run(x).square().mean())


# Any module tree

LEAVES = {
    "linear": lambda p: nn.Linear(4, 4),
    "norm": lambda p: nn.LayerNorm(4),
    "batchnorm": lambda p: nn.BatchNorm1d(4),
    "dropout": lambda p: nn.Dropout(p),
    "inplace": lambda p: nn.Sequential(nn.Identity(), nn.Dropout(p, inplace=True)),
    "alpha": lambda p: nn.AlphaDropout(p),
    "path": lambda p: DropPath(p),
    "functional": lambda p: FunctionalDropout(p),
    "residual": lambda p: ResidualOf(nn.Sequential(nn.Linear(4, 4), nn.Dropout(p))),
    "twice": lambda p: Twice(nn.Dropout(p)),
}


class FunctionalDropout(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return F.dropout(x, self.rate, self.training)


class ResidualOf(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Twice(ResidualOf):
    def forward(self, x):
        return self.inner(self.inner(x))


leaf = st.builds(
    lambda name, p: LEAVES[name](p), st.sampled_from(sorted(LEAVES)), st.floats(0, 0.9)
)
trees = st.recursive(
    leaf,
    lambda inner: st.lists(inner, min_size=1, max_size=4).map(lambda m: nn.Sequential(*m)),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(trees)
def test_any_tree_is_found_again_after_install_and_restore(tree):
    model, x = nn.Sequential(nn.Linear(4, 4), tree).double(), double(3, 4)
    state = copy.deepcopy(model.state_dict())
    evaluated = model.eval()(x)
    found = find_sites(model, x)
    installed = install(model, found.sites)
    assert torch.equal(model(x), evaluated)
    rates = torch.full((len(found),), 0.5, dtype=torch.float64)
    with installed.active(rates, keys_of(len(found))):
        model.train()(x)
    with installed.active(training=False):
        model(x)
    installed.restore()
    model.load_state_dict(state)
    assert torch.equal(model.eval()(x), evaluated)
    assert find_sites(model, x) == found
    assert list(model.state_dict()) == list(state)


@settings(deadline=None, max_examples=15)
@given(trees)
def test_any_tree_trains_fused(tree):
    model, x = nn.Sequential(nn.Linear(4, 4), tree).double(), double(3, 4)
    assert_fused_is_solo(model, find_sites(model, x).sites, lambda run: run(x).square().mean())
