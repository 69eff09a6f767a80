"""What an untrained SAE takes from the data: the input scale, the centre, and starting thresholds."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.autoencoder.sparsity import Sparsity
from sae.errors import UserError

SAMPLE_TOKENS = 8192

INIT_PRE_ACTS = 2**22  # pre-activations looked at when thresholds are set; finding an order statistic copies them


class InputStats(NamedTuple):
    """Of one hook point."""

    scale: float
    """Multiplying activations by it makes E||x||^2 = d_in."""
    centre: Tensor
    """[d_in] geometric median of the scaled activations."""
    sample: Tensor
    """[n d_in] scaled activations."""


def input_stats(acts: Float[Tensor, "n d_in"], hook_name: str) -> InputStats:
    """Measure one hook point from its first activations.

    Raises:
        UserError: the activations are not finite, or all zero.
    """
    acts = acts.float()
    mean_square = float(acts.double().square().sum(-1).mean())
    if not math.isfinite(mean_square):
        raise UserError(f"activations at {hook_name!r} are not finite before step 0: check the model and its dtype.")
    if mean_square == 0:
        raise UserError(f"activations at {hook_name!r} are all zero: check the hook point and the token mask.")
    scale = math.sqrt(acts.shape[-1] / mean_square)
    sample = acts[:SAMPLE_TOKENS] * scale
    return InputStats(scale, geometric_median(sample), sample)


def geometric_median(points: Float[Tensor, "n d"], n_iterations: int = 50) -> Float[Tensor, " d"]:
    """Point with the least summed distance to all points (Weiszfeld); unlike the mean it ignores massive outliers."""
    centre = points.mean(0)
    for _ in range(n_iterations):
        weights = 1 / (points - centre).norm(dim=-1).clamp(min=1e-6)
        moved = (weights[:, None] * points).sum(0) / weights.sum()
        if bool((moved - centre).norm() <= 1e-5 * moved.norm()):
            return moved
        centre = moved
    return centre


@torch.no_grad()
def initialise(sae: SAE, stats: InputStats) -> None:
    """Centre a fresh SAE on the data and let its architecture set its thresholds."""
    sae.b_dec.copy_(stats.centre)
    if type(sae.sparsity).initialise is not Sparsity.initialise:  # pre-activations of a wide SAE are gigabytes
        sae.sparsity.initialise(sae.pre_acts(stats.sample[: sample_rows(sae.config.d_sae)]))


def sample_rows(d_sae: int) -> int:
    """How many tokens' pre-activations an SAE's thresholds are set from."""
    return max(256, min(SAMPLE_TOKENS, INIT_PRE_ACTS // d_sae))
