"""How figures look, and how they leave: SVG and PNG for files, SVG that follows a page's colours.

matplotlib is imported when the first figure is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE = "#1b1f24", "#68727d", "#d8dde2"
COLOURS = {
    "winner": "#0b6bb8",
    "none": "#c8430f",
    "author": "#7b4fa3",
    "half": "#4c8a2f",
    "none at the winner's lr": "#d38b16",
    "pruned": "#b9a37e",
    "failed": "#a8324a",
}
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    COLOURS["winner"]: "--winner",
    COLOURS["none"]: "--none",
    COLOURS["author"]: "--author",
    COLOURS["half"]: "--half",
    COLOURS["none at the winner's lr"]: "--twin",
    COLOURS["pruned"]: "--pruned",
    COLOURS["failed"]: "--failed",
}
MANY = 250  # points from here on are drawn as one picture, not one by one

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "droptune",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "none",
}

P = ParamSpec("P")
Drawn = TypeVar("Drawn", bound="Figure | None")


def styled(draw: Callable[P, Drawn]) -> Callable[P, Drawn]:
    """A drawing function in droptune's style."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def blank(width: float = 4.8, height: float = 3.0) -> tuple[Figure, Axes]:
    """An empty figure of this size in inches, with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file on white, the same bytes for the same figure."""
    return _saved(figure, "svg", facecolor="white", metadata={"Date": None})


def png(figure: Figure) -> bytes:
    """The figure as a PNG file on white."""
    return _saved(figure, "png", facecolor="white", dpi=150)


def inline(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element whose colours are the page's CSS variables.

    `name` keeps its ids apart from those of other figures on the page.
    """
    text = _saved(figure, "svg", metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"[^A-Za-z0-9]", lambda found: f"-{ord(found[0]):x}-", name)
    text = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{prefix}-", text)
    text = re.sub(r"font-family: [^;\"]*(; )?", "", text)  # the page's own
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    size = re.match(r"<svg [^>]*?width=\"([\d.]+)pt\"", text)
    width = f' style="max-width: {float(size[1]) * 1.5:.0f}px"' if size else ""
    return re.sub(r" width=\"[\d.]+pt\" height=\"[\d.]+pt\"", width, text, count=1)


def _saved(figure: Figure, format: str, **options: Any) -> bytes:
    import matplotlib

    held = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(held, format=format, **options)
    return held.getvalue()
