import math
import random
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from rwkv_speech.reports.charts import Point, Series, line_chart, ticks, with_trend


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("text")]


def places(element: ElementTree.Element) -> list[Point]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


def chart(*series: Series) -> str:
    return line_chart("Loss", "optimizer step", "nats", series)


def test_a_chart_is_xml_with_title_labels_and_ticks():
    svg = line_chart("a < b", "x & y", '"z"', [Series("loss", [(0, 0.0), (100, 4.0)])])
    assert parsed(svg).attrib["aria-label"] == "a < b"
    assert {"x & y", '"z"', "0", "100", "4"} <= set(texts(svg))


def test_points_are_where_the_ticks_say():
    svg = chart(Series("loss", [(0, 0.0), (50, 3.0), (100, 4.0)]))
    ends = {}
    for element in parsed(svg).iter("text"):
        if element.get("class") == "tick":
            axis = "x" if element.get("text-anchor") == "middle" else "y"
            ends[axis, float(element.text or "nan")] = float(element.attrib[axis])
    (left, bottom), (middle, _), (right, top) = places(next(parsed(svg).iter("polyline")))
    assert left == pytest.approx(ends["x", 0.0], abs=0.1) and right == pytest.approx(ends["x", 100.0], abs=0.1)
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    # The numbers of the y axis stand 4 below their lines, for the eye.
    assert bottom == pytest.approx(ends["y", 0.0] - 4, abs=0.1) and top == pytest.approx(ends["y", 4.0] - 4, abs=0.1)


def test_everything_is_inside_the_picture():
    draw = random.Random(0)
    svg = chart(*with_trend([(i * 37.0, draw.gauss(0, 1e-3)) for i in range(5000)]))
    _, _, width, height = map(float, parsed(svg).attrib["viewBox"].split())
    for element in parsed(svg).iter("polyline"):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places(element))
    # A number in the middle of its tick needs room on both sides.
    assert all(float(element.attrib["x"]) <= width - 20 for element in parsed(svg).iter("text"))


def test_long_curves_are_thinned_and_keep_their_peaks():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[31_415] = (31_415.0, 9.0)
    svg = chart(Series("loss", points))
    drawn = places(next(parsed(svg).iter("polyline")))
    assert len(drawn) <= 1000
    top = min(y for _, y in drawn)
    assert sum(y == top for _, y in drawn) == 1
    assert all(a[0] <= b[0] for a, b in pairwise(drawn))


def test_several_series_have_a_legend_and_one_has_none():
    one, two = Series("WER", [(0, 1.0), (1, 2.0)]), Series("CER", [(0, 1.0), (1, 0.5)], colour=1)
    assert "WER" not in texts(chart(one))
    assert {"WER", "CER"} <= set(texts(chart(one, two)))
    assert "CER" not in texts(chart(one, Series("CER", [])))


@pytest.mark.parametrize("points", [[], [(0.0, math.nan)], [(math.inf, 1.0)]])
def test_a_chart_of_nothing_is_empty(points: list[Point]):
    assert chart(Series("loss", points)) == ""


@pytest.mark.parametrize(
    "points", [[(3.0, 2.0)], [(0.0, 0.0)], [(5.0, -1.0), (5.0, -1.0)], [(0.0, 1.0), (1.0, math.nan)]]
)
def test_a_chart_of_one_point_can_be_drawn(points: list[Point]):
    line = next(parsed(chart(Series("loss", points))).iter("polyline"))
    assert all(math.isfinite(value) for place in places(line) for value in place)


@pytest.mark.parametrize("low,high", [(0, 1), (0.013, 0.97), (1e-9, 3e-4), (950, 1000), (-5, 17), (3e8, 4e9), (7, 7)])
def test_ticks_are_round_even_and_enclose(low: float, high: float):
    found = ticks([low, high], 5)
    steps = [b - a for a, b in pairwise(found)]
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 9
    assert steps == pytest.approx([steps[0]] * len(steps))
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5, 10)) < 1e-6


def test_trend_is_the_mean_of_the_neighbours():
    points = [(float(i), float(i % 2)) for i in range(400)]
    raw, trend = with_trend(points)
    assert raw.faint and list(raw.points) == points
    middle = [y for _, y in trend.points][50:-50]
    assert middle == pytest.approx([0.5] * len(middle), abs=0.03)
    assert [series.faint for series in with_trend(points[:20])] == [False]
