"""A small SVG drawing kit: scales with round ticks, text that fits, legends that wrap, well-formed output.

Why not matplotlib: text stays text (selectable, readable by screen readers), a figure weighs a few
kilobytes, and colours are CSS variables, so one drawing serves light mode, dark mode and paper. Nothing
here runs JavaScript.

Every string that reaches the drawing passes `xml_text`, which drops the characters XML forbids and escapes
the rest: labels come from models and datasets, and may hold anything.
"""

import hashlib
import html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Characters that no XML 1.0 document may contain, even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LIMIT = 1e100  # beyond it differences overflow; no metric of ours comes near

N_COLOURS = 6
MINUS, DASH = "\u2212", "\u2013"
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")
MARKERS = ("circle", "square", "diamond", "triangle", "cross", "ring")

PLOT_CSS = """
.plot{--c1:#0b63a5;--c2:#c8501a;--c3:#00805f;--c4:#9a4a86;--c5:#a56e00;--c6:#3f93c4;
--ink:#1d232b;--mute:#5d6775;--rule:#d8dde3;--paper:#fff;--ghost:#8a94a1;
display:block;width:100%;height:auto;
font-family:ui-sans-serif,system-ui,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
.plot text{fill:var(--mute);font-size:12px;font-variant-numeric:tabular-nums}
.plot .strong{fill:var(--ink)}.plot .small{font-size:11px}
.plot .halo{paint-order:stroke;stroke:var(--paper);stroke-width:3.5px;stroke-linejoin:round}
.plot .ink{--c:var(--ink)}
.plot .axis{stroke:var(--mute);stroke-width:1}.plot .gridline{stroke:var(--rule);stroke-width:1}
.plot .k1{--c:var(--c1)}.plot .k2{--c:var(--c2)}.plot .k3{--c:var(--c3)}
.plot .k4{--c:var(--c4)}.plot .k5{--c:var(--c5)}.plot .k6{--c:var(--c6)}.plot .k0{--c:var(--ghost)}
.plot .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.plot .thin{stroke-width:1.25}.plot .band{fill:var(--c);opacity:.18}.plot .bar{fill:var(--c)}
.plot .soft{opacity:.8}.plot .faint{opacity:.4}
.plot .dot{fill:var(--c);stroke:var(--paper);stroke-width:1.25}
.plot .hollow{fill:var(--paper);stroke:var(--c);stroke-width:2}
.plot .early{stroke-width:1.5;stroke-dasharray:2 1.6}
.plot .whisker{stroke:var(--c);stroke-width:1.75;fill:none}
.plot .ribbon1{opacity:.3}.plot .ribbon2{opacity:.55}.plot .ribbon3{opacity:.85}
.plot .thread{stroke-width:2.25}.plot .hair{stroke-width:1}
.plot .reference{stroke:var(--ghost);stroke-width:1;stroke-dasharray:3 3}
"""
PLOT_CSS_DARK = """
.plot{--c1:#6cb2f0;--c2:#f08a52;--c3:#3fc79c;--c4:#dd9cc6;--c5:#e9b54c;--c6:#9bd6f5;
--ink:#e8ebef;--mute:#a3adb9;--rule:#323a45;--paper:#171b21;--ghost:#7f8a97}
"""

# A plus sign, as corners around its centre.
_CROSS = [(-1.2, -0.4), (-0.4, -0.4), (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4)]
_CROSS += [(-dx, -dy) for dx, dy in _CROSS]


def xml_text(value: object) -> str:
    """Return `value` as text that is safe inside XML and HTML, in elements and in quoted attributes."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(value)), quote=True)


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the finite values, clipped to a range in which arithmetic cannot overflow."""
    return [max(-_LIMIT, min(_LIMIT, float(v))) for v in values if v is not None and math.isfinite(v)]


def is_finite(value: float | None) -> bool:
    """Tell whether a value can be drawn."""
    return value is not None and math.isfinite(value)


def text_width(text: str, size: float = 12) -> float:
    """Estimate the width of a string in the interface font; errs on the wide side."""
    units = 0.0
    for char in text:
        if unicodedata.east_asian_width(char) in "WF":
            units += 1.05
        elif char in "ijl.,:;|'! ()[]":
            units += 0.36
        elif char.isupper() or char in "mwMW%@—":
            units += 0.74
        else:
            units += 0.575
    return units * size


def fit_text(text: str, width: float, size: float = 12) -> str:
    """Shorten a string in its middle until it fits: the ends of hook names and paths tell them apart."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text
    keep = len(text)
    while keep > 2:
        keep -= 1
        head = (keep + 1) // 2
        short = text[:head].rstrip() + "…" + text[len(text) - (keep - head) :].lstrip()
        if text_width(short, size) <= width:
            return short
    return "…"


def number(value: float) -> str:
    """Format a number for an axis or a label: three significant digits, no needless zeros."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15 or size < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = limit if unit != "k" else 1e3
            return f"{value / scale:.3g}{unit}".replace("-", MINUS)
    text = f"{value:.0f}" if size >= 1000 else f"{value:.3g}"
    return text.replace("-", MINUS)


def percent(value: float | None) -> str:
    """Format a rate as a percentage; values close to 0 or 1 keep a decimal, to be told from it."""
    if value is None or not math.isfinite(value):
        return DASH
    shown = 100 * value
    near_edge = 0 < abs(shown) < 1 or 99 < shown < 100
    return f"{shown:.1f}%" if near_edge else f"{shown:.0f}%"


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(exponent: float) -> str:
    """Format 10 to a power, e.g. 10⁻³."""
    return "10" + number(exponent).replace(MINUS, "-").translate(_SUPERSCRIPT)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (steps of 1, 2, 2.5 or 5 by a power of ten) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    if raw <= 0 or raw < max(abs(low), abs(high)) * 1e-12:
        return [low, high]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(first, min(last, first + 50) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis: 1-2-5 over few decades, whole decades over many."""
    start, stop = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = stop - start
    stride = max(1, math.ceil(decades / 6))
    factors = (1, 2, 5) if decades <= 3 else (1,)
    ticks = [f * 10.0**e for e in range(start, stop + 1, stride) for f in factors]
    inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    return inside if len(inside) >= 2 else [low, high]


@dataclass(frozen=True)
class Scale:
    """A map from data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; values outside the range stay at its edge."""
        value = max(self.low, min(self.high, value))
        if self.log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return the round values to mark."""
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, count)


def make_scale(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    zero: bool = False,
    pad: float = 0.06,
) -> Scale:
    """Build a scale that holds all values with a margin; never of zero length.

    Args:
        values: finite data; empty gives the range 0 to 1.
        start: the pixel of the low end.
        end: the pixel of the high end.
        log: use a logarithmic scale where every value is positive.
        zero: keep zero as the lower end of non-negative data.
        pad: the margin as a share of the range.
    """
    if not values:
        return Scale(0.0, 1.0, start, end)
    low, high = min(values), max(values)
    if log and low > 1e-90:
        ratio = max((high / low) ** pad, 1.06)
        return Scale(low / ratio, high * ratio, start, end, log=True)
    margin = (high - low) * pad
    if margin <= max(abs(low), abs(high)) * 1e-9:
        margin = max(abs(high) * 0.1, 1e-9) if high else 1.0
    bottom = 0.0 if zero and low >= 0 else low - margin
    return Scale(bottom, high + margin, start, end)


@dataclass(frozen=True)
class Key:
    """One legend entry: a colour with a line, a marker or a band."""

    label: str
    colour: int = 1
    dash: str = ""
    marker: str = ""
    band: bool = False
    look: str = "dot"
    """Class of the marker: `dot` is filled, `hollow` is not."""


@dataclass
class Figure:
    """A drawing under construction: add elements, then `render` it."""

    width: float
    height: float
    left: float = 60
    right: float = 16
    top: float = 12
    bottom: float = 44
    parts: list[str] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    @property
    def x1(self) -> float:
        """The right edge of the plotting area."""
        return self.width - self.right

    @property
    def y1(self) -> float:
        """The lower edge of the plotting area."""
        return self.height - self.bottom

    def add(self, name: str, *, hover: str = "", cls: str = "", **attributes: object) -> None:
        """Add an element; underscores in attribute names become hyphens, `hover` becomes its tooltip."""
        pairs = {"class": cls, **{key.replace("_", "-"): value for key, value in attributes.items()}}
        text = "".join(
            f' {key}="{round(value, 2) if isinstance(value, float) else xml_text(value)}"'
            for key, value in pairs.items()
            if value != ""
        )
        self.parts.append(f"<{name}{text}><title>{xml_text(hover)}</title></{name}>" if hover else f"<{name}{text}/>")

    def text(self, x: float, y: float, content: str, *, anchor: str = "start", cls: str = "", turn: float = 0) -> None:
        """Add a line of text whose baseline is at y."""
        rotate = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}"{rotate}>{xml_text(content)}</text>'
        )

    def path(
        self, points: Sequence[tuple[float, float]], *, cls: str, dash: str = "", close: bool = False, hover: str = ""
    ) -> None:
        """Add a line through points (or an area, when closed)."""
        if points:
            steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            self.add("polygon" if close else "polyline", points=steps, cls=cls, stroke_dasharray=dash, hover=hover)

    def marker(self, x: float, y: float, shape: str, *, cls: str, size: float = 4.5, hover: str = "") -> None:
        """Add a data marker; shapes differ in outline as well as colour."""
        if shape == "none":
            return
        s = size
        if shape == "square":
            self.add("rect", x=x - s * 0.9, y=y - s * 0.9, width=s * 1.8, height=s * 1.8, cls=cls, hover=hover)
            return
        corners = {
            "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
            "triangle": [(0, -1.25), (1.2, 0.95), (-1.2, 0.95)],
            "cross": _CROSS,
        }.get(shape)
        if corners:
            points = " ".join(f"{x + dx * s:.1f},{y + dy * s:.1f}" for dx, dy in corners)
            self.add("polygon", points=points, cls=cls, hover=hover)
        else:
            self.add(
                "circle",
                cx=x,
                cy=y,
                r=s,
                cls=cls.replace("dot", "hollow") if shape == "ring" else cls,
                hover=hover,
            )

    def legend(self, keys: Sequence[Key]) -> None:
        """Draw a legend above the plotting area; it wraps, and the area moves down to make room."""
        x, y = self.left, self.top + 10
        for key in keys:
            label = fit_text(key.label, self.width - self.left - self.right - 34)
            step = 26 + text_width(label) + 14
            if x > self.left and x + step - 14 > self.width - 4:
                x, y = self.left, y + 19
            cls = f"k{key.colour}"
            if key.band:
                self.add("rect", x=x, y=y - 9, width=20.0, height=10.0, cls=f"band {cls}")
            elif not key.marker or key.dash:
                self.add("line", x1=x, x2=x + 20, y1=y - 4, y2=y - 4, cls=f"line {cls}", stroke_dasharray=key.dash)
            if key.marker:
                self.marker(x + 10, y - 4, key.marker, cls=f"{key.look} {cls}")
            self.text(x + 26, y, label)
            x += step
        if keys:
            self.top = y + 14

    def axes(
        self,
        x: Scale,
        y: Scale,
        x_label: str,
        y_label: str,
        *,
        x_ticks: Sequence[tuple[float, str]] | None = None,
        y_ticks: Sequence[tuple[float, str]] | None = None,
    ) -> None:
        """Draw light grid lines, tick labels and axis names; tick labels that would touch are thinned out."""
        for value, label in y_ticks if y_ticks is not None else [(v, number(v)) for v in y.ticks()]:
            at = y(value)
            self.add("line", x1=self.left, x2=self.x1, y1=at, y2=at, cls="gridline")
            self.text(self.left - 8, at + 4, label, anchor="end")
        self.add("line", x1=self.left, x2=self.x1, y1=self.y1, y2=self.y1, cls="axis")
        edge = -math.inf
        for value, label in x_ticks if x_ticks is not None else [(v, number(v)) for v in x.ticks(6)]:
            at, half = x(value), text_width(label) / 2
            if at - half < edge + 6:
                continue
            edge = at + half
            self.add("line", x1=at, x2=at, y1=self.y1, y2=self.y1 + 4, cls="axis")
            self.text(at, self.y1 + 17, label, anchor="middle")
        self.text((self.left + self.x1) / 2, self.height - 6, x_label, anchor="middle")
        if y_label:
            self.text(13, (self.top + self.y1) / 2, y_label, anchor="middle", turn=-90)

    def occupy(self, x: float, y: float, half: float) -> None:
        """Reserve the square around a marker, so that no label is put over it."""
        self.taken.append((x - half, y - half, x + half, y + half))

    def label_near(self, x: float, y: float, label: str) -> bool:
        """Write a label beside a point where it covers nothing; leave it out where there is no room."""
        width = text_width(label, 11)
        for dx, dy, anchor in (
            (9, 4, "start"),
            (-9, 4, "end"),
            (0, -9, "middle"),
            (0, 17, "middle"),
            (8, -7, "start"),
            (8, 14, "start"),
            (-8, -7, "end"),
            (-8, 14, "end"),
        ):
            x0 = x + dx - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (x0, y + dy - 9, x0 + width, y + dy + 2)
            inside = box[0] >= self.left and box[2] <= self.width - 2 and box[1] >= self.top and box[3] <= self.y1
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                self.text(x + dx, y + dy, label, anchor=anchor, cls="small halo")
                return True
        return False

    def render(self, title: str, description: str) -> str:
        """Return the finished `<svg>`: labelled for screen readers, with no outside reference."""
        body = "".join(self.parts)
        # The identifiers only need to differ between different figures of one page.
        key = hashlib.sha256(f"{xml_text(title)}{body}".encode()).hexdigest()[:10]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" '
            f'viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-labelledby="t{key} d{key}"><title id="t{key}">{xml_text(title)}</title>'
            f'<desc id="d{key}">{xml_text(description)}</desc>{body}</svg>'
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Tell whether two boxes touch."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def standalone(svg: str) -> str:
    """Return a figure as a file of its own: its style sheet travels inside it."""
    style = f"<style>{PLOT_CSS}@media (prefers-color-scheme: dark){{{PLOT_CSS_DARK}}}</style>"
    head, rest = svg.split(">", 1)
    return f"{head}>{style}{rest}"
