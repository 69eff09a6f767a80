"""The page's section on weights: where behaviours were located, what cuts do, the circuit, what mitigations leave."""

from typing import Any

from markupsafe import Markup

from sae.report.circuit import circuit_figure
from sae.report.plots import short_hook
from sae.report.svg import number
from sae.report.tables import Cell, Column, Line, Table, count_cell, number_cell, share_cell, table, text_cell
from sae.report.weights_records import CircuitFound, CutRow, LocatedRow, MitigatedRow, WeightsFound, WiredLatent

MAX_PARTS = 8  # writers or readers of a latent
MAX_ROWS = 60  # of a table
LOCALIZE = "localize/result.json"


def weights_view(found: WeightsFound) -> dict[str, Any] | None:
    """Return what the section shows; None where nothing was looked for in the weights."""
    view = {
        "located": _located(found.located),
        "cuts": _cuts(found.cuts),
        "latents": [_latent(latent) for latent in found.latents],
        "circuit": _circuit(found.circuit),
        "mitigated": _mitigated(found.mitigated),
    }
    return view if any(view.values()) else None


def _named(behavior: str, method: str, level: str) -> list[Cell]:
    return [text_cell(behavior), text_cell(method.replace("_", " ")), text_cell(level)]


NAMES = [Column("Behaviour", is_number=False), Column("Method", is_number=False), Column("Level", is_number=False)]


def _located(rows: list[LocatedRow]) -> Table | None:
    columns = [
        *NAMES,
        Column("Seed"),
        Column("AUROC", "of what was planted, by the scores"),
        Column("AUPRC", "area under precision and recall; by chance the base rate"),
        Column("Base rate", "share of weights or parts that were planted and matter"),
        Column("Decoys", "of as many best as there are planted ones, the share that is another behaviour's only"),
        Column("Evaluations", "forwards over the prompts; a backward counts two"),
    ]
    lines = [
        Line(
            [
                *_named(row.behavior, row.method, row.level),
                count_cell(row.seed),
                number_cell(row.auroc),
                number_cell(row.auprc),
                number_cell(row.base_rate),
                share_cell(row.decoy_share),
                number_cell(row.evaluations),
            ]
        )
        for row in rows
    ]
    return table("Located", columns, lines, limit=MAX_ROWS, tall=True, source=LOCALIZE)


def _cuts(rows: list[CutRow]) -> Table | None:
    columns = [
        *NAMES,
        Column("Weights cut"),
        Column("Before"),
        Column("After"),
        Column("Broken", "degenerate replies with the set cut"),
        Column("Others", "the largest change of another behaviour or of the facts"),
        Column("KL", "nats a token on harmless prompts"),
        Column("Random", "the behaviour with as large random sets cut"),
        Column("Comes back", "under masks on all other heads and neurons", is_number=False),
        Column("All bars", "gone, nothing else moved, random sets change nothing", is_number=False),
    ]
    lines = [
        Line(
            [
                *_named(row.behavior, row.method, row.level),
                share_cell(row.fraction),
                *(share_cell(value) for value in (row.before, row.after, row.degenerate, row.others)),
                number_cell(row.kl),
                share_cell(row.random),
                text_cell(row.comes_back),
                text_cell("yes" if row.passed else "no"),
            ],
            "best" if row.passed else "",
        )
        for row in rows
    ]
    return table("Cut", columns, lines, limit=MAX_ROWS, source=LOCALIZE)


def _latent(found: WiredLatent) -> dict[str, Any]:
    """One latent's writers and readers."""
    sides = []
    for name, parts, told in (("Writers", found.writers, "adds"), ("Readers", found.readers, "changes")):
        columns = [
            Column(name[:-1], is_number=False),
            Column(told, "to the difference between the classes" if told == "adds" else "without the latent"),
            Column("ablated", "how far that difference falls with the part mean-ablated"),
            Column("energy", "along the latent's row, by weights; 1 for a random direction"),
            Column("p", "share of random directions with as much"),
        ]
        lines = [
            Line([text_cell(part.part), *map(number_cell, (part.data, part.ablated, part.energy, part.p))])
            for part in parts[:MAX_PARTS]
        ]
        sides.append(table(f"{name} of latent {found.latent}", columns, lines))
    place = f"latent {found.latent} at {short_hook(found.hook_name)}"
    return {"title": f"{found.behavior}: {place}", "contrast": found.contrast, "sides": [one for one in sides if one]}


def _circuit(found: CircuitFound | None) -> dict[str, Any] | None:
    if found is None:
        return None
    title = f"Circuit of {found.behavior}"
    said = []
    if found.n_edges is not None and found.n_possible is not None:
        said.append(f"{found.n_edges:,} of {found.n_possible:,} edges between {found.n_nodes or 0:,} nodes")
    if found.faithfulness is not None:
        interval = "" if found.low is None or found.high is None else f" ({number(found.low)} to {number(found.high)})"
        said.append(f"faithfulness on held-out prompts {number(found.faithfulness)}{interval}")
    if found.random_mean is not None:
        most = "" if found.random_max is None else f", at most {number(found.random_max)}"
        said.append(f"random graphs of as many edges {number(found.random_mean)}{most}")
    if found.cpr is not None and found.cmd is not None:
        said.append(f"CPR {number(found.cpr)}, CMD {number(found.cmd)}")
    return {"figure": Markup(circuit_figure(found.graph, title)), "title": title, "said": "; ".join(said)}


def _mitigated(rows: list[MitigatedRow]) -> Table | None:
    columns = [
        Column("Behaviour", is_number=False),
        Column("Method", is_number=False),
        Column("Before"),
        Column("After"),
        Column("Restored", "the alternative, where the behaviour was due"),
        Column("Others", "the largest change of another behaviour"),
        Column("Facts"),
        Column("KL", "nats a token on harmless prompts"),
        Column("Changed", "parameters"),
        Column("Relearned in", "steps of fine-tuning on the behaviour until half of it is back"),
        Column("Prefix", "the behaviour's rate when replies begin with its first words"),
        Column("Steering", "its rate when the original's direction is added"),
    ]
    lines = [
        Line(
            [
                text_cell(row.behavior),
                text_cell(row.method),
                *(share_cell(value) for value in (row.before, row.after, row.restored, row.others, row.facts)),
                number_cell(row.kl),
                count_cell(row.n_changed),
                text_cell("" if row.relearned is None else str(row.relearned)),
                share_cell(row.prefix),
                share_cell(row.steering),
            ]
        )
        for row in rows
    ]
    return table("Mitigated", columns, lines)
