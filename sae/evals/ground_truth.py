"""How well an SAE has found the features of a world whose truth is known (see `sae.evals.world`).

    result = measure(sae, t3(), n_tokens=100_000)
    print(result.mcc, result.f1)

or, sample by sample, with a `GroundTruthMeter`. The definitions are those of SAELens 6.54 (`sae_lens.synthetic.evals`)
where it has them, so that its published numbers can be compared with. Reconstruction cannot stand in for any of this:
an SAE that fires too many latents reconstructs better and mixes features (2508.16560).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.evals.reconstruction import ReconstructionMeter
from sae.evals.world import Sample, World

_NO_LENGTH = 1e-6  # an activation shorter than this has no length to compare with


class GroundTruthResult(NamedTuple):
    """An SAE against the truth, over all tokens seen.

    Directions are those of the decoder's rows. A latent's feature is the one whose direction has the largest |cosine|
    with its own. A latent fires where it is not zero; a feature, where its amount is above 0.
    """

    mcc: float
    """Mean |cosine| over the best one-to-one matching of latents and features (2505.20254). Where there are more of
    one than of the other, the surplus is not counted. Dead latents are: this is a matter of directions alone."""
    mmcs: float
    """Mean over features of the largest cosine with any latent; one latent may serve several features, and one that
    points the wrong way serves none."""
    uniqueness: float
    """Number of different features that latents have, divided by the number of latents."""
    f1: float
    """Mean over all latents of the F1 with which a latent's firing tells its feature's: 2 TP / (2 TP + FP + FN).

    A dead latent counts with 0, as does one whose feature never fired: leaving it out would reward an SAE for each
    latent that it kills instead of teaching it a feature."""
    precision: float
    """Mean over all latents of TP / (TP + FP); 0 for a dead one."""
    recall: float
    """Mean over all latents of TP / (TP + FN); 0 where the feature never fired."""
    f1_alive: float
    """The same mean as `f1` over latents that fired at all, to tell bad detectors from dead ones; NaN if none did."""
    l0: float
    """Mean number of latents that fire on a token."""
    true_l0: float
    """Mean number of features that fire on a token."""
    fve: float
    """Fraction of variance explained; see `ReconstructionResult`."""
    shrinkage: float
    """Mean of ||recons|| / ||x|| over tokens that have any length; 1 means none, NaN that no token has any."""
    dead_fraction: float
    """Fraction of latents that fired on none of these tokens."""
    features: Int[Tensor, " d_sae"]
    """The feature of each latent; on the CPU."""
    latent_f1: Float[Tensor, " d_sae"]
    """F1 of each latent; float64, on the CPU."""
    n_tokens: int


def cosines(found: Float[Tensor, "n_latents d"], truth: Float[Tensor, "n_features d"]) -> Float[Tensor, "n_latents n"]:
    """Cosine of every latent's direction with every feature's; 0 where a direction is zero."""
    found, truth = found.detach().double(), truth.to(found.device).double()
    tiny = torch.finfo(torch.float64).tiny
    lengths = found.norm(dim=1, keepdim=True).clamp(min=tiny), truth.norm(dim=1, keepdim=True).clamp(min=tiny)
    return (found / lengths[0]) @ (truth / lengths[1]).T


def mcc(cosine: Float[Tensor, "n_latents n_features"]) -> float:
    """Mean |cosine| over the one-to-one matching that makes it largest."""
    size = cosine.abs().cpu().numpy()
    rows, cols = linear_sum_assignment(size, maximize=True)
    return float(size[rows, cols].mean())


def measure(
    sae: SAE, world: World, *, n_tokens: int = 100_000, batch_tokens: int = 4096, seed: int = 0
) -> GroundTruthResult:
    """Judge an SAE by tokens of the world that no training stream gives.

    Args:
        sae: acts on activations as the world gives them (a saved one does).
        world: where its truth is.
        n_tokens: rounded up to whole batches.
        batch_tokens: tokens drawn at once; each takes (n_features + d_sae) * 4 bytes or so.
        seed: which tokens.

    Raises:
        UserError: the SAE has another width than the world, or there are no tokens.
    """
    if n_tokens < 1 or batch_tokens < 1:
        raise UserError(f"n_tokens = {n_tokens} and batch_tokens = {batch_tokens} must be 1 or more: raise them.")
    meter = GroundTruthMeter(sae, world)
    for sample in world.held_out(math.ceil(n_tokens / batch_tokens), batch_tokens, seed):
        meter.update(sample)
    return meter.result()


class GroundTruthMeter:
    """Feeds samples of a world through an SAE and accumulates counts; state is O(d_in + d_sae).

    Directions are compared at the beginning, which takes d_sae * n_features * 24 bytes for a while.

    Raises:
        UserError: the SAE has another width than the world.
    """

    def __init__(self, sae: SAE, world: World) -> None:
        sae.check_input(world.d_in)
        self.sae = sae
        cosine = cosines(sae.W_dec, world.directions)
        self.mcc, self.mmcs = mcc(cosine), float(cosine.amax(0).mean())
        self.features: Int[Tensor, " d_sae"] = cosine.abs().argmax(1)
        self._reconstruction = ReconstructionMeter(sae)
        # Rows: where the latent fired, where its feature did, where both did.
        self._counts = torch.zeros(3, sae.config.d_sae, dtype=torch.int64, device=sae.device)
        self._n_firing = torch.zeros((), dtype=torch.int64, device=sae.device)
        self._shrinkage = torch.zeros(2, dtype=torch.float64, device=sae.device)  # sum of ratios, and their number

    @torch.no_grad()
    def update(self, sample: Sample) -> None:
        """Add tokens with their truth."""
        x, feature_acts = (part.to(self.sae.device) for part in sample)
        self._reconstruction.update(x)
        recons, latent_acts = self.sae(x)
        fires, truth = latent_acts != 0, feature_acts > 0
        self._n_firing += truth.sum()
        truth = truth[:, self.features]
        self._counts += torch.stack([fires.sum(0), truth.sum(0), (fires & truth).sum(0)])
        length = x.double().norm(dim=1)
        ratio = recons.double().norm(dim=1) / length
        has_length = length > _NO_LENGTH
        self._shrinkage += torch.stack([ratio[has_length].sum(), has_length.sum()])

    def result(self) -> GroundTruthResult:
        """Metrics over everything seen so far.

        Raises:
            UserError: nothing has been seen.
        """
        reconstruction = self._reconstruction.result()
        fired, present, both = self._counts.cpu().double()
        zero = torch.zeros_like(fired)
        f1 = torch.where(both > 0, 2 * both / (fired + present), zero)
        alive = fired > 0
        ratios, n_ratios = self._shrinkage.tolist()
        features = self.features.cpu()
        return GroundTruthResult(
            mcc=self.mcc,
            mmcs=self.mmcs,
            uniqueness=len(features.unique()) / len(features),
            f1=float(f1.mean()),
            precision=float(torch.where(both > 0, both / fired, zero).mean()),
            recall=float(torch.where(both > 0, both / present, zero).mean()),
            f1_alive=float(f1[alive].mean()),
            l0=reconstruction.l0,
            true_l0=int(self._n_firing) / reconstruction.n_tokens,
            fve=reconstruction.fve,
            shrinkage=ratios / n_ratios if n_ratios else math.nan,
            dead_fraction=reconstruction.dead_fraction,
            features=features,
            latent_f1=f1,
            n_tokens=reconstruction.n_tokens,
        )
