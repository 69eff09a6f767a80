"""Eight-bit activations: a scale for each token, and a few channels kept apart.

Language models have a handful of channels tens to thousands of times larger than the rest, the same ones for nearly
every token. They would set the scale and leave the other channels a few of the 255 steps, so they are stored apart,
in bfloat16, and take no part in the scale:

    scale = max |x_c| / 127 over the other channels c        one float32 a token
    q_c   = x_c / scale, rounded to the nearest integer      one int8 a channel (0 at the channels kept apart)

A channel's error is at most scale / 2; at the channels kept apart it is that of bfloat16.
"""

from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Float32, Int, Int8
from torch import Tensor

STEPS = 127


class Quantized(NamedTuple):
    """Activations in eight bits."""

    scale: Float32[Tensor, " row"]
    outliers: BFloat16[Tensor, "row outlier"]
    acts: Int8[Tensor, "row d_in"]


def n_outliers(d_in: int) -> int:
    """How many channels are kept apart: one in 32, but between 4 and 16, and never all."""
    return min(max(4, min(16, d_in // 32)), d_in - 1)


def pick_outliers(acts: Float[Tensor, "row d_in"]) -> list[int]:
    """The channels to keep apart: those of the largest mean square; the first of equals. Ascending.

    Args:
        acts: at least one row, all finite.
    """
    size = acts.cpu().double().square().mean(dim=0)
    order = torch.argsort(size, descending=True, stable=True)
    return sorted(order[: n_outliers(acts.shape[1])].tolist())


def quantize(acts: Float[Tensor, "row d_in"], channels: Int[Tensor, " outlier"]) -> Quantized:
    """Activations to eight bits; the result for a row depends on that row alone.

    Args:
        acts: finite activations.
        channels: those kept apart, on the same device.
    """
    outliers = acts[:, channels].to(torch.bfloat16)
    rest = acts.to(torch.float32, copy=True)
    rest[:, channels] = 0
    scale = rest.abs().amax(dim=1) / STEPS
    # A row of zeros has scale 0, and so may one of the tiniest numbers; the clamp is for those whose scale is inexact.
    steps = rest.div_(torch.where(scale > 0, scale, 1)[:, None]).round_().clamp_(-STEPS, STEPS)
    return Quantized(scale, outliers, steps.to(torch.int8))


def dequantize(stored: Quantized, channels: Int[Tensor, " outlier"]) -> Float32[Tensor, "row d_in"]:
    """Eight bits back to activations.

    Float32 and not bfloat16: it is what SAEs are trained in, and it is exact, so rounding happens once, when storing.
    """
    acts = stored.acts.to(torch.float32)
    acts.mul_(stored.scale[:, None])
    return acts.index_copy_(1, channels, stored.outliers.float())
