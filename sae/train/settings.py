"""How a grid of SAEs is trained. Defaults follow the SAEBench / dictionary_learning recipe."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from sae.autoencoder.sparsity import Schedule
from sae.errors import UserError, unknown
from sae.kernels import NAMES as KERNELS
from sae.kernels.moments import KINDS as MOMENTS
from sae.kernels.operands import Precision

ENCODER_DTYPES = ("auto", *(item.value for item in Precision))
CENTRES = ("geometric_median", "mean", "zero")


@dataclass(frozen=True)
class TrainSettings:
    """Settings shared by every SAE of a run.

    Raises:
        UserError: a value is out of range.
    """

    total_tokens: int
    """Tokens of the stream to train on; rounded down to whole batches."""
    batch_tokens: int
    """Tokens per optimiser step; must be the stream's."""
    lr: float | None = None
    """Peak learning rate; None means `optim.default_lr` for each SAE."""
    lr_warmup_steps: int | None = None
    """Steps of linear warm-up; None means 1000 or 5% of the run, whichever is shorter."""
    lr_decay_fraction: float = 0.2
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""
    clip: float = 1.0
    """Largest gradient norm of one SAE; 0 switches clipping off."""
    auxk_alpha: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents; 0 switches it off."""
    k_aux: int | None = None
    """Dead latents per token in it; None means d_in / 2."""
    dead_after_tokens: int | None = None
    """A latent is dead when it has been silent for this many tokens; None means 10 million or 5% of the run, whichever
    is less."""
    sparsity_warmup_steps: int | None = None
    """Steps over which penalties grow (relu, jumprelu); None means 5000 or 10% of the run, whichever is shorter."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the architectures (see each one's `Options`); each takes those that are its own."""
    adam_betas: tuple[float, float] | None = None
    """None means the architecture's, (0.9, 0.999) for all that come with the package."""
    start: str = ""
    """Folder of a trained SAE to go on from, or of a run that holds one for each SAE of this one, under the same names;
    empty starts afresh."""
    centre: str = "geometric_median"
    """What b_dec starts at: geometric_median, mean or zero."""
    init_batches: int = 4
    """Batches read to set the input scale, b_dec and thresholds; the stream is then rewound."""
    encoder_dtype: str = "auto"
    """Precision of the encoder product: float32, bfloat16, bfloat16_rescored (bfloat16 offers candidates, fp32 scores
    them), or auto: bfloat16 where the machine multiplies it in hardware. Weights are always fp32."""
    moments: str = "float32"
    """How Adam's moments of the two matrices are kept: float32, bfloat16 or float8 (8, 4 or 2 bytes a parameter)."""
    kernels: str = "auto"
    """What computes the step: auto (the fastest there is), triton, cpp, torch, or reference (plain autograd)."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 means by time only."""
    checkpoint_seconds: float = 300.0
    """Seconds between checkpoints; 0 means by steps only."""
    log_every: int = 50
    """Steps between logged metrics."""

    def __post_init__(self) -> None:
        for name in ("total_tokens", "batch_tokens", "init_batches", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} is less than 1: raise it.")
        if self.total_tokens < self.batch_tokens:
            raise UserError(
                f"total_tokens = {self.total_tokens} is less than one batch of {self.batch_tokens} tokens: raise it."
            )
        for name in ("clip", "auxk_alpha", "checkpoint_every", "checkpoint_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} = {getattr(self, name)} is negative or not finite: use 0 or more.")
        if self.dead_after_tokens is not None and self.dead_after_tokens < 1:
            raise UserError(f"dead_after_tokens = {self.dead_after_tokens} is less than 1: raise it, or leave it out.")
        for name in ("lr", "lr_warmup_steps", "sparsity_warmup_steps", "k_aux"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"{name} = {getattr(self, name)} is negative or not finite: use 0 or more, or leave it out."
                )
        if self.k_aux == 0:
            raise UserError("k_aux = 0 revives nothing: use 1 or more, or auxk_alpha = 0 to switch it off.")
        if not 0 <= self.lr_decay_fraction <= 1:
            raise UserError(f"lr_decay_fraction = {self.lr_decay_fraction} is not between 0 and 1.")
        if self.adam_betas is not None and not all(0 <= beta < 1 for beta in self.adam_betas):
            raise UserError(f"adam_betas = {list(self.adam_betas)} are not both between 0 and 1 (1 excluded).")
        if self.centre not in CENTRES:
            raise unknown("centre", self.centre, list(CENTRES))
        if self.encoder_dtype not in ENCODER_DTYPES:
            raise unknown("encoder_dtype", self.encoder_dtype, list(ENCODER_DTYPES))
        if self.moments not in MOMENTS:
            raise unknown("moments", self.moments, list(MOMENTS))
        if self.kernels not in KERNELS:
            raise unknown("kernels", self.kernels, list(KERNELS))

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.total_tokens // self.batch_tokens

    @property
    def dead_after(self) -> int:
        """Tokens of silence after which a latent is dead."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return min(10_000_000, max(10 * self.batch_tokens, self.total_tokens // 20))

    def schedule(self, seed: int) -> Schedule:
        """What the architecture of an SAE with this seed knows of the run."""
        warmup = self.sparsity_warmup_steps
        return Schedule(self.n_steps, min(5000, self.n_steps // 10) if warmup is None else warmup, seed)

    def identity(self) -> dict[str, Any]:
        """The settings that can change a trained weight; how often to log or save is not among them.

        Nor is which kernels compute it: they agree up to rounding, and a run may go on on another machine. Nor where
        the SAEs to start from lie: their weights count, not their path.
        """
        skipped = {"checkpoint_every", "checkpoint_seconds", "log_every", "kernels", "start"}
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in skipped}
