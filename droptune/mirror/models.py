"""A trained model as files that anybody can load, without droptune and without pickle.

An exported model is an MLflow model with the pytorch flavour in format pt2 (a traced graph in
evaluation mode, from torch.export), for `mlflow models serve` and `mlflow.pytorch.load_model`.
Beside it, in `droptune/`, is what is needed to rebuild the module and to train on: the weights
(safetensors), the rates, the program's source and `rebuild.py`. Where a model cannot be traced
(control flow that depends on data), or the traced model does not predict the same, there is no
flavour: `droptune/` and the reason are all there is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from droptune.training import Record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from droptune.program.program import Program

EXAMPLES = 4  # a batch of one would be traced as a batch that is always one
_REBUILD = '''"""Rebuild the trained model with its tuned rates, to use it or to train on.

Needs torch, safetensors and droptune (the program's file imports it). `model.train()` before
training on; its learning rate is in config.json.
"""

import json
from pathlib import Path

from safetensors.torch import load_file

from droptune import apply_rates
from droptune.program.loading import load_program

HERE = Path(__file__).resolve().parent


def rebuild():
    model = load_program({reference!r}, HERE / "program").model()
    model.load_state_dict(load_file(HERE / "weights.safetensors"))
    applied = apply_rates(model, json.loads((HERE / "rates.json").read_text()))
    for site, reason in applied.not_set.items():
        print(f"{{site}}: {{reason}}")
    return model.eval()


model = rebuild()
'''


@dataclass(frozen=True)
class Trained:
    """A trained model: its record, its program, the weights of its best interval.

    `reference` is the program as the study names it, `sources` its files by path under the
    project's root.
    """

    record: Record
    program: Program
    weights: Mapping[str, Tensor]
    reference: str = ""
    sources: Mapping[str, bytes] = field(default_factory=dict)


def load(record: Record, weights: Mapping[str, Tensor], *, reference: str, root: Path) -> Trained:
    """The trained model of a record, its program loaded from under the project's root."""
    from droptune.program.loading import load_program
    from droptune.program.source import fingerprint

    program = load_program(reference, root)
    sources = {path: (root / path).read_bytes() for path in fingerprint(reference, root)}
    return Trained(record, program, weights, reference, sources)


@dataclass(frozen=True)
class Exported:
    """A model's folder, ready to upload; `reason` says why it has no flavour, if it has none."""

    folder: Path
    reason: str | None = None


@dataclass(frozen=True)
class _Traceable:
    """A module, the tensors it takes in order, and their names."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]


class NotExportable(Exception):
    """Why a model has no pt2 form."""


def export(trained: Trained, folder: Path, *, model_id: str, run_id: str) -> Exported:
    """Write the model's folder; its identity in MLflow goes into its MLmodel file."""
    from mlflow.models import Model

    identity = Model(run_id=run_id, model_id=model_id)
    try:
        _save_traced(trained, folder, identity)
        reason = None
    except Exception as error:  # whatever torch.export raises: it fails in many ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        Model(run_id=run_id, model_id=model_id).save(str(folder / "MLmodel"))
    _write_parts(trained, folder / "droptune", reason)
    return Exported(folder, reason)


def evaluated(trained: Trained) -> nn.Module:
    """The program's module with the trained weights, in evaluation mode."""
    import torch

    with torch.random.fork_rng(devices=[]):
        module = trained.program.model()
    dtypes = {w.dtype for w in trained.weights.values() if w.is_floating_point()}
    if dtypes == {torch.float64}:  # trained in double precision
        module = module.double()
    module.load_state_dict(dict(trained.weights))
    return module.eval()


def _save_traced(trained: Trained, folder: Path, identity: Any) -> None:
    import mlflow.pytorch
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    traceable = _traceable(trained)
    arrays = [tensor.numpy() for tensor in traceable.inputs]
    named = len(arrays) > 1
    specs = [
        TensorSpec(array.dtype, (-1, *array.shape[1:]), name if named else None)
        for array, name in zip(arrays, traceable.names, strict=True)
    ]
    with torch.no_grad():
        output = traceable.module(*traceable.inputs).numpy()
    signature = ModelSignature(
        inputs=Schema([*specs]),
        outputs=Schema([TensorSpec(output.dtype, (-1, *output.shape[1:]))]),
    )
    mlflow.pytorch.save_model(
        traceable.module,
        str(folder),
        mlflow_model=identity,
        signature=signature,
        input_example=tuple(arrays) if named else arrays[0],
        pip_requirements=_requirements(),
        serialization_format="pt2",
    )
    _compare(folder, traceable)


def _compare(folder: Path, traceable: _Traceable) -> None:
    """The traced model must predict as the trained one does, for any size of batch."""
    import torch

    traced = torch.export.load(folder / "data" / "model.pt2").module()
    for size in (EXAMPLES, EXAMPLES - 1):
        inputs = [tensor[:size] for tensor in traceable.inputs]
        with torch.no_grad():
            wanted, found = traceable.module(*inputs), traced(*inputs)
        if not torch.allclose(wanted, found, rtol=1e-5, atol=1e-6, equal_nan=True):
            raise NotExportable(f"the traced model predicts differently for a batch of {size}")


def _traceable(trained: Trained) -> _Traceable:
    """The module as a function of tensors alone, returning the tensor that predictions are from.

    How the model is called is watched: the program's `predict` calls it with an example batch.
    """
    import torch

    module = evaluated(trained)
    batch = _fitting(trained.program.example_batch(EXAMPLES), module)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = module(*args, **kwargs)
        calls.append((args, kwargs, output))
        return output

    with torch.no_grad():
        predictions, _ = trained.program.predict(watched, batch)
    if len(calls) != 1:
        raise NotExportable(f"a prediction calls the model {len(calls)} times, not once")
    args, kwargs, output = calls[0]
    given = {f"input_{i}": value for i, value in enumerate(args)} | kwargs
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    if len(tensors) == len(args) == 1 and not kwargs and isinstance(output, torch.Tensor):
        return _Traceable(module, tuple(tensors.values()), tuple(tensors))
    served = _served(module, args, kwargs, _output_key(output, predictions))
    return _Traceable(served, tuple(tensors.values()), tuple(tensors))


def _fitting(batch: Any, module: nn.Module) -> Any:
    """The batch with its floating point numbers in the model's precision."""
    from torch.utils._pytree import tree_map

    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    return tree_map(
        lambda leaf: leaf.to(dtype) if dtype and leaf.is_floating_point() else leaf, batch
    )


def _output_key(output: Any, predictions: Tensor) -> Any:
    """Which part of the model's output predictions come from: None where it is a tensor."""
    import torch

    if isinstance(output, torch.Tensor):
        return None
    parts = dict(output.items() if isinstance(output, Mapping) else enumerate(output))
    tensors = {key: part for key, part in parts.items() if isinstance(part, torch.Tensor)}
    for key, part in tensors.items():
        if key == "logits" or (part.shape == predictions.shape and torch.equal(part, predictions)):
            return key
    if not tensors:
        raise NotExportable(f"the model returns a {type(output).__name__} without a tensor")
    return next(iter(tensors))


def _served(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], key: Any
) -> nn.Module:
    """The module taking its tensors in order; whatever else it was called with stays fixed."""
    import torch

    is_tensor = [isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())]
    if not 1 <= sum(is_tensor) <= 4:
        raise NotExportable(f"the model takes {sum(is_tensor)} tensors; possible: 1 to 4")
    fixed = [value for value, t in zip((*args, *kwargs.values()), is_tensor, strict=True) if not t]

    class Served(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, a: Any, b: Any = None, c: Any = None, d: Any = None) -> Any:
            tensors, others = iter((a, b, c, d)), iter(fixed)
            values = [next(tensors) if t else next(others) for t in is_tensor]
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            output = self.model(*values[: len(args)], **named)
            return output if key is None else output[key]

    return Served().eval()


def _requirements() -> list[str]:
    """What it takes to load the model, pinned: MLflow, NumPy and torch, not droptune."""
    from importlib.metadata import version

    return [f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", "numpy", "torch")]


def _write_parts(trained: Trained, folder: Path, reason: str | None) -> None:
    """What rebuilds the module itself, and lets training go on."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: w.detach().clone().contiguous() for key, w in trained.weights.items()}
    save_file(weights, folder / "weights.safetensors")
    assignment = trained.record.training.assignment
    assert assignment is not None
    (folder / "rates.json").write_text(_json(dict(assignment.rates)))
    (folder / "config.json").write_text(_json(_config(trained, reason)))
    for path, content in trained.sources.items():
        file = folder / "program" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    if trained.sources:
        (folder / "rebuild.py").write_text(_REBUILD.format(reference=trained.reference))


def _config(trained: Trained, reason: str | None) -> dict[str, Any]:
    from importlib.metadata import version

    training = trained.record.training
    assert training.assignment is not None
    return {
        "training": training.name,
        "lr": training.assignment.lr,
        "values": dict(training.assignment.values),
        "seeds": training.seeds.to_json(),
        "intervals": training.intervals,
        "best_interval": trained.record.best_interval,
        "objective": trained.record.values,
        "program": trained.reference,
        "droptune": version("droptune"),
        "pt2": reason is None,
        "why_no_pt2": reason,
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
