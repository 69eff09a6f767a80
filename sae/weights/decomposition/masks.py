"""Masks of components: 1 keeps one, 0 takes it out, at a token. What no component covers has a mask of its own."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Masks(NamedTuple):
    """Masks of some matrices, by name; matrices without any are left as they are."""

    components: dict[str, Float[Tensor, "*token component"]]
    rest: dict[str, Float[Tensor, "*token 1"]]  #: of W - sum of the components


def whole(importance: Mapping[str, Tensor]) -> Masks:
    """Return the masks under which everything is kept: the model as it is."""
    return Masks(
        {name: torch.ones_like(one) for name, one in importance.items()},
        {name: torch.ones_like(one[..., :1]) for name, one in importance.items()},
    )


def stochastic(importance: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Return masks drawn evenly from [importance, 1], independently; the rest's from [0, 1]."""

    def drawn(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, device=like.device)

    return Masks(
        {name: one + (1 - one) * drawn(one) for name, one in importance.items()},
        {name: drawn(one[..., :1]) for name, one in importance.items()},
    )


def gated(importance: Mapping[str, Tensor]) -> Masks:
    """Return the importances themselves as masks, with nothing of the rest."""
    return Masks(dict(importance), {name: torch.zeros_like(one[..., :1]) for name, one in importance.items()})


def shuffled(importance: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Return `gated` with each token's values dealt out to other components of the matrix: as many, but not which."""
    found = {}
    for name, one in importance.items():
        order = torch.rand(one.shape, generator=generator, device=one.device).argsort(dim=-1)
        found[name] = one.gather(-1, order)
    return gated(found)


def between(importance: Mapping[str, Tensor], where: Masks) -> Masks:
    """Return the masks at some point of the box from the importances (0) to all kept (1)."""
    return Masks({name: one + (1 - one) * where.components[name] for name, one in importance.items()}, dict(where.rest))
