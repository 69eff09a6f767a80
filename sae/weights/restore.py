"""Weights that may be changed for the length of a block: afterwards all is as before, bit for bit, whatever happened.

    with put_back(parameters):                              # {name: tensor}, whole
        ...
    with put_back(parameters, [Marked(name, mask)]):        # or only some of their values
        ...

Copies of all that is named are made before anything can be changed, so parameters that share memory come back, too.
They are written in place, the last one first: what else refers to the tensors sees the old values again. If one cannot
be written, the others are all the same. Blocks may stand in one another.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

Keep = Callable[[Iterable[tuple[int, Tensor]]], Mapping[int, Tensor]]
"""What keeps numbered copies: `dict` in memory, `sae.weights.stored.Stored` on disk."""


class Place(Protocol):
    """Some values of a parameter."""

    @property
    def name(self) -> str:
        """The parameter's."""

    def of(self, tensor: Tensor) -> Tensor:
        """Copy of the values there."""

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write values as `of` gives them, in place."""


class Whole(NamedTuple):
    """All values of a parameter."""

    name: str

    def of(self, tensor: Tensor) -> Tensor:
        """Copy of the parameter."""
        return tensor.clone()

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write all of it."""
        tensor.copy_(values)


class Marked(NamedTuple):
    """The marked values of a parameter: few of them take little memory."""

    name: str
    marks: Bool[Tensor, "..."]

    def of(self, tensor: Tensor) -> Tensor:
        """Copy of those values, one after the other."""
        return tensor[self.marks.to(tensor.device)]

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write them."""
        tensor[self.marks.to(tensor.device)] = values


@contextlib.contextmanager
def put_back(
    parameters: Mapping[str, Tensor], where: Sequence[Place] | None = None, keep: Keep = dict
) -> Iterator[Mapping[int, Tensor]]:
    """Context in which values may be changed in place; afterwards they are as before, and so are gradients and flags.

    Args:
        parameters: leaves by name. Inside, those concerned have no gradient to begin with.
        where: which of their values; None for all.
        keep: where the copies are kept.

    Yields:
        The copies, by place in `where` (or in `parameters`).
    """
    places: Sequence[Place] = [Whole(name) for name in parameters] if where is None else where
    kept = keep((number, place.of(parameters[place.name].detach())) for number, place in enumerate(places))
    with contextlib.ExitStack() as stack:  # which runs every callback, the last first, even if one fails
        for parameter in {id(one): one for one in (parameters[place.name] for place in places)}.values():
            stack.callback(_set, parameter, parameter.requires_grad, parameter.grad)
            parameter.grad = None
        for number, place in enumerate(places):
            stack.callback(_write, place, parameters[place.name], kept, number)
        yield kept


def _set(parameter: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    parameter.requires_grad_(requires_grad)
    parameter.grad = gradient


@torch.no_grad()
def _write(place: Place, parameter: Tensor, kept: Mapping[int, Tensor], number: int) -> None:
    place.put(parameter, kept[number])
