"""Suite `memory`: what each way of keeping Adam's moments costs, in bytes, time and quality.

Bytes per parameter are those of a weight, its gradient and its moments, counted on the tensors themselves. FVU is
held out, after the same steps from the same batches, on random sparse mixtures.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.autoencoder import loss
from sae.bench.data import Data, synthetic
from sae.bench.options import BenchOptions
from sae.kernels import pick, pick_precision
from sae.kernels.moments import KINDS
from sae.train.grid import SAESpec
from sae.train.initialise import input_stats
from sae.train.run import SAERun
from sae.train.settings import TrainSettings

COLUMNS = ["moments", "bytes_per_parameter", "step_ms", "fvu", "relative_to_float32"]
D_IN, D_SAE, K, BATCH, N_BATCHES = 256, 2048, 16, 1024, 16


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Train the same SAE with each kind of moments."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        data = synthetic(folder, d_in=D_IN, batch_tokens=BATCH, n_batches=N_BATCHES)
        rows = [_measure(data, kind, 20 if options.quick else options.steps) for kind in KINDS]
    finally:
        torch.set_num_threads(before)
    for row in rows:
        row["relative_to_float32"] = row["fvu"] / rows[0]["fvu"]
    return rows


def _measure(data: Data, kind: str, n_steps: int) -> dict[str, Any]:
    batches, held_out = (torch.from_numpy(np.load(path)) for path in (data.train, data.held_out))
    settings = TrainSettings(total_tokens=n_steps * BATCH, batch_tokens=BATCH, moments=kind, lr=1e-3)
    spec, device = SAESpec("bench", "topk", D_SAE, K, 0), torch.device("cpu")
    sae = SAERun(spec, {spec.hook_name: D_IN}, settings, "", "", device, pick("cpu"), pick_precision("cpu"))
    stats = input_stats(batches[:4].flatten(0, 1), "bench")
    sae.initialise({spec.hook_name: stats})
    times = []
    for step in range(n_steps):
        start = time.perf_counter()
        sae.train_step(sae.inputs({spec.hook_name: batches[step % N_BATCHES]}), step)
        times.append(1e3 * (time.perf_counter() - start))
    held_out = held_out * stats.scale
    n_parameters = 2 * D_IN * D_SAE
    moments = sum(
        tensor.numel() * tensor.element_size()
        for name in ("W_enc", "W_dec")
        for tensor in sae.optimiser.parts[name].moments.tensors().values()
    )
    return {
        "moments": kind,
        "bytes_per_parameter": 4 + 4 + moments / n_parameters,
        "step_ms": statistics.median(times),
        "fvu": float(loss.fvu(held_out, sae.sae(held_out).recons.detach())),
        "n_steps": n_steps,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": K,
        "batch_tokens": BATCH,
    }
