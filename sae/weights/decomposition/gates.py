"""How important a component is at a token, from the inner activations V_c . x: small networks and two hard sigmoids.

The network's value z is cut to [0, 1] in two ways, both leaky so that no component is lost for good (2506.20790, A.2):
for masks, `lower` lets a gradient through below 0 where it would raise z; for the sparsity penalty, `upper` rises a
little beyond 1, so that a component that is far above is still pushed down.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

LEAK = 0.01
HALF = 0.5  # where gates start: between what is kept and what is not


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (z,), (gradient,) = ctx.saved_tensors, gradients
        inside = gradient * ((z > 0) & (z < 1))
        # A step goes against the gradient: a negative one raises z.
        return torch.where((z <= 0) & (gradient < 0), LEAK * gradient, inside)


def lower(z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return z cut to [0, 1]; below 0, a hundredth of the gradient passes where it raises z."""
    found: Tensor = _Lower.apply(z)
    return found


def upper(z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return z cut at 0, and with a hundredth of its slope above 1."""
    return torch.where(z > 1, 1 + LEAK * (z - 1), z.clamp(min=0))


class SharedGate(nn.Module):
    """One network of one hidden layer for all components of a matrix, each of which may depend on all."""

    def __init__(self, n_components: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(hidden, n_components, generator=generator) / math.sqrt(n_components))
        self.first_bias = nn.Parameter(torch.zeros(hidden))
        self.second = nn.Parameter(torch.randn(n_components, hidden, generator=generator) / math.sqrt(hidden))
        self.second_bias = nn.Parameter(torch.full((n_components,), HALF))

    def forward(self, inner: Float[Tensor, "*token component"]) -> Float[Tensor, "*token component"]:
        """Return z before the sigmoids."""
        hidden = functional.gelu(functional.linear(inner, self.first, self.first_bias))
        return functional.linear(hidden, self.second, self.second_bias)


class EachGate(nn.Module):
    """A network of one hidden layer for each component, which sees its own inner activation and no other."""

    def __init__(self, n_components: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(n_components, hidden, generator=generator))
        self.first_bias = nn.Parameter(torch.zeros(n_components, hidden))
        self.second = nn.Parameter(torch.randn(n_components, hidden, generator=generator) / math.sqrt(hidden))
        self.second_bias = nn.Parameter(torch.full((n_components,), HALF))

    def forward(self, inner: Float[Tensor, "*token component"]) -> Float[Tensor, "*token component"]:
        """Return z before the sigmoids."""
        hidden = functional.gelu(inner[..., None] * self.first + self.first_bias)
        return (hidden * self.second).sum(dim=-1) + self.second_bias


def make_gate(kind: str, n_components: int, hidden: int, generator: torch.Generator) -> nn.Module:
    """Return a gate under which every component starts out about half important."""
    return (SharedGate if kind == "shared" else EachGate)(n_components, hidden, generator)
