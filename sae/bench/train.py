"""Suite `train`: milliseconds of one training step, beside the peers', on synthetic activations.

Everybody gets the same bytes: mixtures of 8 out of 4 d_in features in superposition. FVU and L0 are held-out, after the
same few steps, with latents chosen as in training; they show what was being trained when the clock ran, not how well it
ends (suite `quality` does). What our step costs depends on L0, which relu only brings down in the course of training.
"""

import shutil
from pathlib import Path
from typing import Any

from sae.bench.contest import Case, compare, race
from sae.bench.data import Data, synthetic
from sae.bench.options import REFERENCE, BenchOptions
from sae.bench.process import OUR_DEFAULT, OUR_REFERENCE, Contestant, workers
from sae.bench.workers.protocol import AUTOCAST, FLOAT32
from sae.report.progress import Progress

COLUMNS = [
    "architecture", "d_in", "d_sae", "k", "peer", "dtype", "ours_ms", "peer_ms", "ratio",
    "fvu_ours", "fvu_peer", "l0_ours", "l0_peer",
]  # fmt: skip
MAX_BATCHES = 64  # on disk; longer runs go through them again

SAE_LENS = Contestant("sae-lens", FLOAT32)
SAE_LENS_HALF = Contestant("sae-lens", AUTOCAST)
SPARSIFY = Contestant("sparsify", FLOAT32)
DICTIONARY_LEARNING = Contestant("dictionary_learning", FLOAT32)

CASES: list[tuple[Case, list[Contestant]]] = [
    (
        Case("topk", 512, 8192, 32, 2048),
        [SAE_LENS, SAE_LENS_HALF, SPARSIFY, DICTIONARY_LEARNING, OUR_REFERENCE],
    ),
    (Case("batch_topk", 512, 8192, 32, 2048), [SAE_LENS, DICTIONARY_LEARNING, OUR_REFERENCE]),
    (Case("jumprelu", 512, 8192, 32, 2048), [SAE_LENS, DICTIONARY_LEARNING, OUR_REFERENCE]),
    (Case("relu", 512, 8192, 32, 2048), [SAE_LENS, OUR_REFERENCE]),
    (Case("topk", 768, 16384, 32, 2048), [SAE_LENS, SPARSIFY, OUR_REFERENCE]),
]
"""Who is raced at what."""


def cases(options: BenchOptions) -> list[tuple[Case, list[Contestant]]]:
    """The cases with the contestants that are asked for; the reference always takes part."""
    wanted = {*options.peers, REFERENCE}
    found = [(case, [one for one in peers if one.name in wanted]) for case, peers in CASES]
    if not options.quick:
        return found
    return [(Case(case.architecture, case.d_in // 16, case.d_sae // 64, 4, 64), peers) for case, peers in found]


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Race every case."""
    chosen = cases(options)
    everybody = list(dict.fromkeys([OUR_DEFAULT, *(one for _, peers in chosen for one in peers)]))
    n_turns = sum((1 + len(peers)) * (1 + options.repeats) for _, peers in chosen)
    rows = []
    files: dict[tuple[int, int], Data] = {}
    try:
        with workers(everybody, options) as alive, Progress(n_turns, "bench train", unit="turn") as bar:
            for case, peers in chosen:
                shape = case.d_in, case.batch_tokens
                if shape not in files:
                    n_batches = min(MAX_BATCHES, options.n_steps)
                    files[shape] = synthetic(
                        folder / "data", d_in=case.d_in, batch_tokens=case.batch_tokens, n_batches=n_batches
                    )
                racing = {one: alive[one] for one in [OUR_DEFAULT, *peers]}
                outcomes = race(racing, case, files[shape], options, progress=bar.update)
                rows += [
                    compare(case, outcomes[OUR_DEFAULT], one, outcomes[one], options, options.n_steps) for one in peers
                ]
    finally:
        shutil.rmtree(folder / "data", ignore_errors=True)
    return rows
