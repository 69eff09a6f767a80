"""Rows and columns of matrices, and changing them for the length of a measurement."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sae.errors import UserError
from sae.lm.matrices import Matrix, Part
from sae.weights.restore import put_back


class Region(NamedTuple):
    """Some rows or columns of one matrix, in one piece however many they are."""

    name: str
    axis: int
    lines: Int[Tensor, " n"]

    def of(self, tensor: Tensor) -> Tensor:
        """Copy of those rows or columns of a tensor of the matrix's shape."""
        return tensor.index_select(self.axis, self.lines)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write those rows or columns, in place."""
        tensor.index_copy_(self.axis, self.lines, values)


def regions(parts: Iterable[Part], device: torch.device | str = "cpu") -> list[Region]:
    """Where parts lie, one region for each matrix and axis, so that a thousand neurons are edited as fast as one."""
    found: dict[tuple[str, int], list[int]] = {}
    for part in parts:
        for one in part.slices:
            found.setdefault((one.name, one.axis), []).extend(range(one.start, one.stop))
    return [Region(name, axis, torch.tensor(index, device=device)) for (name, axis), index in found.items()]


def by_name(matrices: Sequence[Matrix], parts: Sequence[Part]) -> dict[str, Tensor]:
    """The parameters that parts lie in.

    Raises:
        UserError: no parts, or one that lies in none of the matrices.
    """
    if not parts:
        raise UserError("there are no parts to locate: give heads, neurons or rows of the model.")
    own: dict[str, Tensor] = {matrix.name: matrix.parameter for matrix in matrices}
    for part in parts:
        for one in part.slices:
            if one.name not in own:
                raise UserError(f"{part.label} lies in {one.name!r}, which is not among the matrices given: add it.")
    return own


@contextlib.contextmanager
def edited(
    parameters: Mapping[str, Tensor], where: Sequence[Region], change: Callable[[Region, Tensor], Tensor]
) -> Iterator[None]:
    """Context in which every region holds `change(region, its values)`; the values come in float32 at least."""
    with put_back(parameters, where):
        with torch.no_grad():
            for region in where:
                parameter = parameters[region.name]
                values = region.of(parameter.detach())
                new = change(region, values.to(torch.promote_types(values.dtype, torch.float32)))
                region.put(parameter, new.to(parameter))
        yield
