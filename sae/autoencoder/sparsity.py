"""What makes an SAE sparse: one small class per architecture, found by name.

A class says how pre-activations become latent activations, in training and at inference, which penalty (if any)
drives the mean number of active latents to the target L0, and how its own state (thresholds, controllers) moves.
All state lives in buffers and parameters, so checkpoints carry it.

To add an architecture from outside, subclass `Sparsity`, set `name`, override what differs (often only `activate`)
and call `register`. Training then takes the dense path; overriding `select` as well opens the sparse one.

Recipes: TopK (Gao et al. 2406.04093), BatchTopK (Bussmann et al. 2412.06410), JumpReLU (Rajamanoharan et al.
2407.14435) with the target-L0 loss of dictionary_learning, whose hyper-parameters are the starting point.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.errors import UserError, unknown
from sae.kernels.operands import Entries, Projection
from sae.kernels.reference import Kernels


@dataclass(frozen=True)
class SparsityOptions:
    """Training knobs of the architectures. Lengths are in normalised units, where E||x||^2 = d_in."""

    warmup_steps: int = 0
    """Steps over which the penalty grows from 0 (relu, jumprelu)."""
    bandwidth: float = 0.3
    """Width of the straight-through window around a JumpReLU threshold."""
    l0_coefficient: float = 5.0
    """Weight of JumpReLU's ((L0 / target) - 1)^2."""
    l1_init: float = 0.02
    """Where relu's l1 coefficient starts; the controller moves it from there."""
    l1_gain: float = 0.02
    """How fast the logarithm of that coefficient moves per step and unit of log(L0 / target)."""
    l1_damping: float = 1.0
    """Part of that logarithm that follows log(L0 / target) directly; it damps overshoot."""
    threshold_beta: float = 0.999
    """Longest memory of BatchTopK's average threshold; short runs use a shorter one."""


class Active(NamedTuple):
    """The latent activations of one training batch, as a dense matrix or as its entries only."""

    pre_acts: Tensor
    """[n] at the entries, or [batch d_sae]."""
    latent_acts: Tensor
    """Same shape as `pre_acts`. What is not listed is zero and has no gradient."""
    cols: Tensor | slice
    """The latent of each entry, or `slice(None)` when dense: a per-latent tensor is looked up as `tensor[cols]`."""
    batch_tokens: int
    d_in: int


class BatchStats(NamedTuple):
    """What a batch did, for controllers and running averages."""

    l0: Tensor
    """Scalar: mean active latents per token."""
    min_active: Tensor
    """Scalar: smallest positive latent activation; infinity when nothing fired."""
    step: int


class Sparsity(nn.Module):
    """Base class: a plain ReLU without penalty. Subclasses override what differs."""

    name: ClassVar[str] = ""
    adam_betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    uses_auxk: ClassVar[bool] = False
    """Whether dead latents are revived by the auxiliary loss (see `loss.auxk`)."""

    def __init__(self, d_sae: int, l0: float | int, options: SparsityOptions) -> None:
        super().__init__()
        self.check(d_sae, l0)
        self.d_sae = d_sae
        self.l0 = l0
        self.options = options

    @classmethod
    def check(cls, d_sae: int, l0: float | int) -> None:
        """Refuse a target L0 this architecture cannot meet.

        Raises:
            UserError: with the value and the remedy.
        """
        if l0 < 0 or l0 > d_sae:
            raise UserError(f"target l0 {l0:g} is not between 0 and d_sae = {d_sae}: lower l0 or raise d_sae.")

    def activate(self, pre_acts: Tensor, cols: Tensor | slice) -> Tensor:
        """Map pre-activations to latent activations one by one; `cols` looks up per-latent values."""
        return pre_acts.relu()

    def select(self, kernels: Kernels, projection: Projection) -> Entries | None:
        """Ask the kernels for the entries that may be non-zero or have a gradient; None takes the dense path."""
        return None

    def train_acts(self, pre_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Latent activations as trained on: the dense truth that the sparse path must equal."""
        return self.activate(pre_acts, slice(None))

    def infer_acts(self, pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Latent activations of a finished SAE; each token stands alone."""
        return self.activate(pre_acts, slice(None))

    def initialise(self, pre_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Set data-dependent state from the pre-activations of the untrained SAE."""

    def penalty(self, active: Active, step: int) -> Tensor:
        """Scalar added to the loss to drive L0 to its target."""
        return active.latent_acts.new_zeros(())

    def update(self, stats: BatchStats) -> None:
        """Move controllers and running averages after an optimiser step."""

    def rescale(self, factor: float) -> None:
        """Follow a change of units: every pre-activation is now `factor` times what it was."""
        threshold = getattr(self, "threshold", None)
        if threshold is not None:
            with torch.no_grad():
                threshold.mul_(factor)

    def warmup(self, step: int) -> float:
        """Fraction of the penalty in force at this step."""
        return min(1.0, (step + 1) / self.options.warmup_steps) if self.options.warmup_steps else 1.0

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Sparsity":
        # Thresholds stay fp32 whatever the SAE is cast to: bf16 cannot hold the small steps they take, and a
        # rounded threshold moves L0.
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        kept = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        for name, tensor in (dict(self.named_parameters()) | dict(self.named_buffers())).items():
            if name in kept and tensor.dtype != kept[name].dtype:
                tensor.data = kept[name].to(tensor.device)
        return self


ARCHITECTURES: dict[str, type[Sparsity]] = {}


def register(cls: type[Sparsity]) -> type[Sparsity]:
    """Make an architecture known by its `name`; usable as a class decorator."""
    if not cls.name:
        raise UserError(f"{cls.__name__} has no name: set the class attribute `name`.")
    ARCHITECTURES[cls.name] = cls
    return cls


def find_architecture(name: str) -> type[Sparsity]:
    """Return the class of an architecture.

    Raises:
        UserError: no such name.
    """
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, sorted(ARCHITECTURES), "Own ones need register() first.")
    return ARCHITECTURES[name]


@register
class ReLU(Sparsity):
    """ReLU with an L1 penalty; a controller moves its coefficient to meet the target L0.

    Weighting each latent by the norm of its decoder row, as some do, would change nothing: the rows have norm 1.
    """

    name = "relu"
    l1_log: Tensor
    l0_average: Tensor

    def __init__(self, d_sae: int, l0: float | int, options: SparsityOptions) -> None:
        super().__init__(d_sae, l0, options)
        self.register_buffer("l1_log", torch.tensor(math.log(options.l1_init)))
        self.register_buffer("l0_average", torch.tensor(0.0))

    def select(self, kernels: Kernels, projection: Projection) -> Entries | None:
        """All positive pre-activations, once they are few."""
        zero = projection.b_enc.new_zeros(())
        return kernels.above(projection, zero, kernels.max_density(projection.precision))

    def penalty(self, active: Active, step: int) -> Tensor:
        """Coefficient * mean over tokens of sum_i z_i, in units of sqrt(d_in) so that widths compare."""
        l1 = active.latent_acts.sum() / active.batch_tokens
        return self.warmup(step) * self.coefficient() * l1 / math.sqrt(active.d_in)

    def coefficient(self) -> Tensor:
        """The l1 coefficient in force: the integral part plus a proportional one, which damps overshoot."""
        return (self.l1_log + self.options.l1_damping * self._error()).exp()

    def _error(self) -> Tensor:
        if self.l0 <= 0:
            return torch.zeros_like(self.l1_log)
        start = torch.where(self.l0_average > 0, self.l0_average, self.l0)
        return (start / self.l0).log().clamp(-1, 1)

    def update(self, stats: BatchStats) -> None:
        """Raise the coefficient while L0 is above target, lower it while below."""
        self.l0_average.copy_(torch.where(self.l0_average > 0, self.l0_average.lerp(stats.l0, 0.1), stats.l0))
        if self.l0 > 0 and stats.step + 1 >= self.options.warmup_steps:
            # Before the warm-up ends the penalty is not at full strength, and integrating its error would overshoot.
            self.l1_log.add_(self.options.l1_gain * self._error())


@register
class TopK(Sparsity):
    """The k = l0 largest pre-activations of each token, where positive."""

    name = "topk"
    uses_auxk = True

    @classmethod
    def check(cls, d_sae: int, l0: float | int) -> None:
        """L0 must be a whole number of at least 1."""
        super().check(d_sae, l0)
        if l0 < 1 or l0 != int(l0):
            raise UserError(f"topk keeps a whole number of latents, not l0 = {l0:g}: use a whole number or batch_topk.")

    def select(self, kernels: Kernels, projection: Projection) -> Entries:
        """The top k of each row."""
        return kernels.topk(projection, int(self.l0))

    def train_acts(self, pre_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """The top k of each row, where positive."""
        values, cols = pre_acts.topk(int(self.l0), dim=-1, sorted=False)
        return torch.zeros_like(pre_acts).scatter(-1, cols, values.relu())

    def infer_acts(self, pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Same selection as in training."""
        return self.train_acts(pre_acts)


@register
class BatchTopK(Sparsity):
    """The l0 * batch largest positive pre-activations of the whole batch; a fixed threshold at inference.

    The threshold is a running average of the smallest activation kept in a batch (dictionary_learning: decay .999).
    The decay grows with the number of batches seen, so that a run of a few hundred steps does not remember its start.
    """

    name = "batch_topk"
    uses_auxk = True
    threshold: Tensor
    n_updates: Tensor

    def __init__(self, d_sae: int, l0: float | int, options: SparsityOptions) -> None:
        super().__init__(d_sae, l0, options)
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("n_updates", torch.tensor(0, dtype=torch.int64))

    def initialise(self, pre_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Start the average where it would stand, so that the first batches know where to look."""
        self.threshold.copy_(_nth_largest(pre_acts.float().reshape(-1), self._n_keep(pre_acts)).clamp(min=0))

    def select(self, kernels: Kernels, projection: Projection) -> Entries:
        """The l0 * batch largest values of the batch, where positive."""
        n_keep = self._n_keep(projection.centred)
        found = self._candidates(kernels, projection, n_keep)
        if len(found.values) <= n_keep:
            return found
        smallest = _nth_largest(found.values, n_keep)
        larger, equal = ~(found.values <= smallest), found.values == smallest  # NaN stays, to be seen in the loss
        # A bf16 product is so coarse that a few per cent of a batch can be equal: exactly as many as wanted stay.
        keep = larger | (equal & (equal.cumsum(0) <= n_keep - larger.sum()))
        return Entries(found.rows[keep], found.cols[keep], found.values[keep])

    def _candidates(self, kernels: Kernels, projection: Projection, n_keep: int) -> Entries:
        """At least `n_keep` entries, or all positive ones.

        A little below the average threshold there are hardly more than enough, so that the order statistic is taken
        over less than a per cent of the matrix. The result does not depend on these guesses.
        """
        for part in (0.9, 0.5):
            found = kernels.above(projection, part * self.threshold.clamp(min=0))
            if found is not None and len(found.values) >= n_keep:
                return found
        found = kernels.above(projection, torch.zeros_like(self.threshold))
        assert found is not None  # it is only when a largest density is given
        return found

    def train_acts(self, pre_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """The same from the whole matrix; ties with the smallest are all kept."""
        smallest = _nth_largest(pre_acts.detach().reshape(-1), self._n_keep(pre_acts))
        return pre_acts * ((pre_acts >= smallest) & (pre_acts > 0))

    def _n_keep(self, batch: Tensor) -> int:
        return max(1, round(self.l0 * len(batch)))

    def infer_acts(self, pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Positive pre-activations strictly above the threshold."""
        return pre_acts * ((pre_acts > self.threshold) & (pre_acts > 0))

    def update(self, stats: BatchStats) -> None:
        """Average the smallest kept activation; a batch in which nothing fired changes nothing."""
        n = self.n_updates.to(torch.float32)
        beta = ((1 + n) / (10 + n)).clamp(max=self.options.threshold_beta) * (n > 0)
        moved = beta * self.threshold + (1 - beta) * stats.min_active.float()
        seen = torch.isfinite(stats.min_active)
        self.threshold.copy_(torch.where(seen, moved, self.threshold))
        self.n_updates.add_(seen)


def _nth_largest(values: Tensor, n: int) -> Tensor:
    if values.is_cuda:  # kthvalue uses a single block per slice there
        return values.topk(n, sorted=False).values.min()
    return values.kthvalue(len(values) - n + 1).values


class _Jump(torch.autograd.Function):
    """z * 1[z > threshold], with a rectangular straight-through gradient to the threshold (2407.14435, eq. 11)."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        window = (pre_acts - threshold).abs() < ctx.bandwidth / 2
        return grad * (pre_acts > threshold), grad * window * (-threshold / ctx.bandwidth), None


class _Step(torch.autograd.Function):
    """1[z > threshold], with the same straight-through gradient (2407.14435, eq. 12); none reaches z."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre_acts, threshold = ctx.saved_tensors
        window = (pre_acts - threshold).abs() < ctx.bandwidth / 2
        return None, grad * window * (-1 / ctx.bandwidth), None


@register
class JumpReLU(Sparsity):
    """Pre-activations strictly above a learned threshold per latent; a quadratic loss holds L0 at its target.

    The threshold is learned itself, not its logarithm: Adam's steps in the logarithm shrink with the threshold and
    it freezes. The loss has a target because under Adam a plain coefficient cancels where the threshold is the
    only path.
    """

    name = "jumprelu"
    adam_betas = (0.0, 0.999)
    uses_auxk = True

    def __init__(self, d_sae: int, l0: float | int, options: SparsityOptions) -> None:
        super().__init__(d_sae, l0, options)
        self.threshold = nn.Parameter(torch.zeros(d_sae))

    def initialise(self, pre_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Start at the one threshold that gives the target L0: from zero, a short run would hardly get there."""
        n_keep = min(pre_acts.numel(), max(1, round(self.l0 * len(pre_acts))))
        start = _nth_largest(pre_acts.float().reshape(-1), n_keep)
        with torch.no_grad():
            self.threshold.fill_(start.clamp(min=0))

    def _threshold(self, cols: Tensor | slice, like: Tensor) -> Tensor:
        threshold = self.threshold[cols]
        return threshold.expand_as(like) if isinstance(cols, slice) else threshold

    def activate(self, pre_acts: Tensor, cols: Tensor | slice) -> Tensor:
        """Strictly above the threshold."""
        return _Jump.apply(pre_acts, self._threshold(cols, pre_acts), self.options.bandwidth)

    def select(self, kernels: Kernels, projection: Projection) -> Entries | None:
        """Entries above the threshold, and those just below, which still move it."""
        near = self.threshold.detach() - self.options.bandwidth / 2
        return kernels.above(projection, near, kernels.max_density(projection.precision))

    def penalty(self, active: Active, step: int) -> Tensor:
        """Coefficient * ((L0 / target) - 1)^2."""
        if self.l0 <= 0:
            return active.latent_acts.new_zeros(())
        threshold = self._threshold(active.cols, active.pre_acts)
        fires: Tensor = _Step.apply(active.pre_acts.detach(), threshold, self.options.bandwidth)
        l0 = fires.sum() / active.batch_tokens
        return self.warmup(step) * self.options.l0_coefficient * (l0 / self.l0 - 1).square()

    def update(self, stats: BatchStats) -> None:
        """A negative threshold would let negative activations through."""
        with torch.no_grad():
            self.threshold.clamp_(min=0)
