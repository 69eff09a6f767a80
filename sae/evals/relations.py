"""SAEs of one hook point related to each other: across seeds, and across sizes.

    match(a, b).shared                      # share of latents of a that b has, too
    seed_stability([a, b, c]).stability     # for every latent, how well the other seeds agree
    stitching(small, large, acts).novel     # what the wider SAE knows that the narrower does not
    families([s, m, l]).tree(0, 17)         # what latent 17 of the narrowest splits into

The similarity of two latents is the cosine of their decoder rows, of their encoder columns, or the mean of both
("both", the default between seeds, after Paulo & Belrose 2501.16615). Signs count: opposite directions are different.

Traps. In few dimensions random directions are alike, too: `Null` is the same procedure on random rows. Rows on the
sphere are a weak null where activations, and so all decoder rows, keep to few dimensions: with null="data" they have
the second moment that the rows have. Latents that never fired keep their initial rows, and two SAEs that
began with the same ones, as other libraries' may, agree on these exactly. A nearest latent may be shared by many; a
match is one to one.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae import stats
from sae.autoencoder.sae import SAE, unit_rows
from sae.errors import UserError, unknown
from sae.evals.geometry import (
    Nearest,
    assign,
    decoder_rows,
    encoder_rows,
    nearest,
    null_generator,
    paired,
    rows_like,
    unit,
)

By = Literal["decoder", "encoder", "both"]
NullRows = Literal["sphere", "data"]

HUNGARIAN_UP_TO = 8192
"""Latents up to which matches are optimal by default: 0.5 GiB and seconds; time grows with the cube."""


class Null(NamedTuple):
    """Similarities that random unit rows of the same shapes reach; see `null_similarity`."""

    best_mean: float
    """Mean over rows of the best similarity with the other set."""
    best_high: float
    """Its 99th percentile."""
    matched_mean: float
    """Mean over pairs of a one-to-one match; NaN where none was made."""
    matched_high: float


class Match(NamedTuple):
    """Latents of SAE a, and what they are in SAE b; tensors are on the CPU."""

    partner: Int[Tensor, " d_sae_a"]
    """The latent of b that is its one-to-one match; -1 where b has too few."""
    similarity: Float[Tensor, " d_sae_a"]
    """With the partner; NaN where there is none."""
    best: Nearest
    """For every latent of a the most similar of b, which others may share: its stability."""
    best_back: Nearest
    """For every latent of b the most similar of a."""
    mean: float
    """Mean similarity of the pairs."""
    shared: float
    """Share of latents of a whose partner is at least `threshold` similar."""
    threshold: float
    method: str
    """hungarian: the largest sum of similarities. greedy: the most similar pair first, then of what is left."""
    by: str
    null: Null


class SeedStability(NamedTuple):
    """How well latents recur in SAEs that differ in their seed."""

    stability: list[Float[Tensor, " d_sae"]]
    """For each SAE, latent by latent, the best similarity in another SAE, averaged over the others."""
    mean: list[float]
    """For each SAE, over its latents."""
    null: Null
    """Of the first two SAEs' shapes."""
    by: str


class Group(NamedTuple):
    """Latents of the wider SAE that are added to the narrower."""

    n: int
    fvu: float
    """Of the narrower SAE with all of them added."""
    change: float
    """fvu - fvu_small: below 0 where they bring what was missing."""
    improving: float
    """Share of them that lower the FVU when added alone; NaN for an empty group."""


class Stitching(NamedTuple):
    """Latents of a wider SAE, as additions to a narrower one (2502.04878)."""

    cosine: Float[Tensor, " d_sae"]
    """Largest decoder cosine with a latent of the narrower SAE."""
    is_novel: Bool[Tensor, " d_sae"]
    """Cosine below the threshold, and it fired."""
    fired: Bool[Tensor, " d_sae"]
    """Latents that never fired belong to neither group: their rows say nothing."""
    change: Float[Tensor, " d_sae"]
    """Change of the narrower SAE's FVU when this latent alone is added; float64."""
    novel: Group
    reconstruction: Group
    """Those at or above the threshold, which tell the narrower SAE what it knows."""
    fvu_small: float
    fvu_large: float
    auroc: float
    """How well a low cosine tells latents that improve from those that do not; NaN where all are alike."""
    threshold: float
    n_tokens: int


class Level(NamedTuple):
    """One size of a family."""

    d_sae: int
    parent: Int[Tensor, " d_sae"]
    """Latent of the next narrower SAE with the largest cosine; -1 below the floor, and at the narrowest."""
    cosine: Float[Tensor, " d_sae"]
    """With that latent, below the floor, too; NaN at the narrowest."""


class Tree(NamedTuple):
    """A latent and what it splits into."""

    level: int
    latent: int
    cosine: float
    """With its parent."""
    children: "list[Tree]"


class Families(NamedTuple):
    """Parents and children across sizes, narrowest first."""

    levels: list[Level]
    floor: float

    def children(self, level: int, latent: int) -> list[int]:
        """Latents of the next wider SAE whose parent this is."""
        if level + 1 == len(self.levels):
            return []
        return (self.levels[level + 1].parent == latent).nonzero()[:, 0].tolist()

    def roots(self, level: int) -> list[int]:
        """Latents of a level without a parent."""
        return (self.levels[level].parent < 0).nonzero()[:, 0].tolist()

    def tree(self, level: int, latent: int) -> Tree:
        """All that descends from a latent."""
        below = [self.tree(level + 1, child) for child in self.children(level, latent)]
        return Tree(level, latent, float(self.levels[level].cosine[latent]), below)


def match(
    a: SAE,
    b: SAE,
    *,
    by: By = "both",
    method: Literal["auto", "hungarian", "greedy"] = "auto",
    threshold: float = 0.7,
    null: NullRows = "sphere",
    seed: int = 0,
) -> Match:
    """Match the latents of two SAEs one to one.

    Args:
        a: whose latents are described.
        b: where they are looked for; of any width.
        by: which directions are compared.
        method: "auto" is Hungarian up to `HUNGARIAN_UP_TO` latents, and greedy beyond, whose memory is that of blocks.
        threshold: similarity from which a latent counts as shared (ours).
        null: see `null_similarity`.
        seed: of the null.

    Raises:
        UserError: SAEs of other hook points or widths of input, or an unknown choice.
    """
    _check_related([a, b])
    if method == "auto":
        method = "hungarian" if max(a.config.d_sae, b.config.d_sae) <= HUNGARIAN_UP_TO else "greedy"
    rows, others = directions(a, by), directions(b, by).to(a.device)
    partner = assign(rows, others, method)
    best, back = nearest(rows, others)
    found = paired(rows, others, partner)
    pairs = found[partner >= 0]
    return Match(
        partner=partner,
        similarity=found,
        best=best,
        best_back=back,
        mean=float(pairs.mean()),
        shared=float((pairs >= threshold).sum() / len(rows)),
        threshold=threshold,
        method=method,
        by=by,
        null=null_similarity(a, b, method, null, seed),
    )


def seed_stability(saes: Sequence[SAE], *, by: By = "both", null: NullRows = "sphere", seed: int = 0) -> SeedStability:
    """Measure how well each latent recurs in the other SAEs.

    Args:
        saes: two or more that differ in their seed.
        by: which directions are compared.
        null: see `null_similarity`.
        seed: of the null.

    Raises:
        UserError: fewer than two, or SAEs that `match` refuses.
    """
    _check_related(saes)
    rows = [directions(sae, by).to(saes[0].device) for sae in saes]
    best: list[list[Tensor]] = [[] for _ in saes]
    for i in range(len(saes)):
        for j in range(i):
            there, back = nearest(rows[i], rows[j])
            best[i].append(there.cosine)
            best[j].append(back.cosine)
    stability = [torch.stack(found).mean(0) for found in best]
    chance = null_similarity(saes[0], saes[1], None, null, seed)
    return SeedStability(stability, [float(found.mean()) for found in stability], chance, by)


@torch.no_grad()
def stitching(small: SAE, large: SAE, batches: Iterable[Tensor], threshold: float = 0.7) -> Stitching:
    """Tell novel from reconstruction latents of the wider SAE, and check it by adding them to the narrower one.

    Latents keep the activations that they have in their own SAE; a group G added to the narrower SAE gives

        recons_small(x) + sum over j in G of z_j(x) d_j

    while b_dec stays the narrower one's. Reconstruction latents added as a group count twice what both SAEs know, and
    the FVU rises; alone (`change`), each only adds its own share. The cosine is a guess, the change is the fact: where
    two dictionaries cut the same space differently, hardly any pair is alike, nearly all latents are "novel" by
    cosine, and adding them does harm, since together they know what the narrower SAE knows. `auroc` says how far the
    guess can be trusted; a second seed of the narrower width shows what two equal SAEs give.

    Args:
        small: the narrower SAE.
        large: the wider SAE.
        batches: held-out activations [n d_in] of their hook point; read once.
        threshold: decoder cosine that divides the groups; 0.7 in 2502.04878.

    Raises:
        UserError: SAEs that `match` refuses, transcoders or crosscoders, or no activations.
    """
    _check_related([small, large])
    if small.config.site.kind != "sae":
        raise UserError(f"stitching is for SAEs of one hook point, not for {small.config.hook_name!r}.")
    decoder = large.W_dec.float()
    cosine = nearest(unit(decoder), unit(small.W_dec).to(decoder.device))[0].cosine
    near = (cosine >= threshold).to(decoder.device)
    sums = _Sums(small.config.d_in, large.config.d_sae, decoder.device)
    for batch in batches:
        x = batch.reshape(-1, batch.shape[-1])
        sums.add(x, x.to(small.device) - small(x).recons, large.encode(x).float(), large, near)
    if sums.n == 0 or float(sums.variation()) == 0:
        raise UserError(f"{sums.n} activations without variance cannot tell SAEs apart: give at least two that differ.")
    fvu = (sums.errors / sums.variation()).tolist()
    change = (sums.change / sums.variation()).cpu()
    fired = (sums.fired > 0).cpu()
    novel, known = ~near.cpu() & fired, near.cpu() & fired
    improves = (change < 0)[fired]
    alike = bool(improves.all()) or not bool(improves.any())
    return Stitching(
        cosine=cosine,
        is_novel=novel,
        fired=fired,
        change=change,
        novel=_group(novel, change, fvu[1], fvu[0]),
        reconstruction=_group(known, change, fvu[2], fvu[0]),
        fvu_small=fvu[0],
        fvu_large=fvu[3],
        auroc=float("nan") if alike else float(stats.auroc(-cosine[fired].numpy(), improves.numpy())[0]),
        threshold=threshold,
        n_tokens=sums.n,
    )


class _Sums:
    """Sums over tokens, in float64."""

    def __init__(self, d_in: int, d_sae: int, device: torch.device) -> None:
        self.n = 0
        self.shift: Tensor | None = None
        self.total = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.square = torch.zeros((), dtype=torch.float64, device=device)
        # Squared errors: small, small with novel, small with reconstruction latents, large.
        self.errors = torch.zeros(4, dtype=torch.float64, device=device)
        self.change = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def add(self, x: Tensor, error: Tensor, latent_acts: Tensor, large: SAE, near: Tensor) -> None:
        """Add tokens: x, the error of the small SAE, and the large SAE's activations."""
        if not len(x):
            return
        x, error, decoder = x.to(near.device).double(), error.to(near.device).float(), large.W_dec.float()
        own = x.float() - large.reconstruct(x, latent_acts).float()
        units = large.units(x)
        latent_acts = latent_acts if units is None else latent_acts * units.float()
        known = (latent_acts * near) @ decoder
        novel = (latent_acts * ~near) @ decoder
        errors = [error, error - novel, error - known, own]
        self.errors += torch.stack([part.double().square().sum() for part in errors])
        # ||e - z d||^2 - ||e||^2, summed over tokens.
        linear = (latent_acts * (error @ decoder.t())).sum(0).double()
        quadratic = latent_acts.square().sum(0).double() * decoder.double().square().sum(1)
        self.change += quadratic - 2 * linear
        self.fired += (latent_acts != 0).sum(0)
        # Taking off a typical value first keeps the digits that a large mean would cost.
        self.shift = x.mean(0) if self.shift is None else self.shift
        self.total += (x - self.shift).sum(0)
        self.square += (x - self.shift).square().sum()
        self.n += len(x)

    def variation(self) -> Tensor:
        """Sum of squared deviations from the mean."""
        return self.square - self.total.square().sum() / max(1, self.n)


def _group(chosen: Tensor, change: Tensor, fvu: float, fvu_small: float) -> Group:
    improving = float((change[chosen] < 0).double().mean()) if bool(chosen.any()) else float("nan")
    return Group(int(chosen.sum()), fvu, fvu - fvu_small, improving)


def families(saes: Sequence[SAE], *, floor: float = 0.5, by: By = "decoder") -> Families:
    """Find for every latent its parent in the next narrower SAE.

    Args:
        saes: of different widths, in any order.
        floor: least similarity of a child with its parent (ours; compare it with `null_similarity`).
        by: which directions are compared.

    Raises:
        UserError: two SAEs of one width, or SAEs that `match` refuses.
    """
    _check_related(saes)
    ordered = sorted(saes, key=lambda sae: sae.config.d_sae)
    widths = [sae.config.d_sae for sae in ordered]
    if len(set(widths)) < len(widths):
        raise UserError(f"families need a different width for each SAE, not {widths}: leave out the doubles.")
    rows = [directions(sae, by).to(ordered[0].device) for sae in ordered]
    levels = [Level(widths[0], torch.full((widths[0],), -1), torch.full((widths[0],), torch.nan))]
    for width, wider, narrower in zip(widths[1:], rows[1:], rows, strict=False):
        found = nearest(wider, narrower)[0]
        levels.append(Level(width, torch.where(found.cosine >= floor, found.row, -1), found.cosine))
    return Families(levels, floor)


@torch.no_grad()
def directions(sae: SAE, by: By) -> Float[Tensor, "d_sae d"]:
    """A row a latent, such that the product of two rows is the similarity of the latents.

    Raises:
        UserError: an unknown `by`.
    """
    if by not in ("decoder", "encoder", "both"):
        raise unknown("way to compare latents", by, ["decoder", "encoder", "both"])
    decoder, encoder = unit(decoder_rows(sae)), unit(encoder_rows(sae))
    if by == "both":
        return torch.cat([decoder, encoder], dim=1) / 2**0.5
    return decoder if by == "decoder" else encoder


def null_similarity(a: SAE, b: SAE, method: str | None, rows: NullRows = "sphere", seed: int = 0) -> Null:
    """What `match` finds between random unit rows in place of two SAEs' latents.

    Encoder and decoder share a row, as in an SAE that has just begun: independent ones would be less alike.

    Args:
        a: for its shape.
        b: likewise.
        method: of the one-to-one match; None makes none.
        rows: "sphere" for uniform directions; "data" for `rows_like` each SAE's decoder.
        seed: of the rows.

    Raises:
        UserError: an unknown kind of rows.
    """
    if rows not in ("sphere", "data"):
        raise unknown("kind of random rows", rows, ["sphere", "data"])
    generator = null_generator(seed)
    drawn = []
    for sae in (a, b):
        if rows == "data":
            drawn.append(rows_like(unit(decoder_rows(sae)), generator).to(a.device))
        else:
            drawn.append(unit_rows(sae.config.d_sae, sae.config.width_out, generator).to(a.device))
    best = nearest(drawn[0], drawn[1])[0].cosine
    matched = torch.tensor([torch.nan])
    if method is not None:
        partner = assign(drawn[0], drawn[1], method)
        matched = paired(drawn[0], drawn[1], partner)[partner >= 0]
    high = [float(np.quantile(found.numpy(), 0.99)) for found in (best, matched)]
    return Null(float(best.mean()), high[0], float(matched.mean()), high[1])


def _check_related(saes: Sequence[SAE]) -> None:
    if len(saes) < 2:
        raise UserError(f"{len(saes)} SAE cannot be compared: give two or more.")
    one = saes[0].config
    for sae in saes[1:]:
        two = sae.config
        if (one.hook_name, one.d_in, one.width_out) != (two.hook_name, two.d_in, two.width_out):
            raise UserError(
                f"SAEs of {one.hook_name!r} (d_in = {one.d_in}) and {two.hook_name!r} (d_in = {two.d_in}) have no "
                "directions in common: compare SAEs of one hook point."
            )
