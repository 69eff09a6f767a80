"""GroupMax: one latent of each of k groups, so that selecting needs no sorting (EleutherAI's sparsify has it)."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.architectures.topk import TopK, top_mask
from sae.autoencoder.sparsity import register
from sae.errors import UserError
from sae.kernels.operands import Entries, Projection
from sae.kernels.reference import Kernels


@register
class GroupMax(TopK):
    """The largest pre-activation, where positive, of each of l0 groups of d_sae / l0 neighbouring latents."""

    name = "groupmax"

    @classmethod
    def check(cls, d_sae: int, l0: float | int) -> None:
        """L0 must be a whole number that divides the dictionary."""
        super().check(d_sae, l0)
        if d_sae % int(l0):
            raise UserError(f"{cls.name} divides d_sae = {d_sae} into l0 = {l0:g} equal groups: use an l0 that fits.")

    def select(self, kernels: Kernels, projection: Projection) -> Entries:
        """The best of each group, group by group."""
        batch, n_groups = len(projection.centred), int(self.l0)
        size = self.d_sae // n_groups
        cols, values = [], []
        for start in range(0, self.d_sae, size):
            group = slice(start, start + size)
            best = kernels.topk(projection._replace(w_enc=projection.w_enc[:, group], b_enc=projection.b_enc[group]), 1)
            cols.append(best.cols + start)
            values.append(best.values)
        rows = torch.arange(batch, device=projection.centred.device).repeat_interleave(n_groups)
        return Entries(rows, torch.stack(cols, dim=1).reshape(-1), torch.stack(values, dim=1).reshape(-1))

    def infer_acts(self, pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Same selection as in training."""
        grouped = pre_acts.unflatten(-1, (int(self.l0), -1))
        return (grouped.relu() * top_mask(grouped, 1)).flatten(-2)
