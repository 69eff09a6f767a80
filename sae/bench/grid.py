"""Suite `grid`: twelve SAEs from one live stream, against twelve trained alone.

Three hook points of the organism times four sizes. `grid_ms` is the wall time of a step of the whole grid, the language
model's passes included; `sum_ms` adds up the steps of the twelve SAEs, each trained alone on activations in memory;
`lm_ms` is what the stream alone takes for a batch. ratio = grid_ms / (sum_ms + lm_ms): 1 means that training many SAEs
from one stream costs nothing on top; training them one by one would run the language model twelve times.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.activations.harvest import Passes, prepare
from sae.activations.stream import LiveStream
from sae.bench.harvested import ORGANISM, organism_documents
from sae.bench.options import BenchOptions
from sae.lm.load import load_lm
from sae.report.progress import Progress
from sae.train.grid import SAESpec, grid
from sae.train.interfaces import Stream
from sae.train.settings import TrainSettings
from sae.train.trainer import train

COLUMNS = ["n_saes", "architecture", "batch_tokens", "grid_ms", "sum_ms", "lm_ms", "ratio"]
ARCHITECTURE, K = "topk", 16
LAYERS = (0, 1, 2)
SIZES = (512, 1024, 2048, 4096)
BATCH_TOKENS = 2_048
WINDOW_PASSES = 8
N_STEPS, WARMUP_STEPS, REPEATS = 24, 4, 3


class _Size(NamedTuple):
    sizes: tuple[int, ...]
    batch_tokens: int
    n_steps: int
    warmup_steps: int
    repeats: int
    n_tokens: int


_FULL = _Size(SIZES, BATCH_TOKENS, N_STEPS, WARMUP_STEPS, REPEATS, 100_000)
_QUICK = _Size((32, 64), 128, 4, 1, 1, 2_000)


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Time the grid, its SAEs one by one, and the stream, in turns."""
    size = _QUICK if options.quick else _FULL
    with _threads(options.threads):
        hook_names = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
        open_stream = _live(hook_names, size)
        specs = grid(hook_names, size.sizes, [ARCHITECTURE], [K], [0])
        held = _Held(open_stream(), size.n_steps)
        whole: list[float] = []
        alone: dict[str, list[float]] = {spec.folder: [] for spec in specs}
        stream_only: list[float] = []
        with Progress(size.repeats * (2 + len(specs)), "bench grid", unit="part") as bar:
            for _ in range(size.repeats):
                whole.append(_train_ms(open_stream(), specs, size))
                bar.update()
                stream_only.append(_stream_ms(open_stream(), size))
                bar.update()
                for spec in specs:
                    held.load_state_dict({"next": 0})
                    alone[spec.folder].append(_train_ms(held, [spec], size))
                    bar.update()
    single_ms = {name: statistics.median(times) for name, times in alone.items()}
    grid_ms, lm_ms, sum_ms = statistics.median(whole), statistics.median(stream_only), sum(single_ms.values())
    row = {
        "data": ORGANISM,
        "architecture": ARCHITECTURE,
        "n_saes": len(specs),
        "hook_names": hook_names,
        "d_sae": list(size.sizes),
        "k": K,
        "d_in": next(iter(held.d_in.values())),
        "batch_tokens": size.batch_tokens,
        "grid_ms": grid_ms,
        "sum_ms": sum_ms,
        "lm_ms": lm_ms,
        "ratio": grid_ms / (sum_ms + lm_ms),
        "single_ms": single_ms,
        "grid_ms_low": min(whole),
        "grid_ms_high": max(whole),
        "threads": options.threads,
        "n_steps": size.n_steps - size.warmup_steps,
        "repeats": size.repeats,
    }
    return [row]


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _live(hook_names: list[str], size: _Size) -> Callable[[], LiveStream]:
    """A maker of equal live streams: each starts at the beginning, with nothing in its buffer."""
    lm = load_lm(ORGANISM)
    corpus = prepare(
        lm, organism_documents(), ctx_len=128, packing="auto", n_tokens=size.n_tokens, n_held_out_tokens=100
    )
    passes = Passes(lm, corpus.train, hook_names, batch_tokens=size.batch_tokens)

    def open_stream() -> LiveStream:
        return LiveStream(
            passes,
            n_passes=len(passes),
            passes_per_window=min(WINDOW_PASSES, len(passes)),
            d_in=passes.d_in,
            batch_tokens=size.batch_tokens,
        )

    return open_stream


class _Batch(NamedTuple):
    acts: dict[str, Tensor]


class _Held:
    """The first batches of a stream, kept in memory, over and over."""

    def __init__(self, stream: LiveStream, n_batches: int) -> None:
        self._batches = [_Batch(stream.next_batch().acts) for _ in range(n_batches)]
        self._next = 0
        self.d_in, self.batch_tokens = stream.d_in, stream.batch_tokens

    def next_batch(self) -> _Batch:
        """The next one."""
        self._next += 1
        return self._batches[(self._next - 1) % len(self._batches)]

    def state_dict(self) -> dict[str, Any]:
        """Position."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._next = state["next"]


def _train_ms(stream: Stream, specs: list[SAESpec], size: _Size) -> float:
    """Mean wall milliseconds of a step after the warm-up, by the trainer itself."""
    settings = TrainSettings(
        total_tokens=size.n_steps * size.batch_tokens,
        batch_tokens=size.batch_tokens,
        checkpoint_seconds=0,
        log_every=10**6,
    )
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            stream,
            specs,
            settings,
            folder,
            lm_name=ORGANISM,
            progress=lambda done, total: marks.append(time.perf_counter()),
        )
    return 1e3 * (marks[-1] - marks[size.warmup_steps - 1]) / (size.n_steps - size.warmup_steps)


def _stream_ms(stream: LiveStream, size: _Size) -> float:
    """Mean wall milliseconds of a batch of the stream: the same batches, so the same passes, as the grid is given."""
    for _ in range(size.warmup_steps):
        stream.next_batch()
    start = time.perf_counter()
    for _ in range(size.n_steps - size.warmup_steps):
        stream.next_batch()
    return 1e3 * (time.perf_counter() - start) / (size.n_steps - size.warmup_steps)
