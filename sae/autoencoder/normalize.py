"""What some published SAEs do to each token before they read it, and undo in what they reconstruct.

Unlike the one scalar that our training folds into the weights, these depend on the token, so they cannot be folded:

    layer_norm   (x - mean(x)) / (std(x) + 1e-5), std with n - 1   (OpenAI 2406.04093; SAELens's "layer_norm")
    rms          x * sqrt(d_in) / |x|                              (SAELens's "constant_norm_rescale")

What is undone is y * std(x) + mean(x), without the 1e-5, as both do.

SAEs trained here have "none".
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import unknown

NONE, LAYER_NORM, RMS = "none", "layer_norm", "rms"
KINDS = (NONE, LAYER_NORM, RMS)
EPSILON = 1e-5


class Frame(NamedTuple):
    """How a token was normalised."""

    mean: Float[Tensor, "... 1"]
    divisor: Float[Tensor, "... 1"]
    """What is divided by on the way in: `scale`, and in layer norm a little more."""
    scale: Float[Tensor, "... 1"]
    """What is multiplied by on the way out."""

    def into(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Normalise."""
        return (x - self.mean) / self.divisor

    def back(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Undo it."""
        return x * self.scale + self.mean


def check(kind: str) -> None:
    """Refuse a name that is none of `KINDS`.

    Raises:
        UserError: unknown kind.
    """
    if kind not in KINDS:
        raise unknown("normalize", kind, list(KINDS))


def frame(kind: str, x: Float[Tensor, "... d"]) -> Frame | None:
    """How each token of `x` is normalised; None for "none"."""
    if kind == NONE:
        return None
    if kind == LAYER_NORM:
        std = x.std(dim=-1, keepdim=True)
        return Frame(x.mean(dim=-1, keepdim=True), std + EPSILON, std)
    length = x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    scale = length / math.sqrt(x.shape[-1])
    return Frame(torch.zeros_like(length), scale, scale)
