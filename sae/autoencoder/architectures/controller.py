"""Moves the coefficient of a penalty until L0 meets its target, so that the user names L0 and not a coefficient."""

import math

import torch
from torch import Tensor, nn

from sae.autoencoder.sparsity import BatchStats, Schedule

L0_MEMORY = 0.1
"""Weight of the newest batch in the running average of L0."""
DAMPING = 1.0
"""Part of the logarithm of the coefficient that follows log(L0 / target) directly; it damps overshoot."""


class L0Controller(nn.Module):
    """A proportional-integral controller of the logarithm of a coefficient.

    Args:
        start: the coefficient before the first step.
        target: wanted L0; 0 leaves the coefficient alone.
        schedule: of the run.
    """

    log_coefficient: Tensor
    l0_average: Tensor

    def __init__(self, start: float, target: float | int, schedule: Schedule) -> None:
        super().__init__()
        self.target = target
        self.warmup_steps = schedule.warmup_steps
        # It must arrive within the run, yet not race ahead of the weights in a long one.
        self.gain = min(0.03, max(0.003, 10 / schedule.n_steps)) if schedule.n_steps else 0.02
        self.register_buffer("log_coefficient", torch.tensor(math.log(start)))
        self.register_buffer("l0_average", torch.tensor(0.0))

    def coefficient(self) -> Tensor:
        """Scalar: the coefficient in force."""
        return (self.log_coefficient + DAMPING * self._error()).exp()

    def _error(self) -> Tensor:
        if self.target <= 0:
            return torch.zeros_like(self.log_coefficient)
        now = torch.where(self.l0_average > 0, self.l0_average, self.target)
        return (now / self.target).log().clamp(-1, 1)

    def restart(self) -> None:
        """Forget the average; the coefficient stays."""
        self.l0_average.zero_()

    def update(self, stats: BatchStats) -> None:
        """Raise the coefficient while L0 is above target, lower it while below."""
        self.l0_average.copy_(torch.where(self.l0_average > 0, self.l0_average.lerp(stats.l0, L0_MEMORY), stats.l0))
        if self.target > 0 and stats.step + 1 >= self.warmup_steps:
            # Before the warm-up ends the penalty is not at full strength, and integrating its error would overshoot.
            self.log_coefficient.add_(self.gain * self._error())
