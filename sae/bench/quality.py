"""Suite `quality`: what is learned in the same number of steps, on real activations.

FVU and L0 are held-out, with latents chosen as a finished SAE does; FVU compares only at equal L0. All take the same
batches in the same order, warm up over 5% and decay over the last 20% of the steps, and call a latent dead after the
same number of silent tokens. A learning rate means something else in every parametrisation, so ours is its default, and
each peer has the best for it, on the held-out tokens and the first seed, of three rates a factor of four apart.

Beside the peers stand controls that must not learn their dictionary (see `sae.train.controls`): what they reach is no
sign of features found. Figures are means over seeds (the reference has one), low and high the extremes; with one seed
there is no saying how much of a difference is chance.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from sae.bench.contest import Case, build, evaluate
from sae.bench.data import Data
from sae.bench.harvested import ORGANISM, harvested
from sae.bench.options import BenchOptions
from sae.bench.process import OUR_DEFAULT, OUR_REFERENCE, Contestant, Worker, workers
from sae.bench.workers.protocol import FLOAT32, INFERENCE
from sae.errors import UserError
from sae.report.progress import Progress

COLUMNS = [
    "data", "architecture", "d_sae", "k", "peer", "lr_peer", "fvu_ours", "fvu_peer", "ratio", "l0_ours", "l0_peer",
    "dead_ours", "dead_peer",
]  # fmt: skip
ARCHITECTURES = ("topk", "batch_topk", "jumprelu")
CONTROLS = ("frozen_decoder", "random")
LEARNING_RATES = (8e-4, 3.2e-3, 1.28e-2)
D_SAE, K, BATCH_TOKENS = 1024, 16, 1024
N_TOKENS, N_HELD_OUT = 400_000, 20_000
DEAD_AFTER = 0.05  # of the run
TURN = 25  # steps between two signs of life


class Learned(NamedTuple):
    """One SAE at the end of its run."""

    fvu: float
    l0: float
    dead_fraction: float
    """Latents that fire on no held-out token."""


class Peer(NamedTuple):
    """Who stands beside us."""

    name: str
    contestant: Contestant
    learning_rates: tuple[float | None, ...]
    control: str = ""
    seeds: tuple[int, ...] = (0,)


def peers(options: BenchOptions) -> list[Peer]:
    """Everybody but ours."""
    seeds = tuple(range(options.seeds))
    foreign = [name for name in ("sae-lens", "dictionary_learning") if name in options.peers]
    return [
        Peer(OUR_REFERENCE.name, OUR_REFERENCE, (None,)),  # one seed: dense, so slow, and ours but for rounding
        *(Peer(name, Contestant(name, FLOAT32), LEARNING_RATES, seeds=seeds) for name in foreign),
        *(Peer(f"control: {name}", OUR_DEFAULT, (None,), name, seeds) for name in CONTROLS),
    ]


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Train every contestant on every model's activations."""
    beside = peers(options)
    rows = []
    try:
        with workers(list(dict.fromkeys([OUR_DEFAULT, *(peer.contestant for peer in beside)])), options) as alive:
            for model in options.models:
                data = _open(folder / "data", model, options)
                for architecture in ARCHITECTURES if data is not None else ():
                    assert data is not None
                    rows += _compare_all(alive, beside, _case(architecture, data, options), data, options)
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
    alive: dict[Contestant, Worker], beside: list[Peer], case: Case, data: Data, options: BenchOptions
) -> list[dict[str, Any]]:
    n_steps = 20 if options.quick else options.steps
    everybody = [Peer("ours", OUR_DEFAULT, (None,), seeds=tuple(range(options.seeds))), *beside]
    n_runs = sum(len(peer.learning_rates) + len(peer.seeds) - 1 for peer in everybody)
    rows = []
    label = f"bench quality {data.name} {case.architecture}"
    with Progress(n_steps * n_runs, label, unit="step") as bar:
        for peer in everybody:
            rows.append(_learn_all(alive[peer.contestant], peer, case, data, options, n_steps, bar))
    ours = {f"{name}_ours": value for name, value in rows[0].items()}
    return [
        {
            "data": data.name,
            "architecture": case.architecture,
            "d_in": case.d_in,
            "d_sae": case.d_sae,
            "k": case.k,
            "batch_tokens": case.batch_tokens,
            "peer": peer.name,
            "n_steps": n_steps,
            "n_seeds": options.seeds,
            "threads": options.threads,
            **ours,
            **{f"{name}_peer": value for name, value in row.items()},
            "ratio": _ratio(row["fvu_by_seed"], ours["fvu_by_seed_ours"]),
        }
        for peer, row in zip(beside, rows[1:], strict=True)
    ]


def _ratio(peer: list[float], ours: list[float]) -> float:
    """Of the means over the seeds that both had."""
    return sum(peer) / sum(ours[: len(peer)])


def _learn_all(
    worker: Worker, peer: Peer, case: Case, data: Data, options: BenchOptions, n_steps: int, bar: Progress
) -> dict[str, Any]:
    """All seeds at the best learning rate."""

    def learn(lr: float | None, seed: int) -> tuple[Learned, dict[str, Any]]:
        said = build(
            worker,
            peer.contestant,
            case,
            data,
            options,
            lr=lr,
            n_steps=n_steps,
            lr_warmup_steps=n_steps // 20,
            lr_decay_steps=n_steps // 5,
            dead_after_tokens=max(1, int(DEAD_AFTER * n_steps)) * case.batch_tokens,
            control=peer.control,
            seed=seed,
        )
        for start in range(0, n_steps, TURN):
            turn = min(TURN, n_steps - start)
            worker.ask("run", n_steps=turn)
            bar.update(turn)
        found = evaluate(worker, case, data, INFERENCE)
        return Learned(found["fvu"], found["l0"], found["dead_fraction"]), said

    tried = {lr: learn(lr, peer.seeds[0]) for lr in peer.learning_rates}
    lr = min(tried, key=lambda rate: tried[rate][0].fvu)
    said = tried[lr][1]
    all_seeds = [tried[lr][0], *(learn(lr, seed)[0] for seed in peer.seeds[1:])]
    fvus = [found.fvu for found in all_seeds]
    return {
        "fvu": sum(fvus) / len(fvus),
        "fvu_by_seed": fvus,
        "fvu_low": min(fvus),
        "fvu_high": max(fvus),
        "l0": sum(found.l0 for found in all_seeds) / len(all_seeds),
        "dead": sum(found.dead_fraction for found in all_seeds) / len(all_seeds),
        "lr": lr,
        "fvu_by_lr": {str(rate): found.fvu for rate, (found, _) in tried.items()},
        "version": said["version"],
        "dtype": said["dtype"],
        "kernels": said["kernels"],
        "options": said["options"],
    }
