"""What a replay says of two curves."""

from __future__ import annotations

import math

import pytest

from droptune.workers.replay import LOSS, Replayed, _apart

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("recorded", "replayed", "apart"),
    [
        ((1.0, 2.0), (1.5, 2.0), 0.5),
        ((1.0, NAN), (1.0, NAN), 0.0),
        ((1.0, INF), (1.0, INF), 0.0),
        ((1.0, NAN), (1.0, 2.0), INF),
        ((NAN, 2.0), (1.0, 2.0), INF),
    ],
)
def test_a_curve_that_diverges_is_the_same_only_as_one_that_does(recorded, replayed, apart):
    assert _apart(recorded, replayed) == apart
    said = Replayed("trial 0001", 2, {LOSS: apart}, {LOSS: 1e-7})
    assert said.agrees == (apart == 0)
