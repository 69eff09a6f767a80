"""Matryoshka (Bussmann et al. 2503.17547): nested dictionaries, each of which must reconstruct on its own.

The first latents have to be general, since they are judged without the later ones; this keeps wide dictionaries from
splitting and absorbing general features. Prefixes are fixed fractions, or drawn anew each step.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sae.autoencoder.architectures.batch_topk import BatchTopK, BatchTopKOptions
from sae.autoencoder.architectures.jumprelu import JumpReLU, JumpReLUOptions
from sae.autoencoder.sparsity import Active, Levels, Options, Sparsity, register
from sae.errors import UserError

SMALLEST = 1 / 64
"""Of the dictionary, as a drawn prefix."""


@dataclass(frozen=True)
class MatryoshkaOptions(Options):
    """Of every Matryoshka architecture."""

    prefixes: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
    """Sizes of the nested dictionaries as rising fractions of d_sae; the whole one is added."""
    n_sampled: int = 0
    """Draw so many prefixes log-uniformly for each step instead; 0 takes the fixed ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 < part < 1 for part in self.prefixes) or sorted(set(self.prefixes)) != list(self.prefixes):
            raise UserError(f"option prefixes = {list(self.prefixes)} is not a rising list of fractions of d_sae.")
        if self.n_sampled < 0:
            raise UserError(f"option n_sampled = {self.n_sampled} is negative: use 0 for fixed prefixes.")


class Matryoshka(Sparsity):
    """What nesting adds to an architecture; mixed in before it."""

    options: MatryoshkaOptions

    def prefix_sizes(self, step: int) -> list[int]:
        """Latents in each nested dictionary, rising; the last is d_sae."""
        parts = self.options.prefixes
        if self.options.n_sampled:
            # A generator of its own for every step: a resumed run draws what an uninterrupted one does.
            generator = torch.Generator().manual_seed((self.schedule.seed * 1_000_003 + step) % 2**63)
            drawn = torch.rand(self.options.n_sampled, generator=generator)
            parts = tuple((drawn * math.log(SMALLEST)).exp().tolist())
        sizes = {max(1, round(part * self.d_sae)) for part in parts}
        return [*sorted(size for size in sizes if size < self.d_sae), self.d_sae]

    def levels(self, active: Active, step: int) -> Levels:
        """A latent's level is the number of prefixes that end before it."""
        sizes = self.prefix_sizes(step)
        latents: Int[Tensor, " d_sae"] = torch.arange(self.d_sae, device=active.pre_acts.device)
        level = torch.searchsorted(torch.tensor(sizes, device=latents.device), latents, right=True)
        return Levels(level[active.cols], (1 / len(sizes),) * len(sizes))


@dataclass(frozen=True)
class MatryoshkaBatchTopKOptions(MatryoshkaOptions, BatchTopKOptions):
    """Of `matryoshka_batch_topk`."""


@register
class MatryoshkaBatchTopK(Matryoshka, BatchTopK):
    """BatchTopK over the whole dictionary, judged at every prefix."""

    name = "matryoshka_batch_topk"
    options_class = MatryoshkaBatchTopKOptions
    options: MatryoshkaBatchTopKOptions


@dataclass(frozen=True)
class MatryoshkaJumpReLUOptions(MatryoshkaOptions, JumpReLUOptions):
    """Of `matryoshka_jumprelu`."""


@register
class MatryoshkaJumpReLU(Matryoshka, JumpReLU):
    """JumpReLU over the whole dictionary, judged at every prefix."""

    name = "matryoshka_jumprelu"
    options_class = MatryoshkaJumpReLUOptions
    options: MatryoshkaJumpReLUOptions
