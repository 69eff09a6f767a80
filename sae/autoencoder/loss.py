"""Losses and batch statistics of sparse autoencoders. Pure functions; definitions as in the project glossary."""

import torch
from jaxtyping import Float
from torch import Tensor


def normalised_mse(x: Float[Tensor, "batch d_in"], recons: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Mean over tokens of ||x - recons||^2 / d_in.

    With inputs scaled to E||x||^2 = d_in this is the fraction of the squared norm that is missed, and its scale
    does not depend on the batch.
    """
    return (x - recons).square().sum() / x.numel()


def variance(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Sum over the batch of ||x - mean(x)||^2: the denominator of FVU, the same for every SAE of a hook point."""
    return (x - x.mean(0)).square().sum()


def fvu(x: Float[Tensor, "batch d_in"], recons: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained: sum ||x - recons||^2 / sum ||x - mean(x)||^2, mean over this batch."""
    return (x - recons).square().sum() / variance(x)


def l0(latent_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    """Mean number of non-zero latents per token."""
    return (latent_acts != 0).sum() / len(latent_acts)


def auxk(
    residual: Float[Tensor, "batch d_in"],
    dead_pre_acts: Float[Tensor, "batch n_dead"],
    dead_decoder: Float[Tensor, "n_dead d_in"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """Auxiliary loss that revives dead latents (2406.04093, A.2): they reconstruct what the living ones missed.

    Args:
        residual: x - recons; no gradient reaches it.
        dead_pre_acts: pre-activations of the dead latents only.
        dead_decoder: their decoder rows.
        k_aux: how many of them may fire per token; capped by how many there are.

    Returns:
        ||residual - its reconstruction||^2 over the residual's variance; 0 for a residual without variance.
    """
    residual = residual.detach()
    k = min(k_aux, dead_pre_acts.shape[-1])
    values, cols = dead_pre_acts.topk(k, dim=-1, sorted=False)
    acts = torch.zeros_like(dead_pre_acts).scatter(-1, cols, values.relu())
    spread = variance(residual)
    missed = (residual - acts @ dead_decoder).square().sum()
    # Where there is no variance the denominator is replaced first: a gradient of 0 * infinity would be NaN.
    return missed / torch.where(spread > 0, spread, 1.0) * (spread > 0)
