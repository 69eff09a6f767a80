"""Editing weights in place, for as long as a block runs; afterwards every value is back, bit for bit (`restore.py`).

A *mask* says which single weights are meant: matrix name -> booleans of its shape. Matrices without a mark may be left
out.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sae.errors import UserError, unknown
from sae.lm.matrices import Matrix, Part
from sae.weights.restore import Keep, Marked, put_back

Mask = dict[str, Tensor]
Weights = Mapping[str, Tensor]
MODES = ("zero", "mean", "restore")


@contextlib.contextmanager
def rewritten(matrices: Sequence[Matrix], values: Weights, keep: Keep = dict) -> Iterator[None]:
    """Context in which some matrices hold other values.

    Args:
        matrices: the model's.
        values: new values by matrix name, of the matrix's shape.
        keep: where the old values are kept.
    """
    parameters = {matrix.name: matrix.parameter for matrix in matrices}
    own = {name: parameters[name] for name in values}
    with put_back(own, keep=keep):
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(values[name])
        yield


@contextlib.contextmanager
def replaced(
    matrices: Sequence[Matrix], mask: Mask, mode: str = "zero", reference: Weights | None = None
) -> Iterator[None]:
    """Context in which the marked weights are replaced.

    Args:
        matrices: the model's.
        mask: what to replace.
        mode: by what: "zero"; "mean", their matrix's mean; "restore", their value in `reference`.
        reference: another model's matrices, by name.

    Raises:
        UserError: an unknown mode, or nothing to restore from.
    """
    if mode not in MODES:
        raise unknown("surgery", mode, list(MODES))
    if mode == "restore" and reference is None:
        raise UserError("mode 'restore' needs a reference model: name one with localize.reference=... .")
    own = {matrix.name: matrix.parameter for matrix in matrices if matrix.name in mask}
    with put_back(own, [Marked(name, mask[name]) for name in own]):
        with torch.no_grad():
            for name, parameter in own.items():
                marks = mask[name].to(parameter.device)
                if mode == "restore":
                    assert reference is not None
                    parameter.copy_(torch.where(marks, reference[name].to(parameter), parameter))
                else:
                    parameter.masked_fill_(marks, 0.0 if mode == "zero" else parameter.float().mean().to(parameter))
        yield


@contextlib.contextmanager
def only(matrices: Sequence[Matrix], mask: Mask, reference: Weights | None = None) -> Iterator[None]:
    """Context in which all other weights are a reference's (the marked ones are transplanted into it), or zero."""
    others = {
        matrix.name: ~mask[matrix.name] if matrix.name in mask else torch.ones_like(matrix.parameter, dtype=torch.bool)
        for matrix in matrices
    }
    with replaced(matrices, others, "zero" if reference is None else "restore", reference):
        yield


def mask_of(parts: Sequence[Part], matrices: Sequence[Matrix]) -> Mask:
    """Return the mask of all weights of some parts."""
    own = {matrix.name: matrix.parameter for matrix in matrices}
    found: Mask = {}
    for part in parts:
        for one in part.slices:
            if one.name not in found:
                found[one.name] = torch.zeros_like(own[one.name], dtype=torch.bool)
            one.of(found[one.name]).fill_(True)
    return found


def share_of(mask: Mask, matrices: Sequence[Matrix]) -> float:
    """Return the marked share of all the matrices' weights."""
    return sum(int(marks.sum()) for marks in mask.values()) / sum(matrix.parameter.numel() for matrix in matrices)
