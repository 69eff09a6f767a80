"""The CPU kernels in C++: selection that reads each product once, and backward passes without a second gather.

Needs no header of torch: kernels.cpp has a plain C interface and is called through ctypes with the addresses of
tensors, while Python's lock is released.
"""

import ctypes
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.cpu import TorchKernels, chunk_buffers
from sae.kernels.moments import KINDS, Moments, step_seed
from sae.kernels.operands import ByLatent, DecodeGrads, Entries, Index, Precision, Projection, RowNorms
from sae.kernels.reference import AdamStep, topk_rows


class _AdamConstants(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("rate", "beta2", "rest1", "rest2", "eps", "correction2", "scale")]


class CppKernels(TorchKernels):
    """Compiled operations; what is not compiled is inherited. Build it with `sae.kernels.pick`.

    Args:
        library: from `sae.kernels.build.library`.
    """

    name = "cpp"
    takes_memory = True

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def max_density(self, precision: Precision) -> float:
        """Measured by `sae bench suite=density`."""
        return 0.35 if precision is Precision.float32 else 0.17

    def topk(self, projection: Projection, k: int) -> Entries:
        """The k largest pre-activations of each token."""
        assert 1 <= k <= projection.shape[1]
        return super().topk(projection, k)

    def above(
        self, projection: Projection, threshold: Float[Tensor, "*d_sae"], max_density: float = 1.0
    ) -> Entries | None:
        """All pre-activations strictly above a threshold."""
        d_sae = projection.shape[1]
        assert threshold.numel() in (1, d_sae)
        # One number in a vector is still one number.
        return super().above(projection, threshold.reshape(() if threshold.numel() == 1 else d_sae), max_density)

    def by_latent(self, index: Index) -> ByLatent:
        """A counting sort."""
        rows, cols = _int64(index.rows, len(index.cols)), _int64(index.cols, len(index.cols))
        order, tokens = torch.empty_like(cols), torch.empty_like(cols)
        starts = torch.empty(index.d_sae + 1, dtype=torch.int64)
        self._call("by_latent", rows, cols, len(cols), index.d_sae, order, tokens, starts, threads=False)
        return ByLatent(order, tokens, starts)

    def decode(
        self,
        acts: Float[Tensor, " n"],
        index: Index,
        w_dec: Float[Tensor, "d_sae d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        """Weighted sum of a few decoder rows a token."""
        n, d_in = len(index.cols), w_dec.shape[1]
        recons = torch.empty(index.batch, d_in)
        where = (_int64(index.row_starts, index.batch + 1), _int64(index.cols, n))
        inputs = (_float32(acts, n), *where, _float32(w_dec, index.d_sae, d_in), _float32(b_dec, d_in))
        self._call("decode", *inputs, *recons.shape, recons)
        return recons

    def decode_grads(
        self,
        grad: Float[Tensor, "batch d_in"],
        acts: Float[Tensor, " n"],
        index: Index,
        groups: ByLatent,
        w_dec: Float[Tensor, "d_sae d_in"],
        out: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> DecodeGrads:
        """Both gradients in one pass, latent by latent."""
        n, d_in = len(index.cols), w_dec.shape[1]
        grads = DecodeGrads(torch.empty(n), torch.empty(w_dec.shape) if out is None else out)
        vectors, weights = _float32(grad, index.batch, d_in), _float32(acts, n)
        inputs = (vectors, weights, *_checked(groups, index), _float32(w_dec, index.d_sae, d_in))
        self._call("decode_grads", *inputs, *w_dec.shape, *grads)
        return grads

    def encode_grad(
        self,
        grad: Float[Tensor, " n"],
        index: Index,
        groups: ByLatent,
        centred: Float[Tensor, "batch d_in"],
        out: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> Float[Tensor, "d_sae d_in"]:
        """Weighted sums of inputs, latent by latent."""
        d_in = centred.shape[1]
        sums = torch.empty(index.d_sae, d_in) if out is None else out
        weights, vectors = _float32(grad, len(index.cols)), _float32(centred, index.batch, d_in)
        self._call("sum_per_latent", weights, *_checked(groups, index), vectors, *sums.shape, sums)
        return sums

    def row_norms(self, grad: Float[Tensor, "rows d"], unit_rows: Float[Tensor, "rows d"] | None = None) -> RowNorms:
        """Both in one pass over the gradient."""
        squares = torch.empty(len(grad))
        along = None if unit_rows is None else torch.empty(len(grad))
        units = None if unit_rows is None else _float32(unit_rows, *grad.shape)
        self._call("row_norms", _float32(grad, *grad.shape), units, *grad.shape, along, squares)
        # Summed by torch, in an order that does not depend on threads.
        return RowNorms(squares.double().sum(), along)

    def adam(
        self,
        param: Float[Tensor, "rows d"],
        grad: Float[Tensor, "rows d"],
        moments: Moments,
        step: AdamStep,
        scale: Float[Tensor, ""],
        along: Float[Tensor, " rows"] | None = None,
    ) -> None:
        """Clipping, projection, moments, step and renormalisation in one pass over memory."""
        assert param.is_contiguous()
        constants = _AdamConstants(
            step.lr / step.correction1,
            step.beta2,
            1 - step.beta1,  # here, in double: of a beta rounded to fp32 it would be off by 1e-5
            1 - step.beta2,
            step.eps,
            step.correction2,
            float(scale),
        )
        state = (moments.exp_avg, moments.exp_avg_sq, moments.exp_avg_scale, moments.exp_avg_sq_scale)
        pointer = ctypes.addressof(constants)
        seed = ctypes.c_uint32(step_seed(step.seed, step.step))
        kind = ctypes.c_int(KINDS.index(moments.kind))
        shape = (kind, *param.shape, ctypes.c_void_p(pointer), seed)
        self._call("adam", param.detach(), grad.contiguous(), along, *state, *shape)

    def _select_topk(self, projection: Projection, k: int) -> Entries:
        batch, d_sae = projection.shape
        cols = torch.empty(batch, k, dtype=torch.int64)
        values = torch.empty(batch, k)
        bias = _float32(projection.b_enc, d_sae)

        def search(start: int, products: Tensor) -> None:
            stop = start + len(products)
            outputs = (cols[start:stop], values[start:stop])
            self._call(_typed("topk", products), products, bias, *products.shape, k, *outputs)

        self._search(projection, search)
        return Entries(topk_rows(batch, k, cols.device), cols.view(-1), values.view(-1))

    def _select_above(
        self, projection: Projection, threshold: Float[Tensor, "*d_sae"], max_density: float
    ) -> Entries | None:
        width = projection.shape[1]
        bias, bar = _float32(projection.b_enc, width), threshold.detach().float().contiguous()
        assert bar.shape in ((), (width,))
        found: list[Entries] = []
        n_found, too_many = 0, False

        def search(start: int, products: Tensor) -> bool:
            nonlocal n_found, too_many
            rows, d_sae = products.shape
            counts = torch.empty(rows, dtype=torch.int64)
            inputs = (products, bias, bar, bar.ndim, rows, d_sae)
            self._call(_typed("count_above", products), *inputs, counts)
            ends = counts.cumsum(0)
            n = int(ends[-1])
            n_found += n
            too_many = n_found > max_density * (start + rows) * d_sae
            if not too_many:
                indices = torch.empty(2, n, dtype=torch.int64)
                entries = Entries(indices[0], indices[1], torch.empty(n))
                self._call(_typed("list_above", products), *inputs, ends - counts, start, *entries)
                found.append(entries)
            return too_many

        self._search(projection, search)
        if too_many:
            return None
        return Entries(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _search(self, projection: Projection, search: Callable[[int, Tensor], bool | None]) -> None:
        """Hand over the product chunk by chunk, without the bias; stop when `search` says so."""
        dtype = projection.precision.dtype
        centred, w_enc = projection.centred.to(dtype), projection.w_enc.to(dtype)
        for start, rows, buffer in chunk_buffers(projection):
            torch.mm(centred[start : start + rows], w_enc, out=buffer)
            if search(start, buffer):
                return

    def _rescore(self, projection: Projection, entries: Entries) -> Float[Tensor, " n"]:
        index = Index(entries.rows, entries.cols, *projection.shape)
        dots = torch.empty(len(entries.values))
        (batch, d_in), n = projection.centred.shape, len(dots)
        vectors, rows = _float32(projection.centred, batch, d_in), _float32(projection.w_enc.t(), index.d_sae, d_in)
        where = (_int64(index.row_starts, batch + 1), _int64(index.cols, n))
        self._call("entry_dots", vectors, rows, *where, *vectors.shape, dots)
        return dots.add_(projection.b_enc[entries.cols])

    def _call(self, name: str, *arguments: object, threads: bool = True) -> None:
        dtypes = _dtypes(name)
        converted = [_argument(argument, dtypes) for argument in arguments]
        if threads:
            converted.append(ctypes.c_int(torch.get_num_threads()))
        getattr(self._library, name)(*converted)


def _typed(name: str, products: Tensor) -> str:
    return f"{name}_{'bfloat16' if products.dtype == torch.bfloat16 else 'float'}"


def _int64(tensor: Tensor, *shape: int) -> Tensor:
    """A contiguous tensor of integers as the C interface reads them, which would read wild memory in any other."""
    assert tensor.dtype == torch.int64, f"int64 is needed, not {tensor.dtype}"
    assert tensor.shape == shape, f"shape {shape} is needed, not {tuple(tensor.shape)}"
    return tensor.contiguous()


def _float32(tensor: Tensor, *shape: int) -> Tensor:
    """The same for numbers."""
    assert tensor.dtype == torch.float32, f"float32 is needed, not {tensor.dtype}"
    assert tensor.shape == shape, f"shape {shape} is needed, not {tuple(tensor.shape)}"
    return tensor.contiguous()


def _checked(groups: ByLatent, index: Index) -> tuple[Tensor, Tensor, Tensor]:
    n = len(index.cols)
    return _int64(groups.order, n), _int64(groups.tokens, n), _int64(groups.starts, index.d_sae + 1)


def _dtypes(name: str) -> set[torch.dtype]:
    """Types of the tensors that a compiled function may be given: narrow ones are products, or Adam's moments."""
    dtypes = {torch.int64, torch.float32}
    if name.endswith("_bfloat16"):
        return dtypes | {torch.bfloat16}
    return dtypes | {torch.bfloat16, torch.uint8} if name == "adam" else dtypes


def _argument(value: object, dtypes: set[torch.dtype]) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        assert value.device.type == "cpu"
        assert value.dtype in dtypes, f"{value.dtype} is not among {dtypes}"
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int64(value) if isinstance(value, int) else value
