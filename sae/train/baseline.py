"""A random SAE beside a trained one: same site, same size, as many latents active, nothing learned.

    random = random_like(sae, {name: acts})

It is what the trainer starts from (`sae.train.initialise`): random unit decoder rows, the encoder their transpose, the
bias at the middle of the activations. Top-k architectures keep their k where that makes as many latents active as in
the SAE, to within `NEAR`; all others, and a top-k SAE that does not fill its k on these activations, get one threshold
for all latents, set so that the mean number active is that of the SAE on the same activations. What this reaches on a
metric is due to the size of the dictionary and its sparsity. Unlike the control `random` of `sae.train.controls`, whose
biases and thresholds are trained, it costs no training.
"""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.architectures.topk import TopK
from sae.autoencoder.sae import SAE, make
from sae.autoencoder.sparsity import nth_largest
from sae.train.initialise import initialise, input_stats, sample_rows

OTHER_SEED = 1_000_003
"""Added to the SAE's seed: with its own, latents that never learned would be equal."""
NEAR = 0.01
"""Relative difference in L0 up to which k latents a token are taken for as many active."""


@torch.no_grad()
def random_like(sae: SAE, acts: Mapping[str, Float[Tensor, "n d_in"]] | None = None) -> SAE:
    """Make the random SAE.

    Args:
        sae: what it is to stand beside.
        acts: raw activations at every hook point of its site, which set how much fires; None where only the
            directions matter.
    """
    topk = isinstance(sae.sparsity, TopK)
    if acts is None:
        return _fresh(sae, topk)
    x = torch.cat([acts[name] for name in sae.config.site.reads], dim=-1).to(sae.device)
    n_active = _n_active(sae, x)
    if topk:
        found = _settled(_fresh(sae, topk), acts)
        if abs(_n_active(found, x) - n_active) <= NEAR * n_active:
            return found
    found = _settled(_fresh(sae, topk=False), acts)
    found.sparsity.get_buffer("threshold").copy_(_threshold(found, x, n_active))
    return found


def _fresh(sae: SAE, topk: bool) -> SAE:
    """As training begins: random directions. `topk` keeps the SAE's own k a token; else one threshold is to be set."""
    config = dataclasses.replace(
        sae.config,
        architecture=sae.config.architecture if topk else "batch_topk",
        l0=sae.sparsity.l0 if topk else sae.config.l0,
        seed=sae.config.seed + OTHER_SEED,
        options=sae.config.options if topk else {},
        metadata={"training": {"control": "random"}},
    )
    return make(config).to(sae.device)


def _settled(random: SAE, acts: Mapping[str, Float[Tensor, "n d_in"]]) -> SAE:
    """Centre a fresh SAE on the activations, and give it their units."""
    site = random.config.site
    stats = {name: input_stats(acts[name].cpu(), name) for name in site.hooks}
    initialise(random, stats)
    reads, writes = ([stats[name].scale for name in names] for names in (site.reads, site.writes))
    random.fold_scales(reads, writes)
    training = {"control": "random", "input_scales": reads, "output_scales": writes}
    random.config = dataclasses.replace(random.config, metadata={"training": training})
    return random


def _n_active(sae: SAE, x: Float[Tensor, "n d_in"]) -> int:
    """Latents active on these rows, summed over them."""
    return sum(int((sae.encode(part) != 0).sum()) for part in _parts(sae, x))


def _threshold(sae: SAE, x: Float[Tensor, "n d_in"], n_active: int) -> Tensor:
    """What `n_active` pre-activations of all these rows are above; at least 0."""
    # Values far below it need not be kept: the first rows say about where it is.
    guess = sae.sparsity.get_buffer("threshold")
    for floor in (guess / 2, torch.zeros_like(guess)):
        kept = torch.cat([pre[pre > floor] for pre in map(sae.pre_acts, _parts(sae, x))])
        if len(kept) > n_active:
            return nth_largest(kept, n_active + 1)
    return torch.zeros_like(guess)


def _parts(sae: SAE, x: Float[Tensor, "n d_in"]) -> tuple[Tensor, ...]:
    return x.split(sample_rows(sae.config.d_sae))
