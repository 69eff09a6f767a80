"""Suite `cuda`: the training step on a GPU: tokens a second, share of the matmul ceiling, peak memory.

Contestants take their turns one after another, each alone on the GPU. The ceiling is the rate of a large bf16 matmul,
measured here. `mfu` counts the operations a sparse step needs, 2 d_in d_sae for the encoder and 8 d_in k for the rest a
token; `dense_mfu` counts the 12 d_in d_sae of a dense one, so it can exceed 1 where work is avoided.
"""

import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sae.bench.contest import Case, Outcome, race, summarise
from sae.bench.data import Data, synthetic
from sae.bench.options import REFERENCE, BenchOptions
from sae.bench.process import OUR_DEFAULT, OUR_REFERENCE, OURS, Contestant, workers
from sae.bench.workers.protocol import AUTOCAST, FLOAT32
from sae.errors import UserError

COLUMNS = ["peer", "d_in", "d_sae", "k", "batch_tokens", "ms", "mtok_s", "mfu", "dense_mfu", "peak_gib", "ratio"]
CASES = [Case("topk", 2304, 65536, 64, 4096), Case("topk", 2304, 65536, 64, 16384)]
QUICK_CASES = [Case("topk", 64, 512, 4, 256)]
PEERS = [
    OUR_REFERENCE,
    Contestant("sae-lens", FLOAT32),
    Contestant("sae-lens", AUTOCAST),
    Contestant("sparsify", FLOAT32),
    Contestant("dictionary_learning", FLOAT32),
]
N_BATCHES = 4
CEILING_SIZE, CEILING_REPEATS = 8192, 20


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Time every contestant; nothing, with a sentence, where there is no GPU."""
    if not torch.cuda.is_available():
        print("bench cuda: this machine has no CUDA device, so nothing was measured")
        return []
    options = replace(options, turn_steps=4 * options.turn_steps, warmup_steps=2 * options.warmup_steps)
    peers = [one for one in PEERS if one.name in {*options.peers, REFERENCE}]
    ceiling = matmul_ceiling()
    rows = []
    try:
        for case in QUICK_CASES if options.quick else CASES:
            data = synthetic(folder / "data", d_in=case.d_in, batch_tokens=case.batch_tokens, n_batches=N_BATCHES)
            ours_ms = None
            for one, outcome in _alone([OUR_DEFAULT, *peers], case, data, options):
                row = _row(case, one, outcome, ceiling, options)
                ours_ms = row["ms"] if one.name == OURS else ours_ms
                rows.append({**row, "ratio": None if ours_ms is None else row["ms"] / ours_ms})
    finally:
        shutil.rmtree(folder / "data", ignore_errors=True)
    return rows


def _alone(
    contestants: list[Contestant], case: Case, data: Data, options: BenchOptions
) -> Iterator[tuple[Contestant, Outcome]]:
    """Each in turn, with the GPU to itself; one that cannot (out of memory, say) is passed over with a sentence."""
    for one in contestants:
        try:
            with workers([one], options) as alive:
                outcome = race(alive, case, data, options, device="cuda")[one]
        except UserError as error:
            if one.name == OURS:
                raise
            print(f"bench cuda: {one.name} {one.precision} at batch {case.batch_tokens} is left out: {error}")
            continue
        yield one, outcome


def _row(case: Case, contestant: Contestant, outcome: Outcome, ceiling: float, options: BenchOptions) -> dict[str, Any]:
    found = summarise(outcome.ms)
    per_second = case.batch_tokens / (found.median / 1e3)
    needed = 2 * case.d_in * case.d_sae + 8 * case.d_in * case.k
    dense = 12 * case.d_in * case.d_sae
    return {
        **asdict(case),
        "peer": contestant.name,
        "peer_version": outcome.version,
        "dtype": outcome.dtype,
        "kernels": outcome.kernels,
        "ms": found.median,
        "ms_low": found.low,
        "ms_high": found.high,
        "mtok_s": per_second / 1e6,
        "mfu": per_second * needed / ceiling,
        "dense_mfu": per_second * dense / ceiling,
        "peak_gib": None if outcome.peak_bytes is None else outcome.peak_bytes / 2**30,
        "ceiling_tflops": ceiling / 1e12,
        "fvu": outcome.fvu,
        "l0": outcome.l0,
        "n_steps": options.n_steps,
        "options": outcome.options,
    }


def matmul_ceiling(size: int = CEILING_SIZE) -> float:
    """Operations a second of a square bf16 matmul on the GPU, the median of several."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for repeat in range(CEILING_REPEATS + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        if repeat >= 3:  # the first ones choose an algorithm and wake the clock
            times.append(time.perf_counter() - start)
    del a, b
    torch.cuda.empty_cache()
    return 2 * size**3 / statistics.median(times)
