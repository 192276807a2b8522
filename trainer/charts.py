"""Charts as inline SVG, written by hand: no script, no font and no picture from elsewhere.

Colours are classes and variables of report.html's style sheet. All text that comes from a run is escaped.
"""

import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape

from memory.cards import size_text, size_unit

Points = Sequence[tuple[float, float]]

_MAX_POINTS = 400
_MAX_COLUMNS = 160
_HALF, _FULL = 520, 1060  # widths of a chart: two beside each other, or one
# Perceptually even and readable without colour vision: viridis, sampled.
_SCALE = ("#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")


def number(value: float) -> str:
    """Four significant digits, or the word for what is no number."""
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def line_chart(title: str, points: Points, *, unit: str = "", smooth: int = 20, zero: bool = False) -> str:
    """Values by step, thin, and their moving mean over `smooth` steps, strong. Non-finite ones are marked at the top.

    zero: the axis begins at 0, whatever the values are."""
    height = 190
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    bad = [x for x, y in points if not math.isfinite(y)]
    low, high = _span([y for _, y in finite] + [0.0] * zero)
    first, last = (points[0][0], points[-1][0]) if points else (0, 1)
    area = _Area(_HALF, height, first, max(last, first + 1), low, high)
    body = [area.axes(unit), f'<path class="raw" d="{area.path(_extremes(finite))}"/>']
    if len(finite) > 2 * smooth:
        means = _moving_mean(finite, smooth)
        body.append(f'<path class="line" d="{area.path(_thinned(means))}"/>')
    else:
        body[-1] = body[-1].replace('"raw"', '"line"')
    if len(finite) == 1:  # a line of one point shows nothing
        body.append(f'<circle class="dot" cx="{area.x(finite[0][0]):.1f}" cy="{area.y(finite[0][1]):.1f}" r="3"/>')
    body += [f'<text class="bad" x="{area.x(x):.1f}" y="{area.top + 9}" text-anchor="middle">✗<title>step {x:g}: '
             "not finite</title></text>" for x in bad[:50]]
    shown = json.dumps([[x, float(f"{y:.5g}")] for x, y in _thinned(finite)])
    return _svg(title, _HALF, height, "".join(body), f' class="chart" data-points="{escape(shown)}" '
                f'data-frame="{escape(json.dumps(area.frame()))}"')


def heat_map(title: str, steps: Sequence[int], rows: Sequence[Sequence[float]]) -> str:
    """Norms by block (upwards) over steps, on a logarithmic scale; a cell is the largest of its steps.

    rows: one sequence of norms, a value a block, for every step. Zero is drawn red, non-finite magenta.
    """
    num_blocks = max(map(len, rows))
    columns = min(_MAX_COLUMNS, len(rows))
    cells: list[list[float]] = []
    for c in range(columns):
        part = rows[c * len(rows) // columns:(c + 1) * len(rows) // columns]
        cells.append([_largest([norms[b] for norms in part if b < len(norms)]) for b in range(num_blocks)])
    positive = [v for column in cells for v in column if math.isfinite(v) and v > 0]
    low, high = (math.log10(min(positive)), math.log10(max(positive))) if positive else (0.0, 0.0)
    side = max(4, min(14, 320 // num_blocks))
    left, top, plot = 46, 26, _FULL - 46 - 150
    height = top + side * num_blocks + 26
    paths: dict[str, list[str]] = {}
    for c, column in enumerate(cells):
        x, w = left + plot * c / columns, plot / columns
        for block, value in enumerate(column):
            y = top + side * (num_blocks - 1 - block)
            paths.setdefault(_colour(value, low, high), []).append(f"M{x:.1f} {y}h{w:.2f}v{side}h-{w:.2f}z")
    body = [f'<path class="cell" style="fill:{colour}" d="{"".join(d)}"/>' for colour, d in paths.items()]
    for block in sorted({0, num_blocks // 2, num_blocks - 1}):
        y = top + side * (num_blocks - block) - side / 2 + 4
        body.append(f'<text class="tick" x="{left - 6}" y="{y:.0f}" text-anchor="end">{block}</text>')
    for share in (0, 0.5, 1):
        step = steps[round(share * (len(steps) - 1))]
        x = left + plot * share
        body.append(f'<text class="tick" x="{x:.0f}" y="{height - 8}" text-anchor="middle">{escape(str(step))}</text>')
    return _svg(title, _FULL, height, "".join(body) + _scale(low, high, left + plot + 20, top))


def stacked_area(title: str, points: Sequence[Mapping[str, float]], phases: Sequence[str]) -> str:
    """Memory by category over the course of a step, with phases as bands. points: bytes by category; phases: of each."""
    names, height = list(dict.fromkeys(name for point in points for name in point)), 300
    most = max(sum(point.values()) for point in points)
    scale, unit = size_unit(most)
    area = _Area(_FULL, height, 0, max(1, len(points) - 1), 0.0, most / scale * 1.05 or 1.0, steps=False, bottom=40)
    body, below = [area.axes(unit)], [0.0] * len(points)
    for i, name in enumerate(names):
        above = [b + point.get(name, 0) / scale for b, point in zip(below, points)]
        outline = [*enumerate(above), *reversed(list(enumerate(below)))]
        body.append(f'<path class="c{i % 8} fill" d="{area.path(outline)}z"><title>{escape(name)}: at most '
                    f"{size_text(max(p.get(name, 0) for p in points))}</title></path>")
        below = above
    for start, stop in _runs(phases):
        x, end = area.x(start), area.x(min(stop, len(points) - 1))
        body.append(f'<line class="phase" x1="{x:.1f}" x2="{x:.1f}" y1="{area.top}" y2="{height - 22}"/>')
        if end - x > 6 * len(phases[start]) + 4:
            body.append(f'<text class="tick" x="{(x + end) / 2:.0f}" y="{height - 24}" text-anchor="middle">'
                        f"{escape(phases[start])}</text>")
    return _svg(title, _FULL, height, "".join(body)) + legend(names)


def bars(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Groups of horizontal bars: {group: {series: bytes}}, the same series in every group."""
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    most = max((v for row in rows.values() for v in row.values()), default=0) or 1.0
    left, thick, gap = 110, 14, 10
    y, body = 26, []
    for group, row in rows.items():
        middle = y + len(row) * thick / 2 + 4
        body.append(f'<text class="label" x="{left - 8}" y="{middle:.0f}" text-anchor="end">{escape(group)}</text>')
        for name, value in row.items():
            length = (_HALF - left - 90) * value / most
            body.append(f'<rect class="c{series.index(name) % 8} fill" x="{left}" y="{y + 1}" width="{length:.1f}" '
                        f'height="{thick - 2}" rx="2"/><text class="tick" x="{left + length + 6:.1f}" y="{y + 11}">'
                        f"{size_text(value)}</text>")
            y += thick
        y += gap
    return _svg(title, _HALF, y, "".join(body)) + (legend(series) if len(series) > 1 else "")


def share_bar(title: str, shares: Mapping[str, float]) -> str:
    """One bar, divided."""
    total, x, body = sum(shares.values()) or 1.0, 0.0, []
    for i, (name, value) in enumerate(shares.items()):
        w = _HALF * value / total
        body.append(f'<rect class="c{i % 8} fill" x="{x:.1f}" y="26" width="{max(0.0, w - 1):.1f}" height="26">'
                    f"<title>{escape(name)}: {value / total:.1%}</title></rect>")
        x += w
    return _svg(title, _HALF, 56, "".join(body)) + legend([f"{n} {v / total:.0%}" for n, v in shares.items()])


def interval(before: float, after: float, low: float, high: float) -> str:
    """Two rates in 0..1 on one axis: hollow before, filled after, with the interval of the latter."""
    width = 220

    def x(rate: float) -> float:
        return 8 + (width - 16) * min(1.0, max(0.0, rate))

    return (f'<svg width="{width}" height="18" role="img"><title>before {before:.1%}, after {after:.1%} '
            f'({low:.1%} to {high:.1%})</title><line class="grid" x1="8" x2="{width - 8}" y1="9" y2="9"/>'
            f'<line class="reach" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="9" y2="9"/>'
            f'<circle class="before" cx="{x(before):.1f}" cy="9" r="4.5"/><circle class="after" cx="{x(after):.1f}" '
            f'cy="9" r="4.5"/></svg>')


def legend(names: Sequence[str]) -> str:
    """Coloured keys in the order of a chart's series."""
    return '<p class="legend">' + " ".join(
        f'<span><i class="c{i % 8}"></i>{escape(name)}</span>' for i, name in enumerate(names)) + "</p>"


class _Area:
    """The plotting area of a chart with axes, and the mapping into it."""

    def __init__(self, width: int, height: int, x0: float, x1: float, y0: float, y1: float, *, steps: bool = True,
                 bottom: int = 24):
        self.left, self.top, self.right, self.bottom = 62, 26, width - 10, height - bottom
        self.x0, self.x1, self.y0, self.y1, self.steps = x0, x1, y0, y1, steps

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * (value - self.y0) / (self.y1 - self.y0)

    def frame(self) -> list[float]:
        return [self.left, self.right, self.x0, self.x1, self.top, self.bottom, self.y0, self.y1]

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points) if points else ""

    def axes(self, unit: str) -> str:
        marks, values = [], _ticks(self.y0, self.y1)
        digits = next((n for n in range(4, 12) if len({f"{value:.{n}g}" for value in values}) == len(values)), 12)
        for value in values:
            y = self.y(value)
            marks.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                         f'<text class="tick" x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.{digits}g}</text>')
        if self.steps:
            marks += [f'<text class="tick" x="{self.x(v):.1f}" y="{self.bottom + 16}" text-anchor="middle">{v:g}</text>'
                      for v in _ticks(self.x0, self.x1) if v == int(v)]
        return "".join(marks) + f'<text class="tick" x="{self.right}" y="16" text-anchor="end">{escape(unit)}</text>'


def _svg(title: str, width: int, height: float, body: str, attributes: str = "") -> str:
    return (f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(title)}"{attributes}>'
            f'<text class="title" x="0" y="14">{escape(title)}</text>{body}</svg>')


def _ticks(low: float, high: float) -> list[float]:
    """Round values inside low..high, about four of them."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [float(f"{k * step:.12g}") for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """What the y axis covers: from zero where the values come near it."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if 0 <= low < 0.5 * high:
        low = 0.0
    margin = (high / 2 - low / 2) * 0.1 or abs(high) * 0.1 or 1.0
    most = sys.float_info.max / 4  # beyond, differences overflow
    return max(-most, low if low == 0 else low - margin), min(most, high + margin)


def _moving_mean(points: Points, span: int) -> list[tuple[float, float]]:
    """Means over `span` points, half of them before and half after; fewer at the ends."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    means = []
    for i, (x, _) in enumerate(points):
        start, stop = max(0, i - span // 2), min(len(points), i + span - span // 2)
        means.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return means


def _thinned(points: Points) -> list[tuple[float, float]]:
    stride = max(1, -(-len(points) // _MAX_POINTS))
    return [*points[::stride], *([points[-1]] if points and (len(points) - 1) % stride else [])]


def _extremes(points: Points) -> list[tuple[float, float]]:
    """At most 2 * _MAX_POINTS of the points, lowest and highest of each share: no spike is lost."""
    stride = max(1, -(-len(points) // _MAX_POINTS))
    if stride == 1:
        return list(points)
    shares = [points[i:i + stride] for i in range(0, len(points), stride)]
    return [p for share in shares for p in sorted({min(share, key=lambda p: p[1]), max(share, key=lambda p: p[1])})]


def _largest(values: Sequence[float]) -> float:
    if not values or any(not math.isfinite(v) for v in values):
        return math.nan
    return max(values)


def _colour(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "var(--bad)"
    if value <= 0:
        return "var(--dead)"
    share = (math.log10(value) - low) / (high - low) if high > low else 0.5
    return _SCALE[min(len(_SCALE) - 1, int(share * len(_SCALE)))]


def _scale(low: float, high: float, x: float, top: float) -> str:
    """The heat map's key."""
    body = [f'<rect x="{x}" y="{top + 10 * (len(_SCALE) - 1 - i)}" width="12" height="10" style="fill:{c}"/>'
            for i, c in enumerate(_SCALE)]
    for share in (0, 0.5, 1):
        body.append(f'<text class="tick" x="{x + 18}" y="{top + 100 * (1 - share) + 4:.0f}">'
                    f"{10 ** (low + share * (high - low)):.1e}</text>")
    return "".join(body)


def _runs(names: Sequence[str]) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of equal names."""
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    return list(zip(starts, [*starts[1:], len(names)]))
