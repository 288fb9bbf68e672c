"""Line charts as inline SVG: plain strings, the same bytes every time, text that the page's own styles reach."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 270  # small enough that text stays readable at a phone's width
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 38  # the left has room for a learning rate
Scale = Callable[[float], float]
DODGE = 3.0  # pixels between lines at one x, so that their error bars do not cover each other


@dataclass(frozen=True)
class Style:
    """How a line looks: `marker` is circle, square, triangle, diamond or none, `dash` an SVG dash array or empty."""

    color: str
    marker: str = "none"
    dash: str = ""
    width: float = 1.6
    opacity: float = 1.0


@dataclass(frozen=True)
class Line:
    """Points (x, y) in the order of x; `errors` are half heights of their error bars."""

    label: str
    points: Sequence[tuple[float, float]]
    style: Style
    errors: Sequence[float] | None = None


def line_chart(
    lines: Sequence[Line],
    *,
    description: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    log_x: bool = False,
    y_limits: tuple[float, float] = (-math.inf, math.inf),
    y_span: float = 0.0,
    levels: Sequence[Line] = (),
) -> Markup:
    """An `<svg>` of the lines; `levels` are horizontal lines at the y of their first point.

    `x_ticks` are whole numbers when not given, `y_limits` bound the y axis, which spans `y_span` at least, and
    `description` is what a screen reader says.
    Raises ValueError for no points at all.
    """
    xs = [x for line in lines for x, _ in line.points]
    if not xs:
        raise ValueError("a chart needs at least one point")
    y_low, y_high = _y_range([*lines, *levels], y_limits, y_span)
    x_scale = _scale(min(xs), max(xs), LEFT + 10, WIDTH - RIGHT - 10, log=log_x)
    y_scale = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    parts = [
        _grid(
            ticks(min(xs), max(xs), smallest=1) if x_ticks is None else x_ticks, ticks(y_low, y_high), x_scale, y_scale
        ),
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text class="axis" transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
    ]
    for level in levels:
        path = f"M{LEFT} {y_scale(level.points[0][1]):.1f}H{WIDTH - RIGHT}"
        parts.append(f'<path d="{path}" {_stroke(level.style)}><title>{escape(level.label)}</title></path>')
    with_bars = any(line.errors for line in lines)
    for i, line in enumerate(lines):
        shift = (i - (len(lines) - 1) / 2) * DODGE if with_bars else 0.0
        parts.append(_line(line, [(x_scale(x) + shift, y_scale(y)) for x, y in line.points], y_scale))
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def key(style: Style) -> Markup:
    """The sample of a line that stands before its name in a legend."""
    return Markup(
        f'<svg class="key" viewBox="0 0 28 12" aria-hidden="true"><path d="M1 6H27" {_stroke(style)}/>'
        f"{_marker(14, 6, style)}</svg>"
    )


def ticks(low: float, high: float, most: int = 6, smallest: float = 0.0) -> list[float]:
    """At most `most` round numbers in [low, high], `smallest` or 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s for factor in (1, 2, 5, 10, 20) if (high - low) / (s := factor * power) + 1 <= most + 1e-9)
    step = max(step, smallest)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the `window` values around each, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - window // 2), min(len(values), i + window // 2 + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def thin(points: Sequence[tuple[float, float]], most: int = 500) -> list[tuple[float, float]]:
    """At most about `most` of the points at even distances, the last one always."""
    stride = max(1, math.ceil(len(points) / most))
    return [*points[:-1:stride], points[-1]] if points else []


def _y_range(lines: Sequence[Line], limits: tuple[float, float], span: float) -> tuple[float, float]:
    ends = [
        y + sign * error
        for line in lines
        for (_, y), error in zip(line.points, line.errors or [0.0] * len(line.points), strict=True)
        for sign in (-1, 1)
    ]
    height = max(ends) - min(ends)
    pad = max(height * 0.05, (span - height) / 2) or 1.0
    return max(limits[0], min(ends) - pad), min(limits[1], max(ends) + pad)


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Scale:
    """A function from [low, high] to pixels; one value alone goes to the middle."""
    place: Scale = math.log if log else float
    first, span = place(low), place(high) - place(low)
    return lambda value: start + (end - start) * ((place(value) - first) / span if span else 0.5)


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], x_scale: Scale, y_scale: Scale) -> str:
    base = HEIGHT - BOTTOM
    parts = [f'<path class="base" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>']
    for y in y_ticks:
        at = y_scale(y)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        at = x_scale(x)
        parts.append(f'<path class="base" d="M{at:.1f} {base}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{base + 16}" text-anchor="middle">{x:g}</text>')
    return "".join(parts)


def _line(line: Line, places: list[tuple[float, float]], y_scale: Scale) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path d="{path}" {_stroke(line.style)}/>']
    for (x, _), (_, value), error in zip(places, line.points, line.errors or [0.0] * len(places), strict=True):
        if error:
            low, high = y_scale(value - error), y_scale(value + error)
            bar = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 2:.1f} {low:.1f}h4M{x - 2:.1f} {high:.1f}h4"
            parts.append(f'<path d="{bar}" fill="none" stroke="{line.style.color}" stroke-width="1"/>')
    parts += [_marker(x, y, line.style) for x, y in places]
    return f"<g><title>{escape(line.label)}</title>{''.join(parts)}</g>"


def _stroke(style: Style) -> str:
    dash = f' stroke-dasharray="{style.dash}"' if style.dash else ""
    opacity = f' stroke-opacity="{style.opacity:g}"' if style.opacity < 1 else ""
    return f'fill="none" stroke="{style.color}" stroke-width="{style.width:g}" stroke-linejoin="round"{dash}{opacity}'


def _marker(x: float, y: float, style: Style) -> str:
    path = {
        "none": "",
        "circle": f"M{x - 3:.1f} {y:.1f}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
        "square": f"M{x - 2.7:.1f} {y - 2.7:.1f}h5.4v5.4h-5.4z",
        "triangle": f"M{x:.1f} {y - 3.6:.1f}l3.6 6.2h-7.2z",
        "diamond": f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z",
    }[style.marker]
    return f'<path d="{path}" fill="{style.color}"/>' if path else ""
