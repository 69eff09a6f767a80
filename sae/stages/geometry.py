"""`sae eval suite=geometry`: what each SAE's weights say, and how far its latents are made of fewer directions.

    sae eval suite=geometry name=mine

Nearest neighbours and encoder-decoder cosines (see `sae.evals.geometry`) of the latents that fire on held-out tokens:
one that never did keeps the directions it began with. A meta-SAE is trained on their decoder rows, and one on as many
random rows of the same second moment (see `sae.evals.meta_sae`), which stand beside them as a random SAE. Figures of
every latent go to `latents/<number>.safetensors`.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.config import RunConfig
from sae.evals.geometry import Geometry, decoder_rows, geometry, null_generator, rows_like, unit
from sae.evals.meta_sae import MetaSAEResult, meta_sae
from sae.report.progress import Progress
from sae.stages import common, measured
from sae.stages.evaluate import measure_reconstruction
from sae.stages.measured import Measured
from sae.train.baseline import random_like
from sae.train.grid import SAESpec
from sae.train.rows import train_on_rows
from sae.train.settings import TrainSettings

META_ROWS = 1_024
"""Decoder rows in a training step of a meta-SAE."""
META_K = 4
QUANTILES = (0.05, 0.5, 0.95)


def run(config: RunConfig) -> None:
    """Run the suite."""
    lm = common.open_lm(config.lm)
    settings = {"meta_steps": config.eval.meta_steps, "seed": config.eval.seed}
    work = measured.find(config, lm, settings, held_out=True)
    if work is None:
        return
    work.open()
    found = measure_reconstruction(lm, [item.sae for item in work.saes], work.held_out, config)
    rows: list[dict[str, Any]] = []
    with Progress(2 * config.eval.meta_steps * len(work.saes), "train meta-SAEs", unit="step") as bar:
        for item, seen in zip(work.saes, found, strict=True):
            alive = seen.density > 0
            meta = _meta(config, item.sae, alive, bar.update)
            rows.append(_measure(work, item, alive) | _about_meta(meta))
            if work.wants_baselines:
                random = Measured(
                    _redrawn(item.sae, alive, config.eval.seed), item.path, measured.RANDOM, on_the_spot=True
                )
                # A meta-SAE was trained on these very rows.
                same = None if meta is None else meta.random
                rows.append(_measure(work, random, alive) | _about_meta(same))
    medians = ("neighbor_cosine", "enc_dec_cosine")
    table = [row | {name: row[name]["median"] for name in medians} for row in rows]
    columns = [*measured.identity(rows), "n_alive", *medians, "meta_fve", "meta_fve_random"]
    work.finish({"saes": rows}, [measured.Table(config.suite, columns, table)])


def _measure(work: measured.Work, item: Measured, alive: Bool[Tensor, " d_sae"]) -> dict[str, Any]:
    """An SAE's geometry, over the latents that are alive."""
    found = geometry(item.sae)
    name = work.write_tensors(found._asdict() | {"alive": alive})
    return item.about() | {"n_alive": int(alive.sum()), **_summary(found, alive), "latents": name}


@torch.no_grad()
def _redrawn(sae: SAE, alive: Bool[Tensor, " d_sae"], seed: int) -> SAE:
    """A random SAE: decoder rows of living latents drawn anew with their second moment, the encoder their transpose.

    Latents that never fired keep their rows, since they are among a living one's neighbours in both.
    """
    random = random_like(sae)
    rows = unit(decoder_rows(sae))
    living = alive.to(rows.device)
    rows[living] = rows_like(rows[living], null_generator(seed))
    random.W_dec.copy_(rows)
    if sae.config.site.kind != "transcoder":
        random.W_enc.copy_(rows.t())
    return random


def _summary(found: Geometry, alive: Bool[Tensor, " d_sae"]) -> dict[str, Any]:
    """Quantiles over living latents; of neighbours the size of the cosine, whatever its sign."""
    columns = {
        "neighbor_cosine": found.neighbor_cosine.abs(),
        "enc_dec_cosine": found.enc_dec_cosine,
        "encoder_norm": found.encoder_norm,
        "decoder_norm": found.decoder_norm,
    }
    return {name: _quantiles(values[alive]) for name, values in columns.items()}


def _quantiles(values: Float[Tensor, " n"]) -> dict[str, float | None]:
    kept = values[~values.isnan()].double()
    names = ("low", "median", "high")
    if not len(kept):
        return dict.fromkeys(names)
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    ranked = kept.sort().values  # torch.quantile takes no more than 16 million values
    places = (levels * (len(ranked) - 1)).round().long()
    return dict(zip(names, ranked[places].tolist(), strict=True))


def _meta(
    config: RunConfig, sae: SAE, alive: Bool[Tensor, " d_sae"], progress: Callable[[], None]
) -> MetaSAEResult | None:
    """The meta-SAE; None where it is left out, or there are too few rows for one."""
    n_steps = config.eval.meta_steps
    if not n_steps or round(int(alive.sum()) / 4) < META_K:
        return None

    def train(rows: Tensor, d_sae: int, k: int) -> SAE:
        spec = SAESpec("decoder_rows", "batch_topk", d_sae, k, config.eval.seed)
        settings = TrainSettings(n_steps * META_ROWS, META_ROWS, encoder_dtype="float32")
        return train_on_rows(rows, spec, settings, progress)

    return meta_sae(sae, train, k=META_K, keep=alive, seed=config.eval.seed)


def _about_meta(found: MetaSAEResult | None) -> dict[str, Any]:
    if found is None:
        return {"meta_fve": None, "meta_fve_random": None, "meta": None}
    fve_random = None if found.random is None else found.random.fve
    return {"meta_fve": found.fve, "meta_fve_random": fve_random, "meta": found}
