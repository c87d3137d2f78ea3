"""What confirmations scored on the test set, once, as SQL keeps it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from droptune.storage import Storage
    from droptune.trainers.slot import Scores
    from droptune.training import Training

EXAMPLES = ("nll", "correct", "brier", "mse", "mae")  # of single examples, [N]
LARGE = ("logits", "targets")  # of a sample of them: see `examples.calibration_sample`
METRICS = "metrics"


def put_scores(storage: Storage, training: Training, scores: Scores) -> None:
    """Keep what a training scored; what is there already stays."""
    metrics = json.dumps(dict(scores.metrics)).encode()
    storage.put_score(training.id, scores.split, METRICS, metrics)
    for name, values in scores.examples.items():
        content, array = io.BytesIO(), values.numpy()
        kept = array.astype("float32") if array.dtype == "float64" else array
        np.save(content, kept, allow_pickle=False)
        storage.put_score(training.id, scores.split, name, content.getvalue())


def read_metrics(storage: Storage, study_id: int) -> dict[int, dict[str, float]]:
    """The program's metrics on the test set, by training id."""
    return {i: json.loads(text) for i, text in storage.scores(study_id, "test", METRICS).items()}


def read_scores(storage: Storage, study_id: int) -> dict[int, Mapping[str, NDArray[Any]]]:
    """Scores of test examples by training id and name; large ones are read when first asked for."""

    @cache
    def read(name: str) -> dict[int, NDArray[Any]]:
        found = storage.scores(study_id, "test", name)
        return {i: np.load(io.BytesIO(c), allow_pickle=False) for i, c in found.items()}

    ids = {training_id for name in EXAMPLES for training_id in read(name)}
    return {training_id: _Stored(training_id, read) for training_id in ids}


class _Stored(Mapping[str, NDArray[Any]]):
    """The scores of one training by name, in double precision."""

    def __init__(self, training_id: int, read: Any) -> None:
        self._id, self._read = training_id, read

    def __getitem__(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = self._read(name)[self._id]
        return values.astype("float64") if values.dtype.kind == "f" else values

    def __iter__(self) -> Iterator[str]:
        return (name for name in (*EXAMPLES, *LARGE) if self._id in self._read(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)
