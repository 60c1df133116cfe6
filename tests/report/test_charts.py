"""Charts: ticks, names, lines, colours."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import STUDENTS

from eekd.report import charts


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e3), st.integers(1, 12), st.booleans())
def test_ticks_are_round_and_inside(low, width, count, whole):
    width *= max(abs(low), 1)
    found = charts.ticks(low, low + width, count, whole=whole)
    slack = 2e-3 * width  # less than a pixel
    assert all(low - slack <= tick <= low + width + slack for tick in found) and len(found) <= count + 1
    steps = [b - a for a, b in pairwise(found)]
    if steps:
        assert max(steps) == pytest.approx(min(steps), rel=1e-5)
        assert f"{min(steps):.3e}"[0] in "125" and (not whole or min(steps) >= 0.999)


@given(st.floats(1e-6, 1e3), st.floats(4.1, 1e6))
def test_log_ticks_rise_by_round_factors(low, factor):
    found = charts.ticks(low, low * factor, 5, log=True)
    assert found and all(low <= tick <= low * factor and f"{tick:e}"[0] in "125" for tick in found)


@given(st.lists(st.floats(-50, 300), min_size=1, max_size=16))
def test_names_at_the_ends_never_overlap(wanted):
    places = charts.spread(wanted, 15, 0, 250)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    assert all(places[b] - places[a] >= 15 - 1e-9 for a, b in pairwise(order))
    assert min(places) >= -1e-9 and max(places) <= 250


def test_far_apart_names_stay_where_their_lines_end():
    assert charts.spread([100, 20, 60], 15, 0, 250) == [100, 20, 60]


def test_a_gap_parts_a_line():
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 3.0), (5, 0.0)]
    whole, log = (
        charts.lines("title", "x", "y", [charts.Line("name", "red", points)], log=log) for log in (False, True)
    )
    pens = [re.search(r'd="([^"]*)" class="line"', str(chart))[1] for chart in (whole, log)]
    assert [re.sub("[^ML]", "", pen) for pen in pens] == ["MLML", "MLM"]
    assert "title: not recorded." in charts.lines("title", "x", "y", [charts.Line("name", "red", [(1, None)])])


def test_tag_escapes_all_but_markup():
    inner = charts.tag("b", "<i>", class_="'\"")
    assert inner == '<b class="&#x27;&quot;">&lt;i&gt;</b>'
    assert charts.tag("p", inner, None, 0.123456789, stroke_width=None) == f"<p>{inner}0.12346</p>"


def luminance(colour):
    colour = colour.lstrip("#")
    colour = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_can_be_seen_on_the_page(mode):
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for lines and discs."""
    found = re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", charts.style())
    palette = {name: colours[mode] for name, *colours in found}
    assert {"ink", "quiet", "early", "late", "teacher", *STUDENTS} <= palette.keys()
    page = luminance(palette.pop("page"))
    palette.pop("faint")  # grid lines
    for name, colour in palette.items():
        high, low = sorted((page, luminance(colour)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= (4.5 if name in ("ink", "quiet") else 3), name
