"""The one logistic regression: a linear readout of activations or latents, for detection and for comparison."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import optimize, special

from sae.errors import UserError

Array = np.ndarray


class Probe(NamedTuple):
    """A logistic readout: log-odds are x @ weight + bias, and it says yes where they are positive."""

    weight: Float[Array, " d"]
    bias: float

    def scores(self, x: ArrayLike) -> Float[Array, " n"]:
        """Log-odds of rows [n d]."""
        return np.asarray(x, dtype=np.float64) @ self.weight + self.bias


def fit_probe(x: ArrayLike, labels: ArrayLike, l2: float = 1.0) -> Probe:
    """Fit a logistic regression on standardised columns by L-BFGS; both classes count the same.

    Minimises, over weights w of the standardised columns and a bias that is not penalised,

        (mean loss over positives + mean loss over negatives) / 2 + l2 / (2 n) ||w||^2.

    Args:
        x: [n d].
        labels: [n], with both classes.
        l2: the penalty; 1 with equal classes is scikit-learn's C = 1.
    """
    values, flags = np.asarray(x, dtype=np.float64), np.asarray(labels).astype(bool)
    if flags.all() or not flags.any():
        raise UserError(f"all {len(flags)} labels are {bool(flags.all())}: a probe needs both classes.")
    if not np.isfinite(values).all():
        raise UserError("activations hold NaN or infinite values: a probe needs finite ones.")
    mean, sd = values.mean(axis=0), values.std(axis=0)
    # A column without spread is left at zero: dividing by its rounding error would make it the largest of all.
    sd = np.where(sd > 1e-8 * np.maximum(np.abs(values).max(axis=0), 1e-30), sd, np.inf)
    z = (values - mean) / sd
    share = np.where(flags, 0.5 / flags.sum(), 0.5 / (~flags).sum())
    sign = np.where(flags, 1.0, -1.0)

    def loss(theta: Array) -> tuple[float, Array]:
        margin = sign * (z @ theta[:-1] + theta[-1])
        slope = -sign * share * special.expit(-margin)
        value = float((share * np.logaddexp(0, -margin)).sum() + 0.5 * l2 / len(z) * (theta[:-1] ** 2).sum())
        return value, np.append(z.T @ slope + l2 / len(z) * theta[:-1], slope.sum())

    best = optimize.minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weight = best[:-1] / sd
    return Probe(weight, float(best[-1] - mean @ weight))
