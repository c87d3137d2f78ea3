"""How figures are said: units, signs and digits."""

from __future__ import annotations

import math
from collections.abc import Iterable

from droptune.spec.objective import Objective
from droptune.training import Record, TrainingKind

FINEST = 1e-6  # what six decimals, the most that are written, can show
PERCENT = ("accuracy", "error", "precision", "recall", "f1", "ece")
NAMES = {
    "nll": "NLL",
    "mse": "MSE",
    "rmse": "RMSE",
    "mae": "MAE",
    "ece": "ECE",
    "brier": "Brier score",
    "f1": "F1",
    "gap": "generalisation gap",
    "seconds": "time per interval",
}
UNITS = {"nll": " nats", "seconds": " s", **dict.fromkeys(PERCENT, " points")}


def how_found(records: Iterable[Record]) -> str:
    """How the winner came about: `found`, or `tried` where baselines were all there was."""
    searched = any(record.training.kind is TrainingKind.SEARCH for record in records)
    return "found" if searched else "tried"


def winner_name(records: Iterable[Record]) -> str:
    """What the winner is called: `dropout found`, or `best dropout tried`."""
    return {"found": "dropout found", "tried": "best dropout tried"}[how_found(records)]


def metric_name(metric: str) -> str:
    """A metric as people write it: `NLL`, `accuracy`, `RMSE`."""
    return NAMES.get(metric, metric)


def better_word(objective: Objective) -> str:
    return "higher" if objective.direction == "maximize" else "lower"


def worse_word(objective: Objective) -> str:
    return "lower" if objective.direction == "maximize" else "higher"


def amount(metric: str, value: float, scale: float, *, sign: bool = False) -> str:
    """A difference with as many digits as its uncertainty `scale` leaves, without a unit."""
    factor = 100.0 if metric in PERCENT else 1.0
    return _number(value * factor, scale * factor, sign=sign)


def difference(metric: str, value: float, scale: float) -> str:
    """A difference without a sign and with its unit: `0.274 nats`, `1.2 points`."""
    return amount(metric, abs(value), scale) + UNITS.get(metric, "")


def interval(metric: str, low: float, high: float, *, sign: bool = False) -> str:
    """`[0.251, 0.297]`, in the digits that its width leaves; only an end at 0 reads as 0."""
    scale = (high - low) / 2
    if not math.isfinite(scale):
        return "[no interval]"
    for finer in (1, 10, 100):
        ends = [amount(metric, end, scale / finer, sign=sign) for end in (low, high)]
        if all(end.strip("0.") for end in ends) or 0 in (low, high):
            break
    return f"[{', '.join(ends)}]"


def change(metric: str, value: float, low: float, high: float) -> str:
    """`−0.019 nats [−0.043, +0.004]`: how a metric itself changes."""
    size = amount(metric, value, (high - low) / 2, sign=True) + UNITS.get(metric, "")
    return f"{size} {interval(metric, low, high, sign=True)}"


def level(metric: str, value: float) -> str:
    """A value of a metric in three digits: `84.1 %`, `0.481`."""
    if not math.isfinite(value):
        return "–"
    if metric in PERCENT:
        return f"{100 * value:.1f} %"
    if 1000 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1000 else f"{value:.3g}"


def rate(value: float) -> str:
    """A rate: `0`, `0.35`, `0.005`."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}".rstrip("0").rstrip(".")


def learning_rate(value: float) -> str:
    return f"{value:.2g}"


def counted(number: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _number(value: float, scale: float, *, sign: bool) -> str:
    digits, form = 3, "f"
    if value and 0 < scale < FINEST and abs(value) < 100 * FINEST:
        digits, form = max(1 + _magnitude(value) - _magnitude(scale), 1), "e"
    elif 0 < scale < math.inf:
        digits = min(max(1 - _magnitude(scale), 0), 6)
    text = f"{value:{'+' if sign else ''}.{digits}{form}}"
    zero = text.strip("+-0.") == ""
    return text.lstrip("+-") if zero else text.replace("-", "−", int(value < 0))


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))
