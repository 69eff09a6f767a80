"""One training batch: its loss, and the gradient of every parameter.

Dense autograd costs 12 * d_in * d_sae FLOPs per token. Here only the encoder product is dense (2 * d_in * d_sae), and
the kernels do not even keep it:

    select    entries of pre_acts = (x - b_dec) @ W_enc + b_enc that may be active or have a gradient
    decode    recons = sum of a few decoder rows a token
    backward  W_dec and the latents from the error, the few rows of each latent summed; then W_enc likewise;
              b_dec through the encoder is -W_enc @ grad(b_enc), a mat-vec, since all tokens share one b_dec

The derivative of the architecture itself (activation and penalty) is autograd's, on the entries alone.

`loss_and_gradients` is what the trainer calls. An architecture that selects nothing, or a batch in which too much is
active for sparse sums to pay, takes `_dense`, the same with matmuls. `reference_loss` is the truth that both are
tested against: the definition, differentiated by autograd.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.autoencoder import loss
from sae.autoencoder.sae import SAE
from sae.autoencoder.sparsity import Active, BatchStats
from sae.kernels.operands import Entries, Index, Precision, Projection, Workspace
from sae.kernels.reference import Kernels

AUXK_DENSE_RATIO = 24
"""The auxiliary loss takes the sparse path when there are more dead latents than this times k_aux: k_aux is large
(d_in / 2), so below that matmuls over all dead latents are cheaper than sums over the selected ones."""


class TrainingLoss(NamedTuple):
    """The loss of one batch and what there is to know about it. Scalars are tensors: reading them may wait on a GPU."""

    total: Tensor
    """Scalar: mse + penalty + auxk_alpha * auxk."""
    mse: Tensor
    fvu: Tensor
    penalty: Tensor
    auxk: Tensor
    fired: Tensor
    """[d_sae] bool: fired on at least one token of the batch."""
    stats: BatchStats


class AuxK(NamedTuple):
    """The auxiliary loss that revives dead latents (2406.04093, A.2)."""

    alpha: float = 1 / 32
    """Its weight; 0 switches it off."""
    k: int | None = None
    """Dead latents per token in it; None means d_in / 2."""


def variance(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Sum over the batch of ||x - mean(x)||^2: the denominator of FVU, the same for every SAE of a hook point."""
    return (x - x.mean(0)).square().sum()


@torch.no_grad()
def loss_and_gradients(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    step: int,
    dead: Bool[Tensor, " d_sae"] | None,
    *,
    kernels: Kernels,
    precision: Precision = Precision.float32,
    auxk: AuxK = AuxK(),  # noqa: B008 - immutable
    x_variance: Tensor | None = None,
    workspace: Workspace | None = None,
) -> TrainingLoss:
    """Compute the loss of a batch and set `.grad` of every parameter of the SAE.

    Args:
        sae: the autoencoder, in normalised units, with decoder rows of norm 1.
        x: inputs scaled to E||x||^2 = d_in, fp32.
        step: optimiser steps taken so far, for warm-ups.
        dead: latents to revive; None when there are none.
        kernels: what computes it; the reference kernels mean plain autograd throughout.
        precision: of the encoder product, and of matmuls on the dense path.
        auxk: the auxiliary loss.
        x_variance: `variance(x)`, where it is known already.
        workspace: memory for the weights' gradients, which then last until its next use.
    """
    x_variance = variance(x) if x_variance is None else x_variance
    sae.zero_grad()
    if kernels.name == "reference":
        return _reference(sae, x, step, dead, auxk, x_variance)
    centred = x - sae.b_dec
    projection = Projection(centred, sae.W_enc, sae.b_enc, precision)
    entries = sae.sparsity.select(kernels, projection)
    if entries is None:
        passed = _dense(sae, x, projection, step)
    else:
        passed = _sparse(sae, x, projection, entries, step, kernels, workspace or Workspace())
    square_error = passed.error.square().sum()
    mse, aux = square_error / x.numel(), x.new_zeros(())
    if dead is not None and auxk.alpha > 0 and sae.sparsity.uses_auxk:
        aux = _auxk(sae, projection, -passed.error, dead, auxk, kernels)
    acts = passed.active.latent_acts
    return TrainingLoss(
        mse + passed.penalty + auxk.alpha * aux,
        mse,
        square_error / x_variance,
        passed.penalty,
        aux,
        *_activity(acts, passed.active.cols, len(x), sae.config.d_sae, step),
    )


class _Pass(NamedTuple):
    """What the forward pass gave."""

    error: Tensor
    """[batch d_in] recons - x."""
    active: Active
    penalty: Tensor


def _sparse(
    sae: SAE,
    x: Tensor,
    projection: Projection,
    entries: Entries,
    step: int,
    kernels: Kernels,
    workspace: Workspace,
) -> _Pass:
    index = Index(entries.rows, entries.cols, len(x), sae.config.d_sae)
    values, active, penalty = _activate(sae, entries.values, entries.cols, len(x), step)
    acts = active.latent_acts
    error = kernels.decode(acts.detach(), index, sae.W_dec, sae.b_dec).sub_(x)
    grad = error * (2 / error.numel())
    groups = kernels.by_latent(index)
    space = workspace.matrix("w_dec", sae.W_dec) if kernels.takes_memory else None
    grads = kernels.decode_grads(grad, acts.detach(), index, groups, sae.W_dec, space)
    grad_values = _backward(values, acts, penalty, grads.acts)
    sae.W_dec.grad = grads.w_dec
    space = workspace.matrix("w_enc", sae.W_dec) if kernels.takes_memory else None
    sae.W_enc.grad = kernels.encode_grad(grad_values, index, groups, projection.centred, space).t()
    sae.b_enc.grad = kernels.bias_grad(grad_values, index, groups)
    sae.b_dec.grad = grad.sum(0).addmv_(sae.W_enc, sae.b_enc.grad, alpha=-1)
    return _Pass(error, active._replace(latent_acts=acts.detach()), penalty.detach())


def _dense(sae: SAE, x: Tensor, projection: Projection, step: int) -> _Pass:
    dtype = projection.precision.dtype

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).to(a.dtype)

    pre_acts = matmul(projection.centred, sae.W_enc) + sae.b_enc
    values, active, penalty = _activate(sae, pre_acts, slice(None), len(x), step)
    acts = active.latent_acts
    error = matmul(acts.detach(), sae.W_dec).add_(sae.b_dec).sub_(x)
    grad = error * (2 / error.numel())
    grad_values = _backward(values, acts, penalty, matmul(grad, sae.W_dec.t()))
    sae.W_dec.grad = matmul(acts.detach().t(), grad)
    # Made as its transpose, so that it lies in memory as W_enc does.
    sae.W_enc.grad = matmul(grad_values.t(), projection.centred).t()
    sae.b_enc.grad = grad_values.sum(0)
    sae.b_dec.grad = grad.sum(0).addmv_(sae.W_enc, sae.b_enc.grad, alpha=-1)
    return _Pass(error, active._replace(latent_acts=acts.detach()), penalty.detach())


def _activate(
    sae: SAE, pre_acts: Tensor, cols: Tensor | slice, batch_tokens: int, step: int
) -> tuple[Tensor, Active, Tensor]:
    """Apply the architecture, keeping the graph from pre-activations to latent activations and penalty."""
    with torch.enable_grad():
        values = pre_acts.detach().requires_grad_()
        acts = sae.sparsity.train_acts(values) if isinstance(cols, slice) else sae.sparsity.activate(values, cols)
        active = Active(values, acts, cols, batch_tokens, sae.config.d_in)
        return values, active, sae.sparsity.penalty(active, step)


def _backward(values: Tensor, acts: Tensor, penalty: Tensor, grad_acts: Tensor) -> Tensor:
    """Gradient of the pre-activations; that of the architecture's own parameters goes to their `.grad`."""
    heads, grads = [acts], [grad_acts]
    if penalty.requires_grad:
        heads.append(penalty)
        grads.append(torch.ones_like(penalty))
    torch.autograd.backward(heads, grads)
    assert values.grad is not None
    return values.grad


def _activity(
    acts: Tensor, cols: Tensor | slice, batch_tokens: int, d_sae: int, step: int
) -> tuple[Bool[Tensor, " d_sae"], BatchStats]:
    """Which latents fired, how many a token, and the smallest activation among them."""
    on = acts != 0
    smallest = torch.where(acts > 0, acts, torch.inf).amin() if acts.numel() else acts.new_tensor(torch.inf)
    if isinstance(cols, slice):
        fired = on.any(0)
    else:
        # Adding keeps "on" where several entries share a latent; which of them comes last does not matter.
        fired = torch.zeros(d_sae, device=acts.device).index_add_(0, cols, on.float()) > 0
    return fired, BatchStats(on.sum() / batch_tokens, smallest, step)


def _auxk(
    sae: SAE, projection: Projection, residual: Tensor, dead: Tensor, auxk: AuxK, kernels: Kernels
) -> Float[Tensor, ""]:
    """The auxiliary loss; its gradient is added to that of the dead latents (b_dec is not to be moved by it)."""
    latents = dead.nonzero().squeeze(1)
    n_dead = len(latents)
    if n_dead == 0:
        return residual.new_zeros(())
    k = min(n_dead, max(1, sae.config.d_in // 2 if auxk.k is None else auxk.k))
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
    for parameter, added in ((sae.W_dec, grad_w_dec), (sae.W_enc, grad_w_enc), (sae.b_enc, grad_b_enc)):
        assert parameter.grad is not None
        rows = parameter.grad.t() if parameter is sae.W_enc else parameter.grad
        rows.index_add_(0, latents, added)
    return missed.square().sum() * weight


def reference_loss(
    sae: SAE, x: Float[Tensor, "batch d_in"], step: int, dead: Bool[Tensor, " d_sae"] | None, auxk: AuxK
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The definition, to be differentiated by autograd.

    Returns:
        total (with a graph), mse, penalty, auxk, and latent_acts [batch d_sae].
    """
    pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = sae.sparsity.train_acts(pre_acts)
    recons = acts @ sae.W_dec + sae.b_dec
    mse = loss.normalised_mse(x, recons)
    active = Active(pre_acts, acts, slice(None), len(x), sae.config.d_in)
    penalty = sae.sparsity.penalty(active, step)
    aux = x.new_zeros(())
    if dead is not None and auxk.alpha > 0 and sae.sparsity.uses_auxk and bool(dead.any()):
        # No gradient to b_dec: the auxiliary loss is to move dead latents, not the centre.
        dead_pre_acts = (x - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead]
        k = max(1, sae.config.d_in // 2 if auxk.k is None else auxk.k)
        aux = loss.auxk(x - recons, dead_pre_acts, sae.W_dec[dead], k)
    return mse + penalty + auxk.alpha * aux, mse, penalty, aux, acts


def _reference(sae: SAE, x: Tensor, step: int, dead: Tensor | None, auxk: AuxK, x_variance: Tensor) -> TrainingLoss:
    with torch.enable_grad():
        total, mse, penalty, aux, acts = reference_loss(sae, x, step, dead, auxk)
        total.backward()
    activity = _activity(acts.detach(), slice(None), len(x), sae.config.d_sae, step)
    fvu = mse.detach() * x.numel() / x_variance
    return TrainingLoss(total.detach(), mse.detach(), fvu, penalty.detach(), aux.detach(), *activity)
