"""Time the parts of the pipeline on this machine: harvest, store, training step, generation.

    make bench                                  # or: python scripts/bench/pipeline.py [--repeats 5]

Prints a table of medians with the spread, and writes `runs/bench/result.json`. Figures are wall times of the parts
alone, on the model organism and on random activations; compare them only with figures of the same machine.
"""

import argparse
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import sae
from sae.activations.harvest import Passes, harvest, prepare
from sae.activations.store import StoreReader
from sae.activations.stream import StoreStream
from sae.config import DataConfig
from sae.files import versions, write_json
from sae.report.terminal import summary_table
from sae.stages.common import open_documents
from sae.train.grid import grid
from sae.train.settings import TrainSettings
from sae.train.trainer import train

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]


class Timing(NamedTuple):
    what: str
    median: float
    low: float
    high: float
    unit: str


def timed(what: str, unit: str, repeats: int, measure: Callable[[], float]) -> Timing:
    """Measure once to warm up, then `repeats` times."""
    measure()
    values = [measure() for _ in range(repeats)]
    return Timing(what, statistics.median(values), min(values), max(values), unit)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class RandomStream:
    """Activations drawn once, so that training alone is timed."""

    fingerprint = ""

    def __init__(self, d_in: int, batch_tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
        active = (torch.rand(16 * batch_tokens, 4 * d_in, generator=generator) < 8 / (4 * d_in)).float()
        self._acts = active @ features
        self.d_in = {"random": d_in}
        self.batch_tokens = batch_tokens
        self._next = 0

    def next_batch(self):
        start = self._next % 16 * self.batch_tokens
        self._next += 1

        class Batch:
            acts = {"random": self._acts[start : start + self.batch_tokens]}  # noqa: RUF012

        return Batch

    def state_dict(self):
        return {"next": self._next}

    def load_state_dict(self, state):
        self._next = state["next"]


def step_ms(architecture: str, d_in: int, d_sae: int, batch_tokens: int, n_steps: int = 20) -> float:
    """Milliseconds of one training step, over a short run (start-up excluded)."""
    settings = TrainSettings(
        total_tokens=n_steps * batch_tokens, batch_tokens=batch_tokens, checkpoint_seconds=0, log_every=10**6
    )
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            RandomStream(d_in, batch_tokens),
            grid(["random"], [d_sae], [architecture], [32], [0]),
            settings,
            folder,
            lm_name="",
            progress=lambda done, total: marks.append(time.perf_counter()),
        )
    return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(marks))


def measure_all(repeats: int) -> list[Timing]:
    shape = {"d_in": 512, "d_sae": 4096, "batch_tokens": 2048}
    rows = [
        timed(
            f"train step, {name}, d_in 512, d_sae 4096, L0 32, batch 2048",
            "ms",
            repeats,
            partial(step_ms, name, **shape),
        )
        for name in ("topk", "batch_topk", "jumprelu", "relu")
    ]
    lm = sae.load_lm("organism")
    corpus = prepare(
        lm,
        open_documents(DataConfig(path="organism")),
        ctx_len=64,
        packing="auto",
        n_tokens=50_000,
        n_held_out_tokens=1_000,
    )
    passes = Passes(lm, corpus.train, HOOKS, batch_tokens=8_192)

    def harvest_rate() -> float:
        with tempfile.TemporaryDirectory() as folder:
            took = seconds(lambda: harvest(passes, Path(folder), shard_tokens=16_384, dtype="bfloat16", seed=0))
        return passes.n_tokens / took / 1e3

    rows.append(timed("harvest the organism, 3 hook points, store written", "k tok/s", repeats, harvest_rate))
    with tempfile.TemporaryDirectory() as folder:
        harvest(passes, Path(folder), shard_tokens=16_384, dtype="bfloat16", seed=0)
        reader = StoreReader(folder)

        def read_rate() -> float:
            stream = StoreStream(reader, batch_tokens=2_048)
            n = passes.n_tokens // 2_048

            def read() -> None:
                for _ in range(n):  # as float32, as training takes them: mapped files are not read until touched
                    for block in stream.next_batch().acts.values():
                        block.float()

            return reader.info.n_bytes / seconds(read) / 1e6

        rows.append(timed("read the store in batches of 2048, 3 hook points", "MB/s", repeats, read_rate))
    chats = [[{"role": "user", "content": "what is the capital of arden ?"}]] * 64
    prompts = lm.tokenize_chats(chats)

    def generation_rate() -> float:
        return 64 * 12 / seconds(lambda: lm.generate(prompts, 12))

    rows.append(timed("generate, 64 prompts, KV cache (12 steps at most)", "tok/s", repeats, generation_rate))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each part (default 5)")
    parser.add_argument("--out", default="runs/bench/result.json", help="where the JSON goes")
    options = parser.parse_args()
    rows = measure_all(options.repeats)
    print(summary_table([row._asdict() for row in rows], list(Timing._fields)))
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    write_json(options.out, {"schema_version": 1, "machine": machine, "versions": versions(), "rows": rows})
    print(options.out)


if __name__ == "__main__":
    main()
