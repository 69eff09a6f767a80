"""Moves the coefficient of a penalty until L0 meets its target, so that the user names L0 and not a coefficient."""

import math

import torch
from torch import Tensor, nn

from sae.autoencoder.sparsity import BatchStats, Schedule

L0_MEMORY = 0.1
"""Weight of the newest batch in the running average of L0."""
DAMPING = 3.0
"""Part of the logarithm of the coefficient that follows log(L0 / aim) directly; it damps overshoot."""
DESCENT = 0.2
"""Part of the run in which the aim falls to the target."""
RELIEF = 2.0
"""How much faster the coefficient falls than it rises: too strong a penalty shrinks what it acts on."""


class L0Controller(nn.Module):
    """A proportional-integral controller of the logarithm of a coefficient.

    It does not aim at the target at once. L0 starts far above it and takes hundreds of steps to fall however strong the
    penalty is; an integral over that error would throw the coefficient far beyond what holds the target. So the aim
    starts where L0 is when the warm-up ends, and falls to the target, evenly in the logarithm, in a fifth of the run.

    Args:
        start: the coefficient before the first step.
        target: wanted L0; 0 leaves the coefficient alone.
        schedule: of the run.
    """

    log_coefficient: Tensor
    l0_average: Tensor
    aim: Tensor

    def __init__(self, start: float, target: float | int, schedule: Schedule) -> None:
        super().__init__()
        self.target = target
        self.warmup_steps = schedule.warmup_steps
        self.arrival_step = schedule.warmup_steps + DESCENT * schedule.n_steps
        # It must arrive within the run, yet not race ahead of the weights in a long one.
        self.gain = min(0.03, max(0.003, 20 / schedule.n_steps)) if schedule.n_steps else 0.02
        self.register_buffer("log_coefficient", torch.tensor(math.log(start)))
        self.register_buffer("l0_average", torch.tensor(0.0))
        self.register_buffer("aim", torch.tensor(0.0))

    def coefficient(self) -> Tensor:
        """Scalar: the coefficient in force."""
        return (self.log_coefficient + DAMPING * self._error()).exp()

    def _error(self) -> Tensor:
        """log(L0 / aim), and 0 before there is an aim."""
        error = (self.l0_average.log() - self.aim.log()).clamp(-1, 1)
        return torch.where(self.aim > 0, error, torch.zeros_like(error))

    def restart(self) -> None:
        """Forget the average and the aim; the coefficient stays."""
        self.l0_average.zero_()
        self.aim.zero_()

    def update(self, stats: BatchStats) -> None:
        """Raise the coefficient while L0 is above the aim, lower it while below."""
        self.l0_average.copy_(torch.where(self.l0_average > 0, self.l0_average.lerp(stats.l0, L0_MEMORY), stats.l0))
        # Before the warm-up ends the penalty is not at full strength, and integrating its error would overshoot.
        if self.target <= 0 or stats.step + 1 < self.warmup_steps:
            return
        aim = torch.where(self.aim > 0, self.aim, self.l0_average.clamp(min=self.target))
        steps_left = max(1.0, self.arrival_step - stats.step)
        self.aim.copy_(aim * (self.target / aim) ** (1 / steps_left))
        error = self._error()
        self.log_coefficient.add_(self.gain * torch.where(error < 0, RELIEF * error, error))
