"""Charts: round ticks, points where the numbers say, escaped labels."""

import re
import xml.etree.ElementTree as ET

import pytest

from vlcp_dist.report.charts import HEIGHT, WIDTH, Line, Style, line_chart, smooth, thin, ticks

STYLE = Style("#000", "circle")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (69.7, 92.3, [70, 75, 80, 85, 90]),
        (0.104, 0.969, [0.2, 0.4, 0.6, 0.8]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == expected


def test_ticks_of_few_epochs_are_whole():
    assert ticks(1, 2, smallest=1) == [1, 2]


def chart(lines, **more):
    return line_chart(lines, description='a "chart" <of> two', x_label="x", y_label="y", **more)


def test_chart_is_xml_with_rising_points_inside_its_box():
    made = chart([Line("<b>", [(1, 10), (10, 20), (100, 30)], STYLE, [1, 1, 1])], log_x=True, x_ticks=[1, 10, 100])
    root = ET.fromstring(made)
    assert root.get("aria-label") == 'a "chart" <of> two' and root.get("role") == "img"
    assert next(e.text for e in root.iter("title")) == "<b>"
    path = next(e.get("d") for e in root.find("g").iter("path"))
    points = [tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]]
    xs, ys = zip(*points, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)  # even on a log scale
    assert ys[0] > ys[1] > ys[2]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in points)


def test_flat_and_single_points_can_be_drawn():
    ET.fromstring(chart([Line("flat", [(1, 50), (2, 50)], STYLE)], y_limits=(0, 100), y_span=5))
    ET.fromstring(chart([Line("one", [(1, 100)], STYLE)], y_limits=(0, 100)))
    with pytest.raises(ValueError, match="at least one point"):
        chart([])


def test_smooth_and_thin():
    assert smooth([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]
    assert smooth([1, 2], 1) == [1, 2]
    points = [(i, i) for i in range(1001)]
    thinned = thin(points, 100)
    assert len(thinned) <= 102 and thinned[0] == (0, 0) and thinned[-1] == (1000, 1000)
    assert thin(points[:3], 100) == points[:3]
