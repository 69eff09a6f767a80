"""Crosscoders (Lindsey et al. 2024): one dictionary for several hook points, or for one of two models, at once.

The activations of all sources are concatenated, each scaled on its own, and a latent has a part of its decoder row for
each of them. Which sources a latent serves shows in the norms of these parts. With BatchTopK (Minder et al.
2504.02922) sparsity does not shrink them, so that latents of one model only are not made up.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE


class Crosscoder(SAE):
    """An SAE of concatenated activations, [... d_in] with d_in the sum of the sources' widths, in the site's order.

    Whole decoder rows have norm 1 in normalised units. Latents keep those units when the scales of the sources are
    folded in, since there is no one scale to give them.
    """

    kind = "crosscoder"

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the hook points."""
        return self.config.site.reads

    def split(self, x: Float[Tensor, "... d_in"]) -> tuple[Float[Tensor, "... d"], ...]:
        """The sources apart: views, in the site's order."""
        return x.split(self.config.read_widths, dim=-1)

    def decoder_norms(self) -> Float[Tensor, "d_sae source"]:
        """Norm of each latent's decoder row at each source, relative to what is typical of the source.

        In an SAE whose scales were folded in, norms are multiplied by the scales again, so that they compare.
        """
        return torch.stack([part.norm(dim=-1) for part in self.split(self.W_dec * self.column_scales())], dim=-1)

    def column_scales(self) -> Float[Tensor, " d_in"]:
        """What each column of a raw activation is multiplied by to be in the units of training; 1 where unknown."""
        scales = self.config.metadata.get("training", {}).get("input_scales", [1.0] * len(self.sources))
        columns = self.W_dec.new_ones(self.config.d_in)
        for part, scale in zip(self.split(columns), scales, strict=True):
            part.mul_(scale)
        return columns

    @torch.no_grad()
    def fold_scales(self, reads: Sequence[float], writes: Sequence[float]) -> None:
        """As in `SAE`, source by source, and without touching the units of latents."""
        assert list(writes) == list(reads), "a crosscoder reconstructs what it reads"
        encoder, decoder, bias = (self.split(tensor) for tensor in (self.W_enc.t(), self.W_dec, self.b_dec))
        for source, scale in enumerate(reads):
            encoder[source].mul_(scale)
            decoder[source].div_(scale)
            bias[source].div_(scale)
