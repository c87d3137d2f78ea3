"""Lines for one's own training script: a study's whole recommended configuration.

Rates are set on the attributes that hold them; sites that the study file inserted become forward
hooks in plain PyTorch, so that the script needs droptune for `apply_rates` alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from droptune.program.declared import is_number
from droptune.sites.site import Site
from droptune.training import Assignment

# Dropout behind a module, by kind: `x` is its output, `before` its input. F.dropout of ones is a
# mask that is 0 or 1 / (1 - rate).
INSERTED = {
    "element": """\
def element(x, rate, module, before):
    return F.dropout(x, rate)
""",
    "channel": """\
def channel(x, rate, module, before):  # whole channels
    return x * F.dropout(x.new_ones(*x.shape[:2], *[1] * (x.dim() - 2)), rate)
""",
    "path": """\
def path(x, rate, module, before):  # stochastic depth: the input alone passes
    return before + F.dropout(x.new_ones(len(x), *[1] * (x.dim() - 1)), rate) * (x - before)
""",
    "variational": """\
def variational(x, rate, module, before):  # one mask for all steps
    shape, time = list(x.shape), 1 if getattr(module, "batch_first", True) else 0
    if len(shape) > 2:
        shape[time] = 1
    return x * F.dropout(x.new_ones(shape), rate)
""",
    "block": """\
def block(x, rate, module, before):  # DropBlock: squares at random places
    height, width = x.shape[-2:]
    size = max(1, min(7, min(height, width) // 2))
    rows, columns = height - size + 1, width - size + 1
    seed = min(rate * height * width / (size * size * rows * columns), 1.0)
    seeds = (torch.rand(*x.shape[:-2], rows, columns, device=x.device) < seed).to(x.dtype)
    padded = F.pad(seeds, [size - 1] * 4)
    keep = 1 - F.max_pool2d(padded, size, stride=1)
    return x * keep * (keep.numel() / keep.sum().clamp(min=1))
""",
}
_HOOK = """\
def insert(path, site, drop):
    def hook(module, inputs, output):
        if not module.training:
            return output
        before = inputs[0] if inputs else None
        if type(output) in (tuple, list):  # dropout on the first of several outputs
            first = drop(output[0], inserted[site], module, before)
            return type(output)([first, *output[1:]])
        if hasattr(output, "last_hidden_state"):
            x = output.last_hidden_state
            output.last_hidden_state = drop(x, inserted[site], module, before)
            return output
        return drop(output, inserted[site], module, before)
    model.get_submodule(path).register_forward_hook(hook)
"""
_FACTORS = {
    "up": "progress",
    "early": "float(progress < {cutoff:.6g})",
    "late": "float(progress >= {cutoff:.6g})",
}
_USES = {
    "weight_decay": "the optimizer's: AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)",
    "l1": "loss + l1 * sum(w.abs().sum() for w in model.parameters() if w.ndim > 1)",
    "label_smoothing": "F.cross_entropy(output, target, label_smoothing=label_smoothing)",
}


def script(assignment: Assignment, sites: Sequence[Site], *comments: str) -> str:
    """Python that makes a `model` train with this assignment: rates, learning rate, other values.

    What has to be done in the model's own code is said in comments.
    """
    rates = {site.path: assignment.rates.get(site.path, site.rate) for site in sites}
    held = _held(sites, rates)
    inserted = [site for site in sites if site.inserted]
    by_hand = [s for s in sites if not s.inserted and s.attribute not in held]
    blocks = [
        "\n".join(f"# {line}" for line in comments),
        _imports(held, inserted),
        _applied(held),
        _configured(sites, rates),
        _told(by_hand, rates),
        *_inserted(inserted, rates),
        _schedule(assignment.values, held=bool(held), inserted=bool(inserted)),
        "\n".join(_numbers(assignment)),
    ]
    return "\n\n".join(block.rstrip("\n") for block in blocks if block)


def _held(sites: Sequence[Site], rates: Mapping[str, float]) -> dict[str, float]:
    """Attribute -> rate, where an attribute holds the rates of its sites and they agree."""
    found: dict[str, set[float]] = {}
    for site in sites:
        if site.attribute and not site.inserted:
            found.setdefault(site.attribute, set()).add(rates[site.path])
    return {attribute: given.pop() for attribute, given in found.items() if len(given) == 1}


def _imports(held: Mapping[str, float], inserted: Sequence[Site]) -> str:
    names = ["droptune"] if held else []
    names += ["torch", "torch.nn.functional as F"] if inserted else []
    return "\n".join(f"import {name}" for name in names)


def _dict(name: str, values: Mapping[str, float]) -> list[str]:
    lines = [f"    {key!r}: {value:.6g}," for key, value in values.items()]
    return [f"{name} = {{  # probability of zeroing", *lines, "}"]


def _applied(held: Mapping[str, float]) -> str:
    if not held:
        return ""
    check = ["missing = droptune.apply_rates(model, rates).not_set", "assert not missing, missing"]
    return "\n".join([*_dict("rates", held), *check])


def _configured(sites: Sequence[Site], rates: Mapping[str, float]) -> str:
    """The fields of the model's configuration whose sites all have one rate."""
    found: dict[str, set[float]] = {}
    for site in sites:
        if site.field:
            found.setdefault(site.field, set()).add(rates[site.path])
    agreed = [
        f"#   {field} = {given.pop():.6g}" for field, given in found.items() if len(given) == 1
    ]
    differ = [
        f"#   {field}: its sites differ, see above" for field, given in found.items() if given
    ]
    if not found:
        return ""
    return "\n".join(
        ["# The same in the model's configuration, to build it with:", *agreed, *differ]
    )


def _told(sites: Sequence[Site], rates: Mapping[str, float]) -> str:
    """The rates that only the model's code can hold."""
    if not sites:
        return ""
    lines = [f"#   {_placed(site)}: {rates[site.path]:.6g}" for site in sites]
    first = "# To be changed in the model's code, where no single attribute holds these rates:"
    return "\n".join([first, *lines])


def _placed(site: Site) -> str:
    return f"{site.path} ({', '.join(filter(None, (site.kind, line_of(site))))})"


def line_of(site: Site) -> str:
    """Where a site is that has no module of its own: the file from the working directory, or from
    the folder of installed packages."""
    if not (site.call and site.line):
        return ""
    below = os.path.relpath(site.line)
    return re.split(r"(?:site|dist)-packages/", site.line if below.startswith("..") else below)[-1]


def _inserted(sites: Sequence[Site], rates: Mapping[str, float]) -> Iterator[str]:
    """Forward hooks for the sites that the study file added."""
    if not sites:
        return
    yield from (INSERTED[kind] for kind in dict.fromkeys(site.kind for site in sites))
    yield _HOOK
    yield "\n".join(_dict("inserted", {site.path: rates[site.path] for site in sites}))
    yield "\n".join(f"insert({site.owner!r}, {site.path!r}, {site.kind})" for site in sites)


def _schedule(values: Mapping[str, float | str], *, held: bool, inserted: bool) -> str:
    """A function that moves the rates, where it is recommended that they move."""
    name = str(values.get("schedule", "constant"))
    if name == "constant":
        return ""
    lines = [
        f"def set_rates(progress):  # schedule {name!r}: call it before every update, with",
        "    # progress = updates done / updates of the whole training",
        f"    factor = {_FACTORS[name].format(cutoff=float(values.get('cutoff', 0.5)))}",
    ]
    if held:
        lines.append("    droptune.apply_rates(model, {k: factor * p for k, p in rates.items()})")
    if inserted:
        lines.insert(0, "whole = dict(inserted)")
        lines.append("    inserted.update({k: factor * p for k, p in whole.items()})")
    return "\n".join(lines)


def _numbers(assignment: Assignment) -> Iterator[str]:
    yield f"lr = {assignment.lr:.6g}"
    for name, value in assignment.values.items():
        if name not in ("schedule", "cutoff"):
            written = f"{value:.6g}" if is_number(value) else repr(value)
            yield f"{name} = {written}  # {_USES.get(name, 'a value that the program declares')}"
