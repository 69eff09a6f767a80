"""How well an SAE reconstructs activations, and how sparsely: streaming sums in float64.

    meter = ReconstructionMeter(sae)
    for acts in stream:
        meter.update(acts)
    print(meter.result().fvu)

Of a transcoder or crosscoder, `target` is what it is to reconstruct; below, x stands for that then.

FVU is about the global mean of the data, so its value does not depend on how the data were cut into batches, and an
SAE that has only learned the mean scores 1, however large the mean.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.autoencoder.crosscoder import Crosscoder
from sae.autoencoder.sae import SAE
from sae.errors import UserError

HISTOGRAM_EDGES = [-8 + 0.25 * i for i in range(33)]


class DensityHistogram(NamedTuple):
    """Latents by log10 of their density."""

    log10_edges: list[float]
    """Bin edges, from -8 to 0; what lies below the first is counted in the first bin."""
    counts: list[int]
    """Latents per bin. Latents that never fired have no logarithm and are not counted."""


class ReconstructionResult(NamedTuple):
    """Reconstruction quality over all tokens seen. Ratios whose denominator is 0 are NaN."""

    l0: float
    """Mean number of non-zero latents per token."""
    fvu: float
    """sum ||x - recons||^2 / sum ||x - mean(x)||^2."""
    fve: float
    """1 - fvu."""
    mse: float
    """Mean over tokens of ||x - recons||^2."""
    cosine: float
    """Mean over tokens of cos(x, recons); 0 for a token where either is zero."""
    relative_bias: float
    """E||recons||^2 / E[x . recons]; 1 means no shrinkage (2404.16014, gamma)."""
    dead_fraction: float
    """Fraction of latents that fired on none of these tokens."""
    density: Float[Tensor, " d_sae"]
    """Fraction of tokens each latent fires on; float64, on the CPU."""
    density_histogram: DensityHistogram
    n_tokens: int
    source_fvu: tuple[float, ...] = ()
    """FVU at each hook point of a crosscoder, in the site's order; empty for all others."""


class ReconstructionMeter:
    """Feeds activations through an SAE and accumulates sums; state is O(d_in + d_sae)."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.n_tokens = 0
        device = sae.device
        self._mean = torch.zeros(sae.config.width_out, dtype=torch.float64, device=device)
        self._variation = torch.zeros_like(self._mean)
        self._error = torch.zeros_like(self._mean)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._fired: Int[Tensor, " d_sae"] = torch.zeros(sae.config.d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, x: Float[Tensor, "... d_in"], target: Float[Tensor, "... d_out"] | None = None) -> None:
        """Add activations; any leading shape. The target is x where none is given.

        Raises:
            UserError: the activations have another width than the SAE.
        """
        self.sae.check_input(x.shape[-1])
        x = x.reshape(-1, x.shape[-1]).to(self.sae.device)
        if len(x) == 0:
            return
        target = x if target is None else target.reshape(-1, target.shape[-1]).to(self.sae.device)
        recons, latent_acts = self.sae(x)
        self._fired += (latent_acts != 0).sum(0)
        x, recons = target.double(), recons.double()
        self._merge(x)
        square, dot = recons.square().sum(-1), (x * recons).sum(-1)
        norms = x.norm(dim=-1) * square.sqrt()
        cosine = torch.where(norms > 0, dot / norms, torch.zeros_like(dot))
        self._error += (x - recons).square().sum(0)
        self._sums += torch.stack([square.sum(), dot.sum(), cosine.sum()])

    def _merge(self, x: Tensor) -> None:
        # Chan et al.: combining means and squared deviations keeps all digits where E||x||^2 - ||E x||^2 would
        # lose them to a large mean.
        n, mean = len(x), x.mean(0)
        total = self.n_tokens + n
        apart = mean - self._mean
        self._variation += (x - mean).square().sum(0) + apart.square() * self.n_tokens * n / total
        self._mean += apart * n / total
        self.n_tokens = total

    def result(self) -> ReconstructionResult:
        """Metrics over everything seen so far.

        Raises:
            UserError: nothing has been seen.
        """
        if self.n_tokens == 0:
            raise UserError("there are no tokens to evaluate the SAE on: give it at least one.")
        n = self.n_tokens
        square, dot, cosine = self._sums.tolist()
        fvu = _fvu(self._error, self._variation)
        fired = self._fired.cpu()
        density = fired.double() / n
        return ReconstructionResult(
            l0=int(fired.sum()) / n,
            fvu=fvu,
            fve=1 - fvu,
            mse=float(self._error.sum()) / n,
            cosine=cosine / n,
            relative_bias=square / dot if dot != 0 else math.nan,
            dead_fraction=float((fired == 0).double().mean()),
            density=density,
            density_histogram=_histogram(density),
            n_tokens=n,
            source_fvu=self._source_fvu(),
        )

    def _source_fvu(self) -> tuple[float, ...]:
        if not isinstance(self.sae, Crosscoder):
            return ()
        return tuple(map(_fvu, self.sae.split(self._error), self.sae.split(self._variation)))


def _fvu(error: Float[Tensor, " d"], variation: Float[Tensor, " d"]) -> float:
    """From the sums of each column."""
    total = float(variation.sum())
    return float(error.sum()) / total if total > 0 else math.nan


def _histogram(density: Tensor) -> DensityHistogram:
    logs = density[density > 0].log10().clamp(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts, _ = torch.histogram(logs, torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64))
    return DensityHistogram(list(HISTOGRAM_EDGES), [int(count) for count in counts])
