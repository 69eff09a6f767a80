"""CUDA, in Triton: only the encoder product is left to cuBLAS, and what is selected from it is found in one more read.

Everything but that product is bound by memory, so the kernels are built around what has to be read how often:

    topk           A group's maximum bounds all of its values, and the k-th largest maximum bounds the k-th largest
                   value from below: the winners lie in k groups. The products are read once for the maxima; then each
                   row's few candidates are one tile. torch.topk would read them several times.
    decode         Sums of gathered rows, one program a token and slice of d_in. Programs run slice by slice, and a
                   slice is so narrow that the matrix it gathers from stays in the L2 cache: each row is then read
                   from memory once, not once an entry.
    decode_grads   Latent by latent, so that a token's gradient is read once for both gradients and each latent's
                   result is written once, by one program. Nothing is added atomically: a step gives the same bits
                   every time. Latents that fire on very many tokens are cut into parts, or one program would be at
                   work long after all others.
    adam           Rows stay in registers: a parameter, its gradient and its moments are read once and written once,
                   with projection, clipping, rounding and the unit norm in between.

The host waits for the device in `above` alone, which cannot know how much it will return. Launch settings are fixed
and follow from the sizes: nothing is tuned at run time. All offsets are 64 bits wide.

In Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) all of this runs on a CPU, very slowly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.cpu import SLACK, candidates_beyond
from sae.kernels.moments import EXPONENT_BITS, Moments, mix, step_seed
from sae.kernels.operands import ByLatent, DecodeGrads, Entries, Index, Precision, Projection, RowNorms
from sae.kernels.reference import AdamStep, Kernels, topk_rows

PRODUCT_BYTES = 2**30
"""Of the products that exist at a time; larger batches are multiplied in chunks of rows."""
LARGEST_TILE = 2**14
"""Numbers that one program may hold: of a row's candidates, or of a parameter's row."""
L2_SHARE = 2**24
"""Bytes of the matrix being gathered from that should stay in the L2 cache. An H200 reports 60 MB, but each half of
the chip keeps its own copy of what both halves read, and results stream through it too."""
PART = 256
"""Entries of a latent that one program sums at most, give or take one such part."""
MOST_PARTS = 4096
"""Bound on the scratch memory for parts: this many rows of d_in."""
MOMENT_KINDS = {"float32": 0, "bfloat16": 1, "float8": 2}
MAX_DENSITY = {Precision.float32: 0.05, Precision.bfloat16: 0.006, Precision.bfloat16_rescored: 0.006}
"""An entry costs three gathers of d_in fp32 numbers (decode and two gradients), 12 * d_in bytes at 4.3 TB/s. An
element of the dense path costs 8 * d_in FLOP (four products, at 790 TFLOP/s in bf16 and 55 in fp32) and about 60 bytes
of element-wise passes. With d_in = 2304: 6.4 ns against 0.037 ns in bf16 and 0.35 ns in fp32."""


class TritonKernels(Kernels):
    """Every operation on CUDA; see the top of this file for how."""

    name = "triton"

    def max_density(self, precision: Precision) -> float:
        """From the cost model at `MAX_DENSITY`."""
        return MAX_DENSITY[precision]

    # The encoder, and what is selected from it

    def pre_acts(self, projection: Projection) -> Float[Tensor, "batch d_sae"]:
        """All pre-activations, in fp32."""
        result = torch.empty(projection.shape, device=projection.centred.device)
        for start, products in _products(projection):
            torch.add(products, projection.b_enc.detach(), out=result[start : start + len(products)])
        return result

    def topk(self, projection: Projection, k: int) -> Entries:
        """The k largest pre-activations of each token, by rising latent; of equal ones those of lower latents.

        A token with a NaN among its pre-activations has one among its entries.
        """
        batch, d_sae = projection.shape
        if projection.precision is not Precision.bfloat16_rescored:
            cols, values = self._topk(projection, k)
        else:
            n_candidates = min(d_sae, k + candidates_beyond(k))
            candidates, _ = self._topk(projection, n_candidates)
            values = _score(projection, topk_rows(batch, n_candidates, candidates.device), candidates.reshape(-1))
            cols, values = _largest_of(values.view(batch, n_candidates), candidates, k)
        return Entries(topk_rows(batch, k, cols.device), cols.reshape(-1), values.reshape(-1))

    def above(
        self, projection: Projection, threshold: Float[Tensor, "*d_sae"], max_density: float = 1.0
    ) -> Entries | None:
        """All pre-activations strictly above a threshold. Waits for the device once a chunk, for their number.

        bfloat16_rescored first takes what is not far below the threshold, as much as twice `max_density` of it, and
        waits once more for what is left of that.
        """
        if projection.precision is not Precision.bfloat16_rescored:
            return self._above(projection, threshold, max_density)
        found = self._above(projection, threshold - SLACK[0] - SLACK[1] * threshold.abs(), 2 * max_density)
        if found is None:
            return None
        values = _score(projection, found.rows, found.cols)
        keep = (~(values <= (threshold[found.cols] if threshold.ndim else threshold))).nonzero().squeeze(1)
        if len(keep) > max_density * projection.shape[0] * projection.shape[1]:
            return None
        return Entries(found.rows[keep], found.cols[keep], values[keep])

    def _topk(self, projection: Projection, k: int) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"]]:
        batch, d_sae = projection.shape
        cols = torch.empty(batch, k, dtype=torch.int64, device=projection.centred.device)
        values = torch.empty(batch, k, device=projection.centred.device)
        bias, group = projection.b_enc.detach().contiguous(), _group_size(d_sae, k)
        for start, products in _products(projection):
            here = slice(start, start + len(products))
            if group is None:
                found = (products + bias).topk(k, dim=1, sorted=False)
                cols[here], order = found.indices.sort(dim=1)
                values[here] = found.values.gather(1, order)
            else:
                _largest(products, bias, group, cols[here], values[here])
        return cols, values

    def _above(self, projection: Projection, threshold: Float[Tensor, "*d_sae"], max_density: float) -> Entries | None:
        batch, d_sae = projection.shape
        bias, threshold = projection.b_enc.detach().contiguous(), threshold.detach().expand(d_sae).contiguous()
        parts: list[Entries] = []
        n = 0
        for start, products in _products(projection):
            words = _bits_above(products, bias, threshold)
            counts = _count_bits(words)
            ends = counts.view(-1).cumsum(0)
            n_here = int(ends[-1]) if len(ends) else 0
            n += n_here
            if n > max_density * batch * d_sae:
                return None
            parts.append(_list_above(products, bias, words, counts, ends, start, n_here))
        if len(parts) == 1:
            return parts[0]
        return Entries(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    # The decoder, and gradients

    def by_latent(self, index: Index) -> ByLatent:
        """Radix sort of the shortest keys that will do: 16 bits take half the passes over memory that 32 take."""
        n, d_sae = len(index.cols), index.d_sae
        lowest, dtype = (-(2**15), torch.int16) if d_sae <= 2**16 else (0, torch.int32)
        keys, order = (index.cols + lowest).to(dtype).sort(stable=True)
        starts = torch.full((d_sae + 1,), n, dtype=torch.int64, device=keys.device)
        latents = torch.arange(lowest, lowest + d_sae, dtype=torch.int32, device=keys.device).to(dtype)
        starts[:-1] = torch.searchsorted(keys, latents)
        return ByLatent(order, index.rows[order], starts)

    def decode(
        self, acts: Float[Tensor, " n"], index: Index, w_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"]
    ) -> Float[Tensor, "batch d_in"]:
        """Weighted sum of a few decoder rows a token."""
        d_sae, d_in = w_dec.shape
        result = torch.empty(index.batch, d_in, device=acts.device)
        block, warps = _slices(d_sae, d_in)
        _launch(
            _decode,
            (index.batch, triton.cdiv(d_in, block)),
            acts.contiguous(),
            index.cols.contiguous(),
            index.row_starts.contiguous(),
            w_dec.contiguous(),
            b_dec.contiguous(),
            result,
            d_in,
            TILE=16 if block <= 64 else 8,
            BLOCK=block,
            num_warps=warps,
        )
        return result

    def decode_grads(
        self,
        grad: Float[Tensor, "batch d_in"],
        acts: Float[Tensor, " n"],
        index: Index,
        groups: ByLatent,
        w_dec: Float[Tensor, "d_sae d_in"],
        out: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> DecodeGrads:
        """Both in one pass over the gathered gradients of tokens, latent by latent."""
        w_grad, dots = _sum_by_latent(acts, grad, index, groups, w_dec.contiguous())
        assert dots is not None
        return DecodeGrads(torch.empty_like(dots[0]).scatter_(0, groups.order, dots.sum(0)), w_grad)

    def encode_grad(
        self,
        grad: Float[Tensor, " n"],
        index: Index,
        groups: ByLatent,
        centred: Float[Tensor, "batch d_in"],
        out: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> Float[Tensor, "d_sae d_in"]:
        """Weighted sums of inputs, latent by latent."""
        return _sum_by_latent(grad, centred, index, groups, None)[0]

    # The optimiser

    def bias_grad(self, grad: Float[Tensor, " n"], index: Index, groups: ByLatent) -> Float[Tensor, " d_sae"]:
        """Latent by latent: adding atomically, as `index_add_` does, would give other bits every time."""
        return torch.segment_reduce(grad[groups.order], "sum", offsets=groups.starts)

    def row_norms(self, grad: Float[Tensor, "rows d"], unit_rows: Float[Tensor, "rows d"] | None = None) -> RowNorms:
        """Sum of squares, in fp64 from the start; rows stay in registers while their component is taken out."""
        if unit_rows is not None and not _fits(grad, unit_rows):
            return super().row_norms(grad, unit_rows)
        grad = grad.contiguous()
        width = grad.shape[1] if unit_rows is not None else 4096
        head, rest, warps = _row_tiles(width)
        n_rows = triton.cdiv(grad.numel(), width)
        along = torch.empty(n_rows if unit_rows is not None else 1, device=grad.device)
        squares = torch.empty(n_rows, dtype=torch.float64, device=grad.device)
        _launch(
            _row_norms,
            (n_rows,),
            grad,
            grad if unit_rows is None else unit_rows,
            along,
            squares,
            width,
            grad.numel(),
            UNIT=unit_rows is not None,
            HEAD=head,
            REST=rest,
            num_warps=warps,
        )
        return RowNorms(squares.sum(), None if unit_rows is None else along)

    def adam(
        self,
        param: Float[Tensor, "rows d"],
        grad: Float[Tensor, "rows d"],
        moments: Moments,
        step: AdamStep,
        scale: Float[Tensor, ""],
        along: Float[Tensor, " rows"] | None = None,
    ) -> None:
        """One read and one write of everything. Rows too long for one program, or not contiguous, go the plain way.

        Given the same moments in fp32, what is stored is what the definition stores, bit by bit. Those moments differ
        from it in their last bit, since products are fused with sums: one rounding in 2^16 to 2^20 then goes the other
        way. The parameter agrees to a few units in the last place of the step.
        """
        by_row = along is not None or moments.kind == "float8"
        if not _fits(param, grad, *moments.tensors().values(), by_row=by_row):
            super().adam(param, grad, moments, step, scale, along)
            return
        # Where no row's sum or maximum is asked for, elements are cut into pieces without regard to rows.
        width = param.shape[1] if by_row else 1024
        head, rest, warps = _row_tiles(width)
        seed = step_seed(step.seed, step.step)
        _launch(
            _adam,
            (triton.cdiv(param.numel(), width),),
            param,
            grad,
            moments.exp_avg,
            moments.exp_avg_sq,
            param if moments.exp_avg_scale is None else moments.exp_avg_scale,
            param if moments.exp_avg_sq_scale is None else moments.exp_avg_sq_scale,
            param if along is None else along,
            scale,
            width,
            param.numel(),
            1 - step.beta1,
            step.beta2,
            1 - step.beta2,
            step.lr / step.correction1,
            1 / step.correction2,
            step.eps,
            _signed(mix(seed)),
            _signed(mix(seed + 1)),
            FROM_GRAD=1 - step.beta1 >= 0.5,
            UNIT=along is not None,
            KIND=MOMENT_KINDS[moments.kind],
            BITS=EXPONENT_BITS["exp_avg"],
            BITS_SQ=EXPONENT_BITS["exp_avg_sq"],
            HEAD=head,
            REST=rest,
            num_warps=warps,
        )


# Host side


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **options: Any) -> None:
    """Start a kernel on the device of its first argument, whichever is the current one.

    Kernels take tensors to lie in memory without gaps; not even index vectors always do (one row of a broadcast).
    """
    assert all(arg.is_contiguous() for arg in (first, *args) if isinstance(arg, Tensor))
    if 0 in grid:
        return
    with torch.cuda.device_of(first):
        kernel[grid](first, *args, enable_fp_fusion=True, **options)


@contextmanager
def _no_tf32() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    if not allowed:
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = True


def _products(projection: Projection) -> Iterator[tuple[int, Tensor]]:
    """First row, and centred @ w_enc [rows d_sae] of that row and the next ones; overwritten by the next chunk.

    The bias is added in fp32 where the products are used: in bf16 it would be rounded twice.
    """
    batch, d_sae = projection.shape
    dtype = projection.precision.dtype
    centred, w_enc = projection.centred.detach().to(dtype), projection.w_enc.detach().to(dtype)
    n_chunks = max(1, triton.cdiv(batch * d_sae * dtype.itemsize, PRODUCT_BYTES))
    n_rows = max(1, triton.cdiv(batch, n_chunks))
    buffer = torch.empty(n_rows, d_sae, dtype=dtype, device=centred.device)
    for start in range(0, batch, n_rows):
        part = centred[start : start + n_rows]
        with _no_tf32():
            products = torch.mm(part, w_enc, out=buffer[: len(part)])
        yield start, products


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return int(triton.next_power_of_2(max(1, n)))


def _group_size(d_sae: int, k: int) -> int | None:
    """Columns whose maximum is taken together, so that both searches of `_largest` are as short as can be.

    Both search a tile: of all maxima, then of k groups. None when no size keeps the two within one program. A group
    of 8 is at least 16 bytes, below which reading scattered groups would waste most of what is read.
    """
    best, cost = None, 2 * LARGEST_TILE + 1
    for group in (8, 16, 32, 64, 128, 256, 512, 1024):
        n_groups = triton.cdiv(d_sae, group)
        tiles = _power(n_groups), _power(min(k, n_groups) * group)
        if max(tiles) <= LARGEST_TILE and sum(tiles) < cost:
            best, cost = group, sum(tiles)
    return best


def _search(tile: int) -> dict[str, int]:
    """Settings of a search: 16 numbers a thread, to keep it in registers; 4 at a time while results are listed."""
    warps = min(16, max(1, tile // 512))
    return {"BLOCK": tile, "STEP": min(tile, warps * 128), "num_warps": warps}


def _largest(
    products: Float[Tensor, "rows d_sae"],
    bias: Float[Tensor, " d_sae"],
    group: int,
    cols: Int[Tensor, "rows k"],
    values: Float[Tensor, "rows k"],
) -> None:
    """Write the k largest of each row of products + bias, and their columns, rising."""
    rows, d_sae = products.shape
    k = cols.shape[1]
    n_groups = triton.cdiv(d_sae, group)
    keep = min(k, n_groups)
    maxima = torch.empty(rows, n_groups, dtype=torch.int32, device=products.device)
    groups = torch.empty(rows, keep, dtype=torch.int32, device=products.device)
    # A few rows a program, for which the bias is read once: it is fp32, and would double the bytes read from L2.
    n_together, n_rows = min(_power(n_groups), 2048 // group), 8
    _launch(
        _group_maxima,
        (triton.cdiv(rows, n_rows), triton.cdiv(n_groups, n_together)),
        products,
        bias,
        maxima,
        rows,
        d_sae,
        n_groups,
        GROUP=group,
        GROUPS=n_together,
        ROWS=n_rows,
        num_warps=4,
    )
    _launch(_choose_groups, (rows,), maxima, groups, n_groups, keep, **_search(_power(n_groups)))
    _launch(
        _choose_entries,
        (rows,),
        products,
        bias,
        groups,
        cols,
        values,
        d_sae,
        keep,
        k,
        GROUP=group,
        **_search(_power(keep * group)),
    )


def _largest_of(
    values: Float[Tensor, "batch n"], cols: Int[Tensor, "batch n"], k: int
) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"]]:
    """The k largest of listed values, with their columns."""
    batch, n = values.shape
    if _power(n) > LARGEST_TILE:
        found = values.topk(k, dim=1, sorted=False)
        order = found.indices.sort(dim=1).values
        return cols.gather(1, order), values.gather(1, order)
    best_cols, best = cols.new_empty(batch, k), values.new_empty(batch, k)
    _launch(_choose_listed, (batch,), values, cols, best_cols, best, n, k, **_search(_power(n)))
    return best_cols, best


def _bits_above(
    products: Float[Tensor, "rows d_sae"], bias: Float[Tensor, " d_sae"], threshold: Float[Tensor, " d_sae"]
) -> Int[Tensor, "rows words"]:
    """One bit for each value, set where it is above the threshold; 32 of them an integer."""
    rows, d_sae = products.shape
    n_words = triton.cdiv(d_sae, 32)
    words = torch.empty(rows, n_words, dtype=torch.int32, device=products.device)
    # As for group maxima, thresholds and biases are read once for a few rows.
    n_together, n_rows = min(_power(n_words), 32), 8
    _launch(
        _above_bits,
        (triton.cdiv(rows, n_rows), triton.cdiv(n_words, n_together)),
        products,
        bias,
        threshold,
        words,
        rows,
        d_sae,
        n_words,
        WORDS=n_together,
        ROWS=n_rows,
        num_warps=4,
    )
    return words


def _count_bits(words: Int[Tensor, "rows words"]) -> Int[Tensor, "rows blocks"]:
    """Bits set in each block of a row."""
    rows, n_words = words.shape
    block = min(1024, _power(n_words))
    counts = torch.empty(rows, triton.cdiv(n_words, block), dtype=torch.int32, device=words.device)
    _launch(_above_counts, tuple(counts.shape), words, counts, n_words, counts.shape[1], BLOCK=block, num_warps=4)
    return counts


def _list_above(
    products: Float[Tensor, "rows d_sae"],
    bias: Float[Tensor, " d_sae"],
    words: Int[Tensor, "rows words"],
    counts: Int[Tensor, "rows blocks"],
    ends: Int[Tensor, " rows*blocks"],
    start: int,
    n: int,
) -> Entries:
    """The values whose bits are set, in row-major order; their rows are counted from `start`."""
    d_sae, n_words = products.shape[1], words.shape[1]
    rows = torch.empty(n, dtype=torch.int64, device=products.device)
    cols, values = torch.empty_like(rows), torch.empty(n, device=products.device)
    _launch(
        _above_entries,
        tuple(counts.shape),
        products,
        bias,
        words,
        counts,
        ends,
        rows,
        cols,
        values,
        start,
        d_sae,
        n_words,
        counts.shape[1],
        BLOCK=min(1024, _power(n_words)),
        num_warps=8,
    )
    return Entries(rows, cols, values)


def _score(projection: Projection, rows: Int[Tensor, " n"], cols: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Pre-activations at given positions, as fp32 dot products."""
    values = torch.empty(len(rows), device=rows.device)
    d_in = projection.centred.shape[1]
    tile, block = 8, min(256, _power(d_in))
    _launch(
        _dot_products,
        (triton.cdiv(len(rows), tile),),
        projection.centred.contiguous(),
        projection.w_enc.t().contiguous(),
        projection.b_enc.contiguous(),
        rows.contiguous(),
        cols.contiguous(),
        values,
        len(rows),
        d_in,
        TILE=tile,
        BLOCK=block,
        num_warps=4,
    )
    return values


def _slices(n_rows: int, d: int) -> tuple[int, int]:
    """Columns, and warps, of one program that gathers from a matrix [n_rows d].

    A slice of 64 columns is 256 bytes of a row, the least that memory delivers at full speed; 512 columns give each
    thread of four warps 16 bytes of every row.
    """
    block = 64
    while block < 512 and 2 * block * n_rows * 4 <= L2_SHARE:
        block *= 2
    block = min(block, _power(d))
    return block, max(1, block // 128)


def _sum_by_latent(
    weights: Float[Tensor, " n"],
    vectors: Float[Tensor, "batch d"],
    index: Index,
    groups: ByLatent,
    w_dec: Float[Tensor, "d_sae d"] | None,
) -> tuple[Float[Tensor, "d_sae d"], Float[Tensor, "slices n"] | None]:
    """For each latent, the weighted sum of the vectors of its tokens.

    With `w_dec`, also each entry's dot product of the token's vector and the latent's row: by slice of d, to be
    summed over them, and in the order of `groups`.
    """
    n, d = len(weights), vectors.shape[1]
    vectors, cols = vectors.contiguous(), index.cols.contiguous()
    order, tokens, starts = (tensor.contiguous() for tensor in groups)
    result = torch.empty(index.d_sae, d, device=weights.device)
    block, warps = _slices(index.batch, d)
    # Few entries a latent: the registers of a larger tile would hold little, and keep programs off the processor.
    tile = 4 if n < 8 * index.d_sae else 8
    slices = triton.cdiv(d, block)
    dots = None if w_dec is None else torch.empty(slices, n, device=weights.device)
    # The entries, in order of latents, are cut at multiples of `part`. A latent's own program goes on to the end of
    # the first whole part that begins in it; each later part has a program, and lies within one latent.
    part = max(PART, _power(triton.cdiv(n, MOST_PARTS)))
    # A latent has at most one entry a token, so that in small batches there are no later parts.
    n_parts = triton.cdiv(n, part) if min(n, index.batch) > part else 0
    later = result if n_parts == 0 else torch.empty(n_parts, d, device=weights.device)
    _launch(
        _latent_sums,
        (n_parts + index.d_sae, slices),
        weights[order],
        order,
        tokens,
        starts,
        cols,
        vectors,
        vectors if w_dec is None else w_dec,
        result,
        later,
        result if dots is None else dots,
        n,
        n_parts,
        part,
        d,
        DOTS=w_dec is not None,
        TILE=tile,
        BLOCK=block,
        num_warps=warps,
    )
    _launch(
        _add_later_parts,
        (n_parts, slices),
        result,
        later,
        order,
        starts,
        cols,
        part,
        d,
        TILE=tile,
        BLOCK=block,
        num_warps=warps,
    )
    return result, dots


def _fits(*tensors: Tensor, by_row: bool = True) -> bool:
    """Whether rows can be held by one program, and lie one after another."""
    return all(tensor.is_contiguous() for tensor in tensors) and (
        not by_row or (tensors[0].ndim == 2 and tensors[0].shape[1] <= LARGEST_TILE)
    )


def _row_tiles(d: int) -> tuple[int, int, int]:
    """Sizes of the two tiles that hold a row, the second one possibly 0, and warps.

    Tiles are powers of two. One alone would leave almost half of the threads idle for 2304 or 1280 numbers.
    """
    head = _power(d)
    rest = 0
    if head > d and _power(d - head // 2) < head // 2:
        head, rest = head // 2, _power(d - head // 2)
    return head, rest, min(16, max(1, head // 256))


def _signed(bits: int) -> int:
    """The 32-bit integer with these bits, so that it is passed in the same type whatever its value."""
    return bits - 2**32 if bits >= 2**31 else bits


# Search. Numbers are compared as integers that have the same order, so that bisection ends after at most 32 steps


@triton.jit
def _ordered(values: tl.tensor) -> tl.tensor:
    """Integers in the order of these fp32 numbers; the smallest integer stands for none.

    NaN is the largest, since a sum that is NaN has its sign bit clear on NVIDIA GPUs (0x7FFFFFFF, whatever went in).
    """
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(keys: tl.tensor) -> tl.tensor:
    """Inverse of `_ordered`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bound(keys: tl.tensor, k: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """What the k largest keys reach, and how many keys equal to it belong to them.

    Bisection ends at a bound that exactly k keys reach, or, where ties allow none, at the k-th largest key.
    """
    high = tl.max(keys, axis=0).to(tl.int64)
    low = tl.min(tl.where(keys == -0x80000000, 0x7FFFFFFF, keys), axis=0).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0)
        if count >= k:
            low = middle
        else:
            high = middle - 1
        if count == k:
            high = middle
    bound = low.to(tl.int32)
    return bound, k - tl.sum((keys > bound).to(tl.int32), axis=0)


@triton.jit
def _take(
    keys: tl.tensor, bound: tl.tensor, n_equal: tl.tensor, larger: tl.tensor, equal: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Flag the keys above the bound, and the first `n_equal` equal ones, and number them from the left.

    `larger` and `equal` count such keys further left; they are returned with those here added.
    """
    # Both counts in one scan: there are at most 2^14 keys.
    flags = (keys > bound).to(tl.int32) + ((keys == bound).to(tl.int32) << 16)
    counts = tl.cumsum(flags, axis=0)
    rank = equal + (counts >> 16)
    chosen = (keys > bound) | ((keys == bound) & (rank <= n_equal))
    place = larger + (counts & 0xFFFF) + tl.minimum(rank, n_equal) - 1
    total = tl.sum(flags, axis=0)
    return chosen, place, larger + (total & 0xFFFF), equal + (total >> 16)


@triton.jit(do_not_specialize=["rows"])
def _group_maxima(
    products: tl.tensor,
    bias: tl.tensor,
    maxima: tl.tensor,
    rows: tl.tensor,
    d_sae: tl.tensor,
    n_groups: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Largest key of each group of columns."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = col < d_sae
    added = tl.load(bias + col, mask=inside, other=0.0)
    for i in tl.static_range(ROWS):
        row = first + i
        # Rows after the last one have no columns.
        there = col < tl.where(row < rows, d_sae, 0)
        value = tl.load((products + row * d_sae) + col, mask=there, other=-float("inf")).to(tl.float32) + added
        key = tl.max(_ordered(value), axis=1)
        tl.store((maxima + row * n_groups) + group, key, mask=group < tl.where(row < rows, n_groups, 0))


# A row is searched as one tile, but listed in steps, which read it once more, from cache: scan and scattered stores of
# a whole tile would take more registers than there are.


@triton.jit
def _choose_groups(
    maxima: tl.tensor, groups: tl.tensor, n_groups: tl.tensor, keep: tl.tensor, BLOCK: tl.constexpr, STEP: tl.constexpr
) -> None:
    """The groups, of one row, with the largest maxima."""
    row = tl.program_id(0).to(tl.int64)
    maxima += row * n_groups
    groups += row * keep
    tile = tl.arange(0, BLOCK)
    bound, n_equal = _bound(tl.load(maxima + tile, mask=tile < n_groups, other=-0x80000000), keep)
    larger, equal = 0, 0
    for first in range(0, n_groups, STEP):
        group = first + tl.arange(0, STEP)
        key = tl.load(maxima + group, mask=group < n_groups, other=-0x80000000)
        chosen, place, larger, equal = _take(key, bound, n_equal, larger, equal)
        tl.store(groups + place, group, mask=chosen)


@triton.jit
def _candidates(
    products: tl.tensor,
    bias: tl.tensor,
    groups: tl.tensor,
    i: tl.tensor,
    d_sae: tl.tensor,
    keep: tl.tensor,
    GROUP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Columns and keys of a row's candidates: all columns of its groups, one after another."""
    slot = i // GROUP
    group = tl.load(groups + slot, mask=slot < keep, other=0)
    col = group * GROUP + i % GROUP
    inside = (slot < keep) & (col < d_sae)
    value = tl.load(products + col, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + col, mask=inside, other=0.0)
    return col, tl.where(inside, _ordered(value), -0x80000000)


@triton.jit
def _choose_entries(
    products: tl.tensor,
    bias: tl.tensor,
    groups: tl.tensor,
    cols: tl.tensor,
    values: tl.tensor,
    d_sae: tl.tensor,
    keep: tl.tensor,
    k: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """The largest values, of one row, in its groups."""
    row = tl.program_id(0).to(tl.int64)
    products += row * d_sae
    groups += row * keep
    cols += row * k
    values += row * k
    _, keys = _candidates(products, bias, groups, tl.arange(0, BLOCK), d_sae, keep, GROUP)
    bound, n_equal = _bound(keys, k)
    larger, equal = 0, 0
    for first in range(0, keep * GROUP, STEP):
        col, key = _candidates(products, bias, groups, first + tl.arange(0, STEP), d_sae, keep, GROUP)
        chosen, place, larger, equal = _take(key, bound, n_equal, larger, equal)
        tl.store(cols + place, col.to(tl.int64), mask=chosen)
        tl.store(values + place, _unordered(key), mask=chosen)


@triton.jit
def _choose_listed(
    values: tl.tensor,
    cols: tl.tensor,
    best_cols: tl.tensor,
    best: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """The largest of one row of listed values."""
    row = tl.program_id(0).to(tl.int64)
    values += row * n
    cols += row * n
    best_cols += row * k
    best += row * k
    tile = tl.arange(0, BLOCK)
    keys = tl.where(tile < n, _ordered(tl.load(values + tile, mask=tile < n, other=0.0)), -0x80000000)
    bound, n_equal = _bound(keys, k)
    larger, equal = 0, 0
    for first in range(0, n, STEP):
        i = first + tl.arange(0, STEP)
        key = tl.where(i < n, _ordered(tl.load(values + i, mask=i < n, other=0.0)), -0x80000000)
        chosen, place, larger, equal = _take(key, bound, n_equal, larger, equal)
        tl.store(best_cols + place, tl.load(cols + i, mask=chosen, other=0), mask=chosen)
        tl.store(best + place, _unordered(key), mask=chosen)


@triton.jit(do_not_specialize=["rows"])
def _above_bits(
    products: tl.tensor,
    bias: tl.tensor,
    threshold: tl.tensor,
    words: tl.tensor,
    rows: tl.tensor,
    d_sae: tl.tensor,
    n_words: tl.tensor,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Bits of the values that are above the threshold, or no number, of some columns and a few rows."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    col = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    bit = tl.full([1, 32], 1, tl.int32) << tl.arange(0, 32)[None, :]
    inside = col < d_sae
    added = tl.load(bias + col, mask=inside, other=0.0)
    bound = tl.load(threshold + col, mask=inside, other=0.0)
    for i in tl.static_range(ROWS):
        row = first + i
        there = col < tl.where(row < rows, d_sae, 0)
        value = tl.load((products + row * d_sae) + col, mask=there, other=0.0).to(tl.float32) + added
        found = tl.sum(tl.where(there & ((value > bound) | (value != value)), bit, 0), axis=1)
        tl.store((words + row * n_words) + word, found, mask=word < tl.where(row < rows, n_words, 0))


@triton.jit
def _bit_counts(bits: tl.tensor) -> tl.tensor:
    """Bits set in each of these unsigned integers."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return ((((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _above_counts(
    words: tl.tensor, counts: tl.tensor, n_words: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Bits set in a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load((words + row * n_words) + word, mask=word < n_words, other=0).to(tl.uint32, bitcast=True)
    tl.store(counts + row * blocks + tl.program_id(1), tl.sum(_bit_counts(bits), axis=0))


@triton.jit(do_not_specialize=["start"])
def _above_entries(
    products: tl.tensor,
    bias: tl.tensor,
    words: tl.tensor,
    counts: tl.tensor,
    ends: tl.tensor,
    out_rows: tl.tensor,
    out_cols: tl.tensor,
    out_values: tl.tensor,
    start: tl.tensor,
    d_sae: tl.tensor,
    n_words: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """List the entries of a block of a row: the first one of each of its integers, then the second ones, and so on.

    Where they are listed follows from the counts of all blocks before. Products are read at the entries alone.
    """
    row = tl.program_id(0).to(tl.int64)
    block = row * blocks + tl.program_id(1)
    begin = tl.load(ends + block) - tl.load(counts + block)
    out_rows += begin
    out_cols += begin
    out_values += begin
    products += row * d_sae
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load((words + row * n_words) + word, mask=word < n_words, other=0).to(tl.uint32, bitcast=True)
    n = _bit_counts(bits)
    place = tl.cumsum(n, axis=0) - n
    for _ in range(tl.max(n, axis=0)):
        live = bits != 0
        col = word * 32 + _bit_counts((bits ^ (bits - 1)) >> 1)
        value = tl.load(products + col, mask=live, other=0.0).to(tl.float32)
        value += tl.load(bias + col, mask=live, other=0.0)
        tl.store(out_rows + place, tl.zeros([BLOCK], tl.int64) + (start + row), mask=live)
        tl.store(out_cols + place, col.to(tl.int64), mask=live)
        tl.store(out_values + place, value, mask=live)
        bits = bits & (bits - 1)
        place += 1


@triton.jit(do_not_specialize=["n"])
def _dot_products(
    centred: tl.tensor,
    directions: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    values: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Pre-activations of a few entries. They are mostly of one token, whose input then comes from the L1 cache."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = i < n
    row = tl.load(rows + i, mask=live, other=0)
    col = tl.load(cols + i, mask=live, other=0)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for first in range(0, d, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = live[:, None] & (at < d)[None, :]
        x = tl.load(centred + row[:, None] * d + at[None, :], mask=inside, other=0.0)
        w = tl.load(directions + col[:, None] * d + at[None, :], mask=inside, other=0.0)
        total += x * w
    tl.store(values + i, tl.sum(total, axis=1) + tl.load(bias + col, mask=live, other=0.0), mask=live)


# Sums of gathered rows


@triton.jit
def _decode(
    acts: tl.tensor,
    cols: tl.tensor,
    row_starts: tl.tensor,
    w_dec: tl.tensor,
    b_dec: tl.tensor,
    result: tl.tensor,
    d: tl.tensor,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One token's reconstruction, in one slice of d."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    start = tl.load(row_starts + token)
    stop = tl.load(row_starts + token + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, TILE):
        i = first + tl.arange(0, TILE)
        live = i < stop
        act = tl.load(acts + i, mask=live, other=0.0)
        col = tl.load(cols + i, mask=live, other=0)
        w = tl.load(w_dec + col[:, None] * d + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        total += tl.sum(act[:, None] * w, axis=0)
    total += tl.load(b_dec + at, mask=inside, other=0.0)
    tl.store(result + token * d + at, total, mask=inside, eviction_policy="evict_first")


@triton.jit
def _own_stop(begin: tl.tensor, part: tl.tensor) -> tl.tensor:
    """Where a latent's own program hands over to those of later parts; `begin` is its first entry."""
    return (begin + part - 1) // part * part + part


@triton.jit(do_not_specialize=["n", "n_parts", "part"])
def _latent_sums(
    weights: tl.tensor,
    order: tl.tensor,
    tokens: tl.tensor,
    starts: tl.tensor,
    cols: tl.tensor,
    vectors: tl.tensor,
    w_dec: tl.tensor,
    result: tl.tensor,
    later: tl.tensor,
    dots: tl.tensor,
    n: tl.tensor,
    n_parts: tl.tensor,
    part: tl.tensor,
    d: tl.tensor,
    DOTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Weighted sum of the vectors of one latent's tokens, or of one later part of them, in one slice of d.

    Programs of later parts come first, since they have the most to do.
    """
    program = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    if program < n_parts:
        first = program * part
        latent = tl.load(cols + tl.load(order + first))
        begin = tl.load(starts + latent)
        stop = tl.minimum(tl.load(starts + latent + 1), first + part)
        if first < _own_stop(begin, part):
            stop = first
        target = later + program * d
        width = tl.where(stop > first, d, 0)
    else:
        latent = program - n_parts
        first = tl.load(starts + latent)
        stop = tl.minimum(tl.load(starts + latent + 1), _own_stop(first, part))
        target = result + latent * d
        width = d
    if DOTS:
        there = at < tl.where(stop > first, d, 0)
        w = tl.load(w_dec + latent * d + at, mask=there, other=0.0, eviction_policy="evict_first")
    total = tl.zeros([BLOCK], tl.float32)
    # Tokens are looked up one tile ahead: their vectors need not wait for that.
    i = first + tl.arange(0, TILE)
    token = tl.load(tokens + i, mask=i < stop, other=0)
    for place in range(first, stop, TILE):
        i = place + tl.arange(0, TILE)
        live = i < stop
        v = tl.load(vectors + token[:, None] * d + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weights + i, mask=live, other=0.0)
        token = tl.load(tokens + i + TILE, mask=i + TILE < stop, other=0)
        total += tl.sum(weight[:, None] * v, axis=0)
        if DOTS:
            tl.store(dots + tl.program_id(1).to(tl.int64) * n + i, tl.sum(v * w[None, :], axis=1), mask=live)
    tl.store(target + at, total, mask=at < width, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["part"])
def _add_later_parts(
    result: tl.tensor,
    later: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    cols: tl.tensor,
    part: tl.tensor,
    d: tl.tensor,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add up the parts of one latent: the work of the program of the first later one."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < d
    first = program * part
    latent = tl.load(cols + tl.load(order + first))
    begin = tl.load(starts + latent)
    if first == _own_stop(begin, part):
        stop = (tl.load(starts + latent + 1) + part - 1) // part
        total = tl.load(result + latent * d + at, mask=inside, other=0.0)
        for place in range(program, stop, TILE):
            i = place + tl.arange(0, TILE)
            mask = (i < stop)[:, None] & inside[None, :]
            total += tl.sum(tl.load(later + i[:, None] * d + at[None, :], mask=mask, other=0.0), axis=0)
        tl.store(result + latent * d + at, total, mask=inside)


# The optimiser


@triton.jit
def _row_norms(
    grad: tl.tensor,
    unit: tl.tensor,
    along: tl.tensor,
    squares: tl.tensor,
    d: tl.tensor,
    n: tl.tensor,
    UNIT: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """Sum of squares of one row, its component along another one taken out."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, HEAD)
    inside = (at < d) & (row * d + at < n)
    g = tl.load(grad + row * d + at, mask=inside, other=0.0)
    if REST > 0:
        at_2 = HEAD + tl.arange(0, REST)
        inside_2 = (at_2 < d) & (row * d + at_2 < n)
        g_2 = tl.load(grad + row * d + at_2, mask=inside_2, other=0.0)
    if UNIT:
        u = tl.load(unit + row * d + at, mask=inside, other=0.0)
        product = tl.sum(g * u, axis=0)
        if REST > 0:
            u_2 = tl.load(unit + row * d + at_2, mask=inside_2, other=0.0)
            product += tl.sum(g_2 * u_2, axis=0)
            g_2 -= product * u_2
        g -= product * u
        tl.store(along + row, product)
    wide = g.to(tl.float64)
    total = tl.sum(wide * wide, axis=0)
    if REST > 0:
        wide_2 = g_2.to(tl.float64)
        total += tl.sum(wide_2 * wide_2, axis=0)
    tl.store(squares + row, total)


@triton.jit(do_not_specialize=["noise", "noise_sq"])
def _adam(
    param: tl.tensor,
    grad: tl.tensor,
    avg: tl.tensor,
    avg_sq: tl.tensor,
    avg_scale: tl.tensor,
    avg_sq_scale: tl.tensor,
    along: tl.tensor,
    clip: tl.tensor,
    d: tl.tensor,
    n: tl.tensor,
    new: tl.tensor,
    kept_sq: tl.tensor,
    new_sq: tl.tensor,
    rate: tl.tensor,
    spread_sq: tl.tensor,
    eps: tl.tensor,
    noise: tl.tensor,
    noise_sq: tl.tensor,
    FROM_GRAD: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    BITS_SQ: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    """One row's step. The row is held as two tiles; what belongs to the second one is marked by _2."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(clip).to(tl.float32)
    component, scale, scale_sq = factor, factor, factor
    if UNIT:
        component = tl.load(along + row)
    if KIND == 2:
        scale = tl.load(avg_scale + row)
        scale_sq = tl.load(avg_sq_scale + row)
    at = row * d + tl.arange(0, HEAD)
    inside = (tl.arange(0, HEAD) < d) & (at < n)
    p, g = _gradient(param + at, grad + at, component, factor, inside, UNIT)
    m = _moved(_moment(avg + at, scale, inside, KIND, BITS, True), g, new, FROM_GRAD)
    v = _moved_sq(_moment(avg_sq + at, scale_sq, inside, KIND, BITS_SQ, False), g, kept_sq, new_sq)
    p -= _change(m, v, rate, spread_sq, eps)
    if REST > 0:
        at_2 = row * d + HEAD + tl.arange(0, REST)
        inside_2 = (HEAD + tl.arange(0, REST) < d) & (at_2 < n)
        p_2, g_2 = _gradient(param + at_2, grad + at_2, component, factor, inside_2, UNIT)
        m_2 = _moved(_moment(avg + at_2, scale, inside_2, KIND, BITS, True), g_2, new, FROM_GRAD)
        v_2 = _moved_sq(_moment(avg_sq + at_2, scale_sq, inside_2, KIND, BITS_SQ, False), g_2, kept_sq, new_sq)
        p_2 -= _change(m_2, v_2, rate, spread_sq, eps)
    if UNIT:
        square = tl.sum(tl.where(inside, p * p, 0.0), axis=0)
        if REST > 0:
            square += tl.sum(tl.where(inside_2, p_2 * p_2, 0.0), axis=0)
        shrink = 1.0 / tl.maximum(tl.sqrt_rn(square), 1e-12)
        p = p * shrink
        if REST > 0:
            p_2 = p_2 * shrink
    if KIND == 2:
        scale = tl.max(tl.abs(m), axis=0)
        scale_sq = tl.max(v, axis=0)
        if REST > 0:
            scale = tl.maximum(scale, tl.max(tl.abs(m_2), axis=0))
            scale_sq = tl.maximum(scale_sq, tl.max(v_2, axis=0))
        tl.store(avg_scale + row, scale)
        tl.store(avg_sq_scale + row, scale_sq)
    tl.store(param + at, p, mask=inside)
    _store_moment(avg + at, m, scale, _noise(at, noise), inside, KIND, BITS, True)
    _store_moment(avg_sq + at, v, scale_sq, _noise(at, noise_sq), inside, KIND, BITS_SQ, False)
    if REST > 0:
        tl.store(param + at_2, p_2, mask=inside_2)
        _store_moment(avg + at_2, m_2, scale, _noise(at_2, noise), inside_2, KIND, BITS, True)
        _store_moment(avg_sq + at_2, v_2, scale_sq, _noise(at_2, noise_sq), inside_2, KIND, BITS_SQ, False)


@triton.jit
def _gradient(
    param: tl.tensor, grad: tl.tensor, component: tl.tensor, factor: tl.tensor, inside: tl.tensor, UNIT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Parameter, and its gradient projected and clipped."""
    p = tl.load(param, mask=inside, other=0.0)
    g = tl.load(grad, mask=inside, other=0.0)
    if UNIT:
        g -= component * p
    return p, g * factor


@triton.jit
def _moved(before: tl.tensor, g: tl.tensor, new: tl.tensor, FROM_GRAD: tl.constexpr) -> tl.tensor:
    """First moment after this step, from the nearer end, so that beta1 = 0 gives the gradient itself."""
    return g - (g - before) * (1.0 - new) if FROM_GRAD else before + (g - before) * new


@triton.jit
def _moved_sq(before: tl.tensor, g: tl.tensor, kept: tl.tensor, new: tl.tensor) -> tl.tensor:
    """Second moment after this step."""
    return before * kept + g * g * new


@triton.jit
def _change(m: tl.tensor, v: tl.tensor, rate: tl.tensor, spread_sq: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """What is subtracted from the parameter. Two multiplications by 1/sqrt(x) divide by x in fewer instructions."""
    root = tl.rsqrt(tl.sqrt(v * spread_sq) + eps)
    return rate * m * root * root


@triton.jit
def _noise(at: tl.tensor, seed: tl.tensor) -> tl.tensor:
    """32 hashed bits an element: `moments.random_bits`, whose seed is hashed already."""
    bits = at.to(tl.uint32) + seed.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _moment(
    pointers: tl.tensor,
    scale: tl.tensor,
    inside: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
) -> tl.tensor:
    """A moment in fp32: `Moments.read`."""
    if KIND == 2:
        code = tl.load(pointers, mask=inside, other=0).to(tl.int32)
        magnitude = code
        if SIGNED:
            magnitude = code & 0x7F
        largest = ((1 << BITS) - 1) << 3
        bits = (magnitude - largest + (127 << 3)) << 20
        value = tl.where(magnitude == 0, 0.0, bits.to(tl.float32, bitcast=True)) * scale
        if SIGNED:
            value = tl.where(code >= 0x80, -value, value)
    else:
        value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _store_moment(
    pointers: tl.tensor,
    value: tl.tensor,
    scale: tl.tensor,
    noise: tl.tensor,
    inside: tl.tensor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
) -> None:
    """Round a moment at random and store it: `Moments.write`."""
    if KIND == 0:
        tl.store(pointers, value, mask=inside)
    elif KIND == 1:
        bits = (value.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)) & 0xFFFF0000
        tl.store(pointers, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)
    else:
        largest = ((1 << BITS) - 1) << 3
        smallest = 1.125 / (1 << ((1 << BITS) - 1))
        # The quotient as IEEE rounds it, with one division a row: a product with the reciprocal, and one correction
        # (P. Markstein, IBM J. Res. Dev. 34, 1990). An approximation would now and then give another code.
        size = tl.abs(value)
        scale = tl.maximum(scale, 1.1754943508222875e-38)
        inverse = tl.div_rn(scale * 0.0 + 1.0, scale)
        ratio = size * inverse
        ratio = tl.fma(tl.fma(-ratio, scale, size), inverse, ratio)
        code = (ratio.to(tl.int32, bitcast=True) + (noise & 0xFFFFF).to(tl.int32)) >> 20
        code = code - (127 << 3) + largest
        up = (noise & 0xFFFFFF).to(tl.int32).to(tl.float32) < ratio * (16777216.0 / smallest)
        # No quotient is larger than 1, which has the largest code: nothing to clamp.
        code = tl.where(ratio < smallest, up.to(tl.int32), code)
        if SIGNED:
            code = code | ((value < 0).to(tl.int32) << 7)
        tl.store(pointers, code.to(tl.uint8), mask=inside)
