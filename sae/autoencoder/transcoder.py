"""Transcoders (Dunefsky et al. 2406.11944): SAEs that read one hook point and reconstruct another.

    latent_acts = sparsity(x @ W_enc + b_enc)
    recons      = latent_acts @ W_dec + b_dec [+ x @ W_skip]

Read before an MLP and reconstruct what it writes, and latents say what the MLP computes. The skip (Paulo et al.
2501.18823) takes over what is linear in it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE, unit_rows


class Transcoder(SAE):
    """Inputs and outputs are different things: nothing is taken off the input, and the encoder starts on its own."""

    kind = "transcoder"
    centres = False

    def _first_encoder(self, generator: torch.Generator) -> Float[Tensor, "d_in d_sae"]:
        return unit_rows(self.config.d_sae, self.config.d_in, generator).t()

    @torch.no_grad()
    def fold_scales(self, reads: Sequence[float], writes: Sequence[float]) -> None:
        """As in `SAE`; latents come out in the units of what is written, so that decoder rows keep norm 1."""
        (read,), (write,) = reads, writes
        self.W_enc.mul_(read / write)
        self.b_enc.div_(write)
        self.b_dec.div_(write)
        if self.W_skip is not None:
            self.W_skip.mul_(read / write)
        self.sparsity.rescale(1 / write)
