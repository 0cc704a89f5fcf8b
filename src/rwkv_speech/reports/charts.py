"""Charts as inline SVG, in the colours of the page around them."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Point = tuple[float, float]

# Matplotlib draws in stand-in colours, which then become the style sheet's: one chart serves a light and a dark page.
_INK, _SOFT, _LINE, *_SERIES = _COLOURS = [f"#00000{i}" for i in range(1, 10)]
_VARIABLES = dict(zip(_COLOURS, ("--ink", "--soft", "--line", *(f"--s{i}" for i in range(6))), strict=True))
_DASHES = ("-", "--", ":", "-.")
# "default" first: a matplotlibrc of the user or the working directory has no effect.
_STYLE = {
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "grid.color": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "path.simplify_threshold": 1.0,  # pixels: a curve of a million steps takes 0.2 MB
}
_MARKED = 40  # so few points get a dot each


def bar_chart(title: str, x_label: str, y_label: str, bars: Mapping[str, float]) -> Markup:
    """An SVG element, the same bytes for the same data: a bar for each name, with its value above it."""
    with style.context(["default", _STYLE, {"svg.hashsalt": title}]):
        figure = Figure(figsize=(5.4, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        drawn = axes.bar(list(bars), list(bars.values()), color=_SERIES[0])
        axes.bar_label(drawn, labels=[f"{round(value, 2):,}" for value in bars.values()], color=_SOFT, fontsize=8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _inline(figure, title)


def line_chart(
    title: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[Point]], trend: bool = False
) -> Markup:
    """An SVG element, the same bytes for the same data; empty without a finite point.

    `lines` are points (x, y) in the order of x, by name; the seventh has the colour of the first. `trend` draws a line
    faint and over it the mean of each point's neighbourhood, 1/20 of the line wide.
    """
    arrays = {name: np.asarray(points, dtype=np.float64).reshape(-1, 2) for name, points in lines.items()}
    finite = {name: points[np.isfinite(points).all(axis=1)] for name, points in arrays.items()}
    drawn = {name: points for name, points in finite.items() if len(points)}
    if not drawn:
        return Markup()
    with style.context(["default", _STYLE, {"svg.hashsalt": title}]):
        figure = Figure(figsize=(5.4, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y")
        for (name, points), colour, dashes in zip(drawn.items(), cycle(_SERIES), cycle(_DASHES), strict=False):
            half = len(points) // 40
            if trend and half:
                axes.plot(*points.T, color=colour, linewidth=0.8, alpha=0.35, label="one step")
                name, points = "mean of 5 %", smoothed(points, half)
            marker = "o" if len(points) <= _MARKED else ""
            axes.plot(*points.T, color=colour, linewidth=1.5, linestyle=dashes, marker=marker, markersize=4, label=name)
        low, high = axes.dataLim.intervaly
        if 0 <= low < high / 2:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(axes.lines) > 1:
            figure.legend(loc="outside upper right", ncols=min(4, len(axes.lines)))
        return _inline(figure, title)


def smoothed(points: np.ndarray, half: int) -> np.ndarray:
    """Each y becomes the mean from `half` points before it to `half` behind."""
    sums = np.concatenate(([0.0], np.cumsum(points[:, 1])))
    places = np.arange(len(points))
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(points))
    return np.stack((points[:, 0], (sums[end] - sums[start]) / (end - start)), axis=1)


def _inline(figure: Figure, title: str) -> Markup:
    """Without the file's head and the names of its groups, which would come again with every chart of a page."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg ") :])
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))
