"""What a dictionary's weights alone say, without data or a language model; and which rows of two sets are alike.

    found = geometry(sae)
    found.neighbor_cosine.abs().max()       # near 1: two latents share a direction

Definitions (d_i is row i of W_dec, e_i column i of W_enc):

    enc_dec_cosine_i  = cos(e_i, d_i)
    neighbor_i        = argmax over j != i of |cos(d_i, d_j)|
    neighbor_cosine_i = cos(d_i, d_neighbor_i), with its sign

Traps. In d_in dimensions even random rows are not orthogonal: the largest |cosine| of one row with n others is about
sqrt(2 ln(n) / d_in) on the sphere (0.3 for n = 512, d_in = 128; 0.09 for n = 16384, d_in = 2304), and more where rows
keep to few dimensions, as those of trained SAEs do: `rows_like` draws what to read it against. A latent that never
fired keeps its initial directions, with enc_dec_cosine 1 where the encoder began as the decoder's transpose.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy import optimize
from torch import Tensor

from sae.autoencoder.crosscoder import Crosscoder
from sae.autoencoder.sae import SAE
from sae.errors import unknown

BLOCK = 1 << 24
"""Cosines held at once: 64 MiB."""
NULL_SEED = 3_000_017
"""Added to the seed of random rows: an SAE of that seed began with rows drawn from it."""


class Geometry(NamedTuple):
    """Directions and lengths of an SAE's latents; float32 and int64, on the CPU."""

    enc_dec_cosine: Float[Tensor, " d_sae"]
    """NaN for a transcoder, whose encoder and decoder are in different spaces."""
    neighbor: Int[Tensor, " d_sae"]
    """The other latent whose decoder row is most nearly parallel, or opposite; -1 where there is no other."""
    neighbor_cosine: Float[Tensor, " d_sae"]
    """Cosine with it, from -1 to 1; NaN where there is no other."""
    encoder_norm: Float[Tensor, " d_sae"]
    decoder_norm: Float[Tensor, " d_sae"]
    """1 for SAEs trained here; foreign weights may differ."""


class Nearest(NamedTuple):
    """For every row of one set the most similar row of another; on the CPU."""

    row: Int[Tensor, " n"]
    """Its number; -1 where there is none."""
    cosine: Float[Tensor, " n"]
    """NaN where there is none."""


@torch.no_grad()
def geometry(sae: SAE) -> Geometry:
    """Measure an SAE's weights. Memory beyond them: `BLOCK` cosines; 65,536 latents need no 65,536 x 65,536 matrix.

    Rows are those of `decoder_rows` and `encoder_rows`.
    """
    encoder, decoder = encoder_rows(sae), decoder_rows(sae)
    if sae.config.site.kind == "transcoder":
        agreement = torch.full((len(decoder),), torch.nan)
    else:
        agreement = (unit(encoder) * unit(decoder)).sum(-1).clamp(-1, 1).cpu()
    neighbors = nearest_other(decoder)
    return Geometry(
        enc_dec_cosine=agreement,
        neighbor=neighbors.row,
        neighbor_cosine=neighbors.cosine,
        encoder_norm=encoder.norm(dim=-1).cpu(),
        decoder_norm=decoder.norm(dim=-1).cpu(),
    )


@torch.no_grad()
def decoder_rows(sae: SAE) -> Float[Tensor, "d_sae d"]:
    """Decoder rows, in float32. Of a crosscoder the concatenated parts, in the units of its training.

    In raw units the source with the smallest activations would have hardly a say in a cosine.
    """
    decoder = sae.W_dec.float()
    return decoder * sae.column_scales() if isinstance(sae, Crosscoder) else decoder


@torch.no_grad()
def encoder_rows(sae: SAE) -> Float[Tensor, "d_sae d_in"]:
    """Columns of the encoder as rows, in float32; of a crosscoder in the units of its training."""
    encoder = sae.W_enc.t().float()
    return encoder / sae.column_scales() if isinstance(sae, Crosscoder) else encoder


def unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows at length 1, in float32. A row of zeros stays zero: its cosine with anything is 0."""
    rows = rows.float()
    norms = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1)


@torch.no_grad()
def rows_like(rows: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """As many random unit rows, with the second moment that these have: they are mixed by a random rotation.

    They fill the same dimensions as much, and have nothing else in common: what they reach is due to that alone. Where
    rows are Gaussian, whatever their covariance, rotated ones cannot be told from them (rotation tests, Langsrud 2005).
    New draws with the same covariance could: with the noise of two samples they are nearer to each other.
    Lengths are made equal at the end, which takes a little from the dimensions that have most.

    Args:
        rows: of any length; longer ones count for more.
        generator: of the draws; `null_generator` gives one.
    """
    # rows = QR, and any other Q with orthonormal columns gives the same rows'rows = R'R: no n x n rotation is needed.
    factor = torch.linalg.qr(rows.float(), mode="r").R
    mixed = torch.linalg.qr(torch.randn(len(rows), len(factor), generator=generator).to(rows.device))
    # With these signs Q is as likely as any rotation of it.
    return unit(mixed.Q * mixed.R.diagonal().sign() @ factor)


def null_generator(seed: int) -> torch.Generator:
    """Where random rows are drawn from: not from the seed itself, or they would be those that an SAE began with."""
    return torch.Generator().manual_seed(seed + NULL_SEED)


@torch.no_grad()
def nearest_other(rows: Float[Tensor, "n d"], block: int = BLOCK) -> Nearest:
    """For every row the other row with the largest |cosine|; the first of equals.

    Args:
        rows: of any length; they are normalised here.
        block: cosines held at once.
    """
    n = len(rows)
    if n == 1:
        return Nearest(torch.tensor([-1]), torch.tensor([torch.nan]))
    directions = unit(rows)
    step = max(1, block // n)
    index = torch.empty(n, dtype=torch.int64)
    cosine = torch.empty(n)
    for start in range(0, n, step):
        part = directions[start : start + step] @ directions.t()
        itself = torch.arange(len(part), device=part.device)
        sizes = part.abs()
        sizes[itself, itself + start] = -1
        best = sizes.argmax(dim=1)
        index[start : start + step] = best.cpu()
        cosine[start : start + step] = part[itself, best].clamp(-1, 1).cpu()
    return Nearest(index, cosine)


@torch.no_grad()
def nearest(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], block: int = BLOCK) -> tuple[Nearest, Nearest]:
    """For every row of each set the row of the other with the largest product, sign included; the first of equals.

    Both answers come from the same products, so that two rows that are each other's best are so on both sides.

    Args:
        first: rows, used as they are: give `unit` rows for cosines.
        second: likewise.
        block: products held at once.
    """
    n, m = len(first), len(second)
    if n == 0 or m == 0:
        nothing = [Nearest(torch.full((size,), -1), torch.full((size,), torch.nan)) for size in (n, m)]
        return nothing[0], nothing[1]
    step = max(1, block // m)
    rows: list[tuple[Tensor, Tensor]] = []
    column = torch.full((m,), -torch.inf, device=first.device)
    owner = torch.zeros(m, dtype=torch.int64, device=first.device)
    for start in range(0, n, step):
        part = (first[start : start + step] @ second.t()).clamp(-1, 1)
        best = part.max(dim=1)
        rows.append((best.indices.cpu(), best.values.cpu()))
        highest = part.max(dim=0)
        # Strictly: of equals the first block, and so the first row, stays.
        better = highest.values > column
        column = torch.where(better, highest.values, column)
        owner = torch.where(better, highest.indices + start, owner)
    index, cosine = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return Nearest(index, cosine), Nearest(owner.cpu(), column.cpu())


def assign(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], method: str) -> Int[Tensor, " n"]:
    """Pair rows of two sets one to one by their products; -1 where the second set is too small.

    Args:
        first: rows whose products are similarities.
        second: likewise.
        method: "hungarian" (the largest sum of products) or "greedy" (the largest product first, then of what is left).

    Raises:
        UserError: an unknown method.
    """
    partner = torch.full((len(first),), -1)
    if method == "hungarian":
        pairs = optimize.linear_sum_assignment((first @ second.t()).double().cpu().numpy(), maximize=True)
        partner[torch.from_numpy(pairs[0])] = torch.from_numpy(pairs[1])
        return partner
    if method != "greedy":
        raise unknown("matching method", method, ["auto", "hungarian", "greedy"])
    left, right = torch.arange(len(first)), torch.arange(len(second))
    # Pairs that are each other's best are those that taking the best pair first ends up with. There is always one,
    # and among random rows about half of what is left are such pairs.
    while len(left) and len(right):
        there, back = nearest(first[left.to(first.device)], second[right.to(second.device)])
        mutual = back.row[there.row] == torch.arange(len(left))
        partner[left[mutual]] = right[there.row[mutual]]
        free = torch.ones(len(right), dtype=torch.bool)
        free[there.row[mutual]] = False
        left, right = left[~mutual], right[free]
    return partner


def paired(first: Tensor, second: Tensor, partner: Tensor) -> Float[Tensor, " n"]:
    """Products of the pairs that `assign` made; NaN without a partner."""
    found = (first * second[partner.clamp_min(0).to(second.device)]).sum(1).clamp(-1, 1).cpu()
    return torch.where(partner >= 0, found, torch.nan)
