"""Synthetic activation streams with known features, for the tests of training."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

HOOK = "blocks.0.hook_resid_post"


@dataclass
class Batch:
    """One batch of a toy stream."""

    acts: dict[str, Tensor]


class ToyStream:
    """Sparse non-negative combinations of known directions plus a mean; batch n is a function of (seed, n) alone."""

    def __init__(
        self,
        directions: dict[str, Tensor],
        batch_tokens: int,
        *,
        p: float | Tensor = 0.25,
        spread: float = 0.05,
        mean: float = 0.0,
        scale: float = 1.0,
        at_most: int | None = None,
        seed: int = 0,
    ) -> None:
        self.directions = directions
        self.batch_tokens = batch_tokens
        self.p, self.spread, self.mean, self.scale, self.seed = p, spread, mean, scale, seed
        self.at_most = at_most
        self.n = 0

    @property
    def d_in(self) -> dict[str, int]:
        return {name: rows.shape[1] for name, rows in self.directions.items()}

    def next_batch(self) -> Batch:
        self.n += 1
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.n)
        acts = {}
        for name, rows in self.directions.items():
            shape = (self.batch_tokens, len(rows))
            draws = torch.rand(shape, generator=generator)
            fires = draws < self.p
            if self.at_most is not None:
                fires &= draws.argsort(1).argsort(1) < self.at_most
            amounts = 1 + self.spread * torch.randn(shape, generator=generator)
            acts[name] = self.scale * ((fires * amounts.clamp(min=0)) @ rows + self.mean)
        return Batch(acts)

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def orthogonal(n: int, d: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """n orthonormal rows."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator))
    return q[:n].contiguous()


def unit_rows(n: int, d: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """n random unit rows."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def mcc(found: Float[Tensor, "m d"], truth: Float[Tensor, "n d"]) -> float:
    """Mean |cosine| of the best one-to-one match."""
    cos = (found / found.norm(dim=1, keepdim=True)) @ truth.T
    rows, cols = linear_sum_assignment(-cos.abs().numpy())
    return float(cos.abs()[rows, cols].mean())
