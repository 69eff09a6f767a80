"""The autoencoders of a run on the page: their table, their figures, how often their latents fire."""

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from sae.report import grid_plots, plots
from sae.report.model import ReportData, SaeRow
from sae.report.names import told_apart
from sae.report.svg import DASH, MINUS, number, percent

MAX_HISTOGRAMS = 12

CURVES = (
    ("fvu", "FVU (share of variance unexplained)"),
    ("l0", "L0 (active latents per token)"),
    ("dead_fraction", "share of dead latents"),
)


def _fixed(digits: int) -> Callable[[float | None], str]:
    """Format a table column: the same number of decimals in every row."""
    return lambda value: DASH if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


# Name, what it means, the field of a row (of a crosscoder's hook points some are absent), how it is written.
COLUMNS: tuple[tuple[str, str, str, Callable[[float | None], str]], ...] = (
    ("L0", "mean active latents per token", "l0", _fixed(1)),
    ("FVU", "share of variance unexplained", "fvu", _fixed(3)),
    ("cosine", "between input and reconstruction", "cosine", _fixed(3)),
    ("dead", "latents that stay silent", "dead_fraction", percent),
    ("CE recovered", "1 = as good as the clean model, 0 = zero ablation", "ce_recovered", _fixed(3)),
    ("ΔCE", "cross entropy added by splicing in the reconstruction, nats", "delta_ce", _fixed(4)),
    ("KL", "from the clean model's predictions, nats", "kl", _fixed(4)),
)


def grid_view(data: ReportData) -> dict[str, Any]:
    """Return the autoencoder table and its figures; controls come after what they stand beside."""
    rows = sorted(data.saes, key=_order)
    shown = [column for column in COLUMNS if any(column[3](getattr(row, column[2])) != DASH for row in rows)]

    def cells(row: Any) -> list[str]:
        return [write(getattr(row, name, None)) for _, _, name, write in shown]

    table = [
        {
            "sae": row,
            "cells": cells(row),
            "best": _is_best(row, rows),
            "sources": [(source, cells(source)) for source in row.sources],
        }
        for row in rows
    ]
    names = {key.rpartition("/")[2] for record in data.curves for key in record}
    controls = {row.path.rpartition("/")[2] for row in rows if row.control}
    labels = sae_labels(rows)
    with_density = [(row, label) for row, label in zip(rows, labels, strict=True) if row.density_counts]
    one_l0 = grid_plots.one_l0(rows)
    return {
        "columns": [(name, hint) for name, hint, _, _ in shown],
        "rows": table,
        "marked": any(row.standing for row in rows),
        "crossed": any(row.sources for row in rows),
        "figure": Markup(grid_plots.fvu_size(rows) if one_l0 else grid_plots.fvu_l0(rows)),
        "figure_title": "Reconstruction against dictionary size." if one_l0 else "Reconstruction against sparsity.",
        "curves": [
            (label, Markup(plots.training_curves(data.curves, metric, label, controls=controls)))
            for metric, label in CURVES
            if metric in names
        ],
        "histograms": [
            (label, Markup(plots.density_histogram(row.density_edges, row.density_counts, label)))
            for row, label in with_density[:MAX_HISTOGRAMS]
        ],
        "hidden_histograms": max(0, len(with_density) - MAX_HISTOGRAMS),
    }


def _order(row: SaeRow) -> tuple[Any, ...]:
    place = (plots.natural(row.hook_name), row.d_sae or 0, row.l0_target or 0, row.seed or 0)
    return (*place, row.before_training, row.control)


def counted(saes: Sequence[SaeRow]) -> str:
    """Say how many autoencoders there are, and how many beside them; empty without any."""
    before = sum(row.before_training for row in saes)
    controls = sum(bool(row.control) and not row.before_training for row in saes)
    parts = [str(len(saes) - before - controls)] if saes else []
    parts += [f"{controls} control{'s' if controls != 1 else ''}"] if controls else []
    parts += [f"{before} from before training"] if before else []
    return ", ".join(parts)


def sae_labels(rows: Sequence[SaeRow]) -> list[str]:
    """Name autoencoders briefly, no two alike."""
    return told_apart([_label(row) for row in rows], [row.path for row in rows])


def _label(row: SaeRow) -> str:
    parts = [plots.short_hook(row.hook_name), row.architecture, str(row.d_sae or "")]
    if row.l0_target is not None:
        parts.append(f"L0 {number(row.l0_target)}")
    parts += [f"seed {row.seed}"] if row.seed else []
    return " · ".join([part for part in (*parts, *row.standing) if part])


def _is_best(row: SaeRow, rows: Sequence[SaeRow]) -> bool:
    """Tell whether a row has the lowest FVU of its hook point, among those trained in this run."""
    peers = [peer.fvu for peer in grid_plots.trained(rows) if peer.hook_name == row.hook_name and peer.fvu is not None]
    return not row.standing and len(peers) > 1 and row.fvu is not None and row.fvu == min(peers)
