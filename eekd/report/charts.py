"""Tables and charts as HTML and inline SVG: no script, nothing to load, light or dark as the reader likes.

Text is escaped by `tag`, and only there. Values of a point or a square show when it is pointed at.
"""

import html
import math
from collections.abc import Container, Sequence
from itertools import pairwise
from typing import NamedTuple

from eekd.method import weightings

NLL = "−log p of the true label, nats"
COLOURS = {  # on a light page and on a dark one; of a weighting, its entry in the registry has them
    "page": ("#ffffff", "#15181b"),
    "ink": ("#1c1e21", "#e8eaed"),
    "quiet": ("#666b72", "#9aa0a6"),
    "faint": ("#e6e8eb", "#2b2f34"),
    "early": ("#c08400", "#ffc94d"),
    "late": ("#0a5fae", "#5ba7f7"),
    "teacher": ("#1c1e21", "#e8eaed"),
    "ce": ("#767b82", "#9aa0a6"),
}
STYLE = """
body { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 } h2 { font-size: 1.25rem; margin: 3rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.75rem 0 0 } p { max-width: 46rem; margin: .5rem 0 }
header p { max-width: none }
.quiet, figcaption, th { color: var(--quiet) } figcaption b { color: var(--ink); font-weight: 600 }
.missing { border-left: 3px solid var(--early); padding-left: .75rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; font-size: .875rem; border-bottom: 1px solid var(--quiet) }
th, td { padding: .2rem 1.5rem .2rem 0; white-space: nowrap }
.number { text-align: right } .break td { border-top: 1px solid var(--faint) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: 0 2rem }
.small { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0 1rem }
.thirds { grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
.facts { font-size: .875rem } .facts td { white-space: normal; overflow-wrap: anywhere; vertical-align: top }
.facts td:first-child { white-space: nowrap; font-weight: 400; color: var(--quiet) }
figure { margin: 1rem 0 0 } figcaption { font-size: .875rem; line-height: 1.4; margin-bottom: .5rem }
svg { display: block; width: 100%; font-size: 12px; overflow: visible } td svg, th svg { width: 15rem }
text { fill: var(--ink); pointer-events: none } .of { fill: var(--quiet) }
.middle { text-anchor: middle } .end { text-anchor: end }
path { fill: none } .axis { stroke: var(--quiet) } .rule { stroke: var(--faint) }
.line { stroke: currentColor; stroke-width: 2; stroke-linejoin: round }
.leader { stroke: currentColor; opacity: .6 } .dashed { stroke-dasharray: 4 3 } .fill { fill: currentColor }
.hidden { opacity: 0 } .hidden:hover { opacity: 1 }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .35em;
  background: currentColor } .key { color: var(--ink); margin-right: 1em }
@media print { body { max-width: none; padding: 0 } figure, tr { break-inside: avoid } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def style() -> str:
    """The page's style sheet, with a colour for each weighting."""
    colours = COLOURS | {entry.name: entry.colours for entry in weightings.registered()}
    lines = "\n".join(f"  --{name}: light-dark({light}, {dark});" for name, (light, dark) in colours.items())
    return f"\n:root {{ color-scheme: light dark;\n{lines} }}{STYLE}"


class Html(str):
    """Text that is markup already; `tag` escapes every other."""


def tag(name: str, *children, **attributes) -> Html:
    """An element. None is left out; of attributes, class_ and stroke_width mean class and stroke-width."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(
        child if isinstance(child, Html) else html.escape(_text(child)) for child in children if child is not None
    )
    return Html(f"<{name}{given}>{inside}</{name}>")


def _text(value) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def page(title: str, *body: Html) -> bytes:
    """A whole page, which may run and load nothing."""
    head = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width">{tag("title", title)}<style>{style()}</style></head>
"""
    return f"{head}{tag('body', *body)}</html>\n".encode(errors="replace")


def table(head: list, rows: list[list], numbers: Container[int] = (), breaks: Container[int] = ()) -> Html:
    """Columns in `numbers` are set flush right; a line parts the rows in `breaks` from those above."""
    kinds = ["number" if i in numbers else None for i in range(len(rows[0]))]
    names = (tag("th", name, scope="col", class_=kind) for name, kind in zip(head, kinds, strict=False))
    body = (
        tag(
            "tr",
            *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)),
            class_="break" if i in breaks else None,
        )
        for i, row in enumerate(rows)
    )
    thead = tag("thead", tag("tr", *names)) if head else None
    return tag("div", tag("table", thead, tag("tbody", *body)), class_="wide")


def ticks(low: float, high: float, count: float, *, whole: bool = False, log: bool = False) -> list[float]:
    """Round numbers from low to high, about `count` of them or fewer; whole ones, or ones for a log scale."""
    if log and high > 4 * low:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        some = [f * 10.0**p for p in powers for f in ((1, 2, 5) if high < 1000 * low else (1,))]
        return [value for value in some if low <= value <= high]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= 0.999 * rough)
    step = max(1, round(step)) if whole else step
    return [i * step for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def limits(values: Sequence[float], *, log: bool = False) -> tuple[float, float]:
    """The range of the values with room at both ends."""
    if log:
        low, high = limits([math.log(value) for value in values])
        return math.exp(low), math.exp(high)
    room = max(0.06 * (max(values) - min(values)), 0.001 * abs(max(values))) or 1
    return min(values) - room, max(values) + room


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as two sweeps get, in their order, `gap` apart, from low to high."""
    order, place = sorted(range(len(wanted)), key=wanted.__getitem__), [max(w, low) for w in wanted]
    for before, i in pairwise(order):
        place[i] = max(place[i], place[before] + gap)
    for i in reversed(order):
        place[i] = min(place[i], high)
        high = place[i] - gap
    return place


class Chart:
    """Axes with round ticks. `x` and `y` turn numbers into places, `add` draws, `figure` is the result."""

    def __init__(
        self,
        title: str,
        x: str,
        y: str | None,
        xlim: tuple[float, float],
        ylim: tuple[float, float],
        *,
        width: float = 480,
        height: float = 270,
        left: float = 0,
        right: float = 14,
        whole: bool = False,
        log: bool = False,
    ):
        self.title, self.width, self.height, self.parts = title, width, height, []
        self.xlim, self.ylim, self.scale = xlim, ylim, math.log if log else float
        self.top, self.bottom = 28 if y else 4, height - 40
        marks = ticks(*ylim, (self.bottom - self.top) / 40, log=log) if y else []
        left = left or 14 + 6.8 * max((len(_text(value)) for value in marks), default=0)
        self.left, self.right = left, width - right
        for value in marks:
            self.add("path", d=f"M{left},{self.y(value):.5g}H{self.right}", class_="rule")
            self.add("text", value, x=left - 7, y=self.y(value) + 4, class_="end of")
        for value in ticks(*xlim, (self.right - left) / 50, whole=whole):
            self.add("path", d=f"M{self.x(value):.5g},{self.bottom}v4", class_="axis")
            self.add("text", value, x=self.x(value), y=self.bottom + 17, class_="middle of")
        self.add("path", d=f"M{left},{self.bottom}H{self.right}", class_="axis")
        self.add("text", x, x=(left + self.right) / 2, y=height - 5, class_="middle of")
        if y:
            self.add("text", y, x=2, y=13, class_="of")

    def x(self, value: float) -> float:
        low, high = self.xlim
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, value, high = map(self.scale, (self.ylim[0], value, self.ylim[1]))
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def add(self, name: str, *children, **attributes) -> None:
        self.parts.append(tag(name, *children, **attributes))

    def figure(self, *note) -> Html:
        return _figure(self.title, self.width, self.height, self.parts, note)


def _figure(title: str, width: float, height: float, parts: list[Html], note=()) -> Html:
    svg = tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.5g} {height:.5g}",
        role="img",
        aria_label=title,
        style=f"max-width: {1.1 * width:.0f}px",
    )
    return tag("figure", tag("figcaption", tag("b", title), " ", *note), svg)


class Line(NamedTuple):
    name: str
    colour: str  # CSS
    points: list[tuple[float, float | None]]  # None is a gap
    dashed: bool = False  # a level to compare with, without points


def lines(title: str, x: str, y: str, series: list[Line], *note, log: bool = False) -> Html:
    """Lines over whole numbers, each named at its end; a sentence where there is no point at all.

    On a log scale what is not above 0 is a gap.
    """
    if log:
        series = [line._replace(points=[(a, b if b and b > 0 else None) for a, b in line.points]) for line in series]
    series = [line for line in series if any(b is not None for _, b in line.points)]
    if not series:
        return tag("p", f"{title}: not recorded.", class_="missing")
    xs, ys = zip(*((a, b) for line in series for a, b in line.points if b is not None), strict=True)
    xlim = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0] - 1, xs[0] + 1)
    right = 26 + 6.8 * max(len(line.name) for line in series)
    chart = Chart(title, x, y, xlim, limits(ys, log=log), right=right, whole=True, log=log)
    ends = []
    for name, colour, points, dashed in series:
        path, pen, dots = "", "M", []
        for a, b in points:
            if b is None:
                pen = "M"
                continue
            path += f"{pen}{chart.x(a):.5g},{chart.y(b):.5g}"
            pen, end = "L", (chart.x(a), chart.y(b))
            dots.append(
                tag(
                    "circle",
                    tag("title", f"{name}, {x} {a}: {b:.4g}"),
                    cx=end[0],
                    cy=end[1],
                    r=3,
                    class_="fill" if len(points) <= 30 else "fill hidden",
                )
            )
        marks = [tag("title", f"{name}: ", points[-1][1])] if dashed else dots
        stroke = tag("path", d=path, class_="line dashed" if dashed else "line")
        chart.add("g", stroke, *marks, style=f"color: {colour}")
        ends.append((name, colour, *end))
    named = ends[:: math.ceil(15 * len(ends) / chart.bottom)]  # as many as there is room for
    places = spread([end[-1] for end in named], 15, 14, chart.bottom)
    for (name, colour, a, b), place in zip(named, places, strict=True):
        leader = f"M{a + 5:.5g},{b:.5g}H{chart.right + 5:.5g}L{chart.right + 15:.5g},{place:.5g}h4"
        chart.add("path", d=leader, class_="leader", style=f"color: {colour}")
        chart.add("text", name, x=chart.right + 22, y=place + 4)
    return chart.figure(*note)


def bars(title: str, x: str, rows: list[tuple[str, list[float]]], parts: dict[str, str]) -> Html:
    """A bar per row, stacked from the parts, which are {name: CSS colour}."""
    left, most = 26 + 6.8 * max(len(name) for name, _ in rows), max(sum(values) for _, values in rows)
    chart = Chart(title, x, None, (0, most or 1), (0, 1), width=640, height=46 + 30 * len(rows), left=left, right=60)
    for i, (name, values) in enumerate(rows):
        start, total, top = 0.0, sum(values), 6 + 30 * i
        chart.add("text", name, x=left - 10, y=top + 15, class_="end")
        for (part, colour), value in zip(parts.items(), values, strict=True):
            tooltip = tag("title", f"{name}, {part}: {value:.3g} ({value / (total or 1):.0%})")
            wide = max(chart.x(start + value) - chart.x(start) - 1, 0)
            chart.add(
                "rect", tooltip, x=chart.x(start), y=top, width=wide, height=22, class_="fill", style=f"color: {colour}"
            )
            start += value
        chart.add("text", f"{total:.3g}", x=chart.x(total) + 6, y=top + 15)
    keys = (
        tag("span", tag("span", class_="swatch", style=f"color: {colour}"), part, class_="key")
        for part, colour in parts.items()
    )
    return chart.figure(tag("div", *keys))


def heatmap(title: str, axis: str, values: list[list[float]], colour: str) -> Html:
    """The squares of an M x M table of fractions, in percent, stronger where larger."""
    m, side, left = len(values), min(56, 420 / len(values)), 34
    most, parts = max(map(max, values)) or 1, []
    for i, row in enumerate(values):
        middle = side * (i + 0.48)
        if i % math.ceil(m / 20) == 0:
            parts += [
                tag("text", i + 1, x=left - 8, y=middle + 4, class_="end of"),
                tag("text", i + 1, x=left + middle, y=side * m + 15, class_="middle of"),
            ]
        for j, value in enumerate(row):
            tooltip = tag("title", f"{axis} {i + 1} and {j + 1}: {100 * value:.2f} %")
            style = f"color: {colour}; fill-opacity: {0.06 + 0.5 * value / most:.3f}"
            parts.append(
                tag(
                    "rect",
                    tooltip,
                    x=left + side * j,
                    y=side * i,
                    rx=2,
                    width=0.96 * side,
                    height=0.96 * side,
                    class_="fill",
                    style=style,
                )
            )
            if side > 34 and i != j:
                place = left + side * (j + 0.48)
                parts.append(tag("text", f"{100 * value:.1f}", x=place, y=middle + 4, class_="middle"))
    parts.append(tag("text", axis, x=left + side * m / 2, y=side * m + 34, class_="middle of"))
    return _figure(title, left + side * m + 2, side * m + 38, parts)


def missing(*sentences: str) -> Html:
    return tag("p", " ".join(sentences), class_="missing")


def note(*sentences: str) -> Html:
    return tag("p", " ".join(sentences), class_="quiet")


def grid(*figures: Html, kind: str = "") -> Html:
    return tag("div", *figures, class_=f"grid {kind}")


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"
