"""`sae l0`: which L0 fits a hook point and a dictionary size, before a long training is spent on another.

    sae l0 hook_name=blocks.4.hook_resid_post d_sae=4096

Trains SAEs with several values of L0 from one stream, `train.total_tokens` each, and compares how far decoder rows
reach into tokens that do not need them (see `sae.evals.l0`). `sae.l0=[...]` names the values to try.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from sae.activations.harvest import Passes
from sae.autoencoder.sae import SAE
from sae.config import RunConfig, SAEGridConfig
from sae.errors import UserError
from sae.evals.l0 import Suggestion, nth_projections, ranks, suggest
from sae.files import write_json, write_manifest
from sae.lm.model import LanguageModel
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.evaluate import ensure_evaluated
from sae.stages.harvest import ensure_tokens

JOB = "l0"
CANDIDATES = (4, 8, 16, 32, 64, 128)


def run(config: RunConfig) -> None:
    """Run the stage."""
    lm = common.open_lm(config.lm)
    clock = common.Clock()
    probe = _probe_config(config)
    if config.force:
        shutil.rmtree(probe.folder, ignore_errors=True)  # the trials are this stage's own
    # SAEs that training goes on from, as they were before it, are no candidates.
    records = [record for record in ensure_evaluated(common.as_needed(probe), lm) if not record["before_training"]]
    folder = probe.folder
    rows = _project(probe, lm, records)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["hook_name"], row["architecture"], row["d_sae"], row["seed"]), []).append(row)
    suggestions = [
        dict(zip(("hook_name", "architecture", "d_sae", "seed"), key, strict=True)) | _suggest(found)._asdict()
        for key, found in groups.items()
    ]
    result = {"schema_version": 1, "saes": rows, "suggestions": suggestions, "wall_s": clock.seconds()}
    write_json(folder / "result.json", result)
    write_manifest(folder, "l0", {"sae": probe.sae}, {"lm": common.model_key(lm)})
    print(summary_table(rows, ["hook_name", "architecture", "d_sae", "l0_target", "l0", "fvu", "s_n"]))
    for found in suggestions:
        note = "; it is the edge of what was tried: try further values, sae.l0=[...]" if found["at_edge"] else ""
        print(
            f"{found['hook_name']}, {found['architecture']} {found['d_sae']:,}: the decoder projections are least at "
            f"L0 {found['l0']:g} (n = {', '.join(map(str, found['ns']))}: "
            f"{', '.join(f'{value:g}' for value in found['minima'])}){note}"
        )
    print(f"{folder / 'result.json'}: {len(rows)} SAEs in {clock.seconds():.1f} s")


def _probe_config(config: RunConfig) -> RunConfig:
    """The same run, or job of a multirun, with a grid over L0, in a folder of its own; the store is the run's."""
    values = [float(value) for value in config.sae.l0]
    if values == SAEGridConfig().l0:  # none were named
        largest = min(config.sae.d_sae) / 4
        values = [float(value) for value in CANDIDATES if value <= largest]
    if len(set(values)) < 2:
        raise UserError(f"sae.l0={values} leaves nothing to choose: give several values, sae.l0=[8,16,32,64].")
    sae = dataclasses.replace(config.sae, l0=sorted(set(values)))
    return dataclasses.replace(config, sae=sae, job=str(Path(config.job) / JOB))


@torch.no_grad()
def _project(config: RunConfig, lm: LanguageModel, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """s_n of every SAE on the held-out tokens."""
    saes = [SAE.load(record["path"], device=lm.device) for record in records]
    hooks = list(dict.fromkeys(name for sae in saes for name in sae.config.site.reads))
    held_out = ensure_tokens(common.as_needed(config), lm).corpus.held_out
    passes = Passes(
        lm,
        held_out,
        hooks,
        batch_tokens=config.harvest.batch_tokens,
        include_special=config.data.include_special,
    )
    acts = [passes(number).acts for number in range(len(passes))]
    rows = []
    for record, sae in zip(records, saes, strict=True):
        ns = ranks(sae.config.d_sae)
        batches = (torch.cat([part[name] for name in sae.config.site.reads], dim=-1) for part in acts)
        values = nth_projections(sae, batches, ns)
        kept = ("hook_name", "architecture", "d_sae", "seed", "l0_target", "l0", "fvu", "path")
        rows.append({name: record[name] for name in kept} | {"ns": ns, "projections": values, "s_n": values[-1]})
    return rows


def _suggest(rows: list[dict[str, Any]]) -> Suggestion:
    return suggest([row["l0_target"] for row in rows], [row["projections"] for row in rows], rows[0]["ns"])
