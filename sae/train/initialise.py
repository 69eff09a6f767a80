"""What an untrained SAE takes from the data: the input scale, the centre, and starting thresholds."""

import math
from collections.abc import Mapping
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
    """[d_in] where the scaled activations have their middle."""
    sample: Tensor
    """[n d_in] scaled activations."""


def input_stats(
    acts: Float[Tensor, "n d_in"], hook_name: str, centre: str = "geometric_median", n_sample: int = SAMPLE_TOKENS
) -> InputStats:
    """Measure one hook point from its first activations.

    Args:
        acts: raw activations.
        hook_name: for messages.
        centre: geometric_median, mean or zero.
        n_sample: how many activations to keep for setting thresholds.

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
    middles = {"geometric_median": geometric_median, "mean": _mean, "zero": _zero}
    return InputStats(scale, middles[centre](sample), sample[:n_sample].clone())


def _mean(points: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    return points.mean(0)


def _zero(points: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    return points.new_zeros(points.shape[1])


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
def initialise(sae: SAE, stats: Mapping[str, InputStats]) -> None:
    """Centre a fresh SAE on the data and let its architecture set its thresholds.

    Args:
        sae: the SAE.
        stats: of every hook point of its site.
    """
    site, device = sae.config.site, sae.device
    sae.b_dec.copy_(torch.cat([stats[name].centre for name in site.writes]))
    if not sae.centres:  # then what is read has its middle taken off by the bias
        centre = torch.cat([stats[name].centre for name in site.reads]).to(device)
        sae.b_enc.copy_(-centre @ sae.W_enc)
    if type(sae.sparsity).initialise is not Sparsity.initialise:  # pre-activations of a wide SAE are gigabytes
        rows = sample_rows(sae.config.d_sae)
        sample = torch.cat([stats[name].sample[:rows] for name in site.reads], dim=1).to(device)
        sae.sparsity.initialise(sae.pre_acts(sample))


def sample_rows(d_sae: int) -> int:
    """How many tokens' pre-activations an SAE's thresholds are set from."""
    return max(256, min(SAMPLE_TOKENS, INIT_PRE_ACTS // d_sae))
