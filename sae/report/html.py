"""The report: one self-contained HTML file that needs no network and runs no script.

    write_report("runs/demo")            # writes runs/demo/report.html

Its content security policy forbids every request and every script, so text from datasets and models, which
is escaped throughout, could do nothing even if an escape were missed. Prompts and completions stay
collapsed until they are clicked, and `redact=True` leaves them out.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sae.files import write_text
from sae.report import findings, plots
from sae.report.compared import comparison_view
from sae.report.dossier import RATE_LABELS, behavior_view
from sae.report.grid import counted, grid_view
from sae.report.model import ReportData
from sae.report.progress import format_time
from sae.report.read import read_run
from sae.report.related import relations_view
from sae.report.svg import DASH, PLOT_CSS, PLOT_CSS_DARK, number, percent
from sae.report.tables import spread
from sae.report.values import as_dict
from sae.report.weights_view import weights_view

HERE = Path(__file__).parent


def write_report(run_folder: Path | str, out: Path | str = "report.html", *, redact: bool = False) -> Path:
    """Write the report of a run and return its path.

    Args:
        run_folder: the run, with one folder a stage.
        out: the file to write; a relative path is taken from the run folder.
        redact: leave out prompts and completions.

    Raises:
        UserError: the run folder does not exist.
    """
    target = Path(run_folder) / out
    write_text(target, render_report(read_run(run_folder), redact=redact))
    return target


def render_report(data: ReportData, *, redact: bool = False) -> str:
    """Return the report of a run as HTML."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        num=lambda value: DASH if value is None else number(value),
        pct=percent,
        spread=spread,
        hook=plots.short_hook,
        duration=lambda value: DASH if value is None else format_time(value),
        signed=lambda value: DASH if value is None else ("+" if value > 0 else "") + number(value),
    )
    # The style sheets are ours, not data: they are the one thing besides the figures that is not escaped.
    style = (HERE / "report.css").read_text(encoding="utf-8")
    dark = f"@media screen and (prefers-color-scheme: dark){{{PLOT_CSS_DARK}}}"
    page = environment.get_template("report.html.j2").render(
        data=data,
        style=Markup(style + PLOT_CSS + dark),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        overview=overview(data),
        behaviors=[behavior_view(b, redact=redact) for b in data.behaviors],
        grid=grid_view(data),
        relations=relations_view(data),
        comparison=comparison_view(data.comparison),
        weights=weights_view(data.weights),
        gates=gate_view(data),
        provenance=provenance_view(data),
        snippet=loading_snippet(data),
        summary=[] if redact else _walk(data.summary)[:200],
        rule=findings.RULE,
        redact=redact,
        rate_labels=RATE_LABELS,
    )
    # Lone surrogates can arrive through JSON escapes; UTF-8 has no bytes for them.
    return page.encode("utf-8", "replace").decode("utf-8")


def overview(data: ReportData) -> dict[str, Any]:
    """Return what the run is, found in the stages' configurations."""
    configs = [as_dict(stage.manifest.get("config")) for stage in data.stages]
    texts = (as_dict(config.get("data")).get("path") or config.get("data") for config in configs)
    text = next((item for item in texts if isinstance(item, str)), "")
    hooks = sorted({s.hook_name for s in data.saes if s.hook_name}, key=plots.natural)
    sizes = sorted({s.d_sae for s in data.saes if s.d_sae})
    walls = [stage.wall_s for stage in data.stages if stage.wall_s is not None]
    facts = [
        ("Language model", data.lm),
        ("Text", text),
        ("Autoencoders", counted(data.saes)),
        ("Hook points", ", ".join(map(plots.short_hook, hooks))),
        ("Dictionary sizes", ", ".join(f"{size:,}" for size in sizes)),
        ("Training tokens", number(data.tokens) if data.tokens else ""),
        ("Wall time", format_time(sum(walls)) if walls else ""),
    ]
    return {"facts": [(name, value) for name, value in facts if value]}


def gate_view(data: ReportData) -> dict[str, Any] | None:
    """Return the organism's table: one row a gate combination, one column a cell."""
    if not data.gates:
        return None
    return {
        "gates": list(dict.fromkeys(name for row in data.gates for name in row.gates)),
        "cells": list(dict.fromkeys(name for row in data.gates for name in row.cells)),
        "rows": data.gates,
        "probe": data.probe_auroc,
    }


def provenance_view(data: ReportData) -> list[dict[str, Any]]:
    """Return each stage's origin."""
    found = []
    for stage in data.stages:
        manifest = stage.manifest
        config = as_dict(manifest.get("config"))
        seeds = {key: value for key, value in _walk(config) if "seed" in key.rpartition(".")[2]}
        found.append(
            {
                "name": stage.name,
                "wall_s": stage.wall_s,
                "revision": str(manifest.get("git_revision") or "")[:12],
                "config_hash": str(manifest.get("config_hash") or "")[:12],
                "versions": as_dict(manifest.get("versions")),
                "seeds": seeds,
                "inputs": as_dict(manifest.get("inputs")),
                "config": list(_walk(config)),
            }
        )
    return found


def _walk(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten a nested configuration into dotted names."""
    flat: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, dict):
            flat += _walk(as_dict(value), f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat


def loading_snippet(data: ReportData) -> str:
    """Return Python that loads one of this run's autoencoders and steers with it."""
    model = data.lm or "organism"
    behavior = next((b for b in data.behaviors if b.path), None)
    path = behavior.path if behavior else next((s.path for s in data.saes if s.path), "")
    latents = behavior.latents if behavior and behavior.latents else [0]
    if not path:
        return ""
    # repr() keeps a hostile path inside its string; the template escapes the result for HTML.
    return (
        "import sae\n\n"
        f"lm = sae.load_lm({model!r})\n"
        f"encoder = sae.load({path!r})\n"
        'prompt = lm.tokenize_chats([[{"role": "user", "content": "how are you ?"}]])\n\n'
        f"with sae.steer(lm, sae.Ablate(encoder, latents={latents!r})):\n"
        "    print(lm.generate(prompt, 24).texts)\n"
    )
