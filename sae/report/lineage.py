"""Families of latents across sizes, put in order: who descends from whom, and who stands beside whom in a picture.

columns(family)[1].order        # latents of the second size, so that no line to their parents crosses another
in_words(family, columns(family), 1, 86)    # what latent 86 of the second size comes from, and what becomes of it
"""

from typing import NamedTuple

from sae.report.model import Family
from sae.report.svg import MINUS

LISTED = 8  # children that a sentence names


class Column(NamedTuple):
    """One size, in the order in which it is drawn."""

    order: list[int]
    """Latents from top to bottom: children in the order of their parents, then those without a parent."""
    place: list[int]
    """For each latent its place in that order."""
    origin: list[int]
    """For each place the level at which its line of parents begins."""
    children: list[list[int]]
    """For each latent its children of the next wider size, in their order there; empty at the widest."""


def columns(family: Family) -> list[Column]:
    """Order every size, so that lines from parents to children never cross, the largest families on top."""
    levels = family.levels
    children: list[list[list[int]]] = [[[] for _ in range(level.d_sae)] for level in levels]
    for depth, level in enumerate(levels[1:]):
        for latent, parent in enumerate(level.parent):
            if parent >= 0:
                children[depth][parent].append(latent)
    sizes = _descendants(children)

    def rank(depth: int, latents: list[int]) -> list[int]:
        own, below = children[depth], sizes[depth]
        return sorted(latents, key=lambda latent: (-len(own[latent]), -below[latent], latent))

    found: list[Column] = []
    for depth, level in enumerate(levels):
        if depth == 0:
            order, origin = rank(0, list(range(level.d_sae))), [0] * level.d_sae
        else:
            before = found[-1]
            order, origin = [], []
            for place, parent in enumerate(before.order):
                mine = rank(depth, children[depth - 1][parent])
                before.children[parent][:] = mine
                order += mine
                origin += [before.origin[place]] * len(mine)
            new = rank(depth, [latent for latent, parent in enumerate(level.parent) if parent < 0])
            order, origin = order + new, origin + [depth] * len(new)
        place_of = [0] * level.d_sae
        for place, latent in enumerate(order):
            place_of[latent] = place
        found.append(Column(order, place_of, origin, children[depth]))
    return found


def _descendants(children: list[list[list[int]]]) -> list[list[int]]:
    """How many latents of all wider sizes descend from each latent."""
    counts = [[0] * len(level) for level in children]
    for depth in range(len(children) - 2, -1, -1):
        for latent, mine in enumerate(children[depth]):
            counts[depth][latent] = sum(1 + counts[depth + 1][child] for child in mine)
    return counts


class Relative(NamedTuple):
    """A latent of a lineage, and whose child it is there."""

    level: int
    latent: int
    parent: int
    """-1 for the eldest."""


def lineage(family: Family, found: list[Column], level: int, latent: int) -> list[Relative]:
    """The line of parents of a latent, itself, and all its descendants, narrowest first.

    Args:
        family: the sizes.
        found: their `columns`.
        level: the latent's size.
        latent: its number there.
    """
    line = [(level, latent)]
    while line[0][0] > 0 and (parent := family.levels[line[0][0]].parent[line[0][1]]) >= 0:
        line.insert(0, (line[0][0] - 1, parent))
    elders = [-1, *(one for _, one in line[:-1])]
    relatives = [Relative(*one, elder) for one, elder in zip(line, elders, strict=True)]
    mine = [latent]
    for depth in range(level, len(family.levels) - 1):
        born = [(child, parent) for parent in mine for child in found[depth].children[parent]]
        relatives += [Relative(depth + 1, child, parent) for child, parent in born]
        mine = [child for child, _ in born]
    return relatives


def in_words(family: Family, found: list[Column], level: int, latent: int) -> str:
    """Say in sentences what a latent comes from and what it becomes, with the cosine behind each number.

    Args:
        family: the sizes.
        found: their `columns`.
        level: the latent's size.
        latent: its number there.
    """
    own = family.levels[level]
    said = []
    if level > 0:
        narrower = f"{family.levels[level - 1].d_sae:,}"
        near = own.cosine[latent] if own.cosine else None
        if own.parent[latent] >= 0:
            said.append(f"Its parent of {narrower} is {_one(family, level, latent, own.parent[latent])}.")
        else:
            said.append(f"It is new: the nearest of {narrower} has a cosine of {_cosine(near)}.")
    mine = [latent]
    for depth in range(level + 1, len(family.levels)):
        mine = [child for parent in mine for child in found[depth - 1].children[parent]]
        said.append(_becomes(family, depth, mine, first=depth == level + 1))
        if not mine:
            break
    stability = own.stability[latent] if own.stability else None
    if stability is not None:
        others = [value for value in own.stability if value is not None]
        mean = _cosine(sum(others) / len(others))
        said.append(f"Its likeness in other seeds is {_cosine(stability)}; that of all latents of its size {mean}.")
    return " ".join(said)


def _becomes(family: Family, depth: int, mine: list[int], *, first: bool) -> str:
    """One sentence about the descendants of one size; `first` says that they are children."""
    size = f"{family.levels[depth].d_sae:,}"
    if not mine:
        return f"No latent of {size} is its child." if first else f"It has no descendant of {size}."
    names = [_one(family, depth, child, child) for child in mine[:LISTED]]
    if len(mine) > LISTED:
        names.append(f"{len(mine) - LISTED} more")
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if not first:
        return f"From there it leads to {listed} of {size}."
    return f"It carries on as {listed} of {size}." if len(mine) == 1 else f"It splits into {listed} of {size}."


def _one(family: Family, depth: int, child: int, shown: int) -> str:
    """A latent with the cosine between the child and its parent."""
    cosines = family.levels[depth].cosine
    return f"{shown} ({_cosine(cosines[child])})" if cosines else str(shown)


def _cosine(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}".replace("-", MINUS)
