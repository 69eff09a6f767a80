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

from sae.bench.learning import Learned, Task, learn, over_seeds, run_length, tasks
from sae.bench.options import BenchOptions
from sae.bench.process import OUR_DEFAULT, OUR_REFERENCE, Contestant, Worker, workers
from sae.bench.workers.protocol import FLOAT32
from sae.report.progress import Progress

COLUMNS = [
    "data", "architecture", "d_sae", "k", "peer", "lr_peer", "fvu_ours", "fvu_peer", "ratio", "l0_ours", "l0_peer",
    "dead_ours", "dead_peer",
]  # fmt: skip
CONTROLS = ("frozen_decoder", "random")
LEARNING_RATES = (8e-4, 3.2e-3, 1.28e-2)


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
            for task in tasks("quality", folder / "data", options):
                rows += _compare_all(alive, beside, task, options)
    finally:
        shutil.rmtree(folder / "data", ignore_errors=True)
    return rows


def _compare_all(
    alive: dict[Contestant, Worker], beside: list[Peer], task: Task, options: BenchOptions
) -> list[dict[str, Any]]:
    steps = run_length(options)
    everybody = [Peer("ours", OUR_DEFAULT, (None,), seeds=tuple(range(options.seeds))), *beside]
    n_runs = sum(len(peer.learning_rates) + len(peer.seeds) - 1 for peer in everybody)
    with Progress(steps * n_runs, f"bench quality {task.label}", unit="step") as bar:
        rows = [_learn_all(alive[peer.contestant], peer, task, options, steps, bar) for peer in everybody]
    ours = {f"{name}_ours": value for name, value in rows[0].items()}
    return [
        {
            **task.columns,
            "peer": peer.name,
            "n_steps": steps,
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
    worker: Worker, peer: Peer, task: Task, options: BenchOptions, steps: int, bar: Progress
) -> dict[str, Any]:
    """All seeds at the best learning rate."""

    def run_at(lr: float | None, seed: int) -> Learned:
        return learn(
            worker, peer.contestant, task, options, n_steps=steps, lr=lr, seed=seed, bar=bar, control=peer.control
        )

    tried = {lr: run_at(lr, peer.seeds[0]) for lr in peer.learning_rates}
    lr = min(tried, key=lambda rate: tried[rate].fvu)
    said = tried[lr].said
    return {
        **over_seeds([tried[lr], *(run_at(lr, seed) for seed in peer.seeds[1:])]),
        "lr": lr,
        "fvu_by_lr": {str(rate): found.fvu for rate, found in tried.items()},
        "version": said["version"],
        "dtype": said["dtype"],
        "kernels": said["kernels"],
        "options": said["options"],
    }
