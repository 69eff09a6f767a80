"""How well components match those that are known to be there, as in toy models."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.weights.decomposition.components import Pieces


class Match(NamedTuple):
    """How well true components are found.

    Attributes:
        mmcs: mean over true components of the largest cosine similarity of a component, as flattened matrices. Stricter
            than the published measure, which compares one column of each.
        l2_ratio: mean over true components of the matched one's norm over its own; 1 is the right size.
    """

    mmcs: float
    l2_ratio: float


@torch.no_grad()
def match(pieces: Pieces, truth: Float[Tensor, "true d_out d_in"]) -> Match:
    """Compare the components of a matrix with the true ones."""
    ours = torch.stack([pieces.component(index) for index in range(len(pieces))]).flatten(1)
    theirs = truth.to(ours).flatten(1)
    size, true_size = ours.norm(dim=1).clamp_min(1e-12), theirs.norm(dim=1)
    cosine = (theirs / true_size[:, None]) @ (ours / size[:, None]).t()
    best, which = cosine.max(dim=1)
    return Match(float(best.mean()), float((size[which] / true_size).mean()))
