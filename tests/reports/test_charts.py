import math
import random
import re
import statistics
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from rwkv_speech.reports.charts import Point, bar_chart, line_chart, smoothed

SVG = "{http://www.w3.org/2000/svg}"


def chart(points: list[Point], **more: list[Point]) -> str:
    return line_chart("Loss", "optimizer step", "nats", {"loss": points, **more})


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_chart_is_xml_with_its_title_and_labels():
    svg = line_chart('a < "b"', "x & y", "z", {"": [(0, 0.0), (100, 4.0)]})
    assert ElementTree.fromstring(svg).attrib["aria-label"] == 'a < "b"'
    assert {"x & y", "z", "0", "100"} <= set(texts(svg))


def test_a_chart_has_only_the_style_sheets_colours():
    assert not re.search(r"#[0-9a-f]{3}|rgb", chart([(0, 1.0), (1, 2.0)], other=[(0, 1.0)]))


def test_a_chart_is_the_same_whatever_matplotlibs_settings():
    before = chart([(0, 1.0), (1, 2.0)])
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path", "figure.dpi": 10}):
        settings = dict(matplotlib.rcParams)
        assert chart([(0, 1.0), (1, 2.0)]) == before
        assert dict(matplotlib.rcParams) == settings


def test_charts_of_a_page_share_no_names():
    one, two = (line_chart(title, "x", "y", {"": [(0, 1.0), (1, 2.0)]}) for title in ("one", "two"))
    names = [re.findall(r'\bid="([^"]+)"', svg) for svg in (one, two)]
    assert names[0] and not set(names[0]) & set(names[1])


def test_no_window_system_is_loaded():
    code = "import sys, rwkv_speech.reports.charts; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_long_curves_make_small_files_and_keep_their_peaks():
    draw = random.Random(0)
    points = [(float(i), 1 + draw.random()) for i in range(200_000)]
    points[31_415] = (31_415.0, 9.0)
    svg = chart(points)
    assert len(svg) < 100_000
    curve = max(re.findall(r' d="([^"]+)"', svg), key=len)
    ys = sorted(float(y) for y in re.findall(r"[ML] \S+ (\S+)", curve))
    lowest = statistics.median(ys)
    assert lowest - ys[0] > 5 * (lowest - ys[1])  # the peak, once, and far above the rest


def test_several_lines_have_a_legend_and_one_has_none():
    rates: list[Point] = [(0, 1.0), (1, 2.0)]
    assert "loss" not in texts(chart(rates))
    assert {"loss", "CER"} <= set(texts(chart(rates, CER=rates)))
    assert "CER" not in texts(chart(rates, CER=[]))


@pytest.mark.parametrize("points", [[], [(0.0, math.nan)], [(math.inf, 1.0)]])
def test_a_chart_of_nothing_is_empty(points: list[Point]):
    assert chart(points) == ""


@pytest.mark.parametrize(
    "points", [[(3.0, 2.0)], [(0.0, 0.0)], [(5.0, -1.0), (5.0, -1.0)], [(0.0, 1.0), (1.0, math.nan)]]
)
def test_a_chart_of_one_point_can_be_drawn(points: list[Point]):
    svg = chart(points)
    assert "nan" not in svg and "inf" not in svg
    ElementTree.fromstring(svg)


@pytest.mark.parametrize("half", [1, 3])
def test_the_smoothed_line_is_the_mean_of_the_neighbours(half: int):
    ys = [random.Random(1).gauss(0, 1) for _ in range(50)]
    found = smoothed(np.array(list(enumerate(ys)), dtype=float), half)
    assert found[:, 0].tolist() == list(range(50))
    assert found[:, 1] == pytest.approx([statistics.fmean(ys[max(0, i - half) : i + half + 1]) for i in range(50)])


def test_a_trend_is_drawn_over_many_points_alone():
    many = [(float(i), 1.0) for i in range(80)]
    assert "mean of 5 %" in texts(line_chart("Loss", "x", "y", {"": many}, trend=True))
    assert "mean of 5 %" not in texts(line_chart("Loss", "x", "y", {"": many[:30]}, trend=True))


def test_bars_stand_beside_their_names_and_values():
    svg = bar_chart("WER", "duration", "%", {"0 to 2 s": 1.5, "2 to 5 s": 12345.0})
    assert {"0 to 2 s", "2 to 5 s", "1.5", "12,345.0", "duration", "%"} <= set(texts(svg))
    assert svg == bar_chart("WER", "duration", "%", {"0 to 2 s": 1.5, "2 to 5 s": 12345.0})
    assert not re.search(r"#[0-9a-f]{3}|rgb", svg)
