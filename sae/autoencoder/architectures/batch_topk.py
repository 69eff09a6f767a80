"""BatchTopK (Bussmann et al. 2412.06410)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sparsity import BatchStats, Options, Sparsity, nth_largest, register
from sae.errors import UserError
from sae.kernels.operands import Entries, Projection
from sae.kernels.reference import Kernels


@dataclass(frozen=True)
class BatchTopKOptions(Options):
    """Of `batch_topk`."""

    threshold_beta: float = 0.999
    """Longest memory of the average threshold; short runs use a shorter one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold_beta < 1:
            raise UserError(f"option threshold_beta = {self.threshold_beta} is not in [0, 1).")


@register
class BatchTopK(Sparsity):
    """The l0 * batch largest positive pre-activations of the whole batch; a fixed threshold at inference.

    The threshold is a running average of the smallest activation kept in a batch (dictionary_learning: decay .999).
    The decay grows with the number of batches seen, so that a run of a few hundred steps does not remember its start.
    """

    name = "batch_topk"
    options_class = BatchTopKOptions
    uses_auxk = True
    options: BatchTopKOptions
    threshold: Tensor
    n_updates: Tensor

    def setup(self) -> None:
        """The threshold, and how often it was moved."""
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("n_updates", torch.tensor(0, dtype=torch.int64))

    def restart(self) -> None:
        """The next batch sets the threshold, and the average begins anew."""
        self.n_updates.zero_()

    def initialise(self, pre_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Start the average where it would stand, so that the first batches know where to look."""
        self.threshold.copy_(nth_largest(pre_acts.float().reshape(-1), self._n_keep(pre_acts)).clamp(min=0))

    def select(self, kernels: Kernels, projection: Projection) -> Entries:
        """The l0 * batch largest values of the batch, where positive."""
        n_keep = self._n_keep(projection.centred)
        found = self._candidates(kernels, projection, n_keep)
        if len(found.values) <= n_keep:
            return found
        smallest = nth_largest(found.values, n_keep)
        larger, equal = ~(found.values <= smallest), found.values == smallest  # NaN stays, to be seen in the loss
        # A bf16 product is so coarse that a few per cent of a batch can be equal: exactly as many as wanted stay.
        keep = larger | (equal & (equal.cumsum(0) <= n_keep - larger.sum()))
        return Entries(found.rows[keep], found.cols[keep], found.values[keep])

    def _candidates(self, kernels: Kernels, projection: Projection, n_keep: int) -> Entries:
        """At least `n_keep` entries, or all positive ones.

        A little below the average threshold there are hardly more than enough, so that the order statistic is taken
        over less than a per cent of the matrix. The result does not depend on these guesses.
        """
        for part in (0.9, 0.5):
            found = kernels.above(projection, part * self.threshold.clamp(min=0))
            if found is not None and len(found.values) >= n_keep:
                return found
        found = kernels.above(projection, torch.zeros_like(self.threshold))
        assert found is not None  # it is only when a largest density is given
        return found

    def train_acts(self, pre_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """The same from the whole matrix; ties with the smallest are all kept."""
        smallest = nth_largest(pre_acts.detach().reshape(-1), self._n_keep(pre_acts))
        return pre_acts * ((pre_acts >= smallest) & (pre_acts > 0))

    def _n_keep(self, batch: Tensor) -> int:
        return max(1, round(self.l0 * len(batch)))

    def infer_acts(self, pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Positive pre-activations strictly above the threshold."""
        return pre_acts * ((pre_acts > self.threshold) & (pre_acts > 0))

    def update(self, stats: BatchStats) -> None:
        """Average the smallest kept activation; a batch in which nothing fired changes nothing."""
        n = self.n_updates.to(torch.float32)
        beta = ((1 + n) / (10 + n)).clamp(max=self.options.threshold_beta) * (n > 0)
        moved = beta * self.threshold + (1 - beta) * stats.min_active.float()
        seen = torch.isfinite(stats.min_active)
        self.threshold.copy_(torch.where(seen, moved, self.threshold))
        self.n_updates.add_(seen)
