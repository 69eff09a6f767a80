"""The figures of the grid: reconstruction against sparsity, or against dictionary size.

Controls, and what training went on from, are hollow: they are to be seen beside the trained autoencoders, never taken
for one. No line joins them, and they are not among those of which the best is named.
"""

from collections.abc import Sequence

from sae.report.model import SaeRow
from sae.report.plots import WIDTH, colour, empty, natural, short_hook
from sae.report.svg import MARKERS, Figure, Key, Scale, finite, is_finite, make_scale, number

HEIGHT = 280  # below the legend


def trained(saes: Sequence[SaeRow]) -> list[SaeRow]:
    """Those that were trained in this run, in full."""
    return [row for row in saes if not row.standing]


def one_l0(saes: Sequence[SaeRow]) -> bool:
    """Tell whether a grid has several sizes at a single L0, so that L0 is no axis; controls do not count."""
    rows = trained(saes) or saes
    l0s = finite(s.l0 for s in rows if is_finite(s.l0))
    return bool(l0s) and max(l0s) <= 1.05 * min(l0s) and len({s.d_sae for s in rows if s.d_sae}) > 1


def fvu_l0(saes: Sequence[SaeRow]) -> str:
    """Draw reconstruction error against sparsity: a colour per hook point, a marker per dictionary size."""
    title = "Reconstruction error (FVU) against sparsity (L0)"
    rows = [s for s in saes if is_finite(s.l0) and is_finite(s.fvu)]
    if not rows:
        return empty(title)
    hooks = sorted({s.hook_name for s in rows}, key=natural)
    sizes = sorted({s.d_sae or 0 for s in rows})
    figure = Figure(WIDTH, 330)
    keys = [Key(short_hook(h) or "?", colour(i)) for i, h in enumerate(hooks)]
    keys += [Key(f"d_sae {d}", 0, marker=MARKERS[i % len(MARKERS)]) for i, d in enumerate(sizes)]
    figure.legend([*keys, *_standing_keys(rows)])
    figure.height = figure.top + HEIGHT
    l0s, fvus = finite(s.l0 for s in rows), finite(s.fvu for s in rows)
    x = make_scale(l0s, figure.left, figure.x1, log=min(l0s) > 0 and max(l0s) > 6 * min(l0s), pad=0.08)
    y = make_scale(fvus, figure.y1, figure.top, log=min(fvus) > 0 and max(fvus) > 12 * min(fvus), zero=True, pad=0.1)
    figure.axes(x, y, "L0: mean active latents per token", "FVU (lower is better)")
    groups: dict[tuple[str, int, str, int], list[tuple[float, float]]] = {}
    for row, l0, fvu in zip(rows, l0s, fvus, strict=True):
        figure.occupy(x(l0), y(fvu), 8)
        if not row.standing:
            groups.setdefault((row.hook_name, row.d_sae or 0, row.architecture, row.seed or 0), []).append((l0, fvu))
    _lines(figure, x, y, [(key[0], points) for key, points in groups.items()], hooks)
    for row, l0, fvu in zip(rows, l0s, fvus, strict=True):
        shape = MARKERS[sizes.index(row.d_sae or 0) % len(MARKERS)]
        _point(figure, x(l0), y(fvu), row, shape, hooks, f"L0 {number(l0)}, FVU {number(fvu)}")
    if len(rows) <= 24:
        for (_, size, _, _), points in groups.items():
            last = max(points)
            figure.label_near(x(last[0]), y(last[1]), str(size))
    return figure.render(title, _about(rows, fvus, [f"L0 {number(l0)}" for l0 in l0s]))


def fvu_size(saes: Sequence[SaeRow]) -> str:
    """Draw reconstruction error against dictionary size, for a grid of one L0: a line per hook point."""
    title = "Reconstruction error (FVU) against dictionary size"
    rows = [s for s in saes if s.d_sae and is_finite(s.fvu)]
    if not rows:
        return empty(title)
    hooks = sorted({s.hook_name for s in rows}, key=natural)
    figure = Figure(WIDTH, 330)
    keys = [Key(short_hook(h) or "?", colour(i)) for i, h in enumerate(hooks)]
    figure.legend([*keys, *_standing_keys(rows)])
    figure.height = figure.top + HEIGHT
    sizes, fvus = finite(s.d_sae for s in rows), finite(s.fvu for s in rows)
    x = make_scale(sizes, figure.left, figure.x1, log=True, pad=0.08)
    y = make_scale(fvus, figure.y1, figure.top, zero=True, pad=0.1)
    ticks = [(size, number(size)) for size in sorted(set(sizes))]
    figure.axes(x, y, "d_sae: latents in the dictionary", "FVU (lower is better)", x_ticks=ticks)
    groups: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for row, size, fvu in zip(rows, sizes, fvus, strict=True):
        if not row.standing:
            groups.setdefault((row.hook_name, row.architecture, row.seed or 0), []).append((size, fvu))
    _lines(figure, x, y, [(key[0], points) for key, points in groups.items()], hooks)
    for row, size, fvu in zip(rows, sizes, fvus, strict=True):
        _point(figure, x(size), y(fvu), row, MARKERS[0], hooks, f"FVU {number(fvu)}")
    return figure.render(title, _about(rows, fvus, [f"d_sae {number(size)}" for size in sizes]))


def _standing_keys(rows: Sequence[SaeRow]) -> list[Key]:
    """What hollow markers stand for, where there are any."""
    keys = [Key("control", 0, marker="circle", look="hollow")] if any(row.control for row in rows) else []
    if any(row.before_training for row in rows):
        keys.append(Key("before training", 0, marker="circle", look="hollow early"))
    return keys


def _lines(
    figure: Figure, x: Scale, y: Scale, groups: list[tuple[str, list[tuple[float, float]]]], hooks: Sequence[str]
) -> None:
    """Join the trained ones of a hook point that differ in nothing but the axis."""
    for hook, points in groups:
        if len(points) > 1:
            line = [(x(at), y(fvu)) for at, fvu in sorted(points)]
            figure.path(line, cls=f"line thin soft k{colour(hooks.index(hook))}")


def _point(figure: Figure, x: float, y: float, row: SaeRow, shape: str, hooks: Sequence[str], measured: str) -> None:
    """Draw one autoencoder: filled when it was trained, hollow otherwise."""
    look = "hollow early" if row.before_training else "hollow" if row.control else "dot"
    name = ", ".join(
        [short_hook(row.hook_name), f"{row.architecture} d_sae {row.d_sae or 0}", f"seed {row.seed}", *row.standing]
    )
    figure.marker(x, y, shape, cls=f"{look} k{colour(hooks.index(row.hook_name))}", hover=f"{name}: {measured}")


def _about(rows: Sequence[SaeRow], fvus: Sequence[float], places: Sequence[str]) -> str:
    """Describe a figure: how many there are, and the best that was trained."""
    n_others = sum(bool(row.standing) for row in rows)
    said = f"{len(rows) - n_others} autoencoders"
    said += f", and {n_others} that are controls or from before training" if n_others else ""
    found = [one for one in zip(fvus, places, rows, strict=True) if not one[2].standing]
    if not found:
        return f"{said}."
    fvu, place, row = min(found, key=lambda one: one[0])
    return f"{said}; lowest FVU {number(fvu)} at {place}, {row.hook_name}."
