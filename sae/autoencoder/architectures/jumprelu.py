"""JumpReLU (Rajamanoharan et al. 2407.14435), with the penalties that are in use for it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.autoencoder.architectures.controller import L0Controller
from sae.autoencoder.sparsity import Active, BatchStats, Options, Sparsity, nth_largest, register
from sae.errors import UserError, unknown
from sae.kernels.operands import Entries, Projection
from sae.kernels.reference import Kernels

PENALTIES = ("target", "quadratic", "step", "tanh")


@dataclass(frozen=True)
class JumpReLUOptions(Options):
    """Of `jumprelu`."""

    penalty: str = "target"
    """target: ((L0 / target) - 1)^2, as dictionary_learning; quadratic: (2 / target) * (L0 - target)^2, as Gemma
    Scope 2; step: L0 itself (2407.14435), and tanh: the sum of tanh(c * z) (Anthropic, January 2025), whose
    coefficients a controller moves to meet the target."""
    l0_coefficient: float = 5.0
    """Weight of target and quadratic."""
    penalty_init: float = 1.0
    """Where the coefficient of step and tanh starts, in units of the squared error of one activation of size 1."""
    tanh_scale: float = 4.0
    """c in tanh(c * z)."""
    bandwidth: float = 1.0
    """Width of the straight-through window around a threshold."""
    ste_to_input: bool = False
    """Whether the straight-through gradient reaches pre-activations too, not only thresholds (Anthropic)."""
    pre_act_coefficient: float = 0.0
    """Weight of relu(threshold - pre_act), summed over dead latents (Anthropic's revival; 3e-6 there); 0 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty not in PENALTIES:
            raise unknown("option penalty", self.penalty, list(PENALTIES))
        for name in ("penalty_init", "tanh_scale", "bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"option {name} = {getattr(self, name)} is not above 0: raise it.")
        for name in ("l0_coefficient", "pre_act_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"option {name} = {getattr(self, name)} is negative or not finite: use 0 or more.")


@register
class JumpReLU(Sparsity):
    """Pre-activations strictly above a learned threshold per latent.

    The threshold is learned itself, not its logarithm: Adam's steps in the logarithm shrink with the threshold and
    it freezes. The default loss has a target because under Adam a plain coefficient cancels where the threshold is
    the only path.
    """

    name = "jumprelu"
    options_class = JumpReLUOptions
    uses_auxk = True
    options: JumpReLUOptions

    def setup(self) -> None:
        """The thresholds, and the controller that some penalties have."""
        self.threshold = nn.Parameter(torch.zeros(self.d_sae))
        self.controller = L0Controller(self.options.penalty_init, self.l0, self.schedule)

    def initialise(self, pre_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Start at the one threshold that gives the target L0: from zero, a short run would hardly get there."""
        n_keep = min(pre_acts.numel(), max(1, round(self.l0 * len(pre_acts))))
        start = nth_largest(pre_acts.float().reshape(-1), n_keep)
        with torch.no_grad():
            self.threshold.fill_(start.clamp(min=0))

    def _threshold(self, cols: Tensor | slice, like: Tensor) -> Tensor:
        threshold = self.threshold[cols]
        return threshold.expand_as(like) if isinstance(cols, slice) else threshold

    def activate(self, pre_acts: Tensor, cols: Tensor | slice) -> Tensor:
        """Strictly above the threshold."""
        options = self.options
        jumped: Tensor = _Jump.apply(pre_acts, self._threshold(cols, pre_acts), options.bandwidth, options.ste_to_input)
        return jumped

    def select(self, kernels: Kernels, projection: Projection) -> Entries | None:
        """Entries above the threshold, and those just below, which still move it."""
        near = self.threshold.detach() - self.options.bandwidth / 2
        return kernels.above(projection, near, kernels.max_density(projection.precision))

    def penalty(self, active: Active, step: int) -> Tensor:
        """Drives L0 to its target; see `Options.penalty`."""
        options, warmup = self.options, self.schedule.warmup(step)
        if self.l0 <= 0:
            return active.latent_acts.new_zeros(())
        if options.penalty == "tanh":
            size = torch.tanh(options.tanh_scale * active.latent_acts).sum() / active.batch_tokens
            return warmup * self.controller.coefficient() * size / active.d_in
        pre_acts = active.pre_acts if options.ste_to_input else active.pre_acts.detach()
        threshold = self._threshold(active.cols, active.pre_acts)
        fires: Tensor = _Step.apply(pre_acts, threshold, options.bandwidth, options.ste_to_input)
        l0 = fires.sum() / active.batch_tokens
        if options.penalty == "step":
            return warmup * self.controller.coefficient() * l0 / active.d_in
        if options.penalty == "quadratic":
            return warmup * options.l0_coefficient * (2 / self.l0) * (l0 - self.l0).square()
        return warmup * options.l0_coefficient * (l0 / self.l0 - 1).square()

    def revive(self, dead_pre_acts: Float[Tensor, "batch n_dead"], latents: Tensor) -> Tensor | None:
        """Coefficient * mean over tokens of how far dead latents are below their thresholds, summed."""
        if not self.options.pre_act_coefficient:
            return None
        below = (self.threshold[latents] - dead_pre_acts).relu().sum() / len(dead_pre_acts)
        return self.options.pre_act_coefficient * below

    def restart(self) -> None:
        """Forget the average L0."""
        self.controller.restart()

    def update(self, stats: BatchStats) -> None:
        """Move the coefficient. A negative threshold would let negative activations through."""
        if self.options.penalty in ("step", "tanh"):
            self.controller.update(stats)
        with torch.no_grad():
            self.threshold.clamp_(min=0)


class _Jump(torch.autograd.Function):
    """z * 1[z > threshold], with a rectangular straight-through gradient to the threshold (2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pre_acts, threshold = ctx.saved_tensors
        through = grad * ((pre_acts - threshold).abs() < ctx.bandwidth / 2) * (threshold / ctx.bandwidth)
        straight = grad * (pre_acts > threshold)
        return straight + through if ctx.to_input else straight, -through, None, None


class _Step(torch.autograd.Function):
    """1[z > threshold], with the same straight-through gradient (2407.14435, eq. 12)."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        pre_acts, threshold = ctx.saved_tensors
        through = grad * ((pre_acts - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return through if ctx.to_input else None, -through, None, None
