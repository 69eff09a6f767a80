"""The figures of a report, each a function from plain records to one inline SVG string.

All take any data: missing or non-finite values are left out, and a figure without data says so. Colour is
never the only carrier of meaning (markers, dashes and labels differ too), and every figure has a title and
a description.
"""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae.report.evidence import Dose, Ranked, Rate
from sae.report.findings import quantile
from sae.report.svg import (
    DASHES,
    N_COLOURS,
    Figure,
    Key,
    Scale,
    finite,
    fit_text,
    is_finite,
    make_scale,
    number,
    percent,
    power_of_ten,
    text_width,
)

WIDTH = 460.0
MAX_POINTS = 240  # of one training curve; more would not be visible
PERCENT_TICKS = [(share, f"{100 * share:.0f}%") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]


def short_hook(hook_name: str) -> str:
    """Shorten TransformerLens hook names: `blocks.2.hook_resid_post` becomes `L2 resid_post`.

    Of a transcoder or crosscoder each part is: `blocks.2.hook_resid_post+pair.blocks.2.hook_resid_post` becomes
    `L2 resid_post + pair L2 resid_post`.
    """
    parts = re.split(r"(->|\+)", hook_name)
    joins = {"->": " → ", "+": " + "}
    return "".join(joins.get(part) or _short(part) for part in parts)


def _short(name: str) -> str:
    """Shorten one hook point, maybe of the second model."""
    place = name.removeprefix("pair.")
    parts = place.split(".")
    if len(parts) >= 3 and parts[0] == "blocks" and parts[1].isdigit():
        place = f"L{parts[1]} {'.'.join(parts[2:]).replace('hook_', '')}"
        return place if len(name) == len(".".join(parts)) else f"pair {place}"
    return name


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 9 comes before layer 15."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d{1,9})", name)]


def empty(title: str, width: float = WIDTH) -> str:
    """Return the figure that says there is nothing to draw."""
    figure = Figure(width, 90)
    figure.text(width / 2, 50, "no data to draw", anchor="middle")
    return figure.render(title, "No data.")


def colour(index: int) -> int:
    """Return the colour class of a series."""
    return index % N_COLOURS + 1


def density_histogram(edges: Sequence[float], counts: Sequence[float], label: str = "") -> str:
    """Draw how often latents fire: a histogram over log10 of the share of tokens."""
    title = f"Firing density of latents{': ' + label if label else ''}"
    width = 300.0
    safe_counts = [max(0.0, v) for v in finite(c if is_finite(c) else 0.0 for c in counts)]
    safe_edges = finite(edges)
    if not safe_counts or len(safe_edges) != len(safe_counts) + 1 or max(safe_counts) == 0:
        return empty(title, width)
    figure = Figure(width, 190, left=44, right=10, bottom=40)
    x = make_scale(safe_edges, figure.left, figure.x1, pad=0.0)
    y = make_scale(safe_counts, figure.y1, figure.top, zero=True, pad=0.08)
    ticks = [t for t in x.ticks(5) if float(t).is_integer()] or x.ticks(3)
    figure.axes(
        x,
        y,
        "share of tokens",
        "",
        x_ticks=[(t, power_of_ten(t)) for t in ticks],
        y_ticks=[(t, number(t)) for t in y.ticks(3)],
    )
    for low, high, count in zip(safe_edges, safe_edges[1:], safe_counts, strict=False):
        left, right = sorted((x(low), x(high)))
        if count > 0:
            hover = f"10^{number(low)} to 10^{number(high)}: {number(count)} latents"
            gap = min(1.0, (right - left) * 0.15)
            box = {"x": left + gap / 2, "width": max(right - left - gap, 0.5), "y": y(count)}
            figure.add("rect", **box, height=figure.y1 - y(count), cls="bar k1 soft", hover=hover)
    return figure.render(title, f"{number(sum(safe_counts))} latents fired at least once.")


def ranked_latents(rows: Sequence[Ranked], chosen: Sequence[bool] = (), limit: int = 14) -> str:
    """Draw the best latents with their interval: filled where significant, hollow where not.

    `chosen` says for each row whether it is one of the latents of the causal test.
    """
    title = "Latents ranked by how well they tell the behaviour apart (AUROC)"
    stars = [*chosen, *[False] * (len(rows) - len(chosen))]
    kept = [(row, star) for row, star in zip(rows, stars, strict=True) if is_finite(row.auroc)][:limit]
    shown = [row for row, _ in kept]
    if not shown:
        return empty(title)
    sizes = len({row.d_sae for row in shown}) > 1
    varied = len({row.position for row in shown}) > 1
    labels = [
        " · ".join(
            [
                plain
                for plain in (
                    short_hook(r.hook_name).split(" ")[0],
                    f"{r.d_sae}" if sizes and r.d_sae else "",
                    str(r.latent),
                )
                if plain
            ]
        )
        + (f" · {r.position}" if varied and r.position else "")
        for r in shown
    ]
    left = min(200.0, 40 + max(text_width(label) for label in labels))
    figure = Figure(WIDTH, 0, left=left, right=56)
    figure.legend(
        [
            Key("significant (q < 0.05)", 1, marker="circle"),
            Key("not significant", 1, marker="ring"),
            Key("★ used in the causal test", 0, marker="none"),
        ][: 3 if any(stars) else 2]
    )
    figure.height = figure.top + 22 * len(shown) + figure.bottom
    bounds = [*finite(v for r in shown for v in (r.auroc, r.low, r.high)), 0.5, 1.0]
    x = Scale(min(bounds) - 0.01, max(bounds) + 0.01, figure.left, figure.x1)
    figure.axes(x, make_scale([], figure.y1, figure.top), "AUROC on the find split", "", y_ticks=[])
    figure.add("line", x1=x(0.5), x2=x(0.5), y1=figure.top, y2=figure.y1, cls="reference")
    for i, (row, label) in enumerate(zip(shown, labels, strict=True)):
        y, auroc = figure.top + 22 * i + 11, finite([row.auroc])[0]
        star = kept[i][1]
        figure.text(
            figure.left - 10,
            y + 4,
            ("★ " if star else "") + fit_text(label, left - 28),
            anchor="end",
            cls="strong",
        )
        if is_finite(row.low) and is_finite(row.high):
            low, high = finite([row.low, row.high])
            figure.add("line", x1=x(low), x2=x(high), y1=y, y2=y, cls="whisker k1")
        solid = row.q is None or row.q < 0.05
        figure.marker(x(auroc), y, "circle" if solid else "ring", cls="dot k1", hover=f"{label}: AUROC {auroc:.3f}")
        figure.text(figure.x1 + 10, y + 4, f"{auroc:.3f}", cls="strong")
    return figure.render(
        title, "; ".join(f"{label} {r.auroc:.3f}" for label, r in zip(labels[:5], shown, strict=False))
    )


def dose_response(
    points: Sequence[Dose],
    controls: Sequence[Sequence[float | None]] = (),
    behavior: str = "behaviour",
    natural: tuple[float, float] | None = None,
) -> str:
    """Draw the behaviour's rate against the dose with its interval, over the band of the random controls.

    `natural` marks the doses that prompts give the latents by themselves.
    """
    title = f"Dose-response: rate of {behavior} against the clamp value"
    kept = [p for p in points if is_finite(p.dose) and is_finite(p.rate.rate)]
    if not kept:
        return empty(title)
    figure = Figure(WIDTH, 330)
    columns: list[tuple[float, list[float]]] = []
    for i, point in enumerate(points):
        draws = finite(draw[i] for draw in controls if i < len(draw))
        if draws and is_finite(point.dose):
            columns.append((finite([point.dose])[0], draws))
    keys = [Key("chosen latents, 95% interval", 1, marker="circle")]
    if columns:
        keys += [
            Key(f"random, mean of {max(len(d) for _, d in columns)}", 2, dash=DASHES[1]),
            Key("random, p5 to p95", 2, band=True),
        ]
    if natural is not None:
        keys.append(Key("natural range", 0, band=True))
    figure.legend(keys)
    doses = finite(p.dose for p in kept)
    x = make_scale(doses + [dose for dose, _ in columns], figure.left, figure.x1, pad=0.04)
    y = Scale(0.0, 1.0, figure.y1, figure.top + 6)
    figure.axes(x, y, "dose", f"rate of {fit_text(behavior, 150)}", y_ticks=PERCENT_TICKS)
    if x.low < 0 < x.high:
        figure.add("line", x1=x(0), x2=x(0), y1=figure.top, y2=figure.y1, cls="reference")
    if natural is not None:
        low, high = (min(max(dose, x.low), x.high) for dose in natural)
        height = figure.y1 - figure.top - 6
        figure.add("rect", x=x(low), y=figure.top + 6, width=x(high) - x(low), height=height, cls="band k0")
    if columns:
        upper = [(x(dose), y(quantile(draws, 0.95))) for dose, draws in columns]
        lower = [(x(dose), y(quantile(draws, 0.05))) for dose, draws in columns]
        figure.path(upper + lower[::-1], cls="band k2", close=True)
        means = [(x(dose), y(sum(draws) / len(draws))) for dose, draws in columns]
        figure.path(means, cls="line k2", dash=DASHES[1])
    ranged = [p for p in kept if is_finite(p.rate.low) and is_finite(p.rate.high)]
    top = [(x(p.dose), y(finite([p.rate.high])[0])) for p in ranged]
    base = [(x(p.dose), y(finite([p.rate.low])[0])) for p in ranged]
    figure.path(top + base[::-1], cls="band k1", close=True)
    figure.path([(x(p.dose), y(p.rate.rate)) for p in kept], cls="line k1")
    for p in kept:
        figure.marker(
            x(p.dose),
            y(p.rate.rate),
            "circle",
            cls="dot k1",
            hover=f"dose {number(p.dose)}: {percent(p.rate.rate)}",
        )
    about = ", ".join(f"{number(p.dose)}: {percent(p.rate.rate)}" for p in kept)
    return figure.render(title, f"Rate at each dose: {about}.")


@dataclass(frozen=True)
class RateRow:
    """One line of a rate comparison: a rate with its interval, or many random draws (one dot each)."""

    label: str
    rate: Rate | None = None
    draws: Sequence[float] = field(default_factory=list)
    colour: int = 0


def rate_bars(rows: Sequence[RateRow], title: str) -> str:
    """Draw rates side by side: bars with intervals for measurements, strips of dots for controls."""
    shown = [row for row in rows if (row.rate and is_finite(row.rate.rate)) or finite(row.draws)]
    if not shown:
        return empty(title)
    left = min(190.0, 20 + max(text_width(row.label) for row in shown))
    figure = Figure(WIDTH, 0, left=left, right=56, bottom=40)
    pitch = 34
    figure.height = figure.top + pitch * len(shown) + figure.bottom
    x = Scale(0.0, 1.0, figure.left, figure.x1)
    for share, label in PERCENT_TICKS:
        figure.add("line", x1=x(share), x2=x(share), y1=figure.top, y2=figure.y1, cls="gridline")
        figure.text(x(share), figure.y1 + 17, label, anchor="middle")
    about = []
    for i, row in enumerate(shown):
        y, cls = figure.top + pitch * i + pitch / 2, f"k{row.colour}"
        figure.text(figure.left - 10, y + 4, fit_text(row.label, left - 14), anchor="end", cls="strong")
        value = (
            _draw_rate(figure, x, y, row.rate, cls)
            if row.rate and is_finite(row.rate.rate)
            else _draw_strip(figure, x, y, row.draws, cls)
        )
        figure.text(figure.x1 + 10, y + 4, percent(value), cls="strong")
        about.append(f"{row.label}: {percent(value)}")
    figure.add("line", x1=figure.left, x2=figure.left, y1=figure.top, y2=figure.y1, cls="axis")
    return figure.render(title, "; ".join(about))


def _draw_rate(figure: Figure, x: Scale, y: float, rate: Rate, cls: str) -> float:
    """Draw one bar with its interval; return the value to print."""
    value = finite([rate.rate])[0]
    spread = f", {percent(rate.low)} to {percent(rate.high)}" if rate.low is not None else ""
    hover = f"{percent(value)}{spread}{f', n={rate.n}' if rate.n else ''}"
    width = max(x(value) - x.start, 1.0)
    figure.add("rect", x=x.start, y=y - 7, width=width, height=14.0, cls=f"bar soft {cls}", hover=hover)
    if is_finite(rate.low) and is_finite(rate.high):
        low, high = (x(v) for v in finite([rate.low, rate.high]))
        figure.add(
            "path",
            d=f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8",
            cls="whisker ink",
        )
    return value


def _draw_strip(figure: Figure, x: Scale, y: float, draws: Sequence[float], cls: str) -> float:
    """Draw one dot per random draw and a tick at their mean; return the mean."""
    values = finite(draws)
    mean = sum(values) / len(values)
    for i, value in enumerate(values[:400]):
        # The golden ratio spreads the dots evenly without a random generator: same data, same picture.
        lift = ((i * 0.618034) % 1 - 0.5) * 18
        figure.add("circle", cx=x(value), cy=y + lift, r=2.0, cls=f"bar faint {cls}")
    hover = f"mean {percent(mean)}; p5 {percent(quantile(values, 0.05))}, p95 {percent(quantile(values, 0.95))}"
    figure.add(
        "rect",
        x=x(mean) - 1.5,
        y=y - 12,
        width=3.0,
        height=24.0,
        cls=f"bar {cls}",
        hover=f"{hover}; {len(values)} draws",
    )
    return mean


def dumbbell(before: Rate | None, after: Rate | None, controls: Sequence[float] = ()) -> str:
    """Draw the change of one rate as a small strip: before (ring), after (dot), the controls (band)."""
    title = "Rate before and after the intervention"
    figure = Figure(440, 40, left=8, right=8)
    x = Scale(0.0, 1.0, figure.left, figure.x1)
    y = 16.0
    figure.add("line", x1=x(0), x2=x(1), y1=y, y2=y, cls="gridline")
    values = finite(controls)
    if values:
        low, high = x(quantile(values, 0.05)), x(quantile(values, 0.95))
        hover = f"random controls, p5 to p95 of {len(values)}"
        figure.add("rect", x=low - 2, width=high - low + 4, y=y - 9, height=18.0, cls="band k0", hover=hover)
    if before and after and is_finite(before.rate) and is_finite(after.rate):
        figure.add("line", x1=x(before.rate), x2=x(after.rate), y1=y, y2=y, cls="line k1 soft")
    for rate, shape in ((before, "ring"), (after, "circle")):
        if rate and is_finite(rate.rate):
            figure.marker(x(rate.rate), y, shape, cls="dot k1", size=5.5)
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        figure.text(x(share), 37, f"{100 * share:.0f}%", anchor=anchor, cls="small")
    return figure.render(
        title, f"From {percent(before.rate if before else None)} to {percent(after.rate if after else None)}."
    )


def _curves(records: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Collect one metric's values over the steps, per autoencoder."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        step = record.get("step")
        if isinstance(step, bool) or not isinstance(step, int | float) or not is_finite(step):
            continue
        for key, value in record.items():
            name, _, last = key.rpartition("/")
            if last == metric and name and isinstance(value, int | float) and is_finite(value):
                series.setdefault(name, []).append((finite([step])[0], finite([value])[0]))
    return {name: _thin(sorted(points)) for name, points in sorted(series.items())}


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep at most `MAX_POINTS`, the first and the last among them."""
    if len(points) <= MAX_POINTS:
        return points
    stride = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(i * stride)] for i in range(MAX_POINTS)]


def training_curves(
    records: Sequence[Mapping[str, Any]], metric: str, label: str, limit: int = 60, controls: Container[str] = ()
) -> str:
    """Draw one metric over the training steps: a colour per hook point, a dash per dictionary size.

    Args:
        records: the lines of `metrics.jsonl`.
        metric: the last part of a key.
        label: what the metric is called.
        limit: curves drawn.
        controls: folder names of autoencoders that are controls, whose curves are faint.
    """
    title = f"Training: {label}"
    series = _curves(records, metric)
    if not series:
        return empty(title)
    names = list(series)[:limit]
    kinds = {name: _kind(name) for name in names}
    hooks = sorted({hook for hook, _ in kinds.values()}, key=natural)
    sizes = sorted({size for _, size in kinds.values()}, key=lambda size: (len(size), size))
    figure = Figure(WIDTH, 330)
    keys = [Key(short_hook(hook) or "all", colour(i)) for i, hook in enumerate(hooks)]
    if len(sizes) > 1:
        keys += [Key(f"d_sae {size or '?'}", 0, DASHES[i % len(DASHES)]) for i, size in enumerate(sizes)]
    if any(_folder(name) in controls for name in names):
        keys.append(Key("faint: control", 0, marker="none"))
    if len(series) > limit:
        keys.append(Key(f"{len(series) - limit} more are not drawn", 0, marker="none"))
    figure.legend(keys)
    values = [value for name in names for _, value in series[name]]
    steps = [step for name in names for step, _ in series[name]]
    log = min(values) > 0 and max(values) > 20 * min(values)
    y = make_scale(values, figure.y1, figure.top + 4, log=log, zero=True)
    # Long tick labels must not reach the axis' name.
    figure.left = max(figure.left, 32 + max(text_width(number(tick)) for tick in y.ticks()))
    x = make_scale(steps, figure.left, figure.x1, pad=0.01)
    figure.axes(x, y, "step", label)
    for name in names:
        hook, size = kinds[name]
        line = [(x(step), y(value)) for step, value in series[name]]
        cls = f"line thin k{colour(hooks.index(hook))}" + (" faint" if _folder(name) in controls else "")
        figure.path(line, cls=cls, dash=DASHES[sizes.index(size) % len(DASHES)], hover=name)
    ends = ", ".join(f"{name} {number(series[name][-1][1])}" for name in names[:12])
    return figure.render(title, f"Last values: {ends}.")


def _kind(name: str) -> tuple[str, str]:
    """Split an autoencoder's key, `<hook name>/<architecture>-<d_sae>-...`, into hook name and size."""
    hook, _, rest = name.rpartition("/")
    found = re.search(r"-(\d+)(?:-|$)", rest)
    return hook, found.group(1) if found else ""


def _folder(name: str) -> str:
    """The folder name in an autoencoder's key."""
    return name.rpartition("/")[2]
