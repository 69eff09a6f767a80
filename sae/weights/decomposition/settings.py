"""Settings of a parameter decomposition, in one place."""

from dataclasses import dataclass

from sae.errors import UserError, unknown

GATES = ("shared", "each")
MAX_WEIGHTS = 30_000_000
"""Weights in the matrices of the largest model that is decomposed: every component trains on every token."""


@dataclass(frozen=True)
class DecompositionSettings:
    """How a model is decomposed.

    Attributes:
        components: of each matrix; 0 is as many as its smaller side has coordinates.
        gates: what says how important components are: "each" has a small network a component, which sees its own
            inner activation, as published; "shared" one network a matrix, which sees all of them.
        hidden: width of these networks.
        steps: training steps.
        lr: of Adam, at the start; it falls to 0 as a cosine.
        faithfulness: weight of the squared distance of the components' sum from its matrix, relative to the matrix.
        stochastic: weight of the reconstruction with random masks in all matrices.
        layerwise: weight of the mean reconstruction with random masks in one matrix.
        layerwise_matrices: matrices drawn for it at every step.
        sparsity: weight of the mean over tokens of the sum over components of importance^p.
        p_start, p_end: p at the first and the last step, linear in between.
        seed: of everything random.
    """

    components: int = 0
    gates: str = "shared"
    hidden: int = 64
    steps: int = 1000
    lr: float = 3e-3
    faithfulness: float = 10.0
    stochastic: float = 1.0
    layerwise: float = 1.0
    layerwise_matrices: int = 1
    sparsity: float = 1e-3
    p_start: float = 2.0
    p_end: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gates not in GATES:
            raise unknown("gates", self.gates, list(GATES))
        least = {"components": 0, "seed": 0}
        for name in ("components", "hidden", "steps", "layerwise_matrices", "seed"):
            if getattr(self, name) < least.get(name, 1):
                raise UserError(f"{name}={getattr(self, name)} of a decomposition: give {least.get(name, 1)} or more.")
        for name in ("lr", "p_start", "p_end"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} of a decomposition must be more than 0.")
        for name in ("faithfulness", "stochastic", "layerwise", "sparsity"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)} of a decomposition is negative: give 0 to leave it out.")

    def p_at(self, step: int) -> float:
        """The power of the sparsity penalty at a step; after the last, as at the last."""
        share = min(1.0, step / max(1, self.steps - 1))
        return self.p_start + (self.p_end - self.p_start) * share
