"""Suite `density`: up to which share of active latents the sparse step is the cheaper one.

The same ReLU step is taken by sparse sums and by matmuls, at several shares of positive pre-activations (set through
the encoder's bias). `Kernels.max_density` of each set of kernels comes from where the two meet.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sae.autoencoder import gradients
from sae.autoencoder.sae import SAE, SAEConfig
from sae.bench.options import BenchOptions
from sae.kernels import pick
from sae.kernels.build import library
from sae.kernels.operands import Entries, Precision, Projection
from sae.kernels.reference import Kernels

COLUMNS = ["kernels", "dtype", "density", "sparse_ms", "dense_ms", "ratio"]
D_IN, D_SAE, BATCH = 512, 8192, 1024
DENSITIES = (0.01, 0.03, 0.06, 0.1, 0.2, 0.4)


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Time both paths at every density."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    shrink = 16 if options.quick else 1
    d_in, d_sae, batch = D_IN // shrink, D_SAE // shrink, BATCH // shrink
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(0))
    rows = []
    try:
        for name in ("torch", *(["cpp"] if library().handle is not None else [])):
            for precision in (Precision.float32, Precision.bfloat16):
                sae = SAE(SAEConfig("relu", d_in, d_sae, 1.0, 0, "bench", ""))
                ordered = sae.pre_acts(x[:64]).detach().flatten().sort().values
                for density in DENSITIES:
                    with torch.no_grad():
                        sae.b_enc.fill_(-float(ordered[int((1 - density) * (len(ordered) - 1))]))
                    rows.append(_compare(sae, x, pick("cpu", name), precision, density, 2 if options.quick else 5))
    finally:
        torch.set_num_threads(before)
    return rows


def _compare(
    sae: SAE, x: torch.Tensor, kernels: Kernels, precision: Precision, density: float, repeats: int
) -> dict[str, Any]:
    zero = torch.tensor(0.0)

    def sparse(kernels: Kernels, projection: Projection) -> Entries | None:
        return kernels.above(projection, zero)

    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    for _ in range(repeats + 1):
        for path, select in (("sparse", sparse), ("dense", lambda *arguments: None)):
            sae.sparsity.select = select  # type: ignore[method-assign]
            start = time.perf_counter()
            gradients.loss_and_gradients(sae, x, 0, None, kernels=kernels, precision=precision)
            times[path].append(1e3 * (time.perf_counter() - start))
    sparse_ms, dense_ms = (statistics.median(times[path][1:]) for path in ("sparse", "dense"))
    return {
        "kernels": kernels.name,
        "dtype": precision.value,
        "density": density,
        "sparse_ms": sparse_ms,
        "dense_ms": dense_ms,
        "ratio": sparse_ms / dense_ms,
    }
