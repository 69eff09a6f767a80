"""One training step's forward pass: inputs to loss, with a sparse backward where the architecture allows it.

`training_loss` is the only thing the trainer calls; faster kernels replace what lies beneath it.

Dense autograd costs 12 * d_in * d_sae FLOPs per token. Here only the encoder matmul is dense (2 * d_in * d_sae):
    - the decoder is a weighted sum of a few rows (`embedding_bag`);
    - both weight gradients are the same operation on the transposed index, rows summed per latent;
    - the gradient of b_dec through the encoder is -W_enc @ grad(b_enc), a mat-vec, since every token's
      centred input is x - b_dec with the same b_dec.
Architectures without `support` take the dense path, which is also the reference the sparse one is tested against.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from sae.autoencoder import loss
from sae.autoencoder.sae import SAE
from sae.autoencoder.sparsity import Active, BatchStats, Entries


class TrainingLoss(NamedTuple):
    """The loss of one batch and what there is to know about it. Scalars are tensors: reading them may wait on a GPU."""

    total: Tensor
    """Scalar with gradient: mse + penalty + auxk_alpha * auxk."""
    mse: Tensor
    fvu: Tensor
    penalty: Tensor
    auxk: Tensor
    fired: Tensor
    """[d_sae] bool: fired on at least one token of the batch."""
    stats: BatchStats


def training_loss(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    step: int,
    dead: Bool[Tensor, " d_sae"],
    *,
    auxk_alpha: float = 1 / 32,
    k_aux: int | None = None,
    encoder_dtype: torch.dtype = torch.float32,
    sparse: bool = True,
) -> TrainingLoss:
    """Forward pass of one training batch.

    Args:
        sae: the autoencoder, in normalised units.
        x: inputs scaled to E||x||^2 = d_in.
        step: optimiser steps taken so far, for warm-ups.
        dead: latents to revive.
        auxk_alpha: weight of the auxiliary loss; 0 switches it off.
        k_aux: dead latents per token in it; default d_in / 2.
        encoder_dtype: precision of the encoder matmul.
        sparse: False forces the dense path.
    """
    recons, active = _forward(sae, x, encoder_dtype, sparse)
    mse = loss.normalised_mse(x, recons)
    penalty = sae.sparsity.penalty(active, step)
    aux = x.new_zeros(())
    if auxk_alpha > 0 and sae.sparsity.uses_auxk and bool(dead.any()):
        k = sae.config.d_in // 2 if k_aux is None else k_aux
        # No gradient to b_dec: the auxiliary loss is to move dead latents, not the centre.
        dead_pre_acts = (x - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead]
        aux = loss.auxk(x - recons, dead_pre_acts, sae.W_dec[dead], max(1, k))
    total = mse + penalty + auxk_alpha * aux
    with torch.no_grad():
        acts = active.latent_acts.detach()
        on = acts != 0
        smallest = torch.where(acts > 0, acts, torch.inf).amin() if acts.numel() else acts.new_tensor(torch.inf)
        fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=x.device)
        fired = on.any(0) if isinstance(active.cols, slice) else fired.index_fill_(0, active.cols[on], True)
        return TrainingLoss(
            total,
            mse.detach(),
            loss.fvu(x, recons),
            penalty.detach(),
            aux.detach(),
            fired,
            BatchStats(on.sum() / len(x), smallest, step),
        )


def _forward(sae: SAE, x: Tensor, encoder_dtype: torch.dtype, sparse: bool) -> tuple[Tensor, Active]:
    centred = x - sae.b_dec.detach()
    with torch.no_grad():
        pre_acts = _matmul(centred, sae.W_enc, encoder_dtype) + sae.b_enc
    entries = sae.sparsity.support(pre_acts) if sparse else None
    norms = sae.W_dec.detach().norm(dim=1)
    if entries is None:
        dense = _DensePreActs.apply(pre_acts, centred, sae.W_enc, sae.b_enc, sae.b_dec, encoder_dtype)
        acts = sae.sparsity.train_acts(dense)
        active = Active(dense, acts, slice(None), len(x), sae.config.d_in, norms)
        return acts @ sae.W_dec + sae.b_dec, active
    index = _Index(entries, len(x), sae.config.d_sae)
    values = _SparsePreActs.apply(pre_acts, centred, sae.W_enc, sae.b_enc, sae.b_dec, index)
    acts = sae.sparsity.activate(values, entries.cols)
    active = Active(values, acts, entries.cols, len(x), sae.config.d_in, norms)
    return _SparseDecode.apply(acts, sae.W_dec, index) + sae.b_dec, active


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)


class _Index:
    """Entries of a [batch d_sae] matrix with what both directions of summation need."""

    def __init__(self, entries: Entries, batch_tokens: int, d_sae: int) -> None:
        self.rows, self.cols = entries
        self.d_sae = d_sae
        self.row_starts = _starts(self.rows, batch_tokens)
        self.by_col: tuple[Tensor, Tensor, Tensor] | None = None

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (order of entries by latent, their tokens, start of each latent); sorted once for both gradients."""
        if self.by_col is None:
            cols, order = self.cols.sort(stable=True)
            self.by_col = order, self.rows[order], _starts(cols, self.d_sae)
        return self.by_col

    def sum_per_latent(self, weights: Tensor, vectors: Tensor) -> Tensor:
        """[d_sae d]: for each latent, the weighted sum of the vectors of the tokens it is active on."""
        order, tokens, starts = self.columns()
        return F.embedding_bag(tokens, vectors, starts, mode="sum", per_sample_weights=weights[order])


def _starts(sorted_ids: Tensor, n: int) -> Tensor:
    """Index at which each id's run starts; ids without entries get an empty run."""
    counts = torch.bincount(sorted_ids, minlength=n)
    return counts.cumsum(0) - counts


class _DensePreActs(torch.autograd.Function):
    """Pre-activations (x - b_dec) @ W_enc + b_enc, computed already; backward without the matmul for x."""

    @staticmethod
    def forward(
        ctx: Any, pre_acts: Tensor, centred: Tensor, w_enc: Tensor, b_enc: Tensor, b_dec: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(centred, w_enc)
        ctx.dtype = dtype
        return pre_acts.view_as(pre_acts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, w_enc = ctx.saved_tensors
        grad_b_enc = grad.sum(0)
        # Transposed twice so that the result lies in memory as W_enc does.
        grad_w_enc = _matmul(grad.t(), centred, ctx.dtype).t()
        return None, None, grad_w_enc, grad_b_enc, -(w_enc @ grad_b_enc), None


class _SparsePreActs(torch.autograd.Function):
    """The same at the entries only."""

    @staticmethod
    def forward(
        ctx: Any, pre_acts: Tensor, centred: Tensor, w_enc: Tensor, b_enc: Tensor, b_dec: Tensor, index: _Index
    ) -> Tensor:
        ctx.save_for_backward(centred, w_enc)
        ctx.index = index
        return pre_acts[index.rows, index.cols]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, w_enc = ctx.saved_tensors
        index: _Index = ctx.index
        grad_b_enc = torch.zeros(index.d_sae, dtype=grad.dtype, device=grad.device).index_add_(0, index.cols, grad)
        grad_w_enc = index.sum_per_latent(grad, centred).t()
        return None, None, grad_w_enc, grad_b_enc, -(w_enc @ grad_b_enc), None


class _SparseDecode(torch.autograd.Function):
    """latent_acts @ W_dec from the entries."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, w_dec: Tensor, index: _Index) -> Tensor:
        ctx.save_for_backward(acts, w_dec)
        ctx.index = index
        return F.embedding_bag(index.cols, w_dec, index.row_starts, mode="sum", per_sample_weights=acts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        acts, w_dec = ctx.saved_tensors
        index: _Index = ctx.index
        grad = grad.contiguous()
        # Row-by-row dot products grad[token] . W_dec[latent] without materialising either gather; mode 0 is "sum".
        grad_acts = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, w_dec, index.cols, index.row_starts, index.rows, 0
        )
        return grad_acts, index.sum_per_latent(acts, grad), None
