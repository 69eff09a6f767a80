"""The architectures that come with the package, a file each; importing this makes them known by name."""

from sae.autoencoder.architectures import (
    abs_topk,
    batch_topk,
    gated,
    groupmax,
    hierarchical_topk,
    jumprelu,
    matching_pursuit,
    matryoshka,
    relu,
    topk,
)

__all__ = [
    "abs_topk",
    "batch_topk",
    "gated",
    "groupmax",
    "hierarchical_topk",
    "jumprelu",
    "matching_pursuit",
    "matryoshka",
    "relu",
    "topk",
]
