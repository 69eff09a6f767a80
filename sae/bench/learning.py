"""Learning real activations in a given number of steps: the data, what is trained on it, and one run of a contestant.

Suites `quality` and `rates` share it, so that what one finds holds for the other: everybody takes the same batches in
the same order, warms up over 5% and decays over the last 20% of the steps, calls a latent dead after 5% of the run, and
is measured on held-out tokens with latents chosen as a finished SAE does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sae.bench.contest import Case, build, evaluate
from sae.bench.data import Data
from sae.bench.harvested import ORGANISM, harvested
from sae.bench.options import BenchOptions
from sae.bench.process import Contestant, Worker
from sae.bench.workers.protocol import INFERENCE
from sae.errors import UserError
from sae.report.progress import Progress

ARCHITECTURES = ("topk", "batch_topk", "jumprelu")
D_SAE, K, BATCH_TOKENS = 1024, 16, 1024
N_TOKENS, N_HELD_OUT = 400_000, 20_000
QUICK_STEPS = 20
DEAD_AFTER = 0.05  # of the run
TURN = 25  # steps between two signs of life


class Task(NamedTuple):
    """An architecture and the activations it is to learn."""

    case: Case
    data: Data

    @property
    def label(self) -> str:
        """Both in words."""
        return f"{self.data.name} {self.case.architecture}"

    @property
    def columns(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"data": self.data.name, **asdict(self.case)}


class Learned(NamedTuple):
    """One SAE at the end of its run."""

    fvu: float
    l0: float
    dead_fraction: float
    """Latents that fire on no held-out token."""
    said: dict[str, Any]
    """What its worker says of itself."""


def tasks(suite: str, folder: Path, options: BenchOptions) -> Iterator[Task]:
    """Every architecture on every model's activations.

    A model that is not there, or has no text to read, is skipped with a sentence.

    Args:
        suite: what that sentence calls the suite.
        folder: where the activations go.
        options: with the models and the text they read.
    """
    for model in options.models:
        data = _open(suite, folder, model, options)
        for architecture in ARCHITECTURES if data is not None else ():
            assert data is not None
            sizes = (128, 4, 64) if options.quick else (D_SAE, K, BATCH_TOKENS)
            yield Task(Case(architecture, data.d_in, *sizes), data)


def run_length(options: BenchOptions) -> int:
    """Training steps of a whole run."""
    return QUICK_STEPS if options.quick else options.steps


def learn(
    worker: Worker,
    contestant: Contestant,
    task: Task,
    options: BenchOptions,
    *,
    n_steps: int,
    lr: float | None,
    seed: int,
    bar: Progress,
    control: str = "",
) -> Learned:
    """Train and evaluate one SAE.

    Args:
        worker: of the contestant.
        contestant: who learns.
        task: what.
        options: the suites'.
        n_steps: for how long.
        lr: peak learning rate; None means the contestant's own default.
        seed: of the weights.
        bar: moves with the steps.
        control: what must not be learned; see `sae.train.controls`.
    """
    case, data = task
    said = build(
        worker,
        contestant,
        case,
        data,
        options,
        lr=lr,
        n_steps=n_steps,
        lr_warmup_steps=n_steps // 20,
        lr_decay_steps=n_steps // 5,
        dead_after_tokens=max(1, int(DEAD_AFTER * n_steps)) * case.batch_tokens,
        control=control,
        seed=seed,
    )
    for start in range(0, n_steps, TURN):
        turn = min(TURN, n_steps - start)
        worker.ask("run", n_steps=turn)
        bar.update(turn)
    found = evaluate(worker, case, data, INFERENCE)
    return Learned(found["fvu"], found["l0"], found["dead_fraction"], said)


def over_seeds(found: Sequence[Learned]) -> dict[str, Any]:
    """Columns of one contestant: the mean over its seeds, and the extremes of FVU."""
    fvus = [one.fvu for one in found]
    return {
        "fvu": sum(fvus) / len(fvus),
        "fvu_by_seed": fvus,
        "fvu_low": min(fvus),
        "fvu_high": max(fvus),
        "l0": sum(one.l0 for one in found) / len(found),
        "dead": sum(one.dead_fraction for one in found) / len(found),
    }


def _open(suite: str, folder: Path, model: str, options: BenchOptions) -> Data | None:
    n_tokens, n_held_out = (2_000, 500) if options.quick else (N_TOKENS, N_HELD_OUT)
    batch_tokens = 64 if options.quick else BATCH_TOKENS
    if model != ORGANISM and not options.text:
        print(f"bench {suite}: {model!r} is skipped, since bench.text= names no text for it to read")
        return None
    try:
        return harvested(
            folder, model, options.text, batch_tokens=batch_tokens, n_tokens=n_tokens, n_held_out=n_held_out
        )
    except UserError as error:
        print(f"bench {suite}: {model!r} is skipped: {error}")
        return None
