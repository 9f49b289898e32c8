"""Line charts as inline SVG: no script, colours from the page, values on hover, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

from polydiff.core.adapter import Metric

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 20, 34
MOST_POINTS = 400  # a curve
MOST_STOPS = 80  # places that answer to the pointer


@dataclass(frozen=True)
class Series:
    """A curve.

    Args:
        name: shown at its end and on hover; may be empty.
        x, y: values; a point that is not finite (or not positive on a logarithmic axis) breaks the curve.
        tone: place on the colour ramp in [0, 1], or None for the page's accent.
        faint: draw it thin, as the raw data behind a smoothed curve; it does not answer to the pointer.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: float | None = None
    faint: bool = False


def number(value: float) -> str:
    """A number for people: four significant digits, thousands separated, small and large ones with a power of ten."""
    size = abs(value)
    if not math.isfinite(value):
        text = str(size)
    elif size and (size >= 1e6 or size < 1e-3):
        mantissa, _, exponent = f"{size:.3e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = f"{size:,.0f}" if size >= 1000 else f"{size:.4g}"
    return ("-" + text if value < 0 else text).replace("-", "−")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that divide [low, high], about ``count`` of them: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values on a logarithmic axis: powers of ten where three fit, else with 2 and 5, else as on a linear one."""
    span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**k for k in span if low <= 10.0**k <= high]
    if len(tens) >= 3:
        return tens[:: math.ceil(len(tens) / 6)]
    fine = [f * 10.0**k for k in span for f in (1, 2, 5) if low <= f * 10.0**k <= high]
    return fine if len(fine) >= 3 else ticks(low, high)


def chart(series: Sequence[Series], title: str, x_label: str = "step", *, log: bool = False) -> str:
    """A figure with one chart, or nothing if no series has a point to draw.

    Args:
        series: curves that share the axes.
        title: what the vertical axis shows; it stands above the chart.
        x_label: what the horizontal axis shows.
        log: make the vertical axis logarithmic.
    """
    curves = [(s, _points(s, log)) for s in series]
    flat = [point for _, points in curves for point in points if point is not None]
    if not flat:
        return ""
    x_low, x_high = min(x for x, _ in flat), max(x for x, _ in flat)
    y_low, y_high = _room(min(y for _, y in flat), max(y for _, y in flat), log)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def up(y: float) -> float:
        place = math.log(y / y_low) / math.log(y_high / y_low) if log else (y - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * place

    parts = []
    for tick in (log_ticks if log else ticks)(y_low, y_high):
        parts.append(f'<path class="rule" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(x_low, x_high):
        anchor = "end" if across(tick) > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<path class="tick" d="M{across(tick):.1f} {HEIGHT - BOTTOM}v5"/>')
        parts.append(
            f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="{anchor}">{number(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    for one, points in curves:
        path = _path([None if p is None else (across(p[0]), up(p[1])) for p in points])
        parts.append(f'<path class="curve{" faint" if one.faint else ""}"{_tone(one)} d="{path}"/>')
    answering = [(s, [p for p in points if p is not None]) for s, points in curves if not s.faint]
    parts += _stops(answering, across, up, x_label)
    # The summary stands for the curves where they cannot be seen.
    summary = "; ".join(f"{s.name or title} from {number(p[0][1])} to {number(p[-1][1])}" for s, p in answering if p)
    drawn = "".join(parts)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<small>by {escape(x_label)}{", log scale" if log else ""}'
        f'</small></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">{drawn}</svg>'
        f"{_legend(series)}</figure>"
    )


def _points(series: Series, log: bool) -> list[tuple[float, float] | None]:
    """The points to draw: None where the curve breaks; long curves keep an even selection and both ends."""
    points = [
        (x, y) if math.isfinite(x) and math.isfinite(y) and not (log and y <= 0) else None
        for x, y in zip(series.x, series.y, strict=True)
    ]
    if len(points) <= MOST_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _room(low: float, high: float, log: bool) -> tuple[float, float]:
    """Some air above and below, and a proper interval where all values are equal."""
    if log:
        air = max((high / low) ** 0.06, 1.05)
        return low / air, high * air
    air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < 0.5 * high else low - air), high + air


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    commands, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        commands.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        if pen == "M":
            commands.append("h0")  # a lone point between two breaks is still a round dot
        pen = "L"
    return "".join(commands)


def _tone(series: Series) -> str:
    return "" if series.tone is None else f' style="--tone:{200 + 140 * series.tone:.0f}"'


def _legend(series: Sequence[Series]) -> str:
    keys = [f"<li{_tone(s)}>{escape(s.name)}</li>" for s in series if s.tone is not None]
    return f'<ul class="legend">{"".join(keys)}</ul>' if keys else ""


def _stops(
    answering: Sequence[tuple[Series, list[tuple[float, float]]]],
    across: Callable[[float], float],
    up: Callable[[float], float],
    x_label: str,
) -> list[str]:
    """Invisible columns that show their values when the pointer is over them, by style sheet alone."""
    every = sorted({x for _, points in answering for x, _ in points})
    stops = (
        [every[round(i * (len(every) - 1) / (MOST_STOPS - 1))] for i in range(MOST_STOPS)]
        if len(every) > MOST_STOPS
        else every
    )
    edges = [LEFT, *((across(a) + across(b)) / 2 for a, b in pairwise(stops)), WIDTH - RIGHT]
    at = [dict(points) for _, points in answering]
    parts = []
    for x, left, right in zip(stops, edges[:-1], edges[1:], strict=True):
        here = [(s, values[x]) for (s, _), values in zip(answering, at, strict=True) if x in values]
        lines = [f"{x_label} {number(x)}", *(f"{s.name} {number(y)}".strip() for s, y in here)]
        dots = "".join(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5"{_tone(s)}/>' for s, y in here)
        note = ""
        if len(here) == 1:
            note = f'<text class="note" x="{WIDTH - RIGHT}" y="{TOP - 8}" text-anchor="end">{escape(" · ".join(lines))}</text>'
        parts.append(
            f'<g class="stop"><rect x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.1):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"/><path d="M{across(x):.1f} {TOP}V{HEIGHT - BOTTOM}"/>{dots}{note}'
            f"<title>{escape(chr(10).join(lines))}</title></g>"
        )
    return parts


def gauge(metric: Metric) -> str:
    """A measured number as a dot on its interval, beside the value that real data has as a ring."""
    places = [v for v in (metric.value, metric.low, metric.high, metric.real) if v is not None]
    low, high = min(places), max(places)
    span = (high - low) or 1.0

    def across(value: float) -> float:
        return 8 + 144 * ((value - low) / span if high > low else 0.5)

    parts = ['<path class="rule" d="M2 10H158"/>']
    if metric.low is not None and metric.high is not None:
        parts.append(f'<path class="range" d="M{across(metric.low):.1f} 10H{across(metric.high):.1f}"/>')
    if metric.real is not None:
        parts.append(f'<circle class="real" cx="{across(metric.real):.1f}" cy="10" r="5"/>')
    parts.append(f'<circle class="dot" cx="{across(metric.value):.1f}" cy="10" r="4"/>')
    return f'<svg class="gauge" viewBox="0 0 160 20" aria-hidden="true">{"".join(parts)}</svg>'


def smooth(values: Sequence[float], share: float = 0.025, *, log: bool = False) -> list[float]:
    """A centred mean that forgets exponentially on both sides, so that the curve does not lag.

    Args:
        values: evenly spaced; those that are not finite (or not positive, with ``log``) become gaps.
        share: reach of the mean on either side as a share of the whole curve.
        log: take the geometric mean, which on a logarithmic axis runs through the middle of the data.
    """
    if log:
        return [math.exp(v) for v in smooth([math.log(v) if v > 0 else math.nan for v in values], share)]
    keep = math.exp(-1 / max(1.0, share * len(values)))
    seen = [math.isfinite(value) for value in values]
    known = [value if is_seen else 0.0 for value, is_seen in zip(values, seen, strict=True)]

    def reach(numbers: Sequence[float]) -> list[float]:
        ahead = list(accumulate(numbers, lambda total, value: keep * total + value))
        behind = list(accumulate(reversed(numbers), lambda total, value: keep * total + value))[::-1]
        return [a + b - value for a, b, value in zip(ahead, behind, numbers, strict=True)]  # itself is in both sums

    totals, weights = reach(known), reach([float(is_seen) for is_seen in seen])
    return [t / w if is_seen else math.nan for t, w, is_seen in zip(totals, weights, seen, strict=True)]
