"""ReLU with an L1 penalty, or with an L^p penalty whose p falls during training (p-annealing, 2408.00113)."""

import math
from dataclasses import dataclass

from torch import Tensor

from sae.autoencoder.architectures.controller import L0Controller
from sae.autoencoder.sparsity import Active, BatchStats, Options, Sparsity, register
from sae.errors import UserError
from sae.kernels.operands import Entries, Projection
from sae.kernels.reference import Kernels

P_OFFSET = 0.03
"""Added to activations under the power, in units of sqrt(d_in): for p < 1 the slope at 0 would be infinite."""

P_SETTLED = 0.75
"""Part of the run after which the power stays: the controller needs the rest to bring L0 to its target."""


@dataclass(frozen=True)
class ReLUOptions(Options):
    """Of `relu`."""

    l1_init: float = 0.02
    """Where the coefficient starts; a controller moves it to meet the target L0."""
    p_end: float = 1.0
    """Power of the penalty from 75% of the run on; 1 is L1 throughout."""
    p_start_fraction: float = 0.2
    """Part of the run after which the power begins to fall, linearly, from 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l1_init", "p_end"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"option {name} = {getattr(self, name)} is not above 0: raise it.")
        if self.p_end > 1:
            raise UserError(f"option p_end = {self.p_end} is above 1: use 1 for L1, or less.")
        if not 0 <= self.p_start_fraction < P_SETTLED:
            raise UserError(f"option p_start_fraction = {self.p_start_fraction} is not in [0, {P_SETTLED}).")


@register
class ReLU(Sparsity):
    """Positive pre-activations.

    Weighting each latent by the norm of its decoder row, as some do, would change nothing: the rows have norm 1.
    """

    name = "relu"
    options_class = ReLUOptions
    options: ReLUOptions

    def setup(self) -> None:
        """The controller of the penalty."""
        self.controller = L0Controller(self.options.l1_init, self.l0, self.schedule)

    def select(self, kernels: Kernels, projection: Projection) -> Entries | None:
        """All positive pre-activations, once they are few."""
        zero = projection.b_enc.new_zeros(())
        return kernels.above(projection, zero, kernels.max_density(projection.precision))

    def penalty(self, active: Active, step: int) -> Tensor:
        """Coefficient * mean over tokens of sum_i (z_i / sqrt(d_in))^p, so that widths compare."""
        acts, p = active.latent_acts / math.sqrt(active.d_in), self.power(step)
        if p < 1:
            acts = (acts + P_OFFSET).pow(p) - P_OFFSET**p
        return self.schedule.warmup(step) * self.controller.coefficient() * acts.sum() / active.batch_tokens

    def power(self, step: int) -> float:
        """The power of the penalty at a step."""
        n_steps = self.schedule.n_steps
        start, stop = self.options.p_start_fraction * n_steps, P_SETTLED * n_steps
        if step < start or n_steps == 0:
            return 1.0
        done = min(1.0, (step - start) / (stop - start))
        return 1.0 - (1.0 - self.options.p_end) * done

    def restart(self) -> None:
        """Forget the average L0."""
        self.controller.restart()

    def update(self, stats: BatchStats) -> None:
        """Move the coefficient."""
        self.controller.update(stats)
