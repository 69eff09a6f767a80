"""The section `Sizes related`: which pictures it has, which latents they point out, and what its tables say."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from markupsafe import Markup

from sae.report.families import Mark, family_picture
from sae.report.lineage import columns, in_words
from sae.report.model import Behavior, Family, Relations, ReportData
from sae.report.plots import natural, short_hook
from sae.report.relation_plots import pair_label, stability_plot, stitching_plot
from sae.report.svg import number
from sae.report.trees import family_trees

MARK_COLOURS = (2, 4, 5)  # of the behaviours; not those of the families' blocks
MAX_PICTURES = 12
SHOWN_WITHOUT_FINDING = 3  # pictures that are open where no latent was found


class Found(NamedTuple):
    """A latent that the behaviour stage chose, and the autoencoder it is of."""

    behavior: str
    hook_name: str
    d_sae: int | None
    latent: int
    path: str
    colour: int


def relations_view(data: ReportData) -> dict[str, Any] | None:
    """Return what the section shows; None where nothing was measured."""
    relations = data.relations
    if not (relations.families or relations.pairs or relations.seeds):
        return None
    families = sorted(relations.families, key=lambda f: (natural(f.hook_name), bool(f.control), f.seed or 0))
    found = found_latents(data.behaviors)
    marks = [marks_of(family, families, found) for family in families]
    order = sorted(range(len(families)), key=lambda i: not marks[i])  # stable: hook points stay in order
    pictures = [_picture(families[i], marks[i], families) for i in order[:MAX_PICTURES]]
    which = [_which(pair, relations) for pair in relations.pairs]
    n_open = sum(bool(found_here) for found_here in marks) or SHOWN_WITHOUT_FINDING
    return {
        "open": pictures[:n_open],
        "folded": pictures[n_open:],
        "n_hidden": len(families) - len(pictures),
        "pairs": [(pair_label(pair), more, pair) for pair, more in zip(relations.pairs, which, strict=True)],
        "stitching": Markup(stitching_plot(relations.pairs, which)) if _stitched(relations) else None,
        "harm": _harm(relations),
        "n_stitched": len(_with_novel(relations)),
        "seeds": [(short_hook(row.hook_name), _which(row, relations), row) for row in relations.seeds],
        "stability": Markup(stability_plot(relations.seeds)) if relations.seeds else None,
        "atoms": [(short_hook(row.hook_name), _which(row, relations), row) for row in relations.atoms],
        "threshold": relations.threshold,
        "notes": relations.notes,
    }


def found_latents(behaviors: Sequence[Behavior]) -> list[Found]:
    """All latents of causal tests: the chosen ones, and those of the other sizes, of which no path is known."""
    found: dict[tuple[str, str, int | None, int], Found] = {}
    for place, behavior in enumerate(behaviors):
        colour = MARK_COLOURS[place % len(MARK_COLOURS)]
        rows = [(behavior.hook_name, behavior.d_sae, behavior.latents + behavior.clamp_latents, behavior.path)]
        rows += [(row.hook_name, row.d_sae, row.latents, "") for row in behavior.per_size]
        for hook_name, d_sae, latents, path in rows:
            for latent in latents:
                key = (behavior.name, hook_name, d_sae, latent)
                found.setdefault(key, Found(behavior.name, hook_name, d_sae, latent, path, colour))
    return list(found.values())


def marks_of(family: Family, families: Sequence[Family], found: Sequence[Found]) -> list[Mark]:
    """The found latents that are certainly of a family: by path, or because no other family has such a size there."""
    marks = []
    for one in found:
        peers = [other for other in families if _level_of(other, one) is not None]
        same = [other for other in peers if one.path and _ends(other.levels[_level_of(other, one) or 0].path, one.path)]
        level = _level_of(family, one)
        sure = same or (peers if len(peers) == 1 else [])
        if level is not None and family in sure and 0 <= one.latent < family.levels[level].d_sae:
            marks.append(Mark(level, one.latent, one.behavior.replace("_", " "), one.colour))
    return marks


def _level_of(family: Family, one: Found) -> int | None:
    """Which of a family's sizes a latent may be of; controls have none."""
    if family.hook_name != one.hook_name or family.control:
        return None
    return next((i for i, level in enumerate(family.levels) if level.d_sae == one.d_sae), None)


def _ends(one: str, other: str) -> bool:
    """Whether two paths name one autoencoder, seen from different folders."""
    return PurePath(one).parts[-2:] == PurePath(other).parts[-2:]


def _picture(family: Family, marks: list[Mark], families: Sequence[Family]) -> dict[str, Any]:
    ordered = columns(family)
    nulls = [
        f"{level.d_sae:,}: {level.null_mean:.2f} on average, {level.null_high:.2f} once in a hundred"
        for level in family.levels
        if level.null_mean is not None and level.null_high is not None
    ]
    return {
        "title": short_hook(family.hook_name),
        "which": _which(family, families),
        "svg": Markup(family_picture(family, marks)),
        "trees": Markup(family_trees(family, marks)) if marks else None,
        "floor": family.floor,
        "nulls": "; ".join(nulls),
        "words": [
            (
                mark.name,
                mark.latent,
                family.levels[mark.level].d_sae,
                in_words(family, ordered, mark.level, mark.latent),
            )
            for mark in sorted(marks, key=lambda mark: (mark.name, mark.level, mark.latent))
        ],
    }


def _which(one: Any, among: Relations | Sequence[Family]) -> str:
    """What tells a group from the others of its hook point: architecture, L0, control, seed; empty where nothing."""
    peers: list[Any] = list(among) if not isinstance(among, Relations) else [*among.pairs, *among.seeds, *among.atoms]
    parts = []
    if len({peer.architecture for peer in peers}) > 1:
        parts.append(one.architecture)
    if len({peer.l0_target for peer in peers}) > 1 and one.l0_target is not None:
        parts.append(f"L0 {number(one.l0_target)}")
    if one.control:
        parts.append(f"control: {one.control.replace('_', ' ')}")
    seed = getattr(one, "seed", None)
    if seed is not None and len({getattr(peer, "seed", seed) for peer in peers}) > 1:
        parts.append(f"seed {seed}")
    return ", ".join(parts)


def _stitched(relations: Relations) -> bool:
    return any(pair.fvu_small is not None for pair in relations.pairs)


def _harm(relations: Relations) -> int:
    """In how many pairs the novel latents, all added, make the narrower SAE worse."""
    return sum(with_novel > alone for alone, with_novel in _with_novel(relations))


def _with_novel(relations: Relations) -> list[tuple[float, float]]:
    """FVU of the narrower SAE alone and with the novel latents, of each pair that was stitched."""
    found = [(pair.fvu_small, pair.novel.fvu) for pair in relations.pairs]
    return [(alone, more) for alone, more in found if alone is not None and more is not None]
