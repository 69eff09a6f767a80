"""One training batch: its loss, and the gradient of every parameter.

Dense autograd costs 12 * d_in * d_sae FLOPs per token. Here only the encoder product is dense (2 * d_in * d_sae), and
the kernels do not even keep it:

    select    entries of pre_acts = (x - b_dec) @ W_enc + b_enc that may be active or have a gradient
    decode    recons = sum of a few decoder rows a token
    backward  W_dec and the latents from the error, the few rows of each latent summed; then W_enc likewise;
              b_dec through the encoder is -W_enc @ grad(b_enc), a mat-vec, since all tokens share one b_dec

The derivative of the architecture itself (activation and penalty) is autograd's, on the entries alone.

Several stages of a reconstruction (Matryoshka's prefixes, HierarchicalTopK's values of k) cost little more than one:
each stage adds a level of latents to the one before, and a level of a token is decoded as a token of its own.

`loss_and_gradients` is what the trainer calls. An architecture that selects nothing, or a batch in which too much is
active for sparse sums to pay, takes `_dense`, the same with matmuls. `reference_loss` is the truth that both are
tested against: the definition, differentiated by autograd. What revives dead latents is in `sae.autoencoder.revive`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.autoencoder import loss
from sae.autoencoder.revive import AuxK, revive
from sae.autoencoder.sae import SAE
from sae.autoencoder.sparsity import Active, BatchStats, Levels
from sae.kernels.operands import Entries, Index, Precision, Projection, Workspace
from sae.kernels.reference import Kernels


class TrainingLoss(NamedTuple):
    """The loss of one batch and what there is to know about it. Scalars are tensors: reading them may wait on a GPU."""

    total: Tensor
    """Scalar: mse (or its mean over the stages of a nested architecture) + penalty + auxk_alpha * auxk."""
    mse: Tensor
    """Of the whole reconstruction."""
    fvu: Tensor
    """Likewise."""
    penalty: Tensor
    """The architecture's own terms: its penalty, what its gates miss, and what revives its dead latents."""
    auxk: Tensor
    fired: Tensor
    """[d_sae] bool: fired on at least one token of the batch."""
    stats: BatchStats


@torch.no_grad()
def loss_and_gradients(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    step: int,
    dead: Bool[Tensor, " d_sae"] | None,
    *,
    target: Float[Tensor, "batch d_out"] | None = None,
    kernels: Kernels,
    precision: Precision = Precision.float32,
    auxk: AuxK = AuxK(),  # noqa: B008 - immutable
    target_variance: Tensor | None = None,
    workspace: Workspace | None = None,
) -> TrainingLoss:
    """Compute the loss of a batch and set `.grad` of every parameter of the SAE.

    Args:
        sae: the autoencoder, in normalised units, with decoder rows of norm 1.
        x: inputs scaled to E||x||^2 = d_in, fp32.
        step: optimiser steps taken so far, for warm-ups.
        dead: latents to revive; None when there are none.
        target: what is to be reconstructed, scaled likewise; None means x. Transcoders have one of their own.
        kernels: what computes it; the reference kernels mean plain autograd throughout.
        precision: of the encoder product, and of matmuls on the dense path.
        auxk: the auxiliary loss.
        target_variance: `loss.variance(target)`, where it is known already.
        workspace: memory for the weights' gradients, which then last until its next use.
    """
    target = x if target is None else target
    target_variance = loss.variance(target) if target_variance is None else target_variance
    sae.zero_grad()
    if kernels.name == "reference":
        return _reference(sae, x, target, step, dead, auxk, target_variance)
    projection = Projection(sae.centre(x), sae.W_enc, sae.b_enc, precision)
    entries = sae.sparsity.select(kernels, projection)
    if entries is None:
        passed = _dense(sae, x, target, projection, step)
    else:
        passed = _sparse(sae, x, target, projection, entries, step, kernels, workspace or Workspace())
    square_error = passed.error.square().sum()
    penalty, aux = passed.penalty, x.new_zeros(())
    if dead is not None:
        revival = revive(sae, projection, passed.error, dead, auxk, kernels)
        penalty, aux = penalty + revival.penalty, revival.auxk
    acts = passed.active.latent_acts
    return TrainingLoss(
        passed.reconstruction + penalty + auxk.alpha * aux,
        square_error / target.numel(),
        square_error / target_variance,
        penalty,
        aux,
        *_activity(acts, passed.active.cols, len(x), sae.config.d_sae, step),
    )


class _Pass(NamedTuple):
    """What the forward pass gave."""

    error: Float[Tensor, "batch d_out"]
    """recons - target."""
    reconstruction: Tensor
    """Scalar: the mean squared error, or that of all stages as they count."""
    active: Active
    penalty: Tensor


class _Graph(NamedTuple):
    """The architecture applied, with autograd's graph from pre-activations to all it gives."""

    values: Tensor
    """Pre-activations, the leaf."""
    active: Active
    penalty: Tensor
    levels: Levels | None
    gate: Tensor | None
    """Activations that reconstruct on their own; see `Sparsity.gate_acts`."""


def _activate(sae: SAE, pre_acts: Tensor, cols: Tensor | slice, batch_tokens: int, step: int) -> _Graph:
    sparsity = sae.sparsity
    with torch.enable_grad():
        values = pre_acts.detach().requires_grad_()
        acts = sparsity.train_acts(values) if isinstance(cols, slice) else sparsity.activate(values, cols)
        active = Active(values, acts, cols, batch_tokens, sae.config.d_in)
        gate = sparsity.gate_acts(active)
        penalty = sparsity.penalty(active, step)
    return _Graph(values, active, penalty, sparsity.levels(active, step), gate)


def _backward(graph: _Graph, grad_acts: Tensor, grad_gate: Tensor | None) -> Tensor:
    """Gradient of the pre-activations; that of the architecture's own parameters goes to their `.grad`."""
    heads, grads = [graph.active.latent_acts], [grad_acts]
    if graph.gate is not None and grad_gate is not None:
        heads.append(graph.gate)
        grads.append(grad_gate)
    if graph.penalty.requires_grad:
        heads.append(graph.penalty)
        grads.append(torch.ones_like(graph.penalty))
    torch.autograd.backward(heads, grads)
    assert graph.values.grad is not None
    return graph.values.grad


def _sparse(
    sae: SAE,
    x: Tensor,
    target: Tensor,
    projection: Projection,
    entries: Entries,
    step: int,
    kernels: Kernels,
    workspace: Workspace,
) -> _Pass:
    index = Index(entries.rows, entries.cols, len(x), sae.config.d_sae)
    graph = _activate(sae, entries.values, entries.cols, len(x), step)
    acts = graph.active.latent_acts.detach()
    groups = kernels.by_latent(index)
    space = workspace.matrix("w_dec", sae.W_dec) if kernels.takes_memory else None
    if graph.levels is None:
        error = _add_skip(sae, x, kernels.decode(acts, index, sae.W_dec, sae.b_dec).sub_(target))
        grad = error * (2 / error.numel())
        reconstruction = error.square().sum() / error.numel()
        grads = kernels.decode_grads(grad, acts, index, groups, sae.W_dec, space)
        grad_acts = grads.acts
    else:
        spread = _Spread(graph.levels, index)
        parts = kernels.decode(acts[spread.order], spread.index, sae.W_dec, torch.zeros_like(sae.b_dec))
        rest = _add_skip(sae, x, sae.b_dec - target)
        errors = spread.stages(parts).add_(rest)
        error, reconstruction = errors[-1], spread.mean_square(errors)
        grad_parts = spread.stage_grads(errors)
        grad = grad_parts[0]  # what every token's first level feels, and so b_dec: the sum over all stages
        by_latent = kernels.by_latent(spread.index)
        grads = kernels.decode_grads(
            grad_parts.flatten(0, 1), acts[spread.order], spread.index, by_latent, sae.W_dec, space
        )
        grad_acts = torch.empty_like(grads.acts).index_copy_(0, spread.order, grads.acts)
    sae.W_dec.grad = grads.w_dec
    grad_gate, missed = None, x.new_zeros(())
    if graph.gate is not None:
        gate = graph.gate.detach()
        gate_error = _add_skip(sae, x, kernels.decode(gate, index, sae.W_dec, sae.b_dec).sub_(target))
        missed = gate_error.square().sum() / gate_error.numel()
        gate_error.mul_(2 / gate_error.numel())
        grad_gate = kernels.decode_grads(gate_error, gate, index, groups, sae.W_dec).acts
    grad_values = _backward(graph, grad_acts, grad_gate)
    space = workspace.matrix("w_enc", sae.W_enc.t()) if kernels.takes_memory else None
    sae.W_enc.grad = kernels.encode_grad(grad_values, index, groups, projection.centred, space).t()
    sae.b_enc.grad = kernels.bias_grad(grad_values, index, groups)
    _bias_and_skip_grads(sae, x, grad)
    return _Pass(error, reconstruction, graph.active._replace(latent_acts=acts), graph.penalty.detach() + missed)


def _dense(sae: SAE, x: Tensor, target: Tensor, projection: Projection, step: int) -> _Pass:
    dtype = projection.precision.dtype

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return (a.to(dtype) @ b.to(dtype)).to(a.dtype)

    graph = _activate(sae, matmul(projection.centred, sae.W_enc) + sae.b_enc, slice(None), len(x), step)
    acts = graph.active.latent_acts.detach()
    rest = _add_skip(sae, x, sae.b_dec - target)
    if graph.levels is None:
        error = matmul(acts, sae.W_dec).add_(rest)
        grad = error * (2 / error.numel())
        reconstruction = error.square().sum() / error.numel()
        grad_acts = matmul(grad, sae.W_dec.t())
        sae.W_dec.grad = matmul(acts.t(), grad)
    else:
        spread = _Spread(graph.levels, None)
        parts = [acts * (graph.levels.of == level) for level in range(spread.n)]
        errors = torch.stack([matmul(part, sae.W_dec) for part in parts]).cumsum(0).add_(rest)
        error, reconstruction = errors[-1], spread.mean_square(errors)
        grad_parts = spread.stage_grads(errors)
        grad = grad_parts[0]
        grad_acts = torch.zeros_like(acts)
        for level, part_grad in enumerate(grad_parts):
            grad_acts += matmul(part_grad, sae.W_dec.t()) * (graph.levels.of == level)
        sae.W_dec.grad = sum((matmul(part.t(), g) for part, g in zip(parts, grad_parts, strict=True)), 0 * sae.W_dec)
    grad_gate, missed = None, x.new_zeros(())
    if graph.gate is not None:
        gate_error = matmul(graph.gate.detach(), sae.W_dec).add_(rest)
        missed = gate_error.square().sum() / gate_error.numel()
        grad_gate = matmul(gate_error * (2 / gate_error.numel()), sae.W_dec.t())
    grad_values = _backward(graph, grad_acts, grad_gate)
    # Made as its transpose, so that it lies in memory as W_enc does.
    sae.W_enc.grad = matmul(grad_values.t(), projection.centred).t()
    sae.b_enc.grad = grad_values.sum(0)
    _bias_and_skip_grads(sae, x, grad)
    return _Pass(error, reconstruction, graph.active._replace(latent_acts=acts), graph.penalty.detach() + missed)


class _Spread:
    """Entries spread over the levels of a nested reconstruction, in which level l of a token is a token of its own.

    Args:
        levels: of the entries.
        index: where the entries lie; None where only the sums over stages are wanted.
    """

    def __init__(self, levels: Levels, index: Index | None) -> None:
        self.n = len(levels.weights)
        self.weights = torch.tensor(levels.weights, device=levels.of.device).view(self.n, 1, 1)
        if index is not None:
            rows, self.order = (levels.of * index.batch + index.rows).sort(stable=True)
            self.index = Index(rows, index.cols[self.order], self.n * index.batch, index.d_sae)

    def stages(self, parts: Float[Tensor, "n_batch d_out"]) -> Float[Tensor, "n batch d_out"]:
        """Sums of the levels up to each stage."""
        return parts.unflatten(0, (self.n, -1)).cumsum(0)

    def mean_square(self, errors: Float[Tensor, "n batch d_out"]) -> Float[Tensor, ""]:
        """What the errors of all stages come to."""
        return (errors.square().sum((1, 2), keepdim=True) * self.weights).sum() / errors[0].numel()

    def stage_grads(self, errors: Float[Tensor, "n batch d_out"]) -> Float[Tensor, "n batch d_out"]:
        """Gradient of what each level adds: it is part of its own stage and of all later ones."""
        grads = errors * (self.weights * (2 / errors[0].numel()))
        return grads.flip(0).cumsum(0).flip(0)


def _add_skip(sae: SAE, x: Tensor, rest: Tensor) -> Tensor:
    """Add what passes by the latents, in place; only skip transcoders have it."""
    return rest if sae.W_skip is None else rest.addmm_(x, sae.W_skip)


def _bias_and_skip_grads(sae: SAE, x: Tensor, grad: Tensor) -> None:
    """Gradients of b_dec and of the skip, given those of the reconstruction and of b_enc."""
    assert sae.b_enc.grad is not None
    sae.b_dec.grad = grad.sum(0)
    if sae.centres:
        sae.b_dec.grad.addmv_(sae.W_enc, sae.b_enc.grad, alpha=-1)
    if sae.W_skip is not None:
        sae.W_skip.grad = x.t() @ grad


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


class ReferenceLoss(NamedTuple):
    """The definition of the loss, with autograd's graph."""

    total: Tensor
    mse: Tensor
    penalty: Tensor
    auxk: Tensor
    latent_acts: Float[Tensor, "batch d_sae"]


def reference_loss(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    step: int,
    dead: Bool[Tensor, " d_sae"] | None,
    auxk: AuxK,
) -> ReferenceLoss:
    """The definition, to be differentiated by autograd."""
    sparsity = sae.sparsity
    pre_acts = sae.centre(x) @ sae.W_enc + sae.b_enc
    acts = sparsity.train_acts(pre_acts)

    def decode(acts: Tensor, w_dec: Tensor, b_dec: Tensor) -> Tensor:
        recons = acts @ w_dec + b_dec
        return recons if sae.W_skip is None else recons + x @ sae.W_skip

    recons = decode(acts, sae.W_dec, sae.b_dec)
    reconstruction = mse = loss.normalised_mse(target, recons)
    active = Active(pre_acts, acts, slice(None), len(x), sae.config.d_in)
    levels = sparsity.levels(active, step)
    if levels is not None:
        stages = [decode(acts * (levels.of <= level), sae.W_dec, sae.b_dec) for level in range(len(levels.weights))]
        reconstruction = sum(
            (w * loss.normalised_mse(target, stage) for w, stage in zip(levels.weights, stages, strict=True)),
            x.new_zeros(()),
        )
    penalty = sparsity.penalty(active, step)
    gate = sparsity.gate_acts(active)
    if gate is not None:
        skipped = 0 if sae.W_skip is None else (x @ sae.W_skip).detach()
        on_its_own = gate @ sae.W_dec.detach() + sae.b_dec.detach() + skipped
        penalty = penalty + loss.normalised_mse(target, on_its_own)
    aux = x.new_zeros(())
    if dead is not None and bool(dead.any()):
        # No gradient to b_dec: reviving is to move dead latents, not the centre.
        dead_pre_acts = sae.centre(x, detach=True) @ sae.W_enc[:, dead] + sae.b_enc[dead]
        revival = sparsity.revive(dead_pre_acts, dead.nonzero().squeeze(1))
        if revival is not None:
            penalty = penalty + revival
        if auxk.alpha > 0 and sparsity.uses_auxk:
            aux = loss.auxk(target - recons, dead_pre_acts, sae.W_dec[dead], auxk.latents(target.shape[1]))
    return ReferenceLoss(reconstruction + penalty + auxk.alpha * aux, mse, penalty, aux, acts)


def _reference(
    sae: SAE, x: Tensor, target: Tensor, step: int, dead: Tensor | None, auxk: AuxK, target_variance: Tensor
) -> TrainingLoss:
    with torch.enable_grad():
        found = reference_loss(sae, x, target, step, dead, auxk)
        found.total.backward()
    total, mse, penalty, aux, acts = (item.detach() for item in found)
    activity = _activity(acts, slice(None), len(x), sae.config.d_sae, step)
    return TrainingLoss(total, mse, mse * target.numel() / target_variance, penalty, aux, *activity)
