"""Perturbation methods by name: where a behaviour is, from evaluations of a metric under changed weights alone.

    from sae.behavior.measure import prepare_margins
    from sae.lm.matrices import block_matrices, heads, neurons
    from sae.weights.perturbation.margins import MarginMetric
    from sae.weights.perturbation.registry import METHODS

    metric = MarginMetric(lm, prepare_margins(lm, positives))
    found = METHODS["adaptive"](metric, block_matrices(lm), neurons(lm), budget=2000, seed=0)
    best = found.scores.argsort()[::-1]

`gradient_directed` takes gradients, too. What each method's scores estimate is said where it is defined, and how they
compare on a model whose parts are known in docs/weights.md.
"""

from collections.abc import Callable

from sae.weights.perturbation.adaptive import adaptive
from sae.weights.perturbation.evolution import evolution
from sae.weights.perturbation.located import Located
from sae.weights.perturbation.noise import gradient_directed, plain, random

METHODS: dict[str, Callable[..., Located]] = {
    "plain": plain,
    "random": random,
    "gradient_directed": gradient_directed,
    "adaptive": adaptive,
    "evolution": evolution,
}
