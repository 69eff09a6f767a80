"""Choosing L0: how much of the decoder's directions is spread over tokens that do not need them (2508.16560).

With too small an L0, latents mix features that fire together; with too large a one they mix what fills the places left
over. Either way decoder rows take up components of other features, and the projections of ordinary tokens onto them
grow. s_n is the value at rank n * batch among the [batch d_sae] projections (x - b_dec) @ W_dec^T, with n above any
plausible L0; the L0 at which it is least is the suggestion. Reconstruction cannot say: it improves with every latent.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.autoencoder.sparsity import nth_largest
from sae.errors import UserError

PARTS = (8, 4, 3, 2)
"""n is d_sae over each of these."""
BLOCK = 2**23
"""Projections made at a time."""


class Suggestion(NamedTuple):
    """Which L0 the decoder projections speak for."""

    l0: float
    """The median of `minima`."""
    minima: list[float]
    """For each n, the L0 with the least s_n."""
    ns: list[int]
    at_edge: bool
    """The suggestion is the smallest or largest L0 tried: try further ones."""


def ranks(d_sae: int) -> list[int]:
    """The values of n for a dictionary of this size."""
    return sorted({max(1, d_sae // part) for part in PARTS})


@torch.no_grad()
def nth_projections(sae: SAE, batches: Iterable[Float[Tensor, "batch d_in"]], ns: Sequence[int]) -> list[float]:
    """s_n for each n, averaged over batches.

    Args:
        sae: an SAE that reconstructs what it reads.
        batches: activations; large ones are cut.
        ns: ranks, each from 1 to d_sae.

    Raises:
        UserError: there are no activations, a rank is out of range, or the SAE is a transcoder.
    """
    d_sae = sae.config.d_sae
    if not sae.centres:
        raise UserError(f"{sae.config.hook_name!r} is a transcoder's site: decoder projections are for SAEs.")
    for n in ns:
        if not 1 <= n <= d_sae:
            raise UserError(f"rank n = {n} is not between 1 and d_sae = {d_sae}.")
    sums, count = [0.0] * len(ns), 0
    rows = max(1, BLOCK // d_sae)
    for batch in batches:
        for part in batch.reshape(-1, batch.shape[-1]).split(rows):
            x = part.to(device=sae.device, dtype=sae.dtype)
            values = ((x - sae.b_dec) @ sae.W_dec.t()).reshape(-1)
            # Weighted by tokens: a last, smaller block must not count as much as a full one.
            for place, n in enumerate(ns):
                sums[place] += len(x) * float(nth_largest(values, n * len(x)))
            count += len(x)
    if count == 0:
        raise UserError("there are no activations to project: give at least one token.")
    return [total / count for total in sums]


def suggest(l0: Sequence[float], projections: Sequence[Sequence[float]], ns: Sequence[int]) -> Suggestion:
    """Find the L0 with the least projections.

    Args:
        l0: one an SAE.
        projections: for each SAE, s_n for each n.
        ns: the ranks.

    Raises:
        UserError: there is nothing to choose from.
    """
    if len(l0) < 2:
        raise UserError(f"one L0 ({list(l0)}) leaves nothing to choose: give several, such as sae.l0=[8,16,32,64].")
    minima = [min(zip((row[place] for row in projections), l0, strict=True))[1] for place in range(len(ns))]
    chosen = statistics.median_low(minima)
    return Suggestion(chosen, minima, list(ns), chosen in (min(l0), max(l0)))
