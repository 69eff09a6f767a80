"""The picture of families: sizes as columns, latents as marks, a ribbon from every parent to each of its children.

A column has its latents from top to bottom in the order of `sae.report.lineage`, so that no two ribbons cross. Its
blocks say at which size the line of parents began; the lowest is what is new at this size. Ribbons are the stronger the
larger the cosine. Where there are too many to be seen, neighbours are drawn as one ribbon, with their mean cosine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from sae.report.lineage import Column, columns, lineage
from sae.report.model import Family
from sae.report.plots import short_hook
from sae.report.svg import Figure, finite, fit_text, number, text_width

WIDTH, TALL, SIDE, BAR = 1000.0, 330.0, 112.0, 13.0
MAX_RATIO = 8.0  # of the tallest column to the lowest: beyond it heights are squeezed
MAX_RIBBONS = 420  # between two columns
STRATA = (1, 3, 6, 5)  # colours of what began at the first size, the second, ...
STEPS = (0.65, 0.8)  # cosines from which a ribbon is stronger
SPACING = 14.0  # between the names of blocks


@dataclass(frozen=True)
class Mark:
    """A latent to point out, with its family."""

    level: int
    latent: int
    name: str  # of the behaviour it was found for
    colour: int


class _Bar(NamedTuple):
    """A column on the page."""

    x: float
    top: float
    pitch: float

    def y(self, place: float) -> float:
        return self.top + self.pitch * place


def family_picture(family: Family, marks: Sequence[Mark] = ()) -> str:
    """Draw the sizes of one hook point.

    Args:
        family: two or more sizes.
        marks: latents whose family stands out; those of other sizes than the family's are left out.
    """
    found = columns(family)
    marks = [m for m in marks if m.level < len(family.levels) and 0 <= m.latent < family.levels[m.level].d_sae]
    figure = Figure(WIDTH, 0, left=SIDE, right=SIDE, top=52)
    bars = _bars(family, figure)
    gap = bars[1].x - bars[0].x
    lines = max(len(_fate_lines(column, gap - 8)) for column in found[:-1])
    figure.height = figure.top + TALL + 52 + 14 * lines
    for depth in range(len(bars) - 1):
        _ribbons(figure, family, found, bars, depth)
        _fates(figure, found[depth], bars[depth].x, bars[depth + 1].x)
    for depth, column in enumerate(found):
        _column(figure, family, column, bars[depth], depth)
    for depth, bar in enumerate(bars):
        _blocks(figure, family, found[depth], bar, depth)
    _marked(figure, family, found, bars, marks)
    _key(figure, family)
    return figure.render(_title(family), _about(family, found, marks))


def _title(family: Family) -> str:
    sizes = ", ".join(f"{level.d_sae:,}" for level in family.levels)
    return f"Families of latents at {short_hook(family.hook_name)} across sizes {sizes}"


def _about(family: Family, found: list[Column], marks: Sequence[Mark]) -> str:
    """Describe the picture for those who do not see it."""
    said = []
    for depth, level in enumerate(family.levels[1:], start=1):
        n_new = sum(parent < 0 for parent in level.parent)
        said.append(
            f"Of {level.d_sae:,} latents {level.d_sae - n_new:,} have a parent among "
            f"{family.levels[depth - 1].d_sae:,}, {n_new:,} are new; {'; '.join(_fate_words(found[depth - 1]))}."
        )
    said += [f"Marked for {mark.name}: {mark.latent} of {family.levels[mark.level].d_sae:,}." for mark in marks]
    return " ".join(said)


def _bars(family: Family, figure: Figure) -> list[_Bar]:
    """Columns side by side; heights follow the numbers of latents as far as the lowest stays visible."""
    sizes = [level.d_sae for level in family.levels]
    heights = [size / max(sizes) for size in sizes]
    if min(heights) < 1 / MAX_RATIO:
        # A straight line from the smallest to the largest keeps the order.
        low = min(heights)
        heights = [1 / MAX_RATIO + (height - low) / (1 - low) * (1 - 1 / MAX_RATIO) for height in heights]
    return [
        _Bar(left_edge(i, len(sizes)), figure.top, TALL * height / size)
        for i, (size, height) in enumerate(zip(sizes, heights, strict=True))
    ]


def left_edge(depth: int, n: int) -> float:
    """Where a column begins; pictures of one family, one below the other, have theirs at the same places."""
    return SIDE + depth * (WIDTH - 2 * SIDE - BAR) / (n - 1)


def _stratum(level: int) -> int:
    return STRATA[level % len(STRATA)]


def _step(cosine: float | None) -> int:
    """How strong a ribbon is, from 1 to 3."""
    return 1 + sum(cosine >= step for step in STEPS) if cosine is not None else 1


class _Link(NamedTuple):
    """Parents and children that one ribbon joins, as places from top to bottom."""

    origin: int
    parents: tuple[float, float]
    children: tuple[float, float]
    cosine: float | None
    hover: str


def _links(family: Family, found: list[Column], depth: int) -> list[_Link]:
    """What joins two columns: a link a child, or as many neighbours a link as keep them visible."""
    left, right, level = found[depth], found[depth + 1], family.levels[depth + 1]
    singles: list[_Link] = []
    for place, latent in enumerate(left.order):
        mine = left.children[latent]
        for i, child in enumerate(mine):
            cosine = level.cosine[child] if level.cosine else None
            hover = f"{latent} of {family.levels[depth].d_sae:,}, {child} of {level.d_sae:,}"
            hover += f": cosine {cosine:.2f}" if cosine is not None else ""
            parents = (place + i / len(mine), place + (i + 1) / len(mine))
            at = right.place[child]
            singles.append(_Link(left.origin[place], parents, (at, at + 1), cosine, hover if len(mine) > 1 else ""))
    each = -(-len(singles) // MAX_RIBBONS)
    if each > 1:
        singles = _thinned(singles, each)
    return _joined(singles)


def _thinned(links: list[_Link], each: int) -> list[_Link]:
    """So many neighbours as one, with their mean cosine, in every block."""
    thin = []
    for origin, same in groupby(links, key=lambda link: link.origin):
        row = list(same)
        for part in (row[i : i + each] for i in range(0, len(row), each)):
            cosines = finite(link.cosine for link in part)
            parents, children = (part[0].parents[0], part[-1].parents[1]), (part[0].children[0], part[-1].children[1])
            thin.append(_Link(origin, parents, children, sum(cosines) / len(cosines) if cosines else None, ""))
    return thin


def _joined(links: list[_Link]) -> list[_Link]:
    """Neighbours that touch on both sides and look the same, as one: seams between them would show."""
    joined: list[_Link] = []
    for link in links:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.origin, _step(last.cosine), last.hover) == (link.origin, _step(link.cosine), "")
            and not link.hover
            and (last.parents[1], last.children[1]) == (link.parents[0], link.children[0])
        ):
            parents, children = (last.parents[0], link.parents[1]), (last.children[0], link.children[1])
            joined[-1] = last._replace(parents=parents, children=children)
        else:
            joined.append(link)
    return joined


def _ribbons(figure: Figure, family: Family, found: list[Column], bars: list[_Bar], depth: int) -> None:
    """Draw what joins two columns. Ribbons without a tooltip share one element for each colour and strength."""
    shared: dict[str, list[str]] = {}
    for link in _links(family, found, depth):
        left = [bars[depth].y(place) for place in link.parents]
        right = [bars[depth + 1].y(place) for place in link.children]
        cls = f"bar ribbon{_step(link.cosine)} k{_stratum(link.origin)}"
        shape = _curve(bars[depth].x + BAR, bars[depth + 1].x, left, right)
        if link.hover:
            figure.add("path", d=shape, cls=cls, hover=link.hover)
        else:
            shared.setdefault(cls, []).append(shape)
    for cls, shapes in shared.items():
        figure.add("path", d="".join(shapes), cls=cls)


def _curve(x0: float, x1: float, left: list[float], right: list[float]) -> str:
    """The outline of a ribbon."""
    xm = (x0 + x1) / 2
    ends = f"L{x1:.0f} {right[1]:.1f}C{xm:.0f} {right[1]:.1f} {xm:.0f} {left[1]:.1f} {x0:.0f} {left[1]:.1f}Z"
    return f"M{x0:.0f} {left[0]:.1f}C{xm:.0f} {left[0]:.1f} {xm:.0f} {right[0]:.1f} {x1:.0f} {right[0]:.1f}{ends}"


def _column(figure: Figure, family: Family, column: Column, bar: _Bar, depth: int) -> None:
    """Draw one size: its name, and a block for each size at which lines of parents began."""
    middle = bar.x + BAR / 2
    figure.text(middle, 22, f"{family.levels[depth].d_sae:,} latents", anchor="middle", cls="strong")
    new = column.origin.count(depth) if depth else 0
    about = f"{len(column.order) - new:,} descend, {new:,} new" if depth else "the narrowest"
    figure.text(middle, 38, about, anchor="middle", cls="small")
    start = 0
    for origin, places in groupby(column.origin):
        n = len(list(places))
        y0, y1 = bar.y(start), bar.y(start + n)
        hover = f"{n:,} latents whose line of parents begins at {family.levels[origin].d_sae:,}"
        box = {"x": bar.x, "y": y0, "width": BAR, "height": max(y1 - y0 - 1, 0.6)}
        figure.add("rect", **box, cls=f"bar k{_stratum(origin)}", hover=hover)
        start += n


def _blocks(figure: Figure, family: Family, column: Column, bar: _Bar, depth: int) -> None:
    """Name the blocks of a column on its left, where there is room for it."""
    if depth == 0:
        return
    start, edge = 0, -1e9
    for origin, places in groupby(column.origin):
        n = len(list(places))
        y = (bar.y(start) + bar.y(start + n)) / 2 + 4
        start += n
        if y < edge + SPACING:
            continue
        edge = y
        words = f"{n:,} new" if origin == depth else f"{n:,} from {family.levels[origin].d_sae:,}"
        figure.text(bar.x - 7, y, words, anchor="end", cls="strong halo")


def _fate_words(column: Column) -> list[str]:
    """What becomes of a size's latents in the next wider one."""
    counts = [len(mine) for mine in column.children]
    return [
        f"{sum(count > 1 for count in counts):,} split",
        f"{counts.count(1):,} carry on as one",
        f"{counts.count(0):,} have no child",
    ]


def _fates(figure: Figure, column: Column, x0: float, x1: float) -> None:
    """Say below a gap what becomes of the latents on its left."""
    for i, line in enumerate(_fate_lines(column, x1 - x0 - 8)):
        figure.text((x0 + BAR + x1) / 2, figure.top + TALL + 20 + 14 * i, line, anchor="middle", cls="small")


def _fate_lines(column: Column, width: float) -> list[str]:
    """The same as one line, or as several where there is no room."""
    words = _fate_words(column)
    line = ", ".join(words)
    return [line] if text_width(line) <= width else [fit_text(part, width) for part in words]


def _marked(figure: Figure, family: Family, found: list[Column], bars: list[_Bar], marks: Sequence[Mark]) -> None:
    """Draw the marked latents and the lines of their families over the rest."""
    for mark in marks:
        for one in lineage(family, found, mark.level, mark.latent):
            if one.parent >= 0:
                left, right = bars[one.level - 1], bars[one.level]
                y0 = left.y(found[one.level - 1].place[one.parent] + 0.5)
                y1 = right.y(found[one.level].place[one.latent] + 0.5)
                figure.add("path", d=thread(left.x + BAR, right.x, y0, y1), cls=f"line thread k{mark.colour}")
    for mark in marks:
        y = bars[mark.level].y(found[mark.level].place[mark.latent] + 0.5)
        hover = f"{mark.latent} of {family.levels[mark.level].d_sae:,}, found for {mark.name}"
        figure.marker(bars[mark.level].x + BAR / 2, y, "circle", cls=f"dot k{mark.colour}", size=5, hover=hover)


def thread(x0: float, x1: float, y0: float, y1: float) -> str:
    """The path of a line that leaves and arrives level."""
    xm = (x0 + x1) / 2
    return f"M{x0:.1f} {y0:.1f}C{xm:.1f} {y0:.1f} {xm:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"


def _key(figure: Figure, family: Family) -> None:
    """Say below what the strength of a ribbon means."""
    floor = family.floor if family.floor is not None else 0.0
    edges = [edge for edge in (floor, *STEPS) if edge >= floor]
    x, y = figure.left, figure.height - 8
    figure.text(x, y, "cosine with the parent", cls="small")
    x += text_width("cosine with the parent", 11) + 12
    for i, edge in enumerate(edges):
        label = (
            f"{number(round(edge, 2))} to {number(edges[i + 1])}" if i + 1 < len(edges) else f"{number(edge)} or more"
        )
        figure.add("rect", x=x, y=y - 9, width=26.0, height=10.0, cls=f"bar ribbon{_step(edge)} k1")
        figure.text(x + 32, y, label, cls="small")
        x += 32 + text_width(label, 11) + 18
