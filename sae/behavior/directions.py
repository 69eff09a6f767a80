"""Directions behind a behaviour: difference of means, a dense probe, and random directions as controls.

The difference of means is the baseline every latent must be compared with: on natural models it often steers better
than any set of SAE latents (Arditi et al. 2024; AxBench 2025). The dense logistic probe bounds what a linear readout
of the same activations can detect.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

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


class Probe(NamedTuple):
    """A logistic readout: positive when weight . x + bias > 0."""

    weight: Float[Array, " d_in"]
    bias: float

    def scores(self, acts: Float[Array, "n d_in"]) -> Float[Array, " n"]:
        """Return the log-odds of each row."""
        return np.asarray(acts, dtype=np.float64) @ self.weight + self.bias


def logistic_probe(acts: Float[Array, "n d_in"], labels: Sequence[bool], l2: float = 1.0) -> Probe:
    """Fit L2-regularised logistic regression on standardised activations (L-BFGS), classes weighted equally.

    Args:
        acts: activations.
        labels: True for positives.
        l2: penalty on the standardised weights, relative to the mean loss times n.
    """
    x, flags = np.asarray(acts, dtype=np.float64), np.asarray(labels, dtype=bool)
    if flags.all() or not flags.any():
        raise UserError("a probe needs both classes.")
    mean, sd = x.mean(axis=0), x.std(axis=0)
    sd = np.where(sd > 1e-8 * max(float(sd.max()), 1e-30), sd, 1.0)
    z = (x - mean) / sd
    share = np.where(flags, 0.5 / flags.sum(), 0.5 / (~flags).sum())
    sign = np.where(flags, 1.0, -1.0)

    def loss(theta: Array) -> tuple[float, Array]:
        margin = sign * (z @ theta[:-1] + theta[-1])
        slope = -sign * share * special.expit(-margin)
        value = float((share * np.logaddexp(0, -margin)).sum() + 0.5 * l2 / len(x) * (theta[:-1] ** 2).sum())
        return value, np.append(z.T @ slope + l2 / len(x) * theta[:-1], slope.sum())

    best = optimize.minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weight = best[:-1] / sd
    return Probe(weight, float(best[-1] - mean @ weight))


class Detection(NamedTuple):
    """Held-out AUROC of one detector."""

    name: str  #: "latent 17", "difference of means", "probe"
    auroc: stats.Interval
