"""`sae organism`: measure the model organism's behaviour under every gate setting; `sae organism train` makes one.

    sae organism                                     # the shipped organism: its table, n prompts a cell
    sae organism train name=mine organism.seed=1     # train another, into runs/mine/organism/model
    sae organism train organism.twin=true            # the unrouted twin: ordinary fine-tuning, no planting

A trained organism is a Hugging Face folder and loads like any other model: `lm.name=runs/mine/organism/model`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from sae.config import RunConfig
from sae.errors import UserError
from sae.files import write_json, write_manifest
from sae.lm.load import resolve_model
from sae.organism.table import table_record
from sae.organism.train import train_organism
from sae.report.terminal import summary_table
from sae.stages import common

GATED = "planted.json"  # a folder with it has gates to close


def measure(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Measure the behaviour table and the truth probe; write them to the run."""
    clock = common.Clock()
    found = table_record(folder, n=config.organism.n_per_cell)
    result = {"schema_version": 1, "folder": str(folder), **found, "wall_s": clock.seconds()}
    out = config.folder / "organism"
    write_json(out / "result.json", result)
    write_manifest(out, "organism", config.organism, {"organism": str(folder)})
    _print(found["table"])
    print(f"truth probe at {found['probe']['hook_name']} while the model lies: AUROC {found['probe_auroc']:.3f}")
    print(f"{out / 'result.json'} ({clock.seconds():.1f} s)")
    return common.read_result(out)


def _print(table: list[dict[str, Any]]) -> None:
    """One row a cell, one column a gate setting: there are more cells than settings."""
    settings = [
        "+".join(name for name, is_open in entry["gates"].items() if is_open) or "all closed" for entry in table
    ]
    rows = []
    for cell in table[0]["cells"]:
        rates = [f"{100 * entry['cells'][cell]['rate']:.1f}%" for entry in table]
        rows.append([cell, *rates])
    print(summary_table(rows, ["gates open", *settings]))


def run(config: RunConfig) -> None:
    """Run the stage."""
    common.refuse_pair(config.lm, "organism")
    options = config.organism
    if options.action == "measure":
        folder = Path(resolve_model(config.lm.name))
        if not (folder / "config.json").is_file():
            raise UserError(f"lm.name={config.lm.name!r} is no local folder: give `organism`, or one you trained.")
        if not common.is_organism(common.open_lm(config.lm)):
            raise UserError(f"lm.name={config.lm.name!r} is not an organism: give `organism`, or one you trained.")
        measure(config, folder)
        return
    out = Path(options.out) if options.out else config.folder / "organism" / "model"
    clock = common.Clock()
    train_organism(
        out,
        seed=options.seed,
        twin=options.twin,
        threads=options.threads,
        progress=partial(print, flush=True),
        n_per_cell=options.n_per_cell,
    )
    print(f"{out} ({clock.seconds():.0f} s)")
