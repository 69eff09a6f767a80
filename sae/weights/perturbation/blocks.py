"""Low-rank blocks of matrices as parts: neighbouring singular directions, which are no rows or columns.

    W = sum over blocks b of U_b S_b V_b' + the rest,      perturbed: W + U_b N V_b',  N [k k]

To the methods of `registry.py` blocks are rows all the same: of *cores*, in which the k x k squares S_b lie one
below the other. A method changes a core, and before the metric is evaluated what changed is carried over into the
weights. So noise in a block stays along its own directions, taking it away takes away U_b S_b V_b' and nothing else,
and every method does what it does to rows.

    blocks = Blocks(block_matrices(lm), rank=4, n_blocks=8)
    METHODS["random"](blocks.metric(metric), blocks.matrices, blocks.parts, budget=2000)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.errors import UserError
from sae.lm.matrices import Matrix, Part, Slice
from sae.weights.attribution import Direction
from sae.weights.edit import rewritten
from sae.weights.perturbation.located import Metric
from sae.weights.perturbation.noise import Gradients

Array = np.ndarray
BLOCK = "block"


class _Frame(NamedTuple):
    """The leading singular directions of one matrix, and where its core began."""

    matrix: Matrix
    left: Float[Tensor, "d_out r"]
    right: Float[Tensor, "r d_in"]
    core: Float[Tensor, "r k"]

    def turned(self, values: Tensor) -> Tensor:
        """Between the matrix's own layout and [d_out d_in]."""
        return values if self.matrix.out_axis == 0 else values.T


class Blocks:
    """The leading singular directions of some matrices, a few to a block.

    Attributes:
        matrices: for every matrix its core [directions k], under the matrix's name; methods change these.
        parts: the blocks; `number` counts them within their matrix, the largest singular values first.
    """

    def __init__(self, matrices: Sequence[Matrix], rank: int = 4, n_blocks: int = 8) -> None:
        """Decompose: one singular value decomposition a matrix, in float32.

        Args:
            matrices: the model's.
            rank: directions a block; of a matrix with fewer, all of them.
            n_blocks: blocks a matrix, at most; what comes after is part of none.

        Raises:
            UserError: a rank or a number of blocks below 1.
        """
        if min(rank, n_blocks) < 1:
            raise UserError(f"{n_blocks} blocks of rank {rank}: give at least 1 of each.")
        self._model = list(matrices)
        self._frames: dict[str, _Frame] = {}
        self.matrices: list[Matrix] = []
        self.parts: list[Part] = []
        for matrix in matrices:
            frame = _frame(matrix, rank, n_blocks)
            self._frames[matrix.name] = frame
            core = nn.Parameter(frame.core.clone(), requires_grad=False)
            self.matrices.append(Matrix(matrix.name, matrix.layer, "", core, 0))
            count, k = len(core) // core.shape[1], core.shape[1]
            self.parts += [
                Part(BLOCK, matrix.layer, index, (Slice(matrix.name, 0, index * k, (index + 1) * k),))
                for index in range(count)
            ]

    def directions(self, part: Part) -> list[Direction]:
        """Return a block's singular directions; the sum of gain * outer(out, into) is the block."""
        (where,) = part.slices
        frame = self._frames[where.name]
        k = frame.core.shape[1]
        return [
            Direction(frame.matrix, one, frame.left[:, one], frame.right[one], float(frame.core[one, one % k]))
            for one in range(where.start, where.stop)
        ]

    def values(self) -> dict[str, Tensor]:
        """Return the matrices' values where a core is not what it was, in float32."""
        found = {}
        for core in self.matrices:
            frame = self._frames[core.name]
            k = frame.core.shape[1]
            change = (core.parameter.detach() - frame.core).view(-1, k, k)
            moved = change.any(dim=2).any(dim=1).nonzero().flatten().tolist()
            if not moved:
                continue
            value = frame.turned(frame.matrix.parameter.detach().float()).clone()
            for block in moved:
                own = slice(block * k, (block + 1) * k)
                value += frame.left[:, own] @ change[block] @ frame.right[own]
            found[core.name] = frame.turned(value)
        return found

    def metric(self, metric: Metric) -> Metric:
        """Return a metric of the model's weights as one of the cores."""
        return _Carried(self, metric)

    def gradients(self, given: Gradients) -> Gradients:
        """Return the gradient by the cores, of what gives the gradient by the model's weights."""

        def found() -> dict[str, Tensor]:
            return {name: self._of_core(self._frames[name], slope) for name, slope in given().items()}

        return found

    @staticmethod
    def _of_core(frame: _Frame, slope: Tensor) -> Float[Tensor, "r k"]:
        k = frame.core.shape[1]
        left = (frame.left.T @ frame.turned(slope.float())).view(-1, k, frame.right.shape[1])
        return (left @ frame.right.view(-1, k, frame.right.shape[1]).transpose(1, 2)).reshape(-1, k)


@torch.no_grad()
def _frame(matrix: Matrix, rank: int, n_blocks: int) -> _Frame:
    weight = matrix.parameter.detach().float()
    u, s, vt = torch.linalg.svd(weight if matrix.out_axis == 0 else weight.T, full_matrices=False)
    k = min(rank, len(s))
    n = k * min(n_blocks, len(s) // k)
    core = torch.zeros(n, k, device=weight.device)
    core[torch.arange(n), torch.arange(n) % k] = s[:n]
    return _Frame(matrix, u[:, :n].clone(), vt[:n].clone(), core)


class _Carried:
    """A metric under the weights that the cores as they are now stand for; the weights are put back bit for bit."""

    def __init__(self, blocks: Blocks, metric: Metric) -> None:
        self._blocks, self._metric = blocks, metric

    def __call__(self) -> Float[Array, " n"]:
        with rewritten(self._blocks._model, self._blocks.values()):
            return self._metric()

    def from_layer(self, layer: int) -> Float[Array, " n"]:
        """The same, given that no core of an earlier layer has changed."""
        started = getattr(self._metric, "from_layer", None)
        with rewritten(self._blocks._model, self._blocks.values()):
            found: Array = self._metric() if started is None else started(layer)
            return found
