"""A model run with some matrices' components masked, token by token, and what goes into its matrices.

A module that gives y = W x + b gives instead, with masks m of the components and n of what they leave of W,

    b + n W x + sum_c (m_c - n) U_c (V_c . x),

which with all masks at 1 is y to the last bit, whatever the components are.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from sae.errors import UserError
from sae.lm.matrices import Matrix
from sae.weights.decomposition.components import Decomposition, Pieces
from sae.weights.decomposition.masks import Masks
from sae.weights.responses import owners


@contextlib.contextmanager
def frozen(root: nn.Module) -> Iterator[None]:
    """Context in which no parameter of a model takes gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@contextlib.contextmanager
def watched(root: nn.Module, matrices: Sequence[Matrix]) -> Iterator[dict[str, Tensor]]:
    """Context in which the inputs [*token d_in] of the matrices are left in a mapping by name.

    Raises:
        UserError: at the end, where a matrix was not multiplied by its own module.
    """
    found: dict[str, Tensor] = {}
    handles = []

    def look(name: str) -> Any:
        return lambda module, given: found.__setitem__(name, given[0].detach())

    try:
        for module, matrix in owners(root, matrices):
            handles.append(module.register_forward_pre_hook(look(matrix.name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
    missing = [matrix.name for matrix in matrices if matrix.name not in found]
    if missing:
        raise UserError(
            f"{missing[0]!r} is not multiplied by a module of its own, so it cannot be taken apart: load the model "
            "with lm.library=transformers (mixtures of experts cannot be decomposed)."
        )


@contextlib.contextmanager
def masked(root: nn.Module, matrices: Sequence[Matrix], decomposition: Decomposition, masks: Masks) -> Iterator[None]:
    """Context in which matrices act as their masked components; those without masks as they are."""
    handles = []
    some = [matrix for matrix in matrices if matrix.name in masks.components]
    try:
        for module, matrix in owners(root, some):
            own = (decomposition.pieces(matrix.name), masks.components[matrix.name], masks.rest[matrix.name])
            handles.append(module.register_forward_hook(_replacing(*own)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replacing(pieces: Pieces, mask: Tensor, rest: Tensor) -> Any:
    def replaced(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        product = output.float() if bias is None else output.float() - bias.float()
        change = (rest - 1) * product + ((mask - rest) * pieces.inner(given[0])) @ pieces.U
        return output + change.to(output)

    return replaced
