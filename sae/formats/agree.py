"""Do two SAEs do the same thing? Run both on the same activations and take the largest difference."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE


class Agreement(NamedTuple):
    """How far apart two SAEs are."""

    latents: float
    """Largest difference of a latent's activation, over the largest activation of the first."""
    recons: float
    """Largest difference of a reconstruction, over the largest entry of the first's."""
    l0: float
    """Mean latents active on a token, of the first: a comparison where nothing fires shows little."""
    n_tokens: int

    @property
    def worst(self) -> float:
        """The larger difference."""
        return max(self.latents, self.recons)


@torch.no_grad()
def agree(first: SAE, second: SAE, batches: Iterable[Float[Tensor, "n d_in"]]) -> Agreement:
    """Compare two SAEs of the same sizes on batches of activations."""
    largest = {"latents": (0.0, 0.0), "recons": (0.0, 0.0)}
    active = n_tokens = 0
    for x in batches:
        one, two = first(x), second(x.to(second.device))
        pairs = {"latents": (one.latent_acts, two.latent_acts), "recons": (one.recons, two.recons)}
        for name, (a, b) in pairs.items():
            apart, size = largest[name]
            a, b = a.float(), b.to(a.device).float()
            largest[name] = max(apart, float((a - b).abs().max())), max(size, float(a.abs().max()))
        active += int((one.latent_acts != 0).sum())
        n_tokens += len(x)
    ratios = {name: apart / size if size else apart for name, (apart, size) in largest.items()}
    return Agreement(**ratios, l0=active / max(1, n_tokens), n_tokens=n_tokens)


def random_activations(sae: SAE, n_tokens: int = 4_096, seed: int = 0) -> Float[Tensor, "n d_in"]:
    """Activations on which an SAE's latents fire: a few of its own encoder directions a token, and noise.

    Sizes spread over four orders of magnitude around what the thresholds and biases ask for, so that some tokens are
    near them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(sae.W_enc.detach().float().cpu().t(), dim=1)
    chosen = torch.randint(len(rows), (n_tokens, 8), generator=generator)
    weights = torch.rand(n_tokens, 8, generator=generator)
    mixed = torch.einsum("nk,nkd->nd", weights, rows[chosen])
    noise = torch.randn(mixed.shape, generator=generator) / rows.shape[1] ** 0.5
    size = 10 ** (4 * torch.rand(n_tokens, 1, generator=generator) - 1)
    scale = max(1.0, float(sae.b_dec.detach().norm()))
    x = (mixed + 0.3 * noise) * size * scale / 10
    if sae.centres:
        x = x + sae.b_dec.detach().float().cpu()
    return x.to(sae.device)
