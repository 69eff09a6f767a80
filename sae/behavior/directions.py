"""Directions behind a behaviour: difference of means, and random directions as controls.

The difference of means is the baseline every latent must be compared with: on natural models it often steers better
than any set of SAE latents (Arditi et al. 2024; AxBench 2025). The dense logistic probe (`sae.probe`) bounds what a
linear readout of the same activations can detect.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sae import stats
from sae.errors import UserError

Array = np.ndarray


@dataclass(frozen=True)
class Direction:
    """Difference of means of two classes at one hook point and position.

    Attributes:
        hook_name: where.
        position: token position, e.g. ``"-1"`` for the last prompt token.
        vector: mean of positives minus mean of negatives; adding it once makes a typical negative a typical positive.
        positive_mean: mean coefficient of positives along the unit vector.
        negative_mean: that of negatives: what `ProjectOut(toward=...)` should aim at.
    """

    hook_name: str
    position: str
    vector: Float[Array, " d_in"]
    positive_mean: float
    negative_mean: float

    @property
    def norm(self) -> float:
        """Length of the difference."""
        return float(np.linalg.norm(self.vector))

    @property
    def unit(self) -> Float[Array, " d_in"]:
        """The direction at length 1."""
        return self.vector / self.norm

    def project(self, acts: Float[Array, "n d_in"]) -> Float[Array, " n"]:
        """Return each row's coefficient along the unit vector."""
        return np.asarray(acts, dtype=np.float64) @ self.unit


def difference_of_means(
    acts: Float[Array, "n d_in"], labels: Sequence[bool], hook_name: str, position: str
) -> Direction:
    """Return the difference of class means, in float64.

    Raises:
        UserError: one class only, non-finite activations, or means that coincide.
    """
    x, flags = np.asarray(acts, dtype=np.float64), np.asarray(labels, dtype=bool)
    if flags.all() or not flags.any():
        raise UserError(f"a difference of means needs both classes; all {len(flags)} labels are {bool(flags.all())}.")
    if not np.isfinite(x).all():
        raise UserError(f"activations at {hook_name!r} hold NaN or infinite values.")
    vector = x[flags].mean(axis=0) - x[~flags].mean(axis=0)
    norm = np.linalg.norm(vector)
    if norm == 0:
        raise UserError(
            f"both classes have the same mean at {hook_name!r}, position {position}: read a later position or layer."
        )
    coefficients = x @ (vector / norm)
    return Direction(hook_name, position, vector, float(coefficients[flags].mean()), float(coefficients[~flags].mean()))


def random_directions(n: int, d_in: int, norm: float = 1.0, seed: int = 0) -> Float[Array, "n d_in"]:
    """Return n directions uniform on the sphere of radius `norm`."""
    draws = np.random.default_rng(seed).normal(size=(n, d_in))
    return norm * draws / np.linalg.norm(draws, axis=1, keepdims=True)


class Detection(NamedTuple):
    """Held-out AUROC of one detector."""

    name: str  #: "latent 17", "difference of means", "probe"
    auroc: stats.Interval
