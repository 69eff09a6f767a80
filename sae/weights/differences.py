"""From scores for a behaviour and for everything else to what is the behaviour's own.

Weights that a behaviour needs are mostly weights that everything needs. Two differences take those out:

- `set_difference`, Wei et al. (2024, 2402.05162): the top q of the behaviour minus the top p of the utility, in each
  matrix. As a score it is the rank for the behaviour, with what is in the utility's top p at zero, so that every
  threshold q gives their set.
- `normalized_difference`: the behaviour's score minus the utility's size, each divided by its mean size over the model.

Both are made a matrix at a time; what keeps them may be `dict`, or `sae.weights.stored.Stored` on disk.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.lm.matrices import Part
from sae.weights.attribution import Scores

Array = np.ndarray
Keep = Callable[[Iterable[tuple[str, Tensor]]], Scores]
TOP_UTILITY = 0.1


def _ranks(values: Tensor) -> Tensor:
    """Ranks in (0, 1], in the values' shape; ties in order of place."""
    flat = values.flatten()
    found = torch.empty(flat.numel(), dtype=torch.float32, device=flat.device)
    found[flat.argsort(stable=True)] = torch.arange(1, flat.numel() + 1, device=flat.device).float() / flat.numel()
    return found.view(values.shape)


def _kept(behavior: Tensor, utility: Tensor, top: float) -> Tensor:
    return torch.where(_ranks(utility.abs()) > 1 - top, 0.0, _ranks(behavior))


def set_difference(behavior: Scores, utility: Scores, top: float = TOP_UTILITY, keep: Keep = dict) -> Scores:
    """Return ranks for the behaviour within each matrix, zero in the top share of the utility's sizes there."""
    return keep((name, _kept(values, utility[name], top)) for name, values in behavior.items())


def normalized_difference(behavior: Scores, utility: Scores, keep: Keep = dict) -> Scores:
    """Return score / mean size - utility's size / mean size; means over all matrices."""
    ours, theirs = _mean_size(behavior), _mean_size(utility)
    return keep((name, values / ours - utility[name].abs() / theirs) for name, values in behavior.items())


def _mean_size(scores: Scores) -> float:
    total = sum(float(values.abs().sum(dtype=torch.float64)) for values in scores.values())
    return max(total / sum(values.numel() for values in scores.values()), 1e-30)


def part_set_difference(
    behavior: Float[Array, " part"], utility: Float[Array, " part"], parts: Sequence[Part], top: float = TOP_UTILITY
) -> Float[Array, " part"]:
    """Return `set_difference` of parts, ranked within those of one layer (rows and columns: of one matrix).

    Parts' scores are differences of sums, not sums of differences: ranks do not add.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, part in enumerate(parts):
        groups.setdefault(part.family, []).append(index)
    found = np.zeros(len(parts))
    for group in groups.values():
        found[group] = _kept(torch.from_numpy(behavior[group]), torch.from_numpy(utility[group]), top).numpy()
    return found


def part_normalized_difference(
    behavior: Float[Array, " part"], utility: Float[Array, " part"]
) -> Float[Array, " part"]:
    """Return `normalized_difference` of parts."""
    ours, theirs = (max(float(np.abs(values).mean()), 1e-30) for values in (behavior, utility))
    found: Array = behavior / ours - np.abs(utility) / theirs
    return found
