"""Controls: SAEs that are not allowed to learn their dictionary. What they reach, a trained SAE has not shown to learn.

Frozen decoders, softly frozen decoders and frozen encoders match trained SAEs on several published metrics (Korznikov
et al. 2602.14111): a table of quality says little without them.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAEConfig

TRAINED = ""
"""No control: everything is trained."""
NO_CONTROL = "none"
"""What that is called in configurations and tables."""
FROZEN: dict[str, frozenset[str]] = {
    TRAINED: frozenset(),
    "frozen_decoder": frozenset({"W_dec"}),
    "soft_frozen_decoder": frozenset(),
    "frozen_encoder": frozenset({"W_enc"}),
    "random": frozenset({"W_dec", "W_enc"}),
}
"""The parameters that stay as they were drawn. In all of them biases and thresholds are trained: how much fires is not
what they are about."""
SOFT = "soft_frozen_decoder"
SOFT_COSINE = 0.8
"""How close a softly frozen row must stay to where it began."""


def control_of(config: SAEConfig) -> str:
    """The control a saved SAE was trained as; `TRAINED` for none, and for SAEs from elsewhere."""
    training = config.metadata.get("training")
    found = training.get("control") if isinstance(training, dict) else None
    return found if isinstance(found, str) and found in FROZEN else TRAINED


@torch.no_grad()
def pull_back(rows: Float[Tensor, "d_sae d"], start: Float[Tensor, "d_sae d"], cosine: float = SOFT_COSINE) -> None:
    """Move unit rows, in place, to the nearest ones whose cosine with `start` is at least `cosine`."""
    along = (rows * start).sum(1, keepdim=True)
    across = rows - along * start
    edge = cosine * start + (1 - cosine**2) ** 0.5 * across / across.norm(dim=1, keepdim=True).clamp(min=1e-12)
    rows.copy_(torch.where(along < cosine, edge, rows))
