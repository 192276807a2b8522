"""Charts: what is drawn stands where its axis says."""

import json
import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from trainer.charts import bars, heat_map, interval, line_chart, share_bar, stacked_area


def elements(chart):
    """(tag, attributes, text) of all that is drawn."""
    return [(e.tag, e.attrib, e.text) for e in ElementTree.fromstring(f"<div>{chart}</div>").iter()]


def texts(chart, **wanted):
    """{text: (x, y)} of those with these attributes."""
    return {text: (float(a["x"]), float(a["y"])) for tag, a, text in elements(chart)
            if tag == "text" and all(a.get(k.replace("_", "-")) == v for k, v in wanted.items())}


def path(chart, name):
    """The points of a path by class."""
    drawn = next(a["d"] for tag, a, _ in elements(chart) if tag == "path" and a["class"] == name)
    return [tuple(map(float, point.split())) for point in drawn.strip("Mz").split("L")]


def frame(chart):
    """left, right, x0, x1, top, bottom, y0, y1"""
    return json.loads(next(a["data-frame"] for tag, a, _ in elements(chart) if tag == "svg"))


@pytest.mark.parametrize("chart", [
    line_chart("a", []), line_chart("a", [(0, 1.0)]), line_chart("a", [(0, 0.0), (1, 0.0)]), line_chart("a", [(5, math.nan)]),
    line_chart("a", [(i, -1e9 * i) for i in range(3000)]), line_chart("<&\">", [(0, 1e-30), (1, 2e-30)], unit="<"),
    heat_map("a", [3], [[0.0]]), heat_map("a", [0, 1], [[1.0, math.inf], [2.0]]), share_bar("a", {}),
    share_bar("<", {"<": 0.0}), stacked_area("a", [{"x": 0}], ["p"]), bars("a", {}),
    bars("<", {"<": {"&": 0.0}}), interval(0.0, 1.0, -0.1, 1.1)])
def test_charts_of_any_data_are_well_formed(chart):
    root = ElementTree.fromstring(f"<div>{chart}</div>")
    assert root[0].tag == "svg" and "nan" not in "".join(e.get("d", "") for e in root.iter())


def test_small_numbers_have_ticks_of_their_own():
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", line_chart("a", [(0, 1e-15), (1, 9e-15)]))
    assert len([label for label in labels if "e-15" in label]) > 2


@pytest.mark.parametrize("low, high", [(121.9, 121.939), (1e6, 1e6 + 3), (1 - 1e-9, 1.0)])
def test_ticks_that_lie_close_are_told_apart(low, high):
    ticks = list(texts(line_chart("a", [(0, low), (1, high)]), text_anchor="end"))
    assert len(ticks) > 2 and all(low - (high - low) <= float(tick) <= high + (high - low) for tick in ticks if tick)


def test_a_spike_survives_thinning():
    points = [(i, 100.0 if i == 4321 else 1.0) for i in range(10_000)]
    path = re.search(r'class="raw" d="([^"]*)"', line_chart("a", points))[1]
    heights = [float(y) for y in re.findall(r" ([\d.]+)", path)]
    assert sum(h < 60 for h in heights) == 1 and len(heights) <= 800


def test_a_single_value_is_a_dot_and_extreme_ones_have_axes():
    chart = line_chart("loss", [(0, 3.0), (1, math.nan)])
    assert chart.count('<circle class="dot"') == 1 and "✗" in chart and '<circle' not in line_chart("loss", [(0, 3.0), (1, 2.0)])
    for value in (1.7e308, -1.7e308):
        assert "tick" in line_chart("loss", [(0, 1.0), (1, value), (2, -value)])


def test_heat_map_marks_dead_and_non_finite_cells():
    chart = heat_map("a", list(range(300)), [[1.0, 0.0 if 100 < i < 140 else 2.0, math.nan if i == 250 else 3.0] for i in range(300)])
    assert chart.count("var(--dead)") == chart.count("var(--bad)") == 1
    assert "var(--bad)" not in heat_map("a", [0], [[1.0, 2.0]])


def test_a_line_stands_where_its_axes_say():
    """From the middle of a run: values 5 to 9 at steps 500 to 900."""
    chart = line_chart("a", [(step, step / 100) for step in range(500, 901, 20)])
    drawn, (left, right, x0, x1, *_) = path(chart, "line"), frame(chart)
    at = {step: point for step, point in zip(range(500, 901, 20), drawn, strict=True)}
    steps, values = texts(chart, text_anchor="middle"), texts(chart, text_anchor="end", x=f"{left - 6}")
    assert (drawn[0][0], drawn[-1][0]) == (left, right) and (x0, x1) == (500, 900)
    assert list(steps) == ["500", "600", "700", "800", "900"] and set(values) >= {"6", "8"}
    assert all(x == pytest.approx(at[int(step)][0], abs=0.1) for step, (x, _) in steps.items())
    grid = {float(a["y1"]) for tag, a, _ in elements(chart) if tag == "line" and a["class"] == "grid"}
    for value, (_, y) in values.items():
        assert min(abs(y - 4 - line) for line in grid) < 0.11
        if 500 <= float(value) * 100 <= 900:
            assert y - 4 == pytest.approx(at[int(float(value) * 100)][1], abs=0.11)


@pytest.mark.parametrize("values, low, high", [
    ([1.0, 3.0], 0, 3.15), ([100.0, 101.0], 99.95, 101.05), ([-1.0, 1.0], -1.1, 1.1), ([7.0, 7.0], 6.3, 7.7), ([0.0, 0.0], 0, 1)])
def test_an_axis_begins_at_zero_where_the_values_come_near_it(values, low, high):
    assert frame(line_chart("a", list(enumerate(values))))[6:] == pytest.approx([low, high])


def test_between_whole_steps_there_are_no_ticks():
    assert list(texts(line_chart("a", [(0, 1.0), (1, 2.0)]), text_anchor="middle")) == ["0", "1"]


def test_the_strong_line_is_the_moving_mean():
    chart = line_chart("a", [(i, 2.0 * (i % 2)) for i in range(100)], smooth=20)
    *_, top, bottom, low, high = frame(chart)
    ys = [y for _, y in path(chart, "line")]
    assert len(ys) == 100 and len(path(chart, "raw")) == 100
    assert ys[10:90] == pytest.approx([bottom - (bottom - top) * (1 - low) / (high - low)] * 80, abs=0.1)
    assert ys[0] == pytest.approx(ys[50], abs=0.1) and ys[-1] != ys[-2]  # fewer at the ends: 10 steps, 11 and 10


@pytest.mark.parametrize("num_points", [400, 401, 1000, 1001])
def test_long_series_are_thinned_and_keep_their_ends(num_points):
    chart = line_chart("a", [(i, float(i)) for i in range(num_points)])
    shown = json.loads(next(a["data-points"] for tag, a, _ in elements(chart) if tag == "svg"))
    assert shown[0] == [0, 0] and shown[-1] == [num_points - 1, num_points - 1] and len(shown) <= 401
    assert len({a[0] for a in shown}) == len(shown) and (len(shown) == 400 or num_points != 400)
    raw = path(chart, "raw")
    assert raw == sorted(raw) and len(raw) <= 800


def test_a_heat_map_has_block_0_below_and_steps_to_the_right():
    """Norms grow with the block from 1 to 1000; the second of four steps lacks the last block."""
    rows = [[1.0, 10.0, 100.0, 1000.0]] * 4
    rows[1] = rows[1][:3]
    chart = heat_map("a", [10, 20, 30, 40], rows)
    cells = {}  # colour: (x, y, width, side) of its cells
    for tag, a, _ in elements(chart):
        if tag == "path":
            cells[a["style"].removeprefix("fill:")] = [tuple(map(float, cell)) for cell in
                                                       re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)", a["d"])]
    scale = [a["style"].removeprefix("fill:") for tag, a, _ in elements(chart) if tag == "rect"]  # from below
    assert [cells[scale[i]][0][1] for i in (0, 3, 6, 9)] == sorted({y for drawn in cells.values() for _, y, *_ in drawn}, reverse=True)
    assert len(cells[scale[9]]) == 3 and len(cells["var(--bad)"]) == 1
    xs = [x for x, *_ in cells[scale[0]]]
    assert all(b - a == pytest.approx(cells[scale[0]][0][2], abs=0.11) for a, b in pairwise(xs))
    assert cells["var(--bad)"][0][0] == xs[1] and cells["var(--bad)"][0][1] == cells[scale[9]][0][1]
    labels = texts(chart, text_anchor="end")
    side = cells[scale[0]][0][3]
    for block, colour in (("0", scale[0]), ("2", scale[6]), ("3", scale[9])):
        assert cells[colour][0][1] < labels[block][1] - 4 <= cells[colour][0][1] + side
    steps = texts(chart, text_anchor="middle")
    assert list(steps) == ["10", "30", "40"] and steps["10"][0] == xs[0] and steps["40"][0] == pytest.approx(xs[-1] + cells[scale[0]][0][2], abs=1)
    height = float(next(a["viewBox"] for tag, a, _ in elements(chart) if tag == "svg").split()[3])
    assert cells[scale[0]][0][1] + side < steps["10"][1] < height
    assert [text for tag, _, text in elements(chart) if tag == "text"][-3:] == ["1.0e+00", "3.2e+01", "1.0e+03"]


@pytest.mark.parametrize("num_blocks", [1, 30, 42, 200])
def test_a_heat_map_of_any_model_is_as_high_as_its_blocks(num_blocks):
    chart = heat_map("a", [0], [[1.0] * num_blocks])
    height = float(next(a["viewBox"] for tag, a, _ in elements(chart) if tag == "svg").split()[3])
    assert max(40, 4 * num_blocks) < height <= max(400, 4 * num_blocks + 60)
    assert list(texts(chart, text_anchor="end")) == [str(block) for block in sorted({0, num_blocks // 2, num_blocks - 1})]


def test_categories_lie_upon_each_other():
    gib = 2**30
    chart = stacked_area("a", [{"x": gib, "y": 2 * gib}, {"x": 2 * gib}, {"y": gib}], ["load", "load", "step"])
    one, two = path(chart, "c0 fill"), path(chart, "c1 fill")
    assert one[:3] == two[:2:-1] and len(two) == 6  # the upper edge of one is the lower edge of the other
    (x0, ground), _ = one[-1], one[-2]
    assert [y for _, y in one[3:]] == [ground] * 3 and one[2][1] == ground and two[1] == one[1]
    assert ground - two[0][1] == pytest.approx(3 * (ground - one[0][1]), abs=0.3)
    phases = [float(a["x1"]) for tag, a, _ in elements(chart) if tag == "line" and a["class"] == "phase"]
    assert phases == [x0, two[2][0]] and texts(chart, text_anchor="middle")["load"][0] == pytest.approx(sum(phases) / 2, abs=1)
    assert "at most 2.00 GiB" in chart


def test_little_memory_is_told_in_mib():
    mib = 2**20
    for most, unit in ((102 * mib, "MiB"), (103 * mib, "GiB")):
        chart = stacked_area("a", [{"x": most, "y": 0}, {"y": mib}], ["load", "step"])
        assert f">{unit}</text>" in chart and all(abs(float(y)) >= 0.01 for y in texts(chart, text_anchor="end") if y not in (unit, "0"))
    assert "y: at most 1.00 MiB" in chart and ">1.50 MiB</text>" in bars("a", {"x": {"s": 1.5 * mib, "t": 2**30}})


def test_bars_are_as_long_as_their_values():
    chart = bars("a", {"all": {"s": 4.0, "t": 2.0}, "one": {"t": 1.0}})
    drawn = [(a["class"], float(a["width"]), float(a["y"])) for tag, a, _ in elements(chart) if tag == "rect"]
    assert [(name, width) for name, width, _ in drawn] == [("c0 fill", 320), ("c1 fill", 160), ("c1 fill", 80)]
    ys = [y for *_, y in drawn]
    assert ys == sorted(set(ys))
    groups = texts(chart, text_anchor="end")
    assert ys[0] < groups["all"][1] - 4 < ys[1] + 12 and ys[2] < groups["one"][1] - 4 < ys[2] + 12
    assert "legend" in chart and "legend" not in bars("a", {"all": {"s": 4.0}})


def test_shares_fill_the_bar():
    chart = share_bar("a", {"x": 3.0, "y": 1.0})
    assert [(float(a["x"]), float(a["width"])) for tag, a, _ in elements(chart) if tag == "rect"] == [(0, 389), (390, 129)]
    assert "x: 75.0%" in chart and "y 25%" in chart


def test_rates_stand_on_their_axis():
    chart = interval(0.5, 0.25, -1.0, 2.0)
    xs = {a["class"]: [float(a[k]) for k in ("cx", "x1", "x2") if k in a] for _, a, _ in elements(chart) if "class" in a}
    assert xs == {"grid": [8, 212], "reach": [8, 212], "before": [110], "after": [59]}
