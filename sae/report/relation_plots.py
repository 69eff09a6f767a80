"""What sizes add to each other, and how seeds agree, as two small figures."""

from collections.abc import Sequence

from sae.report.model import SeedRow, SizePair
from sae.report.plots import WIDTH, empty, short_hook
from sae.report.svg import Figure, Key, finite, fit_text, is_finite, make_scale, number, text_width

PITCH, LEFT = 26, 200.0
MAX_ROWS = 24


def pair_label(pair: SizePair) -> str:
    """Name two sizes briefly: `L1 resid_post, 256 to 512`."""
    return f"{short_hook(pair.hook_name)}, {pair.small or '?'} to {pair.large or '?'}"


def _rows(figure: Figure, labels: Sequence[str], keys: Sequence[Key]) -> list[float]:
    """Lay out one row a label; return their heights."""
    figure.left = min(LEFT, 20 + max(text_width(label) for label in labels))
    figure.legend(keys)
    figure.height = figure.top + PITCH * len(labels) + figure.bottom
    heights = [figure.top + PITCH * (i + 0.5) for i in range(len(labels))]
    for label, y in zip(labels, heights, strict=True):
        figure.text(figure.left - 10, y + 4, fit_text(label, figure.left - 14), anchor="end", cls="strong")
    return heights


def stitching_plot(pairs: Sequence[SizePair], which: Sequence[str] = ()) -> str:
    """Draw the FVU of the narrower SAE, of the same with latents of the wider one added, and of the wider one.

    Args:
        pairs: what was measured; the first `MAX_ROWS` are drawn.
        which: for each pair what tells it from others of its sizes, such as its seed.
    """
    title = "FVU when latents of the wider SAE are added to the narrower one"
    labels = [
        f"{pair_label(pair)}, {which[i]}" if i < len(which) and which[i] else pair_label(pair)
        for i, pair in enumerate(pairs)
    ]
    known = [i for i, pair in enumerate(pairs) if is_finite(pair.fvu_small) and is_finite(pair.fvu_large)]
    if not known:
        return empty(title)
    rows, labels = [pairs[i] for i in known[:MAX_ROWS]], [labels[i] for i in known[:MAX_ROWS]]
    figure = Figure(WIDTH, 0, right=20)
    keys = [Key("narrower", 1, marker="ring"), Key("with its novel latents", 2, marker="diamond")]
    keys += [Key("with its reconstruction latents", 4, marker="triangle"), Key("wider", 1, marker="circle")]
    if len(known) > MAX_ROWS:
        keys.append(Key(f"{len(known) - MAX_ROWS} more are not drawn", 0, marker="none"))
    heights = _rows(figure, labels, keys)
    values = finite(v for p in rows for v in (p.fvu_small, p.fvu_large, p.novel.fvu, p.known.fvu))
    x = make_scale(values, figure.left, figure.x1, log=min(values) > 0 and max(values) > 4 * min(values))
    figure.axes(x, make_scale([], figure.y1, figure.top), "FVU on held-out tokens (lower is better)", "", y_ticks=[])
    for pair, label, y in zip(rows, labels, heights, strict=True):
        marks = (
            ("with novel latents", pair.novel.fvu, "diamond", 2),
            ("with reconstruction latents", pair.known.fvu, "triangle", 4),
            ("wider", pair.fvu_large, "circle", 1),
            ("narrower", pair.fvu_small, "ring", 1),
        )
        shown = [(name, finite([value])[0], shape, colour) for name, value, shape, colour in marks if is_finite(value)]
        ends = [x(value) for _, value, _, _ in shown]
        figure.add("line", x1=min(ends), x2=max(ends), y1=y, y2=y, cls="gridline")
        for name, value, shape, colour in shown:
            hover = f"{label}, {name}: FVU {number(value)}"
            figure.marker(x(value), y, shape, cls=f"dot k{colour}", size=5, hover=hover)
    about = (
        f"{label}: {_or_dash(p.fvu_small)}, with novel latents {_or_dash(p.novel.fvu)}, with reconstruction "
        f"latents {_or_dash(p.known.fvu)}, wider {_or_dash(p.fvu_large)}"
        for label, p in zip(labels, rows, strict=True)
    )
    return figure.render(title, "; ".join(about) + ".")


def stability_plot(rows: Sequence[SeedRow]) -> str:
    """Draw how alike the latents of one size are between seeds, beside random rows."""
    title = "Mean similarity of latents with the nearest of another seed"
    shown = [row for row in rows if row.mean][:MAX_ROWS]
    if not shown:
        return empty(title)
    figure = Figure(WIDTH, 0, right=20)
    keys = [Key("one seed", 1, marker="circle"), Key("random rows, mean to p99", 0, band=True)]
    labels = [f"{short_hook(row.hook_name)}, {row.d_sae or '?'}" for row in shown]
    heights = _rows(figure, labels, keys)
    values = finite(value for row in shown for value in (*row.mean, row.null_mean, row.null_high))
    x = make_scale([*values, 1.0], figure.left, figure.x1, zero=True, pad=0.02)
    figure.axes(x, make_scale([], figure.y1, figure.top), "mean best similarity (1: the same)", "", y_ticks=[])
    for row, label, y in zip(shown, labels, heights, strict=True):
        if is_finite(row.null_mean) and is_finite(row.null_high):
            low, high = (x(value) for value in finite([row.null_mean, row.null_high]))
            figure.add(
                "rect", x=low, width=max(high - low, 1.0), y=y - 9, height=18.0, cls="band k0", hover="random rows"
            )
        for seed, mean in zip(row.seeds or range(len(row.mean)), row.mean, strict=False):
            figure.marker(x(mean), y, "circle", cls="dot k1", hover=f"{label}, seed {seed}: {mean:.3f}")
    about = (
        f"{label}: {number(sum(row.mean) / len(row.mean))}, random rows {_or_dash(row.null_mean)}"
        for label, row in zip(labels, shown, strict=True)
    )
    return figure.render(title, "; ".join(about) + ".")


def _or_dash(value: float | None) -> str:
    return number(value) if value is not None else "unknown"
