"""What revives dead latents in a training step: the auxiliary loss (AuxK), and an architecture's own revival.

Both come after the gradients of everything else, and add to them in the rows of the dead latents alone: b_dec and the
living latents do not feel them. As in `sae.autoencoder.gradients`, the kernels make what is sparse; where few latents
are dead, matmuls over all of them are cheaper. The definition is in `sae.autoencoder.loss.auxk` and `Sparsity.revive`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.autoencoder.loss import variance
from sae.autoencoder.sae import SAE
from sae.kernels.operands import Index, Projection
from sae.kernels.reference import Kernels

AUXK_DENSE_RATIO = 24
"""The auxiliary loss takes the sparse path when there are more dead latents than this times k_aux: k_aux is large
(d_in / 2), so below that matmuls over all dead latents are cheaper than sums over the selected ones."""


class AuxK(NamedTuple):
    """The auxiliary loss that revives dead latents (2406.04093, A.2)."""

    alpha: float = 1 / 32
    """Its weight; 0 switches it off."""
    k: int | None = None
    """Dead latents per token in it; None means d_in / 2."""

    def latents(self, d_out: int) -> int:
        """Dead latents per token, at most."""
        return max(1, d_out // 2 if self.k is None else self.k)


class Revival(NamedTuple):
    """What reviving adds to the loss. Scalars."""

    penalty: Tensor
    """The architecture's own."""
    auxk: Tensor
    """The auxiliary loss, not yet times its weight."""


@torch.no_grad()
def revive(
    sae: SAE,
    projection: Projection,
    error: Float[Tensor, "batch d_out"],
    dead: Bool[Tensor, " d_sae"],
    auxk: AuxK,
    kernels: Kernels,
) -> Revival:
    """Add to the gradients of the dead latents what revives them; nothing where none is dead.

    Args:
        sae: the autoencoder; every parameter has its `.grad` already.
        projection: the encoder product of the batch.
        error: recons - target, in normalised units.
        dead: latents to revive.
        auxk: the auxiliary loss; only some architectures have it.
        kernels: what computes it.
    """
    latents = dead.nonzero().squeeze(1)
    nothing = error.new_zeros(())
    if not len(latents):
        return Revival(nothing, nothing)
    penalty = _own_revival(sae, projection, latents)
    if auxk.alpha > 0 and sae.sparsity.uses_auxk:
        return Revival(penalty, _auxk(sae, projection, -error, latents, auxk, kernels))
    return Revival(penalty, nothing)


def _auxk(
    sae: SAE,
    projection: Projection,
    residual: Float[Tensor, "batch d_out"],
    latents: Int[Tensor, " n_dead"],
    auxk: AuxK,
    kernels: Kernels,
) -> Float[Tensor, ""]:
    """The auxiliary loss; its gradient is added to that of the dead latents (b_dec is not to be moved by it)."""
    n_dead = len(latents)
    k = min(n_dead, auxk.latents(residual.shape[1]))
    w_enc, w_dec = sae.W_enc.t()[latents], sae.W_dec[latents]
    target_variance = variance(residual)
    weight = torch.where(target_variance > 0, 1 / target_variance, 0.0)
    part = projection._replace(w_enc=w_enc.t(), b_enc=sae.b_enc[latents])
    if n_dead > AUXK_DENSE_RATIO * k:
        entries = kernels.topk(part, k)
        index = Index(entries.rows, entries.cols, len(residual), n_dead)
        acts = entries.values.relu()
        missed = kernels.decode(acts, index, w_dec, torch.zeros_like(sae.b_dec)).sub_(residual)
        grad = missed * (2 * auxk.alpha * weight)
        groups = kernels.by_latent(index)
        grads = kernels.decode_grads(grad, acts, index, groups, w_dec)
        grad_values = grads.acts * (acts > 0)
        grad_w_dec = grads.w_dec
        grad_w_enc = kernels.encode_grad(grad_values, index, groups, projection.centred)
        grad_b_enc = kernels.bias_grad(grad_values, index, groups)
    else:
        dtype = projection.precision.dtype
        w, v, centred = w_enc.to(dtype), w_dec.to(dtype), projection.centred.to(dtype)
        pre_acts = (centred @ w.t()).float().add_(part.b_enc)
        if k < n_dead:
            smallest = pre_acts.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
            pre_acts = pre_acts * (pre_acts >= smallest)
        acts = pre_acts.relu_().to(dtype)
        missed = (acts @ v).float().sub_(residual)
        grad = missed * (2 * auxk.alpha * weight)
        rounded = grad.to(dtype)
        grad_values = (rounded @ v.t()).mul_(acts > 0)
        grad_w_dec, grad_w_enc = (acts.t() @ rounded).float(), (grad_values.t() @ centred).float()
        grad_b_enc = grad_values.float().sum(0)
    _add_to_rows(sae, latents, w_dec=grad_w_dec, w_enc=grad_w_enc, b_enc=grad_b_enc)
    return missed.square().sum() * weight


def _own_revival(sae: SAE, projection: Projection, latents: Int[Tensor, " n_dead"]) -> Float[Tensor, ""]:
    """The architecture's own revival of dead latents; b_dec is not to be moved by it."""
    dtype = projection.precision.dtype
    w_enc, centred = sae.W_enc.t()[latents].to(dtype), projection.centred.to(dtype)
    with torch.enable_grad():
        pre_acts = (centred @ w_enc.t()).float().add_(sae.b_enc[latents]).detach().requires_grad_()
        loss = sae.sparsity.revive(pre_acts, latents)
    if loss is None:
        return centred.new_zeros((), dtype=torch.float32)
    loss.backward()
    assert pre_acts.grad is not None
    grad = pre_acts.grad
    _add_to_rows(sae, latents, w_enc=(grad.to(dtype).t() @ centred).float(), b_enc=grad.sum(0))
    return loss.detach()


def _add_to_rows(sae: SAE, latents: Tensor, *, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor | None = None) -> None:
    """Add to the gradients of some latents, given row by row."""
    for parameter, added in ((sae.W_dec, w_dec), (sae.W_enc, w_enc), (sae.b_enc, b_enc)):
        if added is not None:
            assert parameter.grad is not None
            rows = parameter.grad.t() if parameter is sae.W_enc else parameter.grad
            rows.index_add_(0, latents, added)
