"""Line charts as inline SVG, coloured by the page's style sheet (classes s0, s1 ...), for `report.html`."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 12, 46
_MOST_POINTS = 800
_MARKED = 40  # so few points get a dot each
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Series:
    """A named line through points (x, y), in the order of x; `colour` counts the style sheet's, `faint` is behind."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """An SVG element with axes, ticks and, for several series, a legend; empty without a finite point."""
    drawn = [Series(s.name, _thinned(_finite(s.points)), s.colour, s.faint) for s in series]
    points = [point for s in drawn for point in s.points]
    if not points:
        return ""
    xs, ys = ticks([x for x, _ in points], 6), ticks([y for _, y in points], 5)
    # Upwards there is room to the next round number; to the right the curve ends where the run did.
    last = max(x for x, _ in points)
    frame = _Frame(xs[0], last if last > xs[0] else xs[-1], ys[0], ys[-1])
    xs = [x for x in xs if x <= frame.right]
    return "\n".join(
        (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            *_axes(frame, xs, ys, x_label, y_label),
            *(_line(frame, s) for s in drawn if s.points),
            *_legend([s for s in drawn if s.points]),
            "</svg>",
        )
    )


@dataclass(frozen=True)
class _Frame:
    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.bottom) / (self.top - self.bottom) * (_HEIGHT - _TOP - _BOTTOM)


def ticks(values: Sequence[float], count: int) -> list[float]:
    """At least two round numbers, evenly spaced, about `count`, that enclose the values; from 0 where that is near."""
    low, high = min(values), max(values)
    if 0 <= low < 0.5 * high:
        low = 0.0
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in _NICE if nice * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def with_trend(points: Sequence[Point]) -> list[Series]:
    """The points, faint, and the mean of each one's neighbourhood, 1/20 of the curve wide; few points stand alone."""
    half = len(points) // 40
    if not half:
        return [Series("one step", points)]
    ys = [y for _, y in points]
    means = [(x, statistics.fmean(ys[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]
    return [Series("one step", points, faint=True), Series("mean of 5 %", means)]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: list[Point]) -> list[Point]:
    """The lowest and the highest point of each short stretch: no peak is lost."""
    size = -(-2 * len(points) // _MOST_POINTS)
    if size <= 2:
        return points
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _axes(frame: _Frame, xs: list[float], ys: list[float], x_label: str, y_label: str) -> list[str]:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    lines = []
    for value in ys:
        y = frame.y(value)
        lines.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for value in xs:
        x = frame.x(value)
        lines.append(f'<line class="axis" x1="{x:.1f}" y1="{floor}" x2="{x:.1f}" y2="{floor + 4}"/>')
        lines.append(f'<text class="tick" x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{value:,.6g}</text>')
    middle = (_LEFT + right) / 2
    height = (_TOP + floor) / 2
    lines.append(f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{right}" y2="{floor}"/>')
    lines.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    lines.append(
        f'<text x="14" y="{height}" text-anchor="middle" transform="rotate(-90 14 {height})">{escape(y_label)}</text>'
    )
    return lines


def _line(frame: _Frame, series: Series) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in series.points]
    style = f"s{series.colour}{' faint' if series.faint else ''}"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = places if len(places) <= _MARKED and not series.faint else []
    marks = "".join(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in dots)
    return f'<polyline class="{style}" points="{path}"/>{marks}'


def _legend(series: list[Series]) -> list[str]:
    if len(series) < 2:
        return []
    lines = []
    for i, s in enumerate(series):
        y = _TOP + 12 + 18 * i
        style = f"s{s.colour}{' faint' if s.faint else ''}"
        lines.append(f'<polyline class="{style}" points="{_WIDTH - 132},{y - 4} {_WIDTH - 108},{y - 4}"/>')
        lines.append(f'<text x="{_WIDTH - 102}" y="{y}">{escape(s.name)}</text>')
    return lines
