"""Which field of a configuration sets which rate: found by building the model again, without data.

For models in the style of Hugging Face: `type(model)(config)` builds one like `model.config`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from droptune.sites.attributes import join, may_be_rate, rate_attributes
from droptune.sites.modules import module_paths


def config_fields(model: nn.Module) -> dict[str, str]:
    """The configuration's field (`config.hidden_dropout_prob`) by the attribute it sets (`drop.p`).

    Every field called like a rate gets a value of its own in a copy, and the model is built anew
    from that on torch's meta device, where it takes no memory. Empty where that fails.
    """
    found: dict[str, str] = {}
    for path, module in _configured(model):
        for attribute, field in _fields(module).items():
            found[join(path, attribute)] = join(path, f"config.{field}")
    return found


def _configured(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that have a configuration."""
    done: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(join(outer, "")) for outer in done)
        if not inside and hasattr(vars(module).get("config"), "__dict__"):
            done.append(path)
            yield path, module


def _fields(module: nn.Module) -> dict[str, str]:
    config = copy.deepcopy(vars(module)["config"])
    names = [name for name, value in vars(config).items() if may_be_rate(name, value)]
    marks = {1e-3 + 1e-7 * (index + 1): name for index, name in enumerate(names)}
    vars(config).update({name: mark for mark, name in marks.items()})
    try:
        with torch.device("meta"):
            again = type(module)(config)
    except Exception:  # not that style of model
        return {}
    held = {one.path: vars(one.holder)[one.name] for one in rate_attributes(module_paths(again))}
    return {path: marks[value] for path, value in held.items() if value in marks}
