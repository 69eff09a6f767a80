"""Activations for the contestants, as .npy files that all of them read: the same bytes for everybody.

Everything is scaled by one number so that E||x||^2 = d_in over the training batches.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SEED = 1_000
"""Far from any SAE's seed: an SAE that is initialised from the very draws that made the features knows them already."""
FEATURES_PER_DIMENSION = 4
ACTIVE = 8
NOISE = 0.05


class Data(NamedTuple):
    """Where a contestant finds its activations."""

    train: Path
    """[n_batches batch d_in] float32."""
    held_out: Path
    """[tokens d_in] float32, from the same distribution."""
    d_in: int
    name: str


def synthetic(folder: Path, *, d_in: int, batch_tokens: int, n_batches: int, seed: int = SEED) -> Data:
    """Sparse mixtures (see `mixtures`) on disk.

    Args:
        folder: where the files go.
        d_in: width.
        batch_tokens: tokens in a batch; two batches are held out.
        n_batches: training batches.
        seed: of everything.
    """
    batches = mixtures(d_in, batch_tokens, seed)
    held_out = torch.cat([next(batches), next(batches)])
    name = f"synthetic-{d_in}-{batch_tokens}"
    return write(folder, name, itertools.islice(batches, n_batches), n_batches, held_out)


def sparse_mixtures(
    d_in: int, batch_tokens: int, n_batches: int, seed: int = SEED
) -> Float[Tensor, "n_batches batch_tokens d_in"]:
    """The first batches of `mixtures`, in memory."""
    return torch.stack(list(itertools.islice(mixtures(d_in, batch_tokens, seed), n_batches)))


def mixtures(d_in: int, batch_tokens: int, seed: int = SEED) -> Iterator[Float[Tensor, "batch_tokens d_in"]]:
    """Batches without end: 4 d_in random unit features in superposition, 8 of them active on each token, and noise.

    Amplitudes are uniform in [0.5, 1.5]; the noise has norm 0.05 on average, in all directions alike.
    """
    generator = torch.Generator().manual_seed(seed)
    n_features = FEATURES_PER_DIMENSION * d_in
    features = torch.nn.functional.normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
    while True:
        which = torch.randint(n_features, (batch_tokens, ACTIVE), generator=generator)
        amplitude = 0.5 + torch.rand(batch_tokens, ACTIVE, generator=generator)
        mixed = torch.nn.functional.embedding_bag(which, features, per_sample_weights=amplitude, mode="sum")
        yield mixed + NOISE / math.sqrt(d_in) * torch.randn(batch_tokens, d_in, generator=generator)


def write(folder: Path, name: str, batches: Iterator[Tensor], n_batches: int, held_out: Tensor) -> Data:
    """Write scaled batches and held-out tokens.

    Args:
        folder: where the files go.
        name: of the data, in words.
        batches: [batch d_in] each; at least one.
        n_batches: how many there are.
        held_out: [tokens d_in].
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = "".join(char if char.isalnum() else "-" for char in name)
    paths = folder / f"{stem}.npy", folder / f"{stem}-held-out.npy"
    first = next(batches)
    shape = (n_batches, *first.shape)
    file = np.lib.format.open_memmap(paths[0], mode="w+", dtype=np.float32, shape=shape)
    squares = 0.0
    for number, batch in enumerate(itertools.chain([first], batches)):
        file[number] = batch.numpy()
        squares += float(batch.double().square().sum())
    scale = math.sqrt(shape[-1] * shape[0] * shape[1] / squares)
    for number in range(n_batches):
        file[number] *= np.float32(scale)
    file.flush()
    np.save(paths[1], (held_out * scale).numpy())
    return Data(*paths, shape[-1], name)
