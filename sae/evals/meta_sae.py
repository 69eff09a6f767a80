"""Meta-SAEs (Leask et al. 2502.04878): are latents atoms, or made of fewer directions?

    found = meta_sae(sae, train)            # train(rows, d_sae, k) -> SAE
    found.fve, found.fve_random

A small SAE is trained on the decoder rows of another, each at length 1, and asked how much of them it explains:

    fve = 1 - sum ||row - recons(row)||^2 / sum ||row - mean row||^2.

Lower is more atomic: only rows that share directions can be rebuilt from k of a quarter as many meta-latents.

Sources: SAEBench's meta-structure evaluation, after Bussmann et al. (2503.17547): BatchTopK, k = 4, a quarter of the
width, 1500 steps of 1024 rows, learning rate 5e-4. How it is trained is the caller's: the layer below knows no trainer.
The measure is on the rows that it was trained on, as there, since these are all there are.

Traps. A quarter of the width can be many times d_in, so that even random rows are rebuilt in part, and the more of them
the fewer dimensions they fill: `random` is the same procedure on as many random rows with the same second moment
(`rows_like`), and only what is above it says that latents are made of others. Rows that are random on the sphere would
not do: trained decoders are well above those for their covariance alone. Latents that never fired keep random rows,
which look atomic: leave them out through `keep`. Compare SAEs of equal width only.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.evals.geometry import decoder_rows, null_generator, rows_like, unit
from sae.evals.reconstruction import ReconstructionMeter, ReconstructionResult

Train = Callable[[Tensor, int, int], SAE]
"""Trains on rows [n d_in] an SAE of so many latents, of which so many are active a row."""


class MetaSAEResult(NamedTuple):
    """How well decoder rows are rebuilt from few directions."""

    fve: float
    """Fraction of the variance of the rows that the meta-SAE explains."""
    l0: float
    """Mean active meta-latents a row: check that it is about k."""
    dead_fraction: float
    """Of meta-latents that no row uses."""
    d_sae: int
    """Width of the meta-SAE."""
    k: int
    n_rows: int
    random: "MetaSAEResult | None" = None
    """The same of random rows with the same second moment, by a meta-SAE of their own; None where left out."""

    @property
    def fve_random(self) -> float:
        """Fraction of the variance of the random rows that theirs explains; NaN where left out."""
        return float("nan") if self.random is None else self.random.fve


def meta_sae(
    sae: SAE,
    train: Train,
    *,
    width_ratio: float = 0.25,
    k: int = 4,
    keep: Tensor | None = None,
    random: bool = True,
    seed: int = 0,
) -> MetaSAEResult:
    """Train a meta-SAE, and one on random rows, and measure both.

    Args:
        sae: whose decoder rows are decomposed.
        train: makes a meta-SAE; called once, or twice with random rows.
        width_ratio: latents of the meta-SAE for each row.
        k: its active latents a row.
        keep: [d_sae] booleans, or numbers of the latents that count; by default all.
        random: whether to train on random rows, too.
        seed: of the random rows, `rows_like` of those that count.

    Raises:
        UserError: a width or k that cannot be, fewer than two rows, or a trained SAE of another shape.
    """
    rows = unit(decoder_rows(sae))
    rows = rows if keep is None else rows[keep.to(rows.device)]
    n = len(rows)
    d_sae = round(width_ratio * n)
    if n < 2 or not 1 <= k <= d_sae:
        raise UserError(
            f"a meta-SAE of {d_sae} latents with k = {k} for {n} decoder rows cannot be: "
            "give more rows, a larger width_ratio or a smaller k."
        )

    def result(rows: Tensor) -> MetaSAEResult:
        found = explained(rows, train(rows, d_sae, k))
        return MetaSAEResult(found.fve, found.l0, found.dead_fraction, d_sae, k, n)

    found = result(rows)
    return found._replace(random=result(rows_like(rows, null_generator(seed)))) if random else found


def explained(rows: Float[Tensor, "n d_in"], meta: SAE, batch_size: int = 4096) -> ReconstructionResult:
    """Measure a meta-SAE on rows.

    Args:
        rows: decoder rows, at the length it was trained on.
        meta: the meta-SAE.
        batch_size: rows at once.
    """
    meter = ReconstructionMeter(meta)
    for part in rows.split(batch_size):
        meter.update(part)
    return meter.result()
