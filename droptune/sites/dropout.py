"""Every kind of dropout: how it is recognised, what its mask looks like, how it scales.

`KINDS` is the table of all kinds; a new kind is one entry of it. Masks come from
`droptune.masks`; everything batches under `torch.func.vmap`.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from droptune.sites.masks import Noise, Shape


def _same(shape: Shape) -> Shape:
    return shape


def _per_sample(shape: Shape) -> Shape:
    return (*shape[:1], *(1 for _ in shape[1:]))


def _per_channel(shape: Shape) -> Shape:
    return (*shape[:2], *(1 for _ in shape[2:]))


def _over_time(shape: Shape, time: int = 1) -> Shape:
    """One mask for all steps of [batch, time, features]."""
    return (*shape[:time], 1, *shape[time + 1 :]) if len(shape) > 2 else shape


def inverted(x: Tensor, noise: Noise, shape: Shape) -> Tensor:
    """Zero what is not kept and divide the rest by 1 - rate: the expectation stays."""
    return x * noise.multipliers(shape, x)


def self_normalising(x: Tensor, noise: Noise, shape: Shape) -> Tensor:
    """Set what is not kept to SELU's -alpha' and restore mean 0 and variance 1 by an affine map."""
    saturation, rate = 1.7580993408473766, noise.per_slot(noise.rate).to(x.dtype)
    slope = ((saturation**2 * rate + 1) * (1 - rate)).rsqrt()
    kept = noise.ones(shape, x)
    return x * (kept * slope) + (kept - 1 + rate) * (saturation * slope)


def blocks(x: Tensor, noise: Noise, size: int) -> Tensor:
    """DropBlock on [batch, channels, height, width]: squares of `size` at random places.

    Squares overlap, so the share that drops is a little below the rate, as in the paper. What
    stays is divided by its share.
    """
    height, width = x.shape[-2:]
    size = min(size, height, width)
    valid = (height - size + 1) * (width - size + 1)
    seeds = noise.at_rate(noise.rate * (height * width / (size * size * valid)))
    dropped = 1 - seeds.ones((*x.shape[:-2], height - size + 1, width - size + 1), x)
    border = size - 1
    padded = functional.pad(dropped, (border, border, border, border))
    keep = 1 - functional.max_pool2d(padded, size, stride=1)
    return x * (keep * (keep.numel() / keep.sum().clamp(min=1)))


Options = Mapping[str, Any]
Draw = Callable[[Tensor, Noise, Options], Tensor]


@dataclass(frozen=True)
class Kind:
    """One kind of dropout, entirely: how it is recognised, drawn, scaled, searched and cited.

    `mask_shape` maps the activation's shape to the mask's, which broadcasts over it; `scaling`
    puts a mask of that shape on it; `draw` replaces both where a kind needs more. `modules` maps
    type names (globs) of modules that are nothing but this dropout to options of `draw`; such a
    module's rate is the first of `attributes` that it, or its forward's signature, has.
    `functions` are functions of this kind: torch's own, or plain ones of that name next to the
    model's classes. `low` and `high` are the default range.
    """

    name: str
    source: str
    low: float = 0.0
    high: float = 0.5
    mask_shape: Callable[[Shape], Shape] = _same
    scaling: Callable[[Tensor, Noise, Shape], Tensor] = inverted
    draw: Draw | None = field(default=None, repr=False)
    modules: Mapping[str, Options] = field(default_factory=dict)
    attributes: tuple[str, ...] = ("p", "drop_prob", "drop_rate", "dropout")
    functions: Mapping[str, Options] = field(default_factory=dict)
    insertable: bool = False

    def apply(self, x: Tensor, noise: Noise, options: Options | None = None) -> Tensor:
        """`x` after one call of a site of this kind in training mode; exactly `x` at rate 0."""
        if self.draw is not None:
            return self.draw(x, noise, options or {})
        return self.scaling(x, noise, self.mask_shape(tuple(x.shape)))


def _draw_channel(x: Tensor, noise: Noise, options: Options) -> Tensor:
    if x.dim() < options.get("rank", 0):  # one example without its batch dimension
        return _draw_channel(x.unsqueeze(0), noise, {}).squeeze(0)
    return inverted(x, noise, _per_channel(tuple(x.shape)))


def _draw_path(x: Tensor, noise: Noise, options: Options) -> Tensor:
    whole_batch = options.get("mode") == "batch"
    shape = tuple(1 for _ in x.shape) if whole_batch else _per_sample(tuple(x.shape))
    around: Tensor | None = options.get("around")
    if around is not None:  # x holds a shortcut around: x + (m - 1)(x - around) is x where m = 1
        return x + (noise.multipliers(shape, x) - 1) * (x - around)
    return x * (noise.multipliers if options.get("scale_by_keep", True) else noise.ones)(shape, x)


def _draw_block(x: Tensor, noise: Noise, options: Options) -> Tensor:
    size = options.get("block_size") or max(1, min(7, min(x.shape[-2:]) // 2))
    return blocks(x, noise, int(size))


def _draw_variational(x: Tensor, noise: Noise, options: Options) -> Tensor:
    return inverted(x, noise, _over_time(tuple(x.shape), options.get("time", 1)))


_TABLE = (
    Kind(
        "element",
        "Srivastava et al., Dropout, JMLR 15 (2014)",
        high=0.8,
        modules={"Dropout": {}, "StableDropout": {}},
        functions={"dropout": {}, "dropout_": {}},
        insertable=True,
    ),
    Kind(
        "channel",
        "Tompson et al., Efficient object localization (SpatialDropout), CVPR 2015",
        high=0.6,
        mask_shape=_per_channel,
        draw=_draw_channel,
        modules={"Dropout1d": {"rank": 3}, "Dropout2d": {}, "Dropout3d": {"rank": 5}},
        functions={
            "dropout1d": {"rank": 3},
            "dropout2d": {},
            "dropout3d": {"rank": 5},
            "feature_dropout": {},
            "feature_dropout_": {},
        },
        insertable=True,
    ),
    Kind(
        "path",
        "Huang et al., Stochastic depth, ECCV 2016; Larsson et al., FractalNet, ICLR 2017",
        mask_shape=_per_sample,
        draw=_draw_path,
        modules={"*DropPath": {}, "StochasticDepth": {}},
        attributes=("drop_prob", "p"),
        functions={"drop_path": {}, "stochastic_depth": {}},
        insertable=True,
    ),
    Kind(
        "attention",
        "Vaswani et al., Attention is all you need, NeurIPS 2017",
        functions={"scaled_dot_product_attention": {}},
    ),
    Kind(
        "recurrent",
        "Zaremba et al., Recurrent neural network regularization, 2014",
        high=0.7,
        functions={"lstm": {}, "gru": {}, "rnn_tanh": {}, "rnn_relu": {}},
    ),
    Kind(
        "alpha",
        "Klambauer et al., Self-normalizing neural networks, NeurIPS 2017",
        high=0.3,
        scaling=self_normalising,
        modules={"AlphaDropout": {}},
        functions={"alpha_dropout": {}, "alpha_dropout_": {}},
    ),
    Kind(
        "feature_alpha",
        "Klambauer et al., Self-normalizing neural networks, NeurIPS 2017 (whole channels)",
        high=0.3,
        mask_shape=_per_channel,
        scaling=self_normalising,
        modules={"FeatureAlphaDropout": {}},
        functions={"feature_alpha_dropout": {}, "feature_alpha_dropout_": {}},
    ),
    Kind(
        "block",
        "Ghiasi et al., DropBlock, NeurIPS 2018",
        high=0.3,
        draw=_draw_block,
        modules={"DropBlock": {}, "DropBlock2d": {}},
        attributes=("p", "drop_prob"),
        functions={"drop_block2d": {}, "drop_block_2d": {}},
        insertable=True,
    ),
    Kind(
        "variational",
        "Gal and Ghahramani, A theoretically grounded application of dropout in RNNs, NeurIPS 2016",
        high=0.6,
        mask_shape=_over_time,
        draw=_draw_variational,
        modules={"LockedDropout": {"time": 0}, "*VariationalDropout": {}, "RNNDropout": {}},
        insertable=True,
    ),
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in _TABLE}

# Attributes of modules, and arguments of functions, that change what their dropout draws.
OPTIONS = ("mode", "scale_by_keep", "block_size")


class Recognised(NamedTuple):
    """A module that is nothing but dropout. `attribute` holds its rate, or, where `by_argument`,
    is the argument of its forward that does."""

    kind: Kind
    attribute: str
    by_argument: bool
    options: Options

    def rate(self, module: nn.Module, *args: Any, **kwargs: Any) -> float:
        """The author's rate in this call of `module`, which was given these arguments."""
        if not self.by_argument:
            return float(getattr(module, self.attribute) or 0.0)
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        given.apply_defaults()
        return float(given.arguments[self.attribute] or 0.0)


def recognise(module: nn.Module) -> Recognised | None:
    """What kind of dropout `module` is; None where it is more than that, or none."""
    names = [type(module).__name__, *_torch_names(module)]
    for kind in KINDS.values():
        for pattern, options in kind.modules.items():
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return _recognised_as(kind, module, options)
    return None


def _torch_names(module: nn.Module) -> list[str]:
    """The class of torch whose forward this is, for subclasses that only change the name."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return [owner.__name__] if owner.__module__.startswith("torch.nn.") else []


def _recognised_as(kind: Kind, module: nn.Module, options: Options) -> Recognised | None:
    own = {name: getattr(module, name) for name in OPTIONS if hasattr(module, name)}
    numbers = (int, float, type(None))
    arguments = list(inspect.signature(type(module).forward).parameters)[2:]
    for attribute in kind.attributes:
        if attribute in arguments:
            return Recognised(kind, attribute, True, {**options, **own})
        if isinstance(getattr(module, attribute, ""), numbers):
            return Recognised(kind, attribute, False, {**options, **own})
    return None
