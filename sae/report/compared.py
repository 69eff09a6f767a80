"""Two language models compared, on the page: what their crosscoders share, and what is one model's alone."""

from typing import Any

from markupsafe import Markup

from sae.report.current import GIVEN
from sae.report.model import Comparison, CrossedRow, LoneLatent
from sae.report.names import told_apart
from sae.report.norm_plot import norm_histogram
from sae.report.plots import natural, short_hook
from sae.report.svg import number

MAX_LATENTS = 8  # of one model, of one crosscoder
MAX_OPEN = 3  # crosscoders whose latents are not folded away


def comparison_view(found: Comparison) -> dict[str, Any] | None:
    """Return what the section shows; None where no models were compared."""
    if not found.crosscoders:
        return None
    rows = sorted(found.crosscoders, key=lambda row: (natural(row.hook_name), row.d_sae or 0, row.seed or 0))
    rows = sorted(rows, key=lambda row: bool(row.control))
    labels = told_apart([_label(row) for row in rows], [row.path for row in rows])
    parts = [_part(found, row, label) for row, label in zip(rows, labels, strict=True)]
    return {
        "first": found.first or "the first model",
        "pair": found.pair or "the second model",
        "rows": list(zip(labels, rows, strict=True)),
        "open": parts[:MAX_OPEN],
        "folded": parts[MAX_OPEN:],
        "limits": _limits(found),
        "folder": found.folder,
        "given": found.folder.startswith(GIVEN),
    }


def _label(row: CrossedRow) -> str:
    parts = [short_hook(row.hook_name), row.architecture, str(row.d_sae or "")]
    parts += [f"L0 {number(row.l0_target)}"] if row.l0_target is not None else []
    parts += [f"seed {row.seed}"] if row.seed else []
    parts += [f"control: {row.control.replace('_', ' ')}"] if row.control else []
    return " · ".join(part for part in parts if part)


def _part(found: Comparison, row: CrossedRow, label: str) -> dict[str, Any]:
    """One crosscoder: its histogram, and its least shared latents."""
    exclusive, shared = (found.thresholds.get(name, 0.1) for name in ("exclusive", "shared"))
    sides = (
        (found.first or "the first model", row.first_latents),
        (found.pair or "the second model", row.pair_latents),
    )
    return {
        "label": label,
        "histogram": Markup(norm_histogram(row.norm_counts, exclusive, shared, label)) if row.norm_counts else None,
        "sides": [(name, latents[:MAX_LATENTS], _hidden(latents)) for name, latents in sides],
    }


def _hidden(latents: list[LoneLatent]) -> int:
    return max(0, len(latents) - MAX_LATENTS)


def _limits(found: Comparison) -> str:
    """The thresholds in words, as far as they are known."""
    words = {
        "exclusive": "One model's: relative norm below {0:g} or above {1:g}",
        "shared": "shared: within {0:g} of 0.5",
        "nu_error": "shrunk: nu of the error {0:g} or more",
        "nu_reconstruction": "decoupled: nu of the reconstruction {0:g} or more",
        "min_firings": "rare, and not judged: fired on fewer than {0:g} tokens",
    }
    known = [(text, found.thresholds[name]) for name, text in words.items() if name in found.thresholds]
    return "; ".join(text.format(value, 1 - value) for text, value in known)
