"""HierarchicalTopK (2505.24473): one SAE that reconstructs well at many values of k."""

from dataclasses import dataclass

import torch

from sae.autoencoder.architectures.topk import TopK
from sae.autoencoder.sparsity import Active, Levels, Options, register
from sae.errors import UserError


@dataclass(frozen=True)
class HierarchicalTopKOptions(Options):
    """Of `hierarchical_topk`."""

    ks: tuple[int, ...] = ()
    """Values of k below l0 at which the reconstruction counts; () means the powers of two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not isinstance(k, int) or k < 1 for k in self.ks) or sorted(set(self.ks)) != list(self.ks):
            raise UserError(f"option ks = {list(self.ks)} is not a rising list of whole numbers from 1.")


@register
class HierarchicalTopK(TopK):
    """TopK with k = l0, trained so that the k' largest activations of a token already reconstruct it well.

    For use at another k, set `l0` to it.
    """

    name = "hierarchical_topk"
    options_class = HierarchicalTopKOptions
    options: HierarchicalTopKOptions

    def ks(self) -> list[int]:
        """The values of k that count, the last of which is l0."""
        k = int(self.l0)
        smaller = self.options.ks or [2**power for power in range(k.bit_length())]
        return [*(item for item in smaller if item < k), k]

    def levels(self, active: Active, step: int) -> Levels | None:
        """The level of an activation is the number of values of k that its rank within its token has passed."""
        ks = self.ks()
        acts = active.latent_acts.detach()
        table = acts if acts.ndim == 2 else acts.view(active.batch_tokens, -1)
        ranks = torch.empty_like(table, dtype=torch.int64)
        order = table.argsort(dim=1, descending=True, stable=True)
        ranks.scatter_(1, order, torch.arange(table.shape[1], device=acts.device).expand_as(order))
        levels = torch.searchsorted(torch.tensor(ks, device=acts.device), ranks, right=True)
        return Levels(levels.clamp(max=len(ks) - 1).view_as(acts), (1 / len(ks),) * len(ks))
