"""`sae eval suite=diff`: what two language models share and what is one's alone, by the crosscoders of a run.

    sae eval suite=diff name=diff lm.name=base lm.pair=tuned sae=minder_crosscoder sae.d_sae=[16384]

Trains the run's crosscoders of `lm.name` and `lm.pair` (or takes those in `eval.saes`) and measures every latent on the
held-out tokens: decoder norms, and latent scaling, which exposes exclusive latents that training made up (see
`sae.evals.latent_scaling`). Writes `<run>/eval/diff/result.json` and, beside it, a file of tensors a crosscoder.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.activations.harvest import Passes
from sae.autoencoder.crosscoder import Crosscoder
from sae.autoencoder.sae import SAE
from sae.config import RunConfig
from sae.errors import UserError
from sae.evals.latent_scaling import LatentScaling, LatentScalingMeter, Thresholds, Verdicts, judge, summarise
from sae.files import sha256_file, write_json, write_manifest, write_tensors
from sae.lm.pair import PREFIX, PairedModel, is_pairs, names_of
from sae.lm.tokens import PackedTokens
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.harvest import ensure_tokens
from sae.stages.train import ensure_trained

SUITE = "diff"
LISTED = 20
"""Latents named in `result.json`, those nearest to being one model's; all are in the tensors."""
PRINTED = 3
ABOUT = ["hook_name", "architecture", "d_sae", "control"]
COUNTED = ["shared", "first", "confirmed first", "pair", "confirmed pair", "between", "rare"]


class Found(NamedTuple):
    """A crosscoder of both models."""

    path: Path
    sae: Crosscoder


def run(config: RunConfig) -> None:
    """Run the suite.

    Raises:
        UserError: there is no second model, or no crosscoder of both.
    """
    if not config.lm.pair:
        raise UserError("suite=diff compares two models: name the second one, lm.pair=<name or path>.")
    lm = common.open_lm(config.lm)
    assert isinstance(lm, PairedModel)
    paths = [Path(text) for text in config.eval.saes] or ensure_trained(config, lm)
    clock = common.Clock()
    tokens = ensure_tokens(config, lm)
    folder = config.folder / "eval" / SUITE
    thresholds = Thresholds()
    settings = {"eval": config.eval, "include_special": config.data.include_special, "thresholds": thresholds}
    inputs = {"lm": common.model_key(lm), "tokens": tokens.fingerprint}
    inputs |= {str(path): sha256_file(path / "weights.safetensors") for path in paths}
    if common.skip(config, folder, settings, inputs):
        return
    crosscoders = _open(paths, config, lm)
    scalings = _measure(lm, crosscoders, tokens.corpus.held_out, config)
    records = []
    for number, (found, scaling) in enumerate(zip(crosscoders, scalings, strict=True)):
        file = folder / "latents" / f"{number:03d}-{found.path.name}.safetensors"
        write_tensors(file, _tensors(scaling, thresholds))
        records.append(_record(found, scaling, thresholds) | {"tensors": str(file.relative_to(folder))})
    models = names_of(lm)
    result = {
        "schema_version": 1,
        "first": models[""],
        "pair": models[PREFIX],
        "thresholds": thresholds,
        "crosscoders": records,
        "wall_s": clock.seconds(),
    }
    write_json(folder / "result.json", result)
    write_manifest(folder, "eval", settings, inputs)
    _print(records, models, thresholds)
    print(f"{folder / 'result.json'}: {len(records)} crosscoders in {clock.seconds():.1f} s")


def _open(paths: list[Path], config: RunConfig, lm: PairedModel) -> list[Found]:
    """The crosscoders of both models among the SAEs."""
    found = []
    for path in paths:
        sae = SAE.load(path, device=lm.device)
        names = sae.config.site.reads
        if isinstance(sae, Crosscoder) and len({is_pairs(name) for name in names}) == 2:
            common.check_belongs(lm, sae, path, force=config.eval.force)
            found.append(Found(path, sae))
    if not found:
        raise UserError(
            f"none of the {len(paths)} SAEs reads both models: leave sae.sites out, or cross a hook point with the "
            f"second model's, sae.sites=[blocks.1.hook_resid_post+{PREFIX}blocks.1.hook_resid_post]."
        )
    return found


def _measure(
    lm: PairedModel, crosscoders: list[Found], held_out: PackedTokens, config: RunConfig
) -> list[LatentScaling]:
    """Run both models once over the held-out rows and feed every crosscoder."""
    meters = []
    for found in crosscoders:
        sources = found.sae.sources
        sides = tuple([at for at, name in enumerate(sources) if is_pairs(name) == pairs] for pairs in (False, True))
        meters.append(LatentScalingMeter(found.sae, (sides[0], sides[1])))
    names = list(dict.fromkeys(name for found in crosscoders for name in found.sae.sources))
    include = config.data.include_special
    passes = Passes(lm, held_out, names, batch_tokens=config.harvest.batch_tokens, include_special=include)
    with Progress(len(passes), "compare the models", unit="pass") as bar:
        for number in range(len(passes)):
            acts = passes(number).acts
            for meter in meters:
                meter.update(torch.cat([acts[name] for name in meter.sae.sources], dim=-1))
            bar.update()
    return [meter.result() for meter in meters]


def _tensors(scaling: LatentScaling, thresholds: Thresholds) -> dict[str, Tensor]:
    """All there is on each latent, for safetensors."""
    tensors = {name: value for name, value in scaling._asdict().items() if isinstance(value, Tensor)}
    floats = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    masks = {name: mask for name, mask in judge(scaling, thresholds)._asdict().items() if name != "second"}
    return floats | {f"is_{name}": mask for name, mask in (masks | {"pair": judge(scaling, thresholds).second}).items()}


def _record(found: Found, scaling: LatentScaling, thresholds: Thresholds) -> dict[str, Any]:
    config = found.sae.config
    counts = summarise(scaling, thresholds)
    return {
        "hook_name": config.hook_name,
        "architecture": config.architecture,
        "d_sae": config.d_sae,
        "l0_target": config.l0,
        "seed": config.seed,
        "control": config.metadata.get("training", {}).get("control") or "none",
        "path": str(found.path),
        "n_tokens": scaling.n_tokens,
        "shared": counts.shared,
        "first_only": counts.first_only._asdict(),
        "pair_only": counts.second_only._asdict(),
        "between": counts.between,
        "rare": counts.rare,
        **_least_shared(scaling, judge(scaling, thresholds)),
    }


def _least_shared(scaling: LatentScaling, verdicts: Verdicts) -> dict[str, list[dict[str, Any]]]:
    """Latents that are judged and not shared, nearest to one model first."""
    candidates = ~verdicts.rare & ~verdicts.shared
    found = {}
    for name, distance in (("first_latents", scaling.relative_norm), ("pair_latents", 1 - scaling.relative_norm)):
        latents = (candidates & (distance < 0.5)).nonzero().flatten()
        order = latents[distance[latents].argsort()][:LISTED].tolist()
        found[name] = [
            {
                "latent": latent,
                "relative_norm": float(scaling.relative_norm[latent]),
                "nu_error": float(scaling.nu_error[latent]),
                "nu_reconstruction": float(scaling.nu_reconstruction[latent]),
                "n_fired": int(scaling.n_fired[latent]),
                "verdict": _verdict(verdicts, latent),
            }
            for latent in order
        ]
    return found


def _verdict(verdicts: Verdicts, latent: int) -> str:
    """confirmed, or what speaks against it."""
    if verdicts.between[latent]:
        return "between"
    names = [name for name in ("shrunk", "decoupled") if getattr(verdicts, name)[latent]]
    return " ".join(names) or "confirmed"


def _print(records: list[dict[str, Any]], models: dict[str, str], thresholds: Thresholds) -> None:
    rows = []
    for record in records:
        exclusive = [record[side][count] for side in ("first_only", "pair_only") for count in ("by_norm", "confirmed")]
        rows.append(
            [*(record[name] for name in ABOUT), record["shared"], *exclusive, record["between"], record["rare"]]
        )
    print(summary_table(rows, [*ABOUT, *COUNTED]))
    least = [
        {"hook_name": record["hook_name"], "architecture": record["architecture"], "d_sae": record["d_sae"], **latent}
        for record in records
        for side in ("first_latents", "pair_latents")
        for latent in record[side][:PRINTED]
    ]
    if least:
        print("\nthe least shared latents:")
        print(summary_table(least, [name for name in least[0] if name != "hook_name"]))
    low, high = thresholds.exclusive, 1 - thresholds.exclusive
    print(
        f"first: latents of {models['']} by their relative norm (< {low:g}); pair: of {models[PREFIX]} (> {high:g}); "
        f"shared: within {thresholds.shared:g} of 0.5; confirmed: nu_error < {thresholds.nu_error:g} and "
        f"nu_reconstruction < {thresholds.nu_reconstruction:g};\n"
        f"rare: fired on fewer than {thresholds.min_firings} tokens, not judged"
    )
