"""AbsTopK: a latent may be active with either sign, so that one latent can hold two opposite concepts."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.architectures.topk import TopK, top_mask
from sae.autoencoder.sparsity import register
from sae.kernels.operands import Entries, Projection
from sae.kernels.reference import Kernels


@register
class AbsTopK(TopK):
    """The k = l0 pre-activations of each token that are largest in size; they keep their sign."""

    name = "abs_topk"

    def activate(self, pre_acts: Tensor, cols: Tensor | slice) -> Tensor:
        """What is selected is active as it is."""
        return pre_acts

    def select(self, kernels: Kernels, projection: Projection) -> Entries:
        """The best k of the k largest and the k smallest."""
        k = int(self.l0)
        largest = kernels.topk(projection, k)
        opposite = projection._replace(centred=-projection.centred, b_enc=-projection.b_enc)
        smallest = kernels.topk(opposite, k)
        batch = len(projection.centred)
        cols = torch.cat([largest.cols.view(batch, k), smallest.cols.view(batch, k)], dim=1)
        sizes = torch.cat([largest.values.view(batch, k), smallest.values.view(batch, k)], dim=1)
        # Each of the k largest in size is in one of the lists with its size, so no negative "size" is among the best.
        best = sizes.topk(k, dim=1, sorted=False)
        signed = torch.where(best.indices < k, best.values, -best.values)
        return Entries(largest.rows, cols.gather(1, best.indices).reshape(-1), signed.reshape(-1))

    def infer_acts(self, pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Same selection as in training."""
        return pre_acts * top_mask(pre_acts.abs(), int(self.l0))
