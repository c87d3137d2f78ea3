"""Masks and kinds: the statistics, the scaling, and that both are pure functions of their keys."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.func import vmap

from droptune.sites.dropout import KINDS, blocks
from droptune.sites.kernel import TEXT, checked, example
from droptune.sites.masks import Noise, _draw, derive_keys, keep_mask, noises, split_seed

CPU = torch.device("cpu")
SEED = torch.tensor(split_seed(2**62 + 12345), dtype=torch.int32)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def keys_of(count, *, seed=SEED):
    """Keys of successive updates."""
    return derive_keys(seed.expand(count, 2), torch.arange(count, dtype=torch.int32), 0, 1)[:, 0]


def noise(rate, key=None):
    return Noise.of(torch.tensor(rate, dtype=torch.float64), keys_of(1)[0] if key is None else key)


@given(st.integers(0, 2**63 - 1))
def test_a_seed_is_its_two_words(seed):
    low, high = split_seed(seed)
    assert torch.tensor([low, high], dtype=torch.int32).view(torch.int64).item() == seed


def test_the_definition_of_keys_and_masks_never_changes():
    keys = derive_keys(SEED, torch.tensor(7, dtype=torch.int32), 1, 3)
    mask = keep_mask((1000, 100), torch.tensor(0.3), keys[2], CPU)
    called_again = Noise.of(torch.tensor(0.3), keys[2]).at(2).keep((1000,), CPU)
    digest = hashlib.sha256(mask.numpy().tobytes() + called_again.numpy().tobytes()).hexdigest()
    assert keys.tolist() == PINNED_KEYS
    assert digest[:16] == PINNED_MASK


PINNED_KEYS = [[-1601068423, -1336205494], [2101858387, -1903879583], [-1099357281, -14291847]]
PINNED_MASK = "398a653185d14573"


@settings(deadline=None, max_examples=30)
@given(
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4),
    update=st.integers(0, 2**31 - 1),
    micro=st.integers(0, 1000),
)
def test_keys_of_a_group_are_those_of_each_slot(seeds, update, micro):
    seed = int32(*map(split_seed, seeds))
    updates = torch.full((len(seeds),), update, dtype=torch.int32)
    together = derive_keys(seed, updates, micro, 4)
    assert together.shape == (len(seeds), 4, 2)
    assert together.dtype == torch.int32
    for k in range(len(seeds)):
        assert torch.equal(together[k], derive_keys(seed[k], updates[k], torch.tensor(micro), 4))


def test_no_two_keys_are_equal():
    seeds = int32(*(split_seed(seed) for seed in range(5)))[:, None, :].expand(5, 400, 2)
    updates = torch.arange(400, dtype=torch.int32).expand(5, 400)
    keys = torch.stack([derive_keys(seeds, updates, micro, 20) for micro in range(4)])
    words = keys.reshape(-1, 2).contiguous().view(torch.int64)
    assert len(words.unique()) == 5 * 400 * 20 * 4


def test_keys_of_more_sites_begin_with_those_of_fewer():
    update = torch.tensor(3, dtype=torch.int32)
    assert torch.equal(derive_keys(SEED, update, 0, 3), derive_keys(SEED, update, 0, 9)[:3])


def test_noises_are_the_sites_own():
    rates, keys = torch.tensor([0.0, 0.25, 0.9]), derive_keys(SEED, int32(5)[0], 0, 3)
    for site, drawn in enumerate(noises(rates, keys)):
        for call in (0, 1, 5):
            own = Noise.of(rates[site], keys[site])
            assert torch.equal(drawn.at(call).keep((99,), CPU), own.at(call).keep((99,), CPU))


def test_a_mask_is_a_prefix_of_a_larger_one():
    large = noise(0.4).keep((5000,), CPU)
    for count in (1, 2, 3, 17, 1024, 1025):
        assert torch.equal(noise(0.4).keep((count,), CPU), large[:count])


# Rates and independence. Each test counts how often each of the 2^8 patterns of eight decisions
# occurs; under independence the counts are multinomial. Fixed seeds: no test is flaky.


def pattern_p_value(bits, rate):
    """Chi-square p-value of "all 8 rows of `bits` [8, n] are independent, kept at 1 - rate"."""
    count, n = bits.shape
    codes = (bits.to(torch.int64) << torch.arange(count)[:, None]).sum(0)
    observed = torch.bincount(codes, minlength=2**count).numpy()
    kept = np.array([code.bit_count() for code in range(2**count)])
    expected = n * (1 - rate) ** kept * rate ** (count - kept)
    return stats.chisquare(observed, expected * (n / expected.sum())).pvalue


def masks_between(what, base, rate, n):
    r = torch.tensor(rate, dtype=torch.float64)
    seed, update = int32(*split_seed(977 * base)), torch.tensor(base, dtype=torch.int32)
    if what == "updates":
        keys = derive_keys(seed.expand(8, 2), update + torch.arange(8, dtype=torch.int32), 0, 1)
        return [keep_mask((n,), r, key[0], CPU) for key in keys]
    if what == "micro-batches":
        keys = [derive_keys(seed, update, micro, 1)[0] for micro in range(8)]
        return [keep_mask((n,), r, key, CPU) for key in keys]
    if what == "sites":
        return [keep_mask((n,), r, key, CPU) for key in derive_keys(seed, update, 0, 8)]
    if what == "trainings":
        seeds = int32(*(split_seed(8 * base + number) for number in range(8)))
        keys = derive_keys(seeds, update.expand(8), 0, 1)[:, 0]
        return [keep_mask((n,), r, key, CPU) for key in keys]
    drawn = Noise.of(r, derive_keys(seed, update, 0, 1)[0])
    return [drawn.at(call).keep((n,), CPU) for call in range(8)]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("what", ["updates", "micro-batches", "sites", "trainings", "calls"])
def test_masks_are_independent_between(what, rate):
    values = [
        pattern_p_value(torch.stack(masks_between(what, base, rate, 1 << 17)), rate)
        for base in range(5)
    ]
    assert min(values) > 1e-4
    assert stats.combine_pvalues(values).pvalue > 1e-3


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("stride", [1, 2, 3, 16, 28, 64, 512, 768, 1024, 4096])
def test_elements_of_one_mask_are_independent(stride, rate):
    mask = keep_mask((1 << 20,), torch.tensor(rate, dtype=torch.float64), keys_of(3)[2], CPU)
    rows = mask[: len(mask) // (8 * stride) * 8 * stride].view(-1, 8, stride)
    assert pattern_p_value(rows.transpose(0, 1).reshape(8, -1), rate) > 1e-4


def test_no_pair_of_elements_is_correlated_over_many_updates():
    updates, elements, rate = 1 << 15, 128, 0.3
    keys = keys_of(updates)
    draw = vmap(lambda key: keep_mask((elements,), torch.tensor(rate), key, CPU))
    kept = (draw(keys).double() - (1 - rate)) / np.sqrt(rate * (1 - rate))
    correlation = (kept.T @ kept) / np.sqrt(updates)
    pairs = correlation[*torch.triu_indices(elements, elements, 1)]
    assert pairs.abs().max() < 5.5  # of 8,128 normal deviates the largest is about 4
    assert 0.97 < pairs.std() < 1.03
    serial = (kept[1:] * kept[:-1]).sum(0) / np.sqrt(updates)
    assert serial.abs().max() < 4.5


@pytest.mark.parametrize("rate", [1e-4, 0.05, 0.3, 0.5, 0.77, 0.999])
def test_the_share_of_dropped_elements_is_binomial(rate):
    n = 1 << 20
    for key in keys_of(3):
        dropped = n - int(noise(rate, key).keep((n,), CPU).sum())
        assert stats.binomtest(dropped, n, rate).pvalue > 1e-4


# Kinds

SHAPE = (64, 32, 12, 12)


def cells(kind, values):
    """One value per cell of the kind's mask, after checking that cells are uniform."""
    shape = kind.mask_shape(tuple(values.shape))
    index = tuple(slice(None) if size > 1 else slice(0, 1) for size in shape)
    corner = values[index]
    assert torch.equal(corner.expand(values.shape), values)
    return corner


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize(
    "kind", [k for k in KINDS.values() if k.name != "block"], ids=lambda k: k.name
)
def test_each_kind_drops_its_cells_at_its_rate(kind, rate):
    dropped = cells(kind, kind.apply(torch.ones(SHAPE), noise(rate)) < 1)
    assert dropped.numel() == np.prod(kind.mask_shape(SHAPE))
    assert stats.binomtest(int(dropped.sum()), dropped.numel(), rate).pvalue > 1e-4


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.name)
def test_rate_zero_changes_nothing(kind):
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    y = kind.apply(x, noise(0.0))
    y.backward(torch.arange(x.numel(), dtype=x.dtype).view(SHAPE))
    assert torch.equal(x, y)
    assert torch.equal(x.grad, torch.arange(x.numel(), dtype=x.dtype).view(SHAPE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.name)
def test_the_activation_keeps_its_type(kind, dtype):
    assert kind.apply(torch.randn(SHAPE).to(dtype), noise(0.3)).dtype == dtype


INVERTED = ["element", "channel", "path", "attention", "recurrent", "variational"]


@pytest.mark.parametrize("name", INVERTED)
def test_inverted_scaling_and_its_gradient(name):
    x = torch.rand(SHAPE, dtype=torch.float64) + 1
    x.requires_grad_()
    y = KINDS[name].apply(x, noise(0.2))
    y.sum().backward()
    kept = y != 0
    assert torch.equal(y[kept], x[kept] * (1 / torch.tensor(0.8, dtype=torch.float64)))
    assert torch.equal(x.grad, kept / torch.tensor(0.8, dtype=torch.float64))


@pytest.mark.parametrize("name", ["alpha", "feature_alpha"])
def test_alpha_dropout_keeps_mean_and_variance(name):
    x = torch.randn(400, 200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = KINDS[name].apply(x, noise(0.3))
    assert abs(y.mean()) < 0.02
    assert abs(y.var() - 1) < 0.02


def test_alpha_dropout_is_torchs():
    x = torch.randn(1000, dtype=torch.float64)
    theirs = torch.nn.functional.alpha_dropout(x, 0.3, training=True)
    ours = KINDS["alpha"].apply(x, noise(0.3))
    dropped_value = theirs.mode().values
    assert torch.allclose(ours.mode().values, dropped_value)
    both = (theirs != dropped_value) & ~torch.isclose(ours, dropped_value)
    assert torch.allclose(ours[both], theirs[both])


def test_blocks_are_squares_and_the_mean_stays():
    x = torch.ones(200, 8, 14, 14, dtype=torch.float64)
    y = blocks(x, noise(0.2), 5)
    dropped = (y == 0).double()
    eroded = -torch.nn.functional.max_pool2d(-dropped, 5, stride=1)  # where a whole square fits
    grown = torch.nn.functional.max_pool2d(torch.nn.functional.pad(eroded, (4, 4, 4, 4)), 5, 1)
    assert torch.equal(grown, dropped)
    assert y.mean() == pytest.approx(1.0, abs=1e-9)
    # seeds are placed at rate/25 scaled to the valid positions; squares overlap
    assert 0.15 < dropped.mean() < 0.2


def test_blocks_of_one_are_element_dropout():
    y = blocks(torch.ones(50, 8, 10, 10), noise(0.3), 1)
    assert stats.binomtest(int((y == 0).sum()), y.numel(), 0.3).pvalue > 1e-4


def test_a_block_is_no_larger_than_the_map():
    assert torch.isfinite(blocks(torch.ones(4, 2, 3, 3), noise(0.2), 7)).all()


def test_path_drops_whole_batches_in_batch_mode():
    x = torch.ones(16, 3, 2)
    for key in keys_of(20):
        y = KINDS["path"].apply(x, noise(0.5, key), {"mode": "batch"})
        assert len(y.unique()) == 1


def test_path_around_a_residual_block_leaves_its_input():
    x, out = torch.randn(64, 5, dtype=torch.float64), torch.randn(64, 5, dtype=torch.float64)
    y = KINDS["path"].apply(out, noise(0.5), {"around": x})
    passed = torch.isclose(y, x).all(1)
    assert 10 < passed.sum() < 54
    assert torch.allclose(y[~passed], (x + 2 * (out - x))[~passed])
    assert torch.equal(KINDS["path"].apply(out, noise(0.0), {"around": x}), out)


def test_one_example_without_batch_dimension_loses_channels():
    y = KINDS["channel"].apply(torch.ones(500, 7), noise(0.5), {"rank": 3})
    assert y.shape == (500, 7)
    assert ((y == 0).all(1) | (y == 2).all(1)).all()


@pytest.mark.parametrize("time", [0, 1])
def test_variational_masks_are_shared_over_time(time):
    y = KINDS["variational"].apply(torch.ones(6, 9, 50), noise(0.5), {"time": time})
    assert torch.equal(y, y.select(time, 0).unsqueeze(time).expand_as(y))
    assert 0 < (y == 0).sum() < y.numel()


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.name)
def test_under_vmap_each_slot_is_itself(kind):
    x = torch.randn(3, 4, 6, 8, 8, dtype=torch.float64)
    rates, keys = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64), keys_of(3)

    def draw(rate, key, x):
        return kind.apply(x, Noise.of(rate, key).at(1))

    together = vmap(draw)(rates, keys, x)
    for k in range(3):
        assert torch.equal(together[k], draw(rates[k], keys[k], x[k]))


def test_slots_may_share_rates_or_keys_and_lie_in_any_dimension():
    rates, keys = torch.tensor([0.2, 0.6]), derive_keys(keys_of(3), int32(1, 2, 3), 0, 2)
    many = torch.stack([rates, rates / 2, rates / 3])

    def draw(rates, keys):
        return torch.stack([noise.keep((50,), CPU) for noise in noises(rates, keys)])

    def alone(rates, keys):
        return torch.stack([draw(*pair) for pair in zip(rates, keys, strict=True)])

    same_rates, same_keys = vmap(draw, (None, 0))(rates, keys), vmap(draw, (0, None))(many, keys[0])
    assert torch.equal(same_rates, alone(rates.expand(3, 2), keys))
    assert torch.equal(same_keys, alone(many, keys[:1].expand(3, 2, 2)))
    assert torch.equal(vmap(draw, (1, 0))(many.T.contiguous(), keys), alone(many, keys))
    nested = vmap(vmap(draw, (None, 0)), (0, None))(many, keys)
    assert torch.equal(nested[2], alone(many[2].expand(3, 2), keys))


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.name)
def test_ranges_and_sources_are_said(kind):
    assert 0 <= kind.low < kind.high <= 0.9
    assert any(year in kind.source for year in map(str, range(2010, 2027)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_kernel_for_cuda_has_the_same_arithmetic(tmp_path):
    """Its text, compiled for the host as it stands."""
    (tmp_path / "kernel.cpp").write_text(
        TEXT + 'extern "C" int one(int a, int b, int c, int d) { return drawn<int>(a, b, c, d); }'
    )
    command = ["g++", "-O1", "-shared", "-fPIC", "-o", "kernel.so", "kernel.cpp"]
    subprocess.run(command, cwd=tmp_path, check=True)
    one = ctypes.CDLL(str(tmp_path / "kernel.so")).one
    indices, first, second, threshold = example(CPU)
    rows = torch.stack(torch.broadcast_tensors(indices, first, second, threshold), -1)
    drawn = _draw(indices, first, second, threshold).flatten().tolist()
    assert 0.3 < sum(drawn) / len(drawn) < 0.7
    assert drawn == [one(*numbers) for numbers in rows.view(-1, 4).tolist()]


def test_a_kernel_that_fails_or_differs_is_not_used(caplog):
    def fails(*numbers):
        raise RuntimeError("no compiler here\nand more")

    assert checked(fails, _draw, CPU) is _draw
    assert "no compiler here" in caplog.messages[0]
    assert "and more" not in caplog.text
    assert checked(lambda *numbers: 1 - _draw(*numbers), _draw, CPU) is _draw
    same = lambda *numbers: _draw(*numbers)  # noqa: E731
    assert checked(same, _draw, CPU) is same


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bits_are_the_same_on_cuda():
    keys = derive_keys(SEED, torch.tensor(7, dtype=torch.int32), 1, 3)
    on_device = derive_keys(SEED.cuda(), torch.tensor(7, dtype=torch.int32).cuda(), 1, 3)
    assert torch.equal(on_device.cpu(), keys)
    rate = torch.tensor(0.3)
    mask = keep_mask((1000, 100), rate.cuda(), on_device[2], on_device.device)
    assert torch.equal(mask.cpu(), keep_mask((1000, 100), rate, keys[2], CPU))
