"""Suite `harvest`: tokens a second from tokens to activations, the store on disk included in ours.

A randomly initialised model of GPT-2 small's shape, its residual stream behind block 6, on two contexts. The paths:

    ours                    `sae harvest` behind tokenising: passes of the model and a finished, checksummed store
    bare truncated forward  Hugging Face's model with the blocks behind the hook point removed; keeps nothing
    sae-lens                its `ActivationsStore`: run_with_cache(names_filter, stop_at_layer) and its mixing buffer
    run_with_cache          TransformerLens's cache of every hook point

Each path is a process; they take turns on the same tokens. `ratio` is ours, in bfloat16, over the path: how many times
as many tokens a second, in the median turn. `error` is the relative distance of a sample from the bare forward in
float32.
"""

import shutil
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae.bench.options import BenchOptions
from sae.bench.process import WORKERS, Worker
from sae.errors import UserError

COLUMNS = ["path", "dtype", "store", "ctx", "tokens_per_s", "low", "high", "ratio", "error", "version"]
SAE_LENS = "sae-lens"


class Entry(NamedTuple):
    """One path in one precision."""

    path: str
    way: str
    dtype: str
    store: str = ""
    foreign: bool = False


REFERENCE = Entry("bare truncated forward", "bare", "float32")
OURS = Entry("ours", "ours", "bfloat16", "bfloat16")
SHORT = [
    OURS,
    Entry("bare truncated forward", "bare", "bfloat16"),
    Entry("ours", "ours", "bfloat16", "int8"),
    Entry("ours", "ours", "float32", "bfloat16"),
    REFERENCE,
    Entry("sae-lens ActivationsStore", "sae-lens", "float32", foreign=True),
    Entry("sae-lens ActivationsStore, autocast_lm", "sae-lens autocast_lm", "float32", foreign=True),
    Entry("transformer-lens run_with_cache", "run_with_cache", "float32", foreign=True),
]
LONG = [OURS, Entry("bare truncated forward", "bare", "bfloat16"), REFERENCE]


class Size(NamedTuple):
    """How much is done."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab: int
    hook_layer: int
    contexts: tuple[int, int]
    batch_tokens: int
    turn_tokens: int
    turns: int


FULL = Size(12, 768, 12, 50_257, 6, (128, 1024), 4_096, 16_384, 5)
QUICK = Size(2, 32, 2, 300, 0, (16, 64), 256, 8_192, 1)


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Time every path."""
    size = QUICK if options.quick else FULL._replace(turns=min(options.repeats, FULL.turns))
    foreign = SAE_LENS in options.peers
    scratch = folder / "harvest-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _save_model(scratch / "model", size)
        rows = []
        for ctx, entries in zip(size.contexts, (SHORT, LONG), strict=True):
            taking_part = [entry for entry in entries if foreign or not entry.foreign]
            rows += _race(taking_part, ctx, size, scratch, options) if taking_part else []
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return rows


def _race(entries: list[Entry], ctx: int, size: Size, scratch: Path, options: BenchOptions) -> list[dict[str, Any]]:
    tokens = np.random.default_rng(0).integers(0, 256, size=(size.turn_tokens // ctx, ctx))
    np.save(scratch / "tokens.npy", tokens)
    about: dict[Entry, dict[str, Any]] = {}
    rates: dict[Entry, list[float]] = {entry: [] for entry in entries}
    samples: dict[Entry, np.ndarray] = {}
    with ExitStack() as stack:
        workers = {entry: stack.enter_context(_worker(entry, options)) for entry in entries}
        for entry, worker in workers.items():
            about[entry] = worker.ask(
                "build",
                model=str(scratch / "model"),
                tokens=str(scratch / "tokens.npy"),
                hook_layer=size.hook_layer,
                batch_tokens=size.batch_tokens,
                threads=options.threads,
                scratch=str(scratch),
                way=entry.way,
                dtype=entry.dtype,
                store=entry.store,
            )
            worker.ask("sample", path=str(scratch / "sample.npy"))
            samples[entry] = np.load(scratch / "sample.npy").astype(np.float64)
        for turn in range(size.turns + 1):
            for entry, worker in workers.items():
                took = worker.ask("run")
                if turn:  # the first is for warming up
                    rates[entry].append(took["n_tokens"] / took["seconds"])
    exact = samples[REFERENCE]
    rows = []
    for entry in entries:
        rows.append(
            {
                "path": entry.path,
                "dtype": entry.dtype,
                "store": entry.store,
                "ctx": ctx,
                "batch_tokens": size.batch_tokens,
                "tokens_per_s": statistics.median(rates[entry]),
                "low": min(rates[entry]),
                "high": max(rates[entry]),
                # Turn by turn: what slows the machine down for a while slows both.
                "ratio": statistics.median(
                    ours / theirs for ours, theirs in zip(rates[OURS], rates[entry], strict=True)
                ),
                "error": float(np.linalg.norm(samples[entry] - exact) / np.linalg.norm(exact)),
                "turns": size.turns,
                "rates": rates[entry],
                **about[entry],
            }
        )
    return rows


def _worker(entry: Entry, options: BenchOptions) -> Worker:
    if not entry.foreign:
        return Worker(entry.path, [sys.executable, "-m", "sae.bench.workers.harvest_ours"], threads=options.threads)
    python = Path(options.peers_env) / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"there is no {str(python)!r}, the environment of the peers: `make peers` makes it (or name another with "
            "bench.peers_env=, or run without peers with bench.peers=[])."
        )
    return Worker(entry.path, [str(python), str(WORKERS / "harvest_peer.py")], threads=options.threads)


def _save_model(folder: Path, size: Size) -> None:
    """A GPT-2 with random weights, and a tokenizer of one token a byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = GPT2Config(
        n_layer=size.n_layer,
        n_embd=size.n_embd,
        n_head=size.n_head,
        vocab_size=size.vocab,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
