"""Pure torch that visits only what is selected: for CPUs without a compiler, and the fallback on any other device.

The encoder product is made in chunks of rows and each chunk is searched while it is still in cache, in a buffer that
is used again: the [batch d_sae] matrix never exists (allocating it alone took a third of the product's time).
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sae.kernels.moments import Moments
from sae.kernels.operands import ByLatent, DecodeGrads, Entries, Index, Precision, Projection, RowNorms
from sae.kernels.reference import AdamStep, Kernels, topk_rows

CHUNK_BYTES = 8 * 2**20
"""Of one chunk of products: small enough for the last-level cache."""
CHUNK_ROWS = 256
"""At least, or the weights are read from memory too often."""

SLACK = (0.02, 0.01)
"""Rescoring: candidates may lie below a threshold by this much plus this part of its size. The error of a bf16
product is about 0.003 in normalised units, where E||x||^2 = d_in and a latent's direction has norm about 1."""


class TorchKernels(Kernels):
    """Sparse operations from what torch offers: `embedding_bag` sums a few weighted rows of a matrix."""

    name = "torch"

    def max_density(self, precision: Precision) -> float:
        """Measured by `sae bench suite=density`: where the dense step becomes cheaper than the sparse one."""
        return 0.25 if precision is Precision.float32 else 0.1

    def pre_acts(self, projection: Projection) -> Float[Tensor, "batch d_sae"]:
        """All pre-activations, in fp32."""
        dtype = projection.precision.dtype
        product = projection.centred.to(dtype) @ projection.w_enc.to(dtype)
        return product.float().add_(projection.b_enc)

    def topk(self, projection: Projection, k: int) -> Entries:
        """The k largest pre-activations of each token."""
        if projection.precision is not Precision.bfloat16_rescored:
            return self._select_topk(projection, k)
        batch, d_sae = projection.shape
        n_candidates = min(d_sae, k + candidates_beyond(k))
        found = self._select_topk(projection._replace(precision=Precision.bfloat16), n_candidates)
        values = self._rescore(projection, found).view(batch, n_candidates)
        best = values.topk(k, dim=1, sorted=False)
        cols = found.cols.view(batch, n_candidates).gather(1, best.indices)
        return Entries(topk_rows(batch, k, cols.device), cols.reshape(-1), best.values.reshape(-1))

    def above(
        self, projection: Projection, threshold: Float[Tensor, "*d_sae"], max_density: float = 1.0
    ) -> Entries | None:
        """All pre-activations strictly above a threshold."""
        if projection.precision is not Precision.bfloat16_rescored:
            return self._select_above(projection, threshold, max_density)
        plain = projection._replace(precision=Precision.bfloat16)
        found = self._select_above(plain, threshold - SLACK[0] - SLACK[1] * threshold.abs(), max_density)
        if found is None:
            return None
        values = self._rescore(projection, found)
        keep = ~(values <= (threshold[found.cols] if threshold.ndim else threshold))
        return Entries(found.rows[keep], found.cols[keep], values[keep])

    def decode(
        self,
        acts: Float[Tensor, " n"],
        index: Index,
        w_dec: Float[Tensor, "d_sae d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        """Weighted sum of a few decoder rows a token."""
        starts = index.row_starts[:-1]
        return F.embedding_bag(index.cols, w_dec, starts, mode="sum", per_sample_weights=acts) + b_dec

    def decode_grads(
        self,
        grad: Float[Tensor, "batch d_in"],
        acts: Float[Tensor, " n"],
        index: Index,
        groups: ByLatent,
        w_dec: Float[Tensor, "d_sae d_in"],
        out: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> DecodeGrads:
        """Dot products token by token; weighted sums of tokens' gradients latent by latent."""
        return DecodeGrads(_entry_dots(grad, w_dec, index), _sum_per_latent(acts, grad, groups))

    def encode_grad(
        self,
        grad: Float[Tensor, " n"],
        index: Index,
        groups: ByLatent,
        centred: Float[Tensor, "batch d_in"],
        out: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> Float[Tensor, "d_sae d_in"]:
        """Weighted sums of inputs, latent by latent."""
        return _sum_per_latent(grad, centred, groups)

    def row_norms(self, grad: Float[Tensor, "rows d"], unit_rows: Float[Tensor, "rows d"] | None = None) -> RowNorms:
        """Sum of squares; Pythagoras takes the components along unit rows out."""
        squares = torch.linalg.vector_norm(grad, dim=1).double().square()
        if unit_rows is None:
            return RowNorms(squares.sum(), None)
        along = torch.bmm(grad[:, None, :], unit_rows[:, :, None]).view(-1)  # vecdot would store all the products
        return RowNorms((squares - along.double().square()).clamp(min=0).sum(), along)

    def adam(
        self,
        param: Float[Tensor, "rows d"],
        grad: Float[Tensor, "rows d"],
        moments: Moments,
        step: AdamStep,
        scale: Float[Tensor, ""],
        along: Float[Tensor, " rows"] | None = None,
    ) -> None:
        """Torch's fused Adam, which clips on the way; 8- and 16-bit moments as in the reference."""
        if moments.kind != "float32":
            super().adam(param, grad, moments, step, scale, along)
            return
        if along is not None:
            grad.addcmul_(along[:, None], param, value=-1)
        count = torch.tensor(float(step.step), device=param.device)
        torch._fused_adam_(
            [param],
            [grad],
            [moments.exp_avg],
            [moments.exp_avg_sq],
            [],
            [count],
            lr=step.lr,
            beta1=step.beta1,
            beta2=step.beta2,
            weight_decay=0.0,
            eps=step.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale.reciprocal(),
        )
        if along is not None:
            param.div_(torch.linalg.vector_norm(param, dim=1, keepdim=True).clamp(min=1e-12))

    # How entries are selected: overridden where there is something faster than torch's

    def _select_topk(self, projection: Projection, k: int) -> Entries:
        found = [chunk.topk(k, dim=1, sorted=False) for _, chunk in self._chunks(projection)]
        cols = torch.cat([part.indices for part in found]).reshape(-1)
        values = _unrounded(torch.cat([part.values for part in found]).reshape(-1), cols, projection)
        return Entries(topk_rows(len(projection.centred), k, cols.device), cols, values)

    def _select_above(
        self, projection: Projection, threshold: Float[Tensor, "*d_sae"], max_density: float
    ) -> Entries | None:
        d_sae = projection.w_enc.shape[1]
        rows, cols, values, n = [], [], [], 0
        for start, chunk in self._chunks(projection):
            row, col = (~(chunk <= threshold)).nonzero(as_tuple=True)
            n += len(row)
            if n > max_density * (start + len(chunk)) * d_sae:
                return None
            rows.append(row + start)
            cols.append(col)
            values.append(chunk[row, col])
        flat = torch.cat(cols)
        return Entries(torch.cat(rows), flat, _unrounded(torch.cat(values), flat, projection))

    def _chunks(self, projection: Projection) -> Iterator[tuple[int, Tensor]]:
        """First row, and pre-activations of that row and the next ones; overwritten by the next chunk."""
        dtype = projection.precision.dtype
        centred, w_enc, b_enc = (tensor.to(dtype) for tensor in projection[:3])
        for start, rows, buffer in chunk_buffers(projection):
            yield start, torch.addmm(b_enc, centred[start : start + rows], w_enc, out=buffer)

    def _rescore(self, projection: Projection, entries: Entries) -> Float[Tensor, " n"]:
        """Pre-activations of entries as fp32 dot products."""
        index = Index(entries.rows, entries.cols, *projection.shape)
        return _entry_dots(projection.centred, projection.w_enc.t(), index) + projection.b_enc[entries.cols]


def chunk_buffers(projection: Projection) -> Iterator[tuple[int, int, Tensor]]:
    """First row, number of rows, and a buffer [rows d_sae] for their products."""
    batch, d_sae = projection.shape
    dtype = projection.precision.dtype
    n_rows = min(batch, max(CHUNK_ROWS, CHUNK_BYTES // (d_sae * dtype.itemsize)))
    buffer = torch.empty(n_rows, d_sae, dtype=dtype, device=projection.centred.device)
    for start in range(0, batch, n_rows):
        rows = min(n_rows, batch - start)
        yield start, rows, buffer[:rows]


def candidates_beyond(k: int) -> int:
    """How many more than k candidates a bf16 product must offer so that the k best are among them."""
    return max(8, k // 4)


def _unrounded(values: Tensor, cols: Tensor, projection: Projection) -> Float[Tensor, " n"]:
    """Values to which the bias was added in the product's type, as if it had been added in fp32."""
    if values.dtype == torch.float32:
        return values
    lost = projection.b_enc - projection.b_enc.to(values.dtype)
    return values.float() + lost[cols]


def _entry_dots(vectors: Float[Tensor, "batch d"], rows: Float[Tensor, "d_sae d"], index: Index) -> Float[Tensor, " n"]:
    """vectors[token] . rows[latent] for each entry; neither gather is materialised."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors.contiguous(), rows.contiguous(), index.cols, index.row_starts[:-1], index.rows, 0
    )


def _sum_per_latent(
    weights: Float[Tensor, " n"], vectors: Float[Tensor, "batch d"], groups: ByLatent
) -> Float[Tensor, "d_sae d"]:
    """For each latent, the weighted sum of the vectors of the tokens it is active on."""
    ordered = weights[groups.order]
    starts = groups.starts[:-1]
    return F.embedding_bag(groups.tokens, vectors.contiguous(), starts, mode="sum", per_sample_weights=ordered)
