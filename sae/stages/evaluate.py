"""`sae eval`: every SAE of a run, or those of `eval.saes`, on held-out tokens, which training never saw.

Reconstruction (L0, FVU, cosine, densities, dead latents) comes from one pass of the language model over the held-out
rows for all SAEs together; CE and KL from splicing each reconstruction into the model.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae.activations.harvest import Passes
from sae.autoencoder.sae import SAE, WEIGHTS_FILE
from sae.config import RunConfig
from sae.evals.reconstruction import ReconstructionMeter, ReconstructionResult
from sae.evals.splice import PairedSplices, SpliceResult, splice_all
from sae.files import write_json, write_manifest, write_tensors
from sae.lm.model import LanguageModel
from sae.lm.pair import PREFIX, is_pairs, names_of
from sae.lm.tokens import PackedTokens, TokenBatch, by_length, sae_mask
from sae.report.names import told_apart
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common, suites
from sae.stages.harvest import ensure_tokens
from sae.stages.opened import opened_saes
from sae.stages.train import ensure_trained, make_grid, start_inputs
from sae.train.controls import NO_CONTROL, control_of
from sae.train.grid import SAESpec
from sae.train.start import start_folder


class _Subjects(NamedTuple):
    """What is evaluated, and where its results go."""

    paths: list[Path]
    folder: Path
    stage: str
    """What the metrics call it."""
    specs: list[SAESpec]
    """Of the run's own SAEs; none where others are given."""


def ensure_evaluated(config: RunConfig, lm: LanguageModel) -> list[dict[str, Any]]:
    """Evaluate the run's SAEs, or those of `eval.saes`, or read their evaluation. Return one record an SAE, in order.

    SAEs that training went on from come last, as they were before it.
    """
    found = _subjects(config, lm)
    clock = common.Clock()
    tokens = ensure_tokens(common.as_needed(config), lm)
    folder, start = found.folder, config.train.start
    # Keys of other suites are not among them: naming labelled texts does not make this table stale.
    settings = {name: getattr(config.eval, name) for name in ("batch_tokens", "splice", "saes", "force")}
    settings |= {"include_special": config.data.include_special}
    inputs = {"lm": common.model_key(lm), "tokens": tokens.fingerprint}
    inputs |= common.sae_inputs(found.paths, folder)
    inputs |= start_inputs(folder, found.specs, start)
    saes: dict[Path, SAE] = {}
    starts = _starts(start, found.specs)
    if not common.is_kept(config, folder, settings, inputs):  # what is refused must not cost what is there
        saes = _load(config, lm, found.paths, starts)
    if common.skip(config, folder, settings, inputs):
        return common.read_result(folder)["saes"]
    inputs |= start_inputs(folder, found.specs, start)  # what is gone is left out now, and may come back
    reconstruction = measure_reconstruction(lm, [*saes.values()], tokens.corpus.held_out, config)
    spliced = _splice_all(lm, [*saes.values()], tokens.corpus.held_out, config)
    records = [
        _record(lm, path, sae, one, damage) | {"before_training": path in starts, "density_file": _density_file(place)}
        for place, ((path, sae), one, damage) in enumerate(zip(saes.items(), reconstruction, spliced, strict=True))
    ]
    shutil.rmtree(folder / "density", ignore_errors=True)  # of an earlier evaluation, maybe of more SAEs
    for record, one in zip(records, reconstruction, strict=True):
        write_tensors(folder / record["density_file"], {"density": one.density.float()})
    wall = clock.seconds()
    write_json(folder / "result.json", {"schema_version": 1, "saes": records, "wall_s": wall})
    _log(config, found, records)
    write_manifest(folder, "eval", settings, inputs)
    columns = ["hook_name", "architecture", "d_sae", "l0", "fvu", "ce_recovered", "delta_ce", "kl", "dead_fraction"]
    columns += ["before_training"] if starts else []
    columns += ["control"] if any(record["control"] != NO_CONTROL for record in records) else []
    print(summary_table(records, columns))
    _print_sources(records)
    print(f"{folder}: {len(records)} SAEs on {records[0]['n_tokens']:,} held-out tokens in {wall:.1f} s")
    return records


def _subjects(config: RunConfig, lm: LanguageModel) -> _Subjects:
    """The SAEs of `eval.saes`; or the run's own, trained where they are not yet."""
    folder = common.eval_folder(config)
    if config.eval.saes:
        return _Subjects(opened_saes(config, config.eval.saes), folder, "eval-given", [])
    return _Subjects(ensure_trained(common.as_needed(config), lm), folder, "eval", make_grid(config, lm))


def _starts(start: str, specs: list[SAESpec]) -> list[Path]:
    """The SAEs that those of the grid were trained from, but for those deleted since."""
    found = dict.fromkeys(path for path in (start_folder(start, spec) for spec in specs) if path is not None)
    return [path for path in found if (path / WEIGHTS_FILE).is_file()]


def _load(config: RunConfig, lm: LanguageModel, paths: list[Path], starts: list[Path]) -> dict[Path, SAE]:
    """Open what is to be evaluated; refuse what does not belong to the model."""
    saes = {path: SAE.load(path, device=lm.device) for path in (*paths, *starts)}
    if config.eval.saes or starts:
        for path, sae in saes.items():
            # An SAE that training goes on from may well be another model's: that is what it is trained for.
            common.check_belongs(lm, sae.config, path, force=config.eval.force or path in starts)
    return saes


def _density_file(place: int) -> str:
    """Where an SAE's densities lie in the stage's folder; numbered, as its own path may be too long for a name."""
    return f"density/{place:04d}.safetensors"


def measure_reconstruction(
    lm: LanguageModel, saes: list[SAE], held_out: PackedTokens, config: RunConfig
) -> list[ReconstructionResult]:
    """Run the model once over the held-out rows and feed every SAE."""
    hooks = list(dict.fromkeys(name for sae in saes for name in sae.config.site.hooks))
    passes = Passes(
        lm,
        held_out,
        hooks,
        batch_tokens=config.harvest.batch_tokens,
        include_special=config.data.include_special,
    )
    meters = [ReconstructionMeter(sae) for sae in saes]
    with Progress(len(passes), "evaluate reconstruction", unit="pass") as bar:
        for number in range(len(passes)):
            acts = passes(number).acts
            for meter in meters:
                site = meter.sae.config.site
                x, target = (torch.cat([acts[name] for name in names], dim=-1) for names in (site.reads, site.writes))
                meter.update(x, target)
            bar.update()
    return [meter.result() for meter in meters]


def _splice_all(
    lm: LanguageModel, saes: list[SAE], held_out: PackedTokens, config: RunConfig
) -> list[PairedSplices | None]:
    if not config.eval.splice:
        return [None] * len(saes)
    batches = list(padded_batches(held_out, config.eval.batch_tokens, lm.device))

    def seen(batch: TokenBatch) -> torch.Tensor:
        return sae_mask(batch.roles, config.data.include_special)

    with Progress(len(batches), "evaluate splicing", unit="batch") as bar:
        return [*splice_all(lm, saes, batches, splice_mask=seen, progress=bar.update)]


def padded_batches(packed: PackedTokens, batch_tokens: int, device: str) -> Iterator[TokenBatch]:
    """Held-out rows, shortest first, each batch cut to its longest row."""
    for rows in by_length(packed.mask.sum(dim=1), batch_tokens):
        yield packed.batch(rows).select(range(len(rows))).to(device)


def _record(
    lm: LanguageModel, path: Path, sae: SAE, found: ReconstructionResult, damage: PairedSplices | None
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "hook_name": sae.config.hook_name,
        "d_sae": sae.config.d_sae,
        "architecture": sae.config.architecture,
        "l0_target": sae.config.l0,
        "seed": sae.config.seed,
        "control": control_of(sae.config) or NO_CONTROL,
        "path": str(path),
        "l0": found.l0,
        "fvu": found.fvu,
        "cosine": found.cosine,
        "mse": found.mse,
        "relative_bias": found.relative_bias,
        "dead_fraction": found.dead_fraction,
        "n_tokens": found.n_tokens,
        "density_histogram": {
            "edges": found.density_histogram.log10_edges,
            "counts": found.density_histogram.counts,
        },
    }
    return record | _damage(damage and damage.together) | {"sources": _sources(lm, sae, found, damage)}


def _damage(damage: SpliceResult | None) -> dict[str, float | None]:
    """What splicing does, flat; None where it was left out."""
    names = [name for name in SpliceResult._fields if name != "n_tokens"]
    return {name: None if damage is None else getattr(damage, name) for name in names}


def _sources(
    lm: LanguageModel, sae: SAE, found: ReconstructionResult, damage: PairedSplices | None
) -> list[dict[str, Any]]:
    """One record a hook point of a crosscoder: its FVU, and the damage to its model, all of whose parts are spliced."""
    records = []
    for name, fvu in zip(sae.config.site.writes, found.source_fvu, strict=False):
        prefix = PREFIX if is_pairs(name) else ""
        model = names_of(lm)[prefix]
        records.append(
            {"hook_name": name, "lm": model, "fvu": fvu} | _damage(None if damage is None else damage.models[prefix])
        )
    return records


def _print_sources(records: list[dict[str, Any]]) -> None:
    """A row a hook point of every crosscoder."""
    rows = [
        {"sae": name.removeprefix(f"{record['hook_name']}/"), **source}
        for name, record in zip(_names(records), records, strict=True)
        for source in record["sources"]
    ]
    if rows:
        print("\nof crosscoders, at each hook point (FVU) and in its model (the rest):")
        print(summary_table(rows, ["hook_name", "sae", "fvu", "ce_recovered", "delta_ce", "kl"]))


def _log(config: RunConfig, found: _Subjects, records: list[dict[str, Any]]) -> None:
    """Put the table and the density histograms into the metric sink."""
    with common.open_sink(config, found.folder, found.stage) as sink:
        columns = [name for name in records[0] if name not in ("density_histogram", "sources")]
        sink.table("saes", columns, [[record[name] for name in columns] for record in records])
        for name, record in zip(_names(records), records, strict=True):
            histogram = record["density_histogram"]
            sink.histogram(f"{name}/log10_density", histogram["counts"], histogram["edges"], 0)


def _names(records: list[dict[str, Any]]) -> list[str]:
    """`<hook name>/<folder>` of each SAE, no two alike: more of its path where one of another run has the same."""
    names = []
    for record in records:
        before = "-before_training" if record["before_training"] else ""
        names.append(f"{record['hook_name']}/{Path(record['path']).name}{before}")
    return told_apart(names, [record["path"] for record in records], joint="-")


def run(config: RunConfig) -> None:
    """Run the stage: the table of all SAEs, or what `suite` names."""
    if config.suite != RunConfig.suite:
        suites.run(config)
    else:
        ensure_evaluated(config, common.open_lm(config.lm))
