"""TopK (Gao et al. 2406.04093)."""

from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sparsity import Sparsity, register
from sae.errors import UserError
from sae.kernels.operands import Entries, Projection
from sae.kernels.reference import Kernels


@register
class TopK(Sparsity):
    """The k = l0 largest pre-activations of each token, where positive."""

    name = "topk"
    uses_auxk = True

    @classmethod
    def check(cls, d_sae: int, l0: float | int) -> None:
        """L0 must be a whole number of at least 1."""
        super().check(d_sae, l0)
        if l0 < 1 or l0 != int(l0):
            raise UserError(
                f"{cls.name} keeps a whole number of latents, not l0 = {l0:g}: use a whole number or batch_topk."
            )

    def select(self, kernels: Kernels, projection: Projection) -> Entries:
        """The top k of each row."""
        return kernels.topk(projection, int(self.l0))

    def train_acts(self, pre_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """The top k of each row, where positive."""
        return self.infer_acts(pre_acts)

    def infer_acts(self, pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
        """Same selection as in training."""
        return pre_acts.relu() * top_mask(pre_acts, int(self.l0))


def top_mask(scores: Float[Tensor, "... n"], k: int) -> Float[Tensor, "... n"]:
    """1 at the k largest of each row, else 0; exactly k, ties broken arbitrarily."""
    cols = scores.detach().topk(k, dim=-1, sorted=False).indices
    return scores.new_zeros(scores.shape).scatter(-1, cols, 1.0)
