"""Whose the latents of a crosscoder are, as a histogram of their relative norms."""

from collections.abc import Sequence

from sae.report.plots import WIDTH, empty
from sae.report.svg import Figure, Key, Scale, finite, make_scale, nice_ticks, number

FIRST, SHARED, PAIR, BETWEEN = 2, 1, 3, 0  # colours
NAMES = {FIRST: "first only", SHARED: "shared", PAIR: "second only", BETWEEN: "between"}


def norm_histogram(counts: Sequence[int], exclusive: float, shared: float, label: str) -> str:
    """Draw how many latents have which relative norm; heights grow as the root of a count, so that few stay visible.

    Args:
        counts: over equal bins from 0 (the first model's alone) to 1 (the second's).
        exclusive: below this, and above 1 - this, a latent is one model's.
        shared: within this of 0.5 it is both models'.
        label: of the crosscoder.
    """
    title = f"Relative norms of latents: {label}"
    values = [max(0.0, value) for value in finite(counts)]
    if not values or max(values) == 0:
        return empty(title)
    figure = Figure(WIDTH, 0, left=52, bottom=60)
    figure.legend([Key(name, colour, marker="square", look="bar") for colour, name in NAMES.items()])
    figure.height = figure.top + 150 + figure.bottom
    x = Scale(0.0, 1.0, figure.left, figure.x1)
    y = make_scale([value**0.5 for value in values], figure.y1, figure.top, zero=True)
    ticks = sorted({*nice_ticks(0, max(values), 3), *nice_ticks(0, max(values) / 10, 1)})
    figure.axes(
        x,
        y,
        "relative norm of the decoder row",
        "latents",
        x_ticks=[(place, number(place)) for place in (0.0, 0.25, 0.5, 0.75, 1.0)],
        y_ticks=[(value**0.5, number(value)) for value in ticks],
    )
    for place, name, anchor in ((0.0, "first only", "start"), (0.5, "shared", "middle"), (1.0, "second only", "end")):
        figure.text(x(place), figure.y1 + 32, name, anchor=anchor, cls="small")
    sums = dict.fromkeys(NAMES, 0.0)
    for i, value in enumerate(values):
        low, high = i / len(values), (i + 1) / len(values)
        zone = _zone((low + high) / 2, exclusive, shared)
        sums[zone] += value
        if value > 0:
            top, hover = y(value**0.5), f"{low:.2f} to {high:.2f}: {number(value)} latents"
            box = {"x": x(low) + 0.5, "width": x(high) - x(low) - 1, "y": top, "height": figure.y1 - top}
            figure.add("rect", **box, cls=f"bar k{zone}", hover=hover)
    about = ", ".join(f"{NAMES[zone]} {number(value)}" for zone, value in sums.items())
    return figure.render(title, f"By bins: {about}.")


def _zone(norm: float, exclusive: float, shared: float) -> int:
    """The colour of a relative norm."""
    if abs(norm - 0.5) <= shared:
        return SHARED
    return FIRST if norm < exclusive else PAIR if norm > 1 - exclusive else BETWEEN
