"""`sae eval suite=diff`: what two language models share and what is one's alone, by the crosscoders of a run.

    sae eval suite=diff name=diff lm.name=base lm.pair=tuned sae=minder_crosscoder sae.d_sae=[16384]

Trains the run's crosscoders of `lm.name` and `lm.pair` (or takes those in `eval.saes`) and measures every latent on the
held-out tokens: decoder norms, and latent scaling, which exposes exclusive latents that training made up (see
`sae.evals.latent_scaling`). Writes `<run>/eval/diff/result.json` and, beside it, a file of tensors a crosscoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sae.activations.harvest import Passes
from sae.autoencoder.crosscoder import Crosscoder
from sae.autoencoder.sae import SAE, SAEConfig
from sae.autoencoder.site import Site
from sae.config import RunConfig
from sae.errors import UserError
from sae.evals.latent_scaling import LatentScaling, LatentScalingMeter, Thresholds, Verdicts, judge, summarise
from sae.lm.pair import PREFIX, PairedModel, is_pairs, names_of
from sae.lm.tokens import PackedTokens
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common, measured
from sae.train.grid import SAESpec

LISTED = 20
"""Latents named in `result.json`, those nearest to being one model's; all are in the tensors."""
PRINTED = 3
COUNTED = ["shared", "first", "confirmed first", "pair", "confirmed pair", "between", "rare"]


def run(config: RunConfig) -> None:
    """Run the suite.

    Raises:
        UserError: there is no second model, or no crosscoder of both.
    """
    if not config.lm.pair:
        raise UserError("suite=diff compares two models: name the second one, lm.pair=<name or path>.")
    lm = common.open_lm(config.lm)
    assert isinstance(lm, PairedModel)
    thresholds = Thresholds()
    work = measured.find(config, lm, {"thresholds": thresholds}, held_out=True, check=_check_sites)
    if work is None:
        return
    work.configs = {path: one for path, one in work.configs.items() if _of_both(one.site)}
    work.open()
    scalings = _measure(lm, [item.sae for item in work.saes], work.held_out, config)
    records = []
    for item, scaling in zip(work.saes, scalings, strict=True):
        file = work.write_tensors(_tensors(scaling, thresholds))
        records.append(item.about() | _record(scaling, thresholds) | {"tensors": file})
    models = names_of(lm)
    result = {"first": models[""], "pair": models[PREFIX], "thresholds": thresholds, "crosscoders": records}
    about = measured.identity(records)
    table = measured.Table(config.suite, [*about, *COUNTED], [record | _counts(record) for record in records])
    work.finish(result, [table], _note(records, about, models, thresholds))


def _of_both(site: Site) -> bool:
    """Whether a site is a crosscoder's that reads both models."""
    return len({is_pairs(name) for name in site.reads}) == 2


def _check_sites(saes: Sequence[SAESpec | SAEConfig]) -> None:
    if not any(_of_both(sae.site) for sae in saes):
        raise UserError(
            f"none of the {len(saes)} SAEs reads both models: leave sae.sites out, or cross a hook point with the "
            f"second model's, sae.sites=[blocks.1.hook_resid_post+{PREFIX}blocks.1.hook_resid_post]."
        )


def _measure(lm: PairedModel, saes: list[SAE], held_out: PackedTokens, config: RunConfig) -> list[LatentScaling]:
    """Run both models once over the held-out rows and feed every crosscoder."""
    meters = []
    for sae in saes:
        assert isinstance(sae, Crosscoder)
        sides = tuple([at for at, name in enumerate(sae.sources) if is_pairs(name) == pairs] for pairs in (False, True))
        meters.append(LatentScalingMeter(sae, (sides[0], sides[1])))
    names = list(dict.fromkeys(name for meter in meters for name in meter.sae.sources))
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


def _record(scaling: LatentScaling, thresholds: Thresholds) -> dict[str, Any]:
    counts = summarise(scaling, thresholds)
    return {
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


def _counts(record: dict[str, Any]) -> dict[str, int]:
    """A record's counts, as columns of the table."""
    first, pair = record["first_only"], record["pair_only"]
    exclusive = (first["by_norm"], first["confirmed"], pair["by_norm"], pair["confirmed"])
    counts = (record["shared"], *exclusive, record["between"], record["rare"])
    return dict(zip(COUNTED, counts, strict=True))


def _note(records: list[dict[str, Any]], about: list[str], models: dict[str, str], thresholds: Thresholds) -> str:
    """The least shared latents, and what the columns mean."""
    apart = [name for name in about if len({record[name] for record in records}) > 1]
    least = [
        {name: record[name] for name in apart} | latent
        for record in records
        for side in ("first_latents", "pair_latents")
        for latent in record[side][:PRINTED]
    ]
    table = ""
    if least:
        table = f"\nthe least shared latents:\n{summary_table(least, list(least[0]))}\n"
    low, high = thresholds.exclusive, 1 - thresholds.exclusive
    return (
        f"{table}first: latents of {models['']} by their relative norm (< {low:g}); pair: of {models[PREFIX]} "
        f"(> {high:g}); shared: within {thresholds.shared:g} of 0.5; confirmed: nu_error < {thresholds.nu_error:g} and "
        f"nu_reconstruction < {thresholds.nu_reconstruction:g};\n"
        f"rare: fired on fewer than {thresholds.min_firings} tokens, not judged"
    )
