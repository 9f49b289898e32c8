"""Charts: round ticks, curves where the numbers say, gaps where there are none."""

import math
import re
from itertools import pairwise

import pytest

from polydiff.core.adapter import Metric
from polydiff.core.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    chart,
    gauge,
    log_ticks,
    number,
    smooth,
    ticks,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (-1.23456, "−1.235"),
        (1234.4, "1,234"),
        (2e6, "2e6"),
        (1.5e-5, "1.5e−5"),
        (-1e-4, "−1e−4"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 2000) == [0, 500, 1000, 1500, 2000]
    assert ticks(-7.3, 8.1) == [-5, 0, 5]
    assert ticks(0.12, 0.31) == pytest.approx([0.15, 0.2, 0.25, 0.3])
    assert ticks(3, 3) == [3]
    assert log_ticks(1e-5, 1) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert log_ticks(0.15, 2.2) == pytest.approx([0.2, 0.5, 1, 2])
    assert log_ticks(0.71, 0.93) == pytest.approx([0.75, 0.8, 0.85, 0.9])
    assert len(log_ticks(1e-300, 1e300)) <= 7


def curve(svg: str) -> list[tuple[float, float]]:
    path = re.search(r'class="curve"[^>]* d="([^"]*)"', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path[1])]


def test_a_straight_line_is_straight_and_a_power_law_is_straight_on_the_logarithmic_axis() -> None:
    x = [0.0, 1.0, 2.0, 3.0]
    for y, log in (([1.0, 2.0, 3.0, 4.0], False), ([1.0, 10.0, 100.0, 1000.0], True)):
        points = curve(chart([Series("a", x, y)], "title", log=log))
        assert points[0][0] == LEFT and points[-1][0] == WIDTH - RIGHT
        rises = [before[1] - after[1] for before, after in pairwise(points)]
        assert min(rises) > 0 and max(rises) - min(rises) <= 0.11  # written to a tenth
        assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in points)


def test_gaps_break_the_curve() -> None:
    svg = chart([Series("", [0, 1, 2, 3, 4], [1.0, math.nan, 2.0, -1.0, 3.0])], "title", log=True)
    path = re.search(r'class="curve"[^>]* d="([^"]*)"', svg)
    assert path is not None and path[1].count("M") == 3 and "nan" not in svg
    assert chart([Series("", [0, 1], [math.nan, math.inf])], "title") == ""
    assert chart([], "title") == ""


def test_one_point_and_equal_values_still_give_a_chart() -> None:
    for y in ([0.0], [5.0], [5.0, 5.0, 5.0], [-2.0, -2.0]):
        svg = chart([Series("", list(range(len(y))), y)], "title", log=y[0] > 0)
        assert "nan" not in svg and len(curve(svg)) == len(y)


def test_hover_tells_the_values_and_long_curves_stay_small() -> None:
    n = 100_000
    svg = chart([Series("up", range(n), [1.0 + i for i in range(n)], tone=0.5)], "title")
    assert len(svg) < 60_000
    assert "<title>step 0\nup 1</title>" in svg and "<title>step 99,999\nup 100,000</title>" in svg


def test_smoothing_keeps_lines_level_and_gaps_open() -> None:
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    line = smooth([float(i) for i in range(101)])
    assert line[50] == pytest.approx(50.0)  # centred: no lag
    assert smooth([1.0, math.nan, 1.0])[0] == pytest.approx(1.0) and math.isnan(smooth([1.0, math.nan, 1.0])[1])
    assert smooth([1.0, 100.0] * 40, share=1.0, log=True)[40] == pytest.approx(10.0, rel=0.05)
    rough = [(-1.0) ** i for i in range(100)]
    assert max(abs(v) for v in smooth(rough, share=0.1)) < 0.15


def test_a_gauge_puts_its_marks_in_order() -> None:
    svg = gauge(Metric(2.0, low=1.0, high=3.0, real=4.0))
    dot, ring = (float(re.search(rf'class="{name}" cx="([\d.]+)"', svg)[1]) for name in ("dot", "real"))  # type: ignore[index]
    low, high = map(float, re.search(r'class="range" d="M([\d.]+) 10H([\d.]+)"', svg).groups())  # type: ignore[union-attr]
    assert [low, dot, high, ring] == pytest.approx([8, 56, 104, 152])
    assert "range" not in gauge(Metric(1.0)) and "nan" not in gauge(Metric(1.0, 1.0, 1.0, 1.0))
