"""Matching pursuit (Costa et al. 2506.03093): latents are picked one after the other, each to explain what is left.

What is picked next depends on what was picked before, so activations are no function of the pre-activations. It is
there for SAEs that were trained elsewhere.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sparsity import Options, Sparsity, register
from sae.errors import UserError

if TYPE_CHECKING:
    from sae.autoencoder.sae import SAE


@dataclass(frozen=True)
class MatchingPursuitOptions(Options):
    """Of `matching_pursuit`."""

    max_steps: int = 0
    """Latents picked for a token at most, repeats counted; 0 means d_in."""
    stop_on_repeat: bool = True
    """Whether a token is done when a step picks a latent that it had before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps < 0:
            raise UserError(f"option max_steps = {self.max_steps} is negative: use 0 for d_in, or a limit.")


@register
class MatchingPursuit(Sparsity):
    """The latent whose decoder row has the largest product with the residual is active with it, again and again.

    The encoder is the decoder; W_enc and b_enc are not used.
    """

    name = "matching_pursuit"
    options_class = MatchingPursuitOptions
    trainable = False
    options: MatchingPursuitOptions
    residual_threshold: Tensor

    def setup(self) -> None:
        """The length of the residual below which a token is done; 0 never stops it."""
        self.register_buffer("residual_threshold", torch.tensor(0.0))

    def encode(self, sae: "SAE", x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Pick until the residual is small, a latent comes again, none helps, or there were enough."""
        centred = sae.encoder_input(x)
        return self._pursue(centred.reshape(-1, x.shape[-1]), sae.W_dec).view(*x.shape[:-1], self.d_sae)

    def _pursue(self, residual: Float[Tensor, "n d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> Tensor:
        acts = residual.new_zeros(len(residual), self.d_sae)
        rows = torch.arange(len(residual), device=residual.device)
        for _ in range(self.options.max_steps or W_dec.shape[1]):
            if not len(rows):
                break
            latents = (residual.detach() @ W_dec.detach().t()).argmax(dim=1)
            directions = W_dec[latents]
            values = (residual * directions).sum(dim=1).relu()
            repeated = acts.detach()[rows, latents] != 0
            acts.index_put_((rows, latents), values, accumulate=True)
            residual = residual - values[:, None] * directions
            going = (values > 0) & (residual.norm(dim=1) >= self.residual_threshold)
            if self.options.stop_on_repeat:
                going &= ~repeated
            rows, residual = rows[going], residual[going]
        return acts

    def infer_acts(self, pre_acts: Tensor) -> NoReturn:
        """There is no such function."""
        raise NotImplementedError("matching pursuit needs the residual, not pre-activations: call SAE.encode")

    def train_acts(self, pre_acts: Tensor) -> NoReturn:
        """There is no such function."""
        self.infer_acts(pre_acts)

    def rescale(self, factor: float) -> None:
        """The residual is a length."""
        with torch.no_grad():
            self.residual_threshold.mul_(factor)
