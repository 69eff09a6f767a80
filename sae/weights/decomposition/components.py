"""The components themselves: for every matrix, directions that are read and written, and what says how they matter."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.errors import UserError
from sae.lm.matrices import Matrix
from sae.weights.decomposition.gates import lower, make_gate, upper
from sae.weights.decomposition.settings import MAX_WEIGHTS, DecompositionSettings


def oriented(matrix: Matrix) -> Float[Tensor, "d_out d_in"]:
    """Return a matrix's values in float32, outputs first however it is stored."""
    values = matrix.parameter.detach().float()
    return values if matrix.out_axis == 0 else values.t()


def check_size(matrices: Sequence[Matrix]) -> None:
    """Refuse a model that is too large to be decomposed.

    Raises:
        UserError: saying how large it may be.
    """
    size = sum(matrix.parameter.numel() for matrix in matrices)
    if size > MAX_WEIGHTS:
        raise UserError(
            f"the matrices hold {size:,} weights, and decomposing trains on each of them at every token: models of at "
            f"most {MAX_WEIGHTS:,} are decomposed; use taylor or integrated_gradients on this one."
        )


class Importance(NamedTuple):
    """How important each component of a matrix is at each token."""

    masks: Float[Tensor, "*token component"]  #: in [0, 1]: what masks are drawn above
    penalty: Float[Tensor, "*token component"]  #: the same, a little more than 1 where it is above: what is penalised


class Pieces(nn.Module):
    """One matrix's components, the sum of outer(U_c, V_c), and their gate.

    Attributes:
        name: the matrix's.
        U: what is written [component d_out].
        V: what is read [component d_in].
        scale: what inner activations are multiplied by before the gate [component].
        gate: their importance.
    """

    scale: Tensor

    def __init__(self, name: str, weight: Tensor, settings: DecompositionSettings, generator: torch.Generator) -> None:
        """Start from a random tight frame on a side that it spans, the larger if it can: the sum is then the matrix."""
        super().__init__()
        self.name = name
        d_out, d_in = weight.shape
        count = settings.components or min(d_out, d_in)
        read_side = d_in <= d_out if count < max(d_out, d_in) else d_in >= d_out
        side = d_in if read_side else d_out
        frame = torch.randn(count, side, generator=generator)
        u, _, vt = torch.linalg.svd(frame, full_matrices=False)
        frame = (u @ vt).to(weight)  # orthonormal columns, or rows where there are fewer components than coordinates
        self.U = nn.Parameter(frame @ weight.t() if read_side else frame)
        self.V = nn.Parameter(frame.clone() if read_side else frame @ weight)
        self.register_buffer("scale", torch.ones(count, device=weight.device))
        self.gate = make_gate(settings.gates, count, settings.hidden, generator).to(weight.device)

    def __len__(self) -> int:
        return len(self.U)

    def inner(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token component"]:
        """Return V_c . x of every component."""
        return x.float() @ self.V.t()

    def importance(self, x: Float[Tensor, "*token d_in"]) -> Importance:
        """Return how important the components are for an input."""
        z = self.gate(self.inner(x) * self.scale)
        return Importance(lower(z), upper(z))

    def total(self) -> Float[Tensor, "d_out d_in"]:
        """Return the sum of the components."""
        return self.U.t() @ self.V

    def component(self, index: int) -> Float[Tensor, "d_out d_in"]:
        """Return one component."""
        return torch.outer(self.U[index], self.V[index])


class Decomposition(nn.Module):
    """All matrices' components.

    Attributes:
        settings: how it was made.
        fingerprint: of the model it is of.
        rows_run: rows of text that a model was run on while training, a backward counted as two forwards.
    """

    def __init__(
        self, matrices: Sequence[Matrix], settings: DecompositionSettings | None = None, fingerprint: str = ""
    ) -> None:
        """Start a decomposition of some matrices.

        Raises:
            UserError: a model that is too large.
        """
        super().__init__()
        self.settings, self.fingerprint = settings or DecompositionSettings(), fingerprint
        self.rows_run = 0.0
        check_size(matrices)
        generator = torch.Generator().manual_seed(self.settings.seed)
        self.all = nn.ModuleList(Pieces(one.name, oriented(one), self.settings, generator) for one in matrices)

    def __iter__(self) -> Iterator[Pieces]:
        for one in self.all:
            assert isinstance(one, Pieces)
            yield one

    @property
    def n_components(self) -> int:
        """Components of all matrices together."""
        return sum(len(one) for one in self)

    def pieces(self, name: str) -> Pieces:
        """One matrix's components."""
        return next(one for one in self if one.name == name)

    def importance(self, inputs: Mapping[str, Tensor]) -> dict[str, Importance]:
        """Return how important every component is, given what goes into the matrices."""
        return {one.name: one.importance(inputs[one.name]) for one in self}

    def unfaithfulness(self, matrices: Sequence[Matrix]) -> Float[Tensor, ""]:
        """Return the mean over matrices of the sum's squared distance from its matrix over the matrix's square."""
        given = {matrix.name: oriented(matrix) for matrix in matrices}
        errors = []
        for one in self:
            weight = given[one.name]
            errors.append((weight - one.total()).square().sum() / weight.square().sum().clamp_min(1e-12))
        return torch.stack(errors).mean()

    @torch.no_grad()
    def calibrate(self, inputs: Mapping[str, Tensor]) -> None:
        """Scale what gates see so that every inner activation has mean square 1 on some inputs."""
        for one in self:
            inner = one.inner(inputs[one.name]).flatten(0, -2)
            one.scale.copy_(inner.square().mean(dim=0).add(1e-8).rsqrt())
