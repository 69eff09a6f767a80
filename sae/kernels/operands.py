"""What kernels take and give: the encoder product asked about, the entries that were selected, and their order.

Shapes: `batch` tokens, `d_in` width of the activations, `d_sae` latents, `n` entries.
"""

import enum
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Precision(enum.Enum):
    """How the encoder product is computed, and the matmuls of dense paths where these are taken.

    Weights, sums over entries, gradients as they are stored, thresholds and the loss are fp32.
    """

    float32 = "float32"
    bfloat16 = "bfloat16"
    """bf16 operands, fp32 accumulation, bf16 result."""
    bfloat16_rescored = "bfloat16_rescored"
    """Candidates from the bf16 product; their values, and the final choice, from fp32 dot products. A dense path knows
    no candidates: it is bf16 there."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the operands of the dense product."""
        return torch.float32 if self is Precision.float32 else torch.bfloat16


class Projection(NamedTuple):
    """The encoder product, not yet carried out: pre_acts = centred @ w_enc + b_enc.

    Kernels are asked for what is selected from it, so that they need not keep the [batch d_sae] matrix.
    """

    centred: Float[Tensor, "batch d_in"]
    """x - b_dec, fp32."""
    w_enc: Float[Tensor, "d_in d_sae"]
    """fp32; one latent's direction is contiguous (the transpose of a contiguous matrix)."""
    b_enc: Float[Tensor, " d_sae"]
    precision: Precision = Precision.float32

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, d_sae)."""
        return self.centred.shape[0], self.w_enc.shape[1]


class Entries(NamedTuple):
    """Selected positions of the [batch d_sae] matrix of pre-activations, token by token."""

    rows: Int[Tensor, " n"]
    """Token of each entry, ascending."""
    cols: Int[Tensor, " n"]
    """Latent of each entry."""
    values: Float[Tensor, " n"]
    """Its pre-activation, fp32."""


class ByLatent(NamedTuple):
    """Entries regrouped by latent; within a latent by token."""

    order: Int[Tensor, " n"]
    """Number of the entry, in row-major order, that comes at each place."""
    tokens: Int[Tensor, " n"]
    """Its token."""
    starts: Int[Tensor, " d_sae+1"]
    """Where each latent's entries begin; the last element is n."""


class Index:
    """Where the entries of a batch lie, by token and by latent.

    Args:
        rows: [n] token of each entry, ascending.
        cols: [n] latent of each entry.
        batch: tokens.
        d_sae: latents.
    """

    def __init__(self, rows: Tensor, cols: Tensor, batch: int, d_sae: int) -> None:
        self.rows, self.cols = rows, cols
        self.batch, self.d_sae = batch, d_sae
        self.row_starts: Int[Tensor, " batch+1"] = run_starts(rows, batch)


def run_starts(sorted_ids: Int[Tensor, " n"], n_ids: int) -> Int[Tensor, " n_ids+1"]:
    """Index at which each id's run starts in a sorted list; ids without entries get an empty run."""
    # Not bincount, which makes the host wait for a GPU.
    return torch.searchsorted(sorted_ids.contiguous(), torch.arange(n_ids + 1, device=sorted_ids.device))


class DecodeGrads(NamedTuple):
    """Gradients of a sparse decode."""

    acts: Float[Tensor, " n"]
    """With respect to the latent activation of each entry."""
    w_dec: Float[Tensor, "d_sae d_in"]


class Workspace:
    """Memory for the gradients of the two weight matrices, used again by every step of every SAE that shares it.

    Memory that is new every time has to be mapped in page by page: about a tenth of a step's time on a CPU.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def matrix(self, name: str, like: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """Memory of the shape of `like`, contents undefined; whatever had it under this name loses it."""
        held = self._held.get(name)
        if held is None or held.numel() < like.numel() or held.device != like.device:
            self._held.pop(name, None)  # let the smaller one go first
            held = self._held[name] = torch.empty(like.numel(), device=like.device)
        return held[: like.numel()].view(like.shape)


class RowNorms(NamedTuple):
    """What clipping and the unit-norm constraint need to know of a gradient."""

    square_sum: Float[Tensor, ""]
    """Sum of squares of the gradient, after what `along` describes is taken out; fp64."""
    along: Float[Tensor, " rows"] | None
    """Each row's component along the parameter's row (which has norm 1); None when nothing is taken out."""
