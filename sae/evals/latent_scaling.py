"""Which latents of a crosscoder of two models are one model's own: by decoder norms, and by latent scaling.

    meter = LatentScalingMeter(crosscoder)
    for acts in stream:
        meter.update(acts)
    found = meter.result()
    print(summarise(found))

A latent whose decoder row is (nearly) zero in one model seems to be the other's alone. Minder et al. (2504.02922) show
that a training with an L1 penalty makes such latents up, in two ways, and measure both. Let d_j be latent j's decoder
row in the model where it is longer, its home, and

    beta_j = argmin_b sum_t || b f_j(x_t) d_j - y_t ||^2  =  sum_t f_j(x_t) d_j . y_t  /  ( ||d_j||^2 sum_t f_j(x_t)^2 )

with y, in either model, of two kinds:

    error           what all the other latents leave unexplained: x - recons + f_j d_j (with the model's own d_j)
    reconstruction  what the latents say: recons - b_dec

The ratios nu = beta in the other model / beta at home are 0 for a latent that is its home's alone:

    nu_error near 1           complete shrinkage: the other model has the concept too, but the crosscoder dropped it
    nu_reconstruction near 1  latent decoupling: other latents write the concept in the other model

Units are the trained ones, E||x||^2 = d in each model, so that a model with longer activations does not seem to own
everything. The authors' code leaves b_dec in the reconstruction; it is there whether the latent fires or not, so it is
left out here.

Traps. d_j is looked for in the other model's activations as it is, which only means something where the models have
the same basis: a model and one that was fine-tuned from it. A beta of few tokens is noise; see `min_firings`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.autoencoder.crosscoder import Crosscoder
from sae.errors import UserError

BLOCK = 1 << 24
"""Latent activations held at once: 64 MiB a matrix."""


class Thresholds(NamedTuple):
    """Where a latent counts as what: limits of judgement, stated beside every result."""

    exclusive: float = 0.1
    """A relative norm below this, or above 1 - this, makes a latent one model's by its norms."""
    shared: float = 0.1
    """A relative norm within this of 0.5 makes it shared."""
    nu_error: float = 0.2
    """From here on the other model's error holds the latent's direction."""
    nu_reconstruction: float = 0.5
    """From here on the other model's reconstruction does."""
    min_firings: int = 20
    """Tokens a latent must fire on to be judged."""


class LatentScaling(NamedTuple):
    """Of every latent; on the CPU, sums taken in float64. The last axis is the model: first, second."""

    decoder_norms: Float[Tensor, "d_sae 2"]
    """Norm of the decoder row in each model, in normalised units."""
    relative_norm: Float[Tensor, " d_sae"]
    """((n2 - n1) / max(n1, n2) + 1) / 2: 0 is the first model's alone, 1 the second's; NaN for a row of zeros."""
    beta_error: Float[Tensor, "d_sae 2"]
    beta_reconstruction: Float[Tensor, "d_sae 2"]
    nu_error: Float[Tensor, " d_sae"]
    """NaN where the latent never fired, or its own model's beta is not above 0."""
    nu_reconstruction: Float[Tensor, " d_sae"]
    n_fired: Int[Tensor, " d_sae"]
    """Tokens on which each latent fires."""
    n_tokens: int


class Exclusive(NamedTuple):
    """Latents that are one model's by their norms."""

    by_norm: int
    confirmed: int
    """Of these, neither shrunk nor decoupled."""
    shrunk: int
    """Complete shrinkage: nu_error is at its limit or above, or cannot be said."""
    decoupled: int
    """Latent decoupling, likewise by nu_reconstruction. A latent may be both."""


class Summary(NamedTuple):
    """Counts; shared, between, rare and the two `by_norm` add up to all latents."""

    shared: int
    first_only: Exclusive
    second_only: Exclusive
    between: int
    """Neither shared nor exclusive by their norms."""
    rare: int
    """Fired on fewer than `min_firings` tokens, so not judged."""


class LatentScalingMeter:
    """Feeds activations through a crosscoder and accumulates sums; state is O(d_sae), beside a copy of the decoder.

    Args:
        sae: the crosscoder.
        sides: which of its sources (by number, in the site's order) are the first model's and which the second's. With
            several a model, the concatenated row counts.

    Raises:
        UserError: the two sides are not equally wide.
    """

    def __init__(self, sae: Crosscoder, sides: tuple[Sequence[int], Sequence[int]] = ((0,), (1,))) -> None:
        self.sae = sae
        self._sides = sides
        self._scale = sae.column_scales()
        self._decoder = self._parts(sae.W_dec.detach() * self._scale)
        widths = [part.shape[1] for part in self._decoder]
        if widths[0] != widths[1]:
            raise UserError(
                f"latent scaling looks for one model's directions in the other, but in {sae.config.hook_name!r} one "
                f"side is {widths[0]} wide and the other {widths[1]}: cross hook points of equal width."
            )
        self._norms = torch.stack([part.double().norm(dim=1) for part in self._decoder], dim=1)
        self._home = self._norms.argmax(dim=1)
        self._direction = torch.where((self._home == 0)[:, None], *self._decoder)
        d_sae, device = sae.config.d_sae, sae.device
        self._error = torch.zeros(d_sae, 2, dtype=torch.float64, device=device)
        self._recons = torch.zeros_like(self._error)
        self._energy = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self._fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.n_tokens = 0

    def _parts(self, x: Float[Tensor, "... d_in"]) -> tuple[Tensor, Tensor]:
        """Each model's own columns."""
        sources = self.sae.split(x)
        first, second = (torch.cat([sources[index] for index in side], dim=-1) for side in self._sides)
        return first, second

    @torch.no_grad()
    def update(self, x: Float[Tensor, "... d_in"]) -> None:
        """Add activations of both models, concatenated in the site's order; any leading shape.

        Raises:
            UserError: the activations have another width than the crosscoder.
        """
        self.sae.check_input(x.shape[-1])
        for rows in x.reshape(-1, x.shape[-1]).split(max(1, BLOCK // self.sae.config.d_sae)):
            self._add(rows.to(self.sae.device, self.sae.dtype))

    def _add(self, x: Float[Tensor, "n d_in"]) -> None:
        recons, latent_acts = self.sae(x)
        errors = self._parts((x - recons) * self._scale)
        said = self._parts((recons - self.sae.b_dec) * self._scale)
        for model in range(2):
            for total, y in ((self._error, errors[model]), (self._recons, said[model])):
                total[:, model] += (latent_acts * (y @ self._direction.t())).sum(0, dtype=torch.float64)
        self._energy += latent_acts.square().sum(0, dtype=torch.float64)
        self._fired += (latent_acts != 0).sum(0)
        self.n_tokens += len(x)

    def result(self) -> LatentScaling:
        """Everything seen so far.

        Raises:
            UserError: nothing has been seen.
        """
        if self.n_tokens == 0:
            raise UserError("there are no tokens to measure the crosscoder on: give it at least one.")
        direction = self._direction.double()
        square = direction.square().sum(1)
        own = torch.stack([(part.double() * direction).sum(1) for part in self._decoder], dim=1)
        size = (square * self._energy)[:, None]  # 0 for what never fired, which leaves 0 / 0
        beta_error = self._error / size + own / square[:, None]
        beta_recons = self._recons / size
        largest = self._norms.amax(1)
        relative = ((self._norms[:, 1] - self._norms[:, 0]) / largest + 1) / 2
        return LatentScaling(
            decoder_norms=self._norms.cpu(),
            relative_norm=relative.cpu(),
            beta_error=beta_error.cpu(),
            beta_reconstruction=beta_recons.cpu(),
            nu_error=self._ratio(beta_error).cpu(),
            nu_reconstruction=self._ratio(beta_recons).cpu(),
            n_fired=self._fired.cpu(),
            n_tokens=self.n_tokens,
        )

    def _ratio(self, beta: Float[Tensor, "d_sae 2"]) -> Float[Tensor, " d_sae"]:
        """The other model's over the home's."""
        home = beta.gather(1, self._home[:, None]).squeeze(1)
        other = beta.gather(1, 1 - self._home[:, None]).squeeze(1)
        return torch.where(home > 0, other / home, torch.nan)


class Verdicts(NamedTuple):
    """Masks over latents. `first`, `second`, `shared`, `between` and `rare` exclude each other and cover all."""

    first: Bool[Tensor, " d_sae"]
    """The first model's by its norms."""
    second: Bool[Tensor, " d_sae"]
    shared: Bool[Tensor, " d_sae"]
    between: Bool[Tensor, " d_sae"]
    rare: Bool[Tensor, " d_sae"]
    shrunk: Bool[Tensor, " d_sae"]
    """nu_error is at its limit or above, or cannot be said; means something for exclusive latents only."""
    decoupled: Bool[Tensor, " d_sae"]
    """Likewise by nu_reconstruction."""

    def confirmed(self, exclusive: Bool[Tensor, " d_sae"]) -> Bool[Tensor, " d_sae"]:
        """Those that latent scaling leaves, of `first` or of `second`."""
        return exclusive & ~self.shrunk & ~self.decoupled


def judge(found: LatentScaling, thresholds: Thresholds = Thresholds()) -> Verdicts:  # noqa: B008 - immutable
    """Say of every latent what it is."""
    often = (found.n_fired >= thresholds.min_firings) & ~found.relative_norm.isnan()
    first = often & (found.relative_norm < thresholds.exclusive)
    second = often & (found.relative_norm > 1 - thresholds.exclusive)
    shared = often & ((found.relative_norm - 0.5).abs() <= thresholds.shared)
    return Verdicts(
        first=first,
        second=second,
        shared=shared,
        between=often & ~first & ~second & ~shared,
        rare=~often,
        # A NaN is below no limit.
        shrunk=~(found.nu_error < thresholds.nu_error),
        decoupled=~(found.nu_reconstruction < thresholds.nu_reconstruction),
    )


def summarise(found: LatentScaling, thresholds: Thresholds = Thresholds()) -> Summary:  # noqa: B008 - immutable
    """Count the latents of each kind."""
    verdicts = judge(found, thresholds)

    def exclusive(mask: Tensor) -> Exclusive:
        return Exclusive(
            by_norm=int(mask.sum()),
            confirmed=int(verdicts.confirmed(mask).sum()),
            shrunk=int((mask & verdicts.shrunk).sum()),
            decoupled=int((mask & verdicts.decoupled).sum()),
        )

    return Summary(
        shared=int(verdicts.shared.sum()),
        first_only=exclusive(verdicts.first),
        second_only=exclusive(verdicts.second),
        between=int(verdicts.between.sum()),
        rare=int(verdicts.rare.sum()),
    )
