"""The truth: every operation of a sparse training step in plain torch and fp32, as its definition reads.

The other kernels subclass `Kernels`, override what they do faster, and must agree with it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.moments import Moments, step_seed
from sae.kernels.operands import ByLatent, DecodeGrads, Entries, Index, Precision, Projection, RowNorms, run_starts

ADAM_ELEMENTS = 2**18
"""Elements of a matrix that Adam works on at a time."""


@dataclass(frozen=True)
class AdamStep:
    """One step of Adam (1412.6980, algorithm 1) on one matrix."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int
    """Number of this step; the first is 1."""
    seed: int
    """Of the matrix, for the stochastic rounding of its moments."""

    @property
    def correction1(self) -> float:
        """What the first moment is divided by."""
        return 1.0 - self.beta1**self.step

    @property
    def correction2(self) -> float:
        """What the second moment is divided by."""
        return 1.0 - self.beta2**self.step


class Kernels:
    """Operations of a training step. All inputs and outputs are fp32 on one device; indices are int64."""

    name: ClassVar[str] = "reference"
    takes_memory: ClassVar[bool] = False
    """Whether the gradients of the weights are written to the memory that is offered for them."""

    # The encoder, and what is selected from it

    def pre_acts(self, projection: Projection) -> Float[Tensor, "batch d_sae"]:
        """All pre-activations."""
        return projection.centred @ projection.w_enc + projection.b_enc

    def topk(self, projection: Projection, k: int) -> Entries:
        """The k largest pre-activations of each token, negative ones included; ties are broken arbitrarily."""
        values, cols = self.pre_acts(projection).topk(k, dim=1, sorted=False)
        return Entries(topk_rows(len(cols), k, cols.device), cols.reshape(-1), values.reshape(-1))

    def above(
        self, projection: Projection, threshold: Float[Tensor, "*d_sae"], max_density: float = 1.0
    ) -> Entries | None:
        """All pre-activations strictly above a threshold, and those that are not a number, so that they are seen.

        Args:
            projection: the encoder product.
            threshold: one number, or one a latent.
            max_density: give up, and return None, once a larger part than this of the matrix is above.
        """
        pre_acts = self.pre_acts(projection)
        rows, cols = (~(pre_acts <= threshold)).nonzero(as_tuple=True)
        if len(rows) > max_density * pre_acts.numel():
            return None
        return Entries(rows, cols, pre_acts[rows, cols])

    def max_density(self, precision: Precision) -> float:
        """Up to which part of non-zero entries the sparse operations are cheaper than dense ones."""
        return 1.0

    # The decoder, and gradients

    def by_latent(self, index: Index) -> ByLatent:
        """Regroup entries by latent."""
        cols, order = index.cols.sort(stable=True)
        return ByLatent(order, index.rows[order], run_starts(cols, index.d_sae))

    def decode(
        self,
        acts: Float[Tensor, " n"],
        index: Index,
        w_dec: Float[Tensor, "d_sae d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        """Reconstructions: recons[t] = b_dec + sum over the entries of token t of acts * w_dec[latent]."""
        return _dense(acts, index) @ w_dec + b_dec

    def decode_grads(
        self,
        grad: Float[Tensor, "batch d_in"],
        acts: Float[Tensor, " n"],
        index: Index,
        groups: ByLatent,
        w_dec: Float[Tensor, "d_sae d_in"],
        out: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> DecodeGrads:
        """Gradients of `decode`, given that of the reconstructions.

        `out` is memory that may be used for the gradient of w_dec instead of new memory; use what is returned.
        """
        return DecodeGrads((grad @ w_dec.t())[index.rows, index.cols], _dense(acts, index).t() @ grad)

    def encode_grad(
        self,
        grad: Float[Tensor, " n"],
        index: Index,
        groups: ByLatent,
        centred: Float[Tensor, "batch d_in"],
        out: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> Float[Tensor, "d_sae d_in"]:
        """Gradient of w_enc, transposed, given that of the pre-activations at the entries; `out` as above."""
        return _dense(grad, index).t() @ centred

    def bias_grad(self, grad: Float[Tensor, " n"], index: Index, groups: ByLatent) -> Float[Tensor, " d_sae"]:
        """Gradient of b_enc: the sum over each latent's entries."""
        return torch.zeros(index.d_sae, device=grad.device).index_add_(0, index.cols, grad)

    # The optimiser

    def row_norms(self, grad: Float[Tensor, "rows d"], unit_rows: Float[Tensor, "rows d"] | None = None) -> RowNorms:
        """Sum of squares of a gradient, without its components along `unit_rows` where they are given."""
        if unit_rows is None:
            return RowNorms(grad.double().square().sum(), None)
        along = (grad * unit_rows).sum(1)
        rest = grad - along[:, None] * unit_rows
        return RowNorms(rest.double().square().sum(), along)

    def adam(
        self,
        param: Float[Tensor, "rows d"],
        grad: Float[Tensor, "rows d"],
        moments: Moments,
        step: AdamStep,
        scale: Float[Tensor, ""],
        along: Float[Tensor, " rows"] | None = None,
    ) -> None:
        """Take one step of Adam, in place.

        Args:
            param: the parameter.
            grad: its gradient; may be overwritten.
            moments: its moments, moved on.
            step: rate and constants.
            scale: what the gradient is multiplied by (clipping).
            along: take these components along the parameter's rows out of the gradient first, and restore the
                rows to norm 1 after the step.
        """
        n_rows = max(1, ADAM_ELEMENTS // max(1, param.shape[1]))
        for start in range(0, len(param), n_rows):  # compressed moments take several times their size when opened
            rows = slice(start, start + n_rows)
            part = None if along is None else along[rows]
            first = start * param.shape[1]
            _adam_rows(param[rows], grad[rows], moments.part(start, start + n_rows), step, scale, part, first)


def _adam_rows(
    param: Tensor, grad: Tensor, moments: Moments, step: AdamStep, scale: Tensor, along: Tensor | None, first: int
) -> None:
    """`Kernels.adam` for some rows of a matrix, the first of whose elements has number `first` in it."""
    if along is not None:
        grad = grad - along[:, None] * param
    grad = grad * scale
    exp_avg, exp_avg_sq = moments.read()
    exp_avg = exp_avg.lerp(grad, 1 - step.beta1)
    exp_avg_sq = (step.beta2 * exp_avg_sq).addcmul(grad, grad, value=1 - step.beta2)
    denominator = (exp_avg_sq / step.correction2).sqrt_().add_(step.eps)
    param.addcdiv_(exp_avg, denominator, value=-step.lr / step.correction1)
    if along is not None:
        param.div_(param.norm(dim=1, keepdim=True).clamp(min=1e-12))
    moments.write(exp_avg, exp_avg_sq, step_seed(step.seed, step.step), first)


def topk_rows(batch: int, k: int, device: torch.device) -> Tensor:
    """[batch*k] token of each entry, when every token has k."""
    return torch.arange(batch, device=device).repeat_interleave(k, output_size=batch * k)


def _dense(values: Float[Tensor, " n"], index: Index) -> Float[Tensor, "batch d_sae"]:
    """The matrix whose entries are listed."""
    matrix = torch.zeros(index.batch, index.d_sae, dtype=values.dtype, device=values.device)
    return matrix.index_put((index.rows, index.cols), values)
