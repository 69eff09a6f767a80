"""What the tests of all kernels share: which there are on this machine, a random projection, entries as a matrix."""

import torch

from sae.kernels import build
from sae.kernels.operands import Precision, Projection

FAST = ["torch", *(["cpp"] if build.library().handle is not None else [])]


def projection(batch, d_in, d_sae, precision=Precision.float32, *, seed=0):
    """Unit directions, small biases, standard normal inputs."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    bias = 0.1 * torch.randn(d_sae, generator=generator)
    return Projection(torch.randn(batch, d_in, generator=generator), rows.t(), bias, precision)


def as_matrix(found, shape):
    """Entries as the matrix they are of, NaN where there is none; each is listed once, token by token."""
    matrix = torch.full(shape, torch.nan)
    matrix[found.rows, found.cols] = found.values
    assert int((~matrix.isnan()).sum()) == len(found.values), "an entry was listed twice"
    assert torch.equal(found.rows, found.rows.sort().values)
    return matrix
