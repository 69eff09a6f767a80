"""A random SAE beside a trained one: same site, same size, as many latents active, nothing learned.

    random = random_like(sae, {name: acts})

It is what the trainer starts from (`sae.train.initialise`): random unit decoder rows, the encoder their transpose, the
bias at the middle of the activations. Top-k architectures keep their k; all others fire above one threshold for all
latents, set so that the mean number active is that of the SAE on the same activations. What this reaches on a metric
is due to the size of the dictionary and its sparsity. Unlike the control `random` of `sae.train.controls`, whose biases
and thresholds are trained, it costs no training.
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


@torch.no_grad()
def random_like(sae: SAE, acts: Mapping[str, Float[Tensor, "n d_in"]] | None = None) -> SAE:
    """Make the random SAE.

    Args:
        sae: what it is to stand beside.
        acts: raw activations at every hook point of its site, which set how much fires; None where only the
            directions matter.
    """
    topk = isinstance(sae.sparsity, TopK)
    config = dataclasses.replace(
        sae.config,
        architecture=sae.config.architecture if topk else "batch_topk",
        l0=sae.sparsity.l0 if topk else sae.config.l0,
        seed=sae.config.seed + OTHER_SEED,
        options=sae.config.options if topk else {},
        metadata={"training": {"control": "random"}},
    )
    found = make(config).to(sae.device)
    if acts is None:
        return found
    site = sae.config.site
    stats = {name: input_stats(acts[name].cpu(), name) for name in site.hooks}
    initialise(found, stats)
    reads, writes = ([stats[name].scale for name in names] for names in (site.reads, site.writes))
    found.fold_scales(reads, writes)
    training = {"control": "random", "input_scales": reads, "output_scales": writes}
    found.config = dataclasses.replace(found.config, metadata={"training": training})
    if not topk:
        x = torch.cat([acts[name] for name in site.reads], dim=-1).to(sae.device)
        threshold = found.sparsity.get_buffer("threshold")
        threshold.copy_(_threshold(found, x, sum(int((sae.encode(part) != 0).sum()) for part in _parts(sae, x))))
    return found


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
