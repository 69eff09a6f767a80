"""The trees of single latents: what each comes from, and what it splits into, over all sizes.

Columns are the sizes, as in the picture of all latents (`sae.report.families`); a line is the thicker the larger the
cosine, which is written on it.
"""

from collections.abc import Sequence

from sae.report.families import BAR, WIDTH, Mark, left_edge, thread
from sae.report.lineage import Column, columns, lineage
from sae.report.model import Family
from sae.report.plots import short_hook
from sae.report.svg import Figure, fit_text

SLOT = 32.0  # height of a latent that has no children
SHOWN = 8  # children of one latent that are drawn; the nearest ones, and those that are marked
NAME = 100.0  # width of a name over a latent
Node = tuple[int, int]  # level and latent


class _Forest:
    """The marked latents' families: who is drawn, below whom, and at what height."""

    def __init__(self, family: Family, found: list[Column], marks: Sequence[Mark]) -> None:
        self.family = family
        self.marks: dict[Node, list[Mark]] = {}
        for mark in marks:
            self.marks.setdefault((mark.level, mark.latent), []).append(mark)
        self.colour: dict[Node, int] = {}
        self.parent: dict[Node, Node] = {}
        for mark in marks:
            for one in lineage(family, found, mark.level, mark.latent):
                node = (one.level, one.latent)
                self.colour.setdefault(node, mark.colour)
                if one.parent >= 0:
                    self.parent[node] = (one.level - 1, one.parent)
        self.colour |= {node: group[0].colour for node, group in self.marks.items()}
        self.children: dict[Node, list[Node]] = {node: [] for node in self.colour}
        for node, parent in self.parent.items():
            self.children[parent].append(node)
        self.hidden: dict[Node, int] = {}
        self.y: dict[Node, float] = {}
        self.bottom = 0.0
        for node in sorted(set(self.colour) - set(self.parent)):
            self._place(node)
            self.bottom += 8

    def cosine(self, node: Node) -> float | None:
        """With the nearest latent of the next narrower size."""
        cosines = self.family.levels[node[0]].cosine
        return cosines[node[1]] if cosines else None

    def _place(self, node: Node) -> float:
        """Give a latent and all below it their heights: parents stand in the middle of their children."""
        mine = sorted(self.children[node], key=lambda child: (child not in self.marks, -(self.cosine(child) or 0)))
        kept, left_out = mine[:SHOWN], mine[SHOWN:]
        self.hidden[node] = len(left_out)
        heights = [self._place(child) for child in sorted(kept, key=lambda child: -(self.cosine(child) or 0))]
        if not heights:
            self.bottom += SLOT
            heights = [self.bottom - SLOT / 2]
        if left_out:
            self.bottom += SLOT / 2
        self.y[node] = (heights[0] + heights[-1]) / 2
        return self.y[node]


def family_trees(family: Family, marks: Sequence[Mark]) -> str:
    """Draw the families of some latents; with none marked, a figure that says so.

    Args:
        family: two or more sizes.
        marks: the latents; all of sizes that the family has.
    """
    forest = _Forest(family, columns(family), marks)
    n = len(family.levels)
    figure = Figure(WIDTH, 0, top=36)
    figure.height = figure.top + max(forest.bottom, SLOT) + 6
    middles = [left_edge(depth, n) + BAR / 2 for depth in range(n)]
    for x, level in zip(middles, family.levels, strict=True):
        figure.text(x, 16, f"{level.d_sae:,} latents", anchor="middle", cls="strong")
    for node in forest.y:
        _line(figure, forest, node, middles)
    for node in forest.y:
        _node(figure, forest, node, middles)
    names = ", ".join(dict.fromkeys(mark.name for mark in marks))
    title = f"Families of the latents found for {names or 'nothing'} at {short_hook(family.hook_name)}"
    return figure.render(title, _about(forest))


def _about(forest: _Forest) -> str:
    said = []
    for node in forest.y:
        size = forest.family.levels[node[0]].d_sae
        above = forest.parent.get(node)
        cosine = forest.cosine(node)
        words = f"{node[1]} of {size:,}"
        said.append(words if above is None or cosine is None else f"{words}, child of {above[1]}: {cosine:.2f}")
    return "; ".join(said[:60]) + "."


def _line(figure: Figure, forest: _Forest, node: Node, middles: list[float]) -> None:
    """Draw the line from a latent's parent, or say how near the nearest latent is."""
    x, y = middles[node[0]], figure.top + forest.y[node]
    cosine, above = forest.cosine(node), forest.parent.get(node)
    if above is None:
        if node[0] > 0:
            near = "" if cosine is None else f": nearest {cosine:.2f}"
            figure.text(x - 12, y + 4, f"new{near}", anchor="end", cls="small")
        return
    weight = 1.5 if cosine is None else 1.5 + 5 * max(0.0, cosine - 0.4)
    x0 = middles[above[0]]
    shape = thread(x0, x, figure.top + forest.y[above], y)
    figure.add("path", d=shape, cls=f"line soft k{forest.colour[node]}", style=f"stroke-width:{weight:.1f}")
    if cosine is not None:
        # The name of a latent stands over it; only in the last column is it on the other side.
        aside = 14 if node[0] == len(middles) - 1 else NAME / 2 + 6
        figure.text(x - aside, y - 5, f"{cosine:.2f}", anchor="end", cls="small halo")


def _node(figure: Figure, forest: _Forest, node: Node, middles: list[float]) -> None:
    """Draw a latent: filled where it was found, a ring where it is only related."""
    x, y = middles[node[0]], figure.top + forest.y[node]
    marks = forest.marks.get(node, [])
    shape, size = ("circle", 6.0) if marks else ("ring", 4.0)
    figure.marker(x, y, shape, cls=f"dot k{forest.colour[node]}", size=size)
    names = ", ".join(mark.name for mark in marks)
    words = f"{node[1]}" + (f", {names}" if names else "")
    cls = "strong halo" if marks else "small halo"
    if node[0] == len(forest.family.levels) - 1:
        figure.text(x + 11, y + 4, fit_text(words, figure.width - x - 14), cls=cls)
    else:
        figure.text(x, y - 10, fit_text(words, NAME), anchor="middle", cls=cls)
    if forest.hidden[node]:
        figure.text(x + 12, y + 18, f"and {forest.hidden[node]} more children", cls="small halo")
