"""Charts as SVG: ticks, long lines, and labels that can be read."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from embedtune.reports.chart import LINE_HEIGHT, MAX_HOVERS, WIDTH, Axis, Line, line_chart, spread
from embedtune.reports.panels import step_panels, width_panels
from embedtune.reports.smoothing import MAX_POINTS, smooth, thin
from embedtune.reports.ticks import nice_ticks, number, tick_labels

STEP, QUALITY = Axis("step"), Axis("nDCG@10")


def draw(*lines: Line, x: Axis = STEP, y: Axis = QUALITY) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart(lines, title="a chart", x=x, y=y))


def texts(svg: ElementTree.Element, style: str) -> list[str | None]:
    return [node.text for node in svg.iter("text") if node.get("class") == style]


def hovers(svg: ElementTree.Element) -> list[str]:
    return [node.findtext("title") or "" for node in svg.iter("rect")]


# --- Ticks and numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.645, 0.7), (-3, 12), (1e-6, 5e-5), (0, 98765), (7, 7.9)]
)
def test_ticks_enclose_the_values_in_even_steps_of_1_2_or_5(low, high):
    ticks = nice_ticks(low, high)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert ticks[0] <= low <= high <= ticks[-1]
    assert ticks[1] > low
    assert ticks[-2] < high
    assert 3 <= len(ticks) <= 7
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert float(f"{steps[0]:e}".partition("e")[0]) in (1, 2, 5)


@pytest.mark.parametrize("value", [0.0, 0.7, -2.0, 2e-5])
def test_ticks_of_a_constant_make_room_around_it(value):
    ticks = nice_ticks(value, value)
    assert ticks[0] < value < ticks[-1]
    assert len(set(tick_labels(ticks))) == len(ticks)


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.6, 0.65, 0.7], [".60", ".65", ".70"]),
        ([0.0, 5000.0, 10000.0], ["0", "5,000", "10,000"]),
        ([0.0, 5e-6, 1e-5, 1.5e-5], ["0", "5e-6", "1e-5", "1.5e-5"]),
        ([-0.5, 0.0, 0.5], ["\N{MINUS SIGN}.5", "0", ".5"]),
    ],
)
def test_labels_of_ticks_have_the_decimals_they_need(ticks, labels):
    assert tick_labels(ticks) == labels


@pytest.mark.parametrize(
    ("value", "decimals", "sign", "text"),
    [
        (0.7, 3, True, "+.700"),
        (-0.7, 3, True, "\N{MINUS SIGN}.700"),
        (-0.0001, 3, True, ".000"),
        (10.5, 3, False, "10.500"),
        (1e-12, None, False, "1e-12"),
        (math.nan, 3, True, "nan"),
    ],
)
def test_a_number_has_no_leading_zero_and_no_sign_of_nothing(value, decimals, sign, text):
    assert number(value, decimals, sign) == text


# --- Long lines -----------------------------------------------------------------------------


def test_thinning_keeps_the_mean_and_the_limit():
    points = [(float(i), float(i % 7)) for i in range(12_345)]
    few = thin(points, 1000)
    assert len(few) <= 1000
    assert few[0] == pytest.approx((6.0, sum(i % 7 for i in range(13)) / 13))
    assert thin(points[:1000], 1000) == points[:1000]


def test_a_running_mean_is_centred():
    points = [(i, float(i)) for i in range(100)]
    assert smooth(points, 5)[50] == (50, 50.0)
    assert smooth(points, 5)[0] == (0, 2.5)


def test_a_long_noisy_curve_is_thinned_and_says_so():
    curve = {step: 1 + (-1) ** step for step in range(1, 5001)}
    (panel,) = step_panels("loss", Axis("loss"), {"loss": curve}, is_noisy=True)
    lines = re.findall(r'<polyline class="line ([\w]+)" points="([^"]+)"', panel.svg)
    assert [style for style, _ in lines] == ["pale", "s0"]
    assert all(len(points.split()) <= MAX_POINTS for _, points in lines)
    assert panel.note == "running mean of 253 values, thinned to 500 points"


def test_values_that_are_not_finite_are_counted_and_left_out():
    (panel,) = step_panels("loss", Axis("loss"), {"loss": {1: 2.0, 2: math.nan, 3: math.inf}})
    assert panel.note == "loss: 2 not finite"
    assert "nan" not in panel.svg
    assert step_panels("loss", Axis("loss"), {"loss": {1: math.nan}}) == []


# --- Drawing --------------------------------------------------------------------------------


def test_a_chart_tells_what_it_shows_to_those_who_do_not_see_it():
    svg = draw(Line("<384>", [(0, 0.645), (400, 0.7)], "s0"))
    assert svg.get("role") == "img"
    assert svg.findtext("title") == "a chart"
    assert svg.findtext("desc") == "<384>: .645 at step 0 to .7 at step 400"
    assert texts(svg, "axis name") == ["nDCG@10", "step"]
    assert texts(svg, "label s0") == ["<384>"]


def test_points_lie_where_the_ticks_say():
    svg = draw(Line("a", [(0, 0.0), (200, 0.5), (400, 1.0)], "s0"))
    places = {node.text: node for node in svg.iter("text")}
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle")]
    assert [x for x, _ in dots] == [float(places[x].get("x")) for x in ("0", "200", "400")]
    grid = sorted(
        {float(node.get("y1")) for node in svg.iter("line") if node.get("x2") != node.get("x1")}
    )
    assert dots[0][1] == grid[-1]
    assert dots[2][1] == grid[0]
    assert dots[1][1] == pytest.approx((grid[0] + grid[-1]) / 2, abs=0.1)


def test_widths_are_a_log_2_axis_with_their_own_ticks_ascending():
    values = {384: 0.7, 128: 0.6, 64: 0.5, 32: 0.4}
    (panel,) = width_panels("by width", QUALITY, {"base": {128: 0.3}, "trained": values})
    svg = ElementTree.fromstring(panel.svg)
    places = {node.text: float(node.get("x")) for node in svg.iter("text") if node.get("x")}
    assert places["64"] - places["32"] == pytest.approx(places["128"] - places["64"], abs=0.2)
    assert places["32"] < places["64"] < places["128"] < places["384"]
    assert places["384"] - places["128"] < 2 * (places["128"] - places["64"])


@pytest.mark.parametrize("values", [{}, {384: 0.7}, {384: 0.7, 0: 0.8}])
def test_one_width_is_no_chart(values):
    assert width_panels("by width", QUALITY, {"base": {}, "trained": values}) == []


def test_ticks_that_would_touch_leave_the_wider_one():
    widths = (128, 256, 512, 768, 1024, 1280, 1536, 1792)
    (panel,) = width_panels("by width", QUALITY, {"trained": {w: 0.5 + w / 9999 for w in widths}})
    svg = ElementTree.fromstring(panel.svg)
    shown = [node for node in svg.iter("text") if (node.text or "").isdigit()]
    places = sorted(float(node.get("x")) for node in shown)
    assert {"1792", "512", "128"} <= {node.text for node in shown}
    assert min(b - a for a, b in itertools.pairwise(places)) > 4 * 6.6


def test_labels_at_the_ends_do_not_touch_and_stay_in_the_chart():
    lines = [Line(str(w), [(0, 0.5), (9, 0.7 + w / 1e6)], f"s{w % 6}") for w in range(8)]
    svg = draw(*lines)
    labels = [node for node in svg.iter("text") if node.get("class", "").startswith("label")]
    places = sorted(float(node.get("y")) for node in labels)
    assert len(labels) == 8
    assert min(b - a for a, b in itertools.pairwise(places)) >= LINE_HEIGHT - 0.1
    assert all(float(node.get("x")) < WIDTH for node in labels)


def test_spreading_moves_only_what_is_too_close():
    assert spread([10.0, 40.0], 12, 0, 100) == [10.0, 40.0]
    assert spread([99.0, 99.0], 12, 0, 100) == [88.0, 100.0]
    assert spread([0.0] * 3, 12, 0, 10) == [0.0, 12.0, 24.0]


def test_hovering_tells_every_line_at_a_step():
    svg = draw(Line("384", [(0, 0.6), (40, 0.65)], "s0"), Line("32", [(40, 0.512345)], "s1"))
    assert hovers(svg) == ["step 0\n384: .6", "step 40\n384: .65\n32: .5123"]


def test_hovers_of_a_long_line_are_few_and_end_with_its_end():
    told = hovers(draw(Line("loss", [(i, 1 / (i + 1)) for i in range(1000)], "s0")))
    assert 30 <= len(told) <= MAX_HOVERS
    assert told[-1] == "step 999\nloss: .001"


def test_few_steps_have_whole_ticks():
    svg = draw(Line("loss", [(1, 0.5), (2, 0.4)], "s0"), x=Axis("step", include=[0]))
    assert [text for text in texts(svg, "axis") if "." not in text] == ["2", "1", "0"]


def test_one_point_is_drawn():
    svg = draw(Line("a", [(3, 0.5)], "s0"))
    assert len(list(svg.iter("circle"))) == 1
    assert svg.findtext("desc") == "a: .5 at step 3"
