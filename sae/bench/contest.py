"""Timed and untimed contests between workers on the same activations, and the rows that come of them."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from sae.bench.data import Data
from sae.bench.options import BenchOptions
from sae.bench.process import Contestant, Worker
from sae.bench.workers.protocol import TRAINING, Request

LOW, HIGH = 10, 90
"""Percentiles that stand beside a median."""


@dataclass(frozen=True)
class Case:
    """What is trained."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch_tokens: int

    @property
    def lr(self) -> float:
        """Everybody's learning rate where times are compared: 2e-4 / sqrt(d_sae / 2^14), as sparsify has it."""
        return float(2e-4 / (self.d_sae / 2**14) ** 0.5)


class Outcome(NamedTuple):
    """How one contestant did."""

    version: str
    dtype: str
    kernels: str
    options: str
    ms: list[float]
    """Of each timed step; on a GPU the mean of each turn."""
    fvu: float
    l0: float
    peak_bytes: int | None
    """GPU memory, inputs included."""


class Median(NamedTuple):
    """A median and its spread."""

    median: float
    low: float
    high: float


def summarise(values: list[float]) -> Median:
    """Median with the 10th and 90th percentile."""
    low, high = np.percentile(values, [LOW, HIGH]).tolist()
    return Median(statistics.median(values), low, high)


def build(
    worker: Worker, contestant: Contestant, case: Case, data: Data, options: BenchOptions, **more: Any
) -> dict[str, Any]:
    """Let a worker build its SAE and open the activations. Returns what it says of itself.

    `more` are fields of `Request`; the learning rate is the case's where none is given.
    """
    chosen = {"lr": case.lr, **more}
    request = Request(**asdict(case), precision=contestant.precision, threads=options.threads, **chosen)
    said = {**worker.ask("hello"), **worker.ask("build", **asdict(request))}
    worker.ask("load", path=str(data.train.resolve()))
    return said


def race(
    workers: dict[Contestant, Worker],
    case: Case,
    data: Data,
    options: BenchOptions,
    *,
    device: str = "cpu",
    progress: Callable[[], None] = lambda: None,
) -> dict[Contestant, Outcome]:
    """Time a training step of every contestant, in turns.

    Each takes its warm-up steps, which are not counted; then, `repeats` times over, each takes `turn_steps` steps while
    the others wait. All of them take the same number of steps on the same batches, and are evaluated at the end with
    latents chosen as in training.
    """
    said = {
        one: build(worker, one, case, data, options, n_steps=options.n_steps, device=device)
        for one, worker in workers.items()
    }
    for worker in workers.values():
        worker.ask("run", n_steps=options.warmup_steps)
        progress()
    ms: dict[Contestant, list[float]] = {one: [] for one in workers}
    peak: dict[Contestant, int | None] = {}
    for _ in range(options.repeats):
        for one, worker in workers.items():
            turn = worker.ask("run", n_steps=options.turn_steps)
            ms[one] += turn["ms"]
            peak[one] = turn.get("peak_bytes")
            progress()
    return {
        one: _outcome(said[one], ms[one], evaluate(worker, case, data, TRAINING), peak[one])
        for one, worker in workers.items()
    }


def evaluate(worker: Worker, case: Case, data: Data, selection: str) -> dict[str, Any]:
    """FVU and L0 on the held-out tokens."""
    return worker.ask(
        "evaluate", path=str(data.held_out.resolve()), batch_tokens=case.batch_tokens, selection=selection
    )


def _outcome(said: dict[str, Any], ms: list[float], found: dict[str, Any], peak: int | None) -> Outcome:
    return Outcome(
        said["version"], said["dtype"], said["kernels"], said["options"], ms, found["fvu"], found["l0"], peak
    )


def compare(
    case: Case, ours: Outcome, contestant: Contestant, peer: Outcome, options: BenchOptions, n_steps: int
) -> dict[str, Any]:
    """One row: a peer beside us. Times are milliseconds a step; ratio = peer_ms / ours_ms, where both were timed."""
    row = {
        **asdict(case),
        "peer": contestant.name,
        "peer_version": peer.version,
        "ours_ms": None,
        "peer_ms": None,
        "ratio": None,
        "fvu_ours": ours.fvu,
        "fvu_peer": peer.fvu,
        "l0_ours": ours.l0,
        "l0_peer": peer.l0,
        "dtype": peer.dtype,
        "ours_dtype": ours.dtype,
        "ours_kernels": ours.kernels,
        "threads": options.threads,
        "n_steps": n_steps,
        "lr": case.lr,
        "options": peer.options,
        "ours_options": ours.options,
    }
    for who, outcome in (("ours", ours), ("peer", peer)):
        if outcome.ms:
            row |= {f"{who}_{key}": value for key, value in _times(outcome.ms).items()}
    if ours.ms and peer.ms:
        row["ratio"] = row["peer_ms"] / row["ours_ms"]
    return row


def _times(ms: list[float]) -> dict[str, float]:
    found = summarise(ms)
    return {"ms": found.median, "ms_low": found.low, "ms_high": found.high}
