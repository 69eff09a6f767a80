"""The architectures that come with the package, a file each; importing this makes them known by name."""

from sae.autoencoder.architectures import (
    abs_topk,
    batch_topk,
    gated,
    hierarchical_topk,
    jumprelu,
    matryoshka,
    relu,
    topk,
)

__all__ = ["abs_topk", "batch_topk", "gated", "hierarchical_topk", "jumprelu", "matryoshka", "relu", "topk"]
