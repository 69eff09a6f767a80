"""Suite `quality`: what is learned in the same number of steps, on real activations.

FVU and L0 are held-out, with latents chosen as a finished SAE does. All take the same batches in the same order, the
same peak learning rate, warm-up over 5% and decay over the last 20% of the steps, and call a latent dead after the same
number of silent tokens. FVU compares only at equal L0.
"""

import shutil
from pathlib import Path
from typing import Any

from sae.bench.contest import Case, Outcome, build, compare, evaluate
from sae.bench.data import Data
from sae.bench.harvested import ORGANISM, harvested
from sae.bench.options import BenchOptions
from sae.bench.process import OUR_DEFAULT, OUR_REFERENCE, Contestant, Worker, workers
from sae.bench.workers.protocol import FLOAT32, INFERENCE
from sae.errors import UserError
from sae.report.progress import Progress

COLUMNS = [
    "data", "architecture", "d_in", "d_sae", "k", "peer", "n_steps", "fvu_ours", "fvu_peer", "l0_ours", "l0_peer",
]  # fmt: skip
ARCHITECTURES = ("topk", "batch_topk", "jumprelu")
D_SAE, K, BATCH_TOKENS = 1024, 16, 1024
N_TOKENS, N_HELD_OUT = 400_000, 20_000
DEAD_AFTER_STEPS = 1_000  # SAELens's default, in everybody's units
TURN = 25  # steps between two signs of life


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Train every contestant on every model's activations."""
    peers = [OUR_REFERENCE]
    if "sae-lens" in options.peers:
        peers.append(Contestant("sae-lens", FLOAT32))
    rows = []
    try:
        with workers([OUR_DEFAULT, *peers], options) as alive:
            for model in options.models:
                data = _open(folder / "data", model, options)
                for architecture in ARCHITECTURES if data is not None else ():
                    assert data is not None
                    rows += _compare_all(alive, peers, _case(architecture, data, options), data, options)
    finally:
        shutil.rmtree(folder / "data", ignore_errors=True)
    return rows


def _open(folder: Path, model: str, options: BenchOptions) -> Data | None:
    """The model's activations; None, with a sentence, when it or its text is not there."""
    n_tokens, n_held_out = (2_000, 500) if options.quick else (N_TOKENS, N_HELD_OUT)
    batch_tokens = 64 if options.quick else BATCH_TOKENS
    if model != ORGANISM and not options.text:
        print(f"bench quality: {model!r} is skipped, since bench.text= names no text for it to read")
        return None
    try:
        return harvested(
            folder, model, options.text, batch_tokens=batch_tokens, n_tokens=n_tokens, n_held_out=n_held_out
        )
    except UserError as error:
        print(f"bench quality: {model!r} is skipped: {error}")
        return None


def _case(architecture: str, data: Data, options: BenchOptions) -> Case:
    if options.quick:
        return Case(architecture, data.d_in, 128, 4, 64)
    return Case(architecture, data.d_in, D_SAE, K, BATCH_TOKENS)


def _compare_all(
    alive: dict[Contestant, Worker], peers: list[Contestant], case: Case, data: Data, options: BenchOptions
) -> list[dict[str, Any]]:
    n_steps = 20 if options.quick else options.steps
    outcomes = {}
    label = f"bench quality {data.name} {case.architecture}"
    with Progress(n_steps * (1 + len(peers)), label, unit="step") as bar:
        for one in [OUR_DEFAULT, *peers]:
            outcomes[one] = _learn(alive[one], one, case, data, options, n_steps, bar)
    ours = outcomes[OUR_DEFAULT]
    return [{"data": data.name, **compare(case, ours, one, outcomes[one], options, n_steps)} for one in peers]


def _learn(
    worker: Worker,
    contestant: Contestant,
    case: Case,
    data: Data,
    options: BenchOptions,
    n_steps: int,
    bar: Progress,
) -> Outcome:
    said = build(
        worker,
        contestant,
        case,
        data,
        options,
        n_steps=n_steps,
        lr_warmup_steps=n_steps // 20,
        lr_decay_steps=n_steps // 5,
        dead_after_tokens=DEAD_AFTER_STEPS * case.batch_tokens,
    )
    for start in range(0, n_steps, TURN):
        turn = min(TURN, n_steps - start)
        worker.ask("run", n_steps=turn)
        bar.update(turn)
    found = evaluate(worker, case, data, INFERENCE)
    return Outcome(
        said["version"], said["dtype"], said["kernels"], said["options"], [], found["fvu"], found["l0"], None
    )
