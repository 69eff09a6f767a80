"""Suite `store`: how fast a store is read, how many bytes it takes, and what eight bits cost.

Reading, from the page cache: bytes are those stored. `files` reads the shards into one small buffer. The other paths
deliver batches, in float32 as training wants them, or copied as they are stored; the first epoch takes rows as they
lie, later ones shuffled. `ratio` is to the first epoch delivered in the same form. Cold figures, where the system lets
go of its cache, are of the disk.

Size. Bytes a token with all its fields; `ratio` is to bfloat16.

Cost of int8, each against bfloat16 (`ratio`): the squared error relative to the variance of the exact activations; the
FVU, on exact held-out activations, of a TopK SAE trained from the store (the same seeds for both; their spread is what
chance does); the cross-entropy of the model organism with its activations replaced by what a store would give back.
"""

import itertools
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.activations.harvest import Corpus, Passes, harvest, prepare
from sae.activations.layout import DTYPES, record_bytes
from sae.activations.prefetch import Prefetch
from sae.activations.quantize import dequantize, quantize
from sae.activations.store import StoreReader, StoreWriter, TokenRows
from sae.activations.stream import StoreStream
from sae.autoencoder.sae import SAE
from sae.bench.data import mixtures
from sae.bench.harvested import ORGANISM, organism_documents
from sae.bench.options import BenchOptions
from sae.lm.load import load_lm
from sae.lm.model import LanguageModel
from sae.train.grid import grid
from sae.train.settings import TrainSettings
from sae.train.trainer import train

COLUMNS = ["what", "of", "dtype", "value", "unit", "low", "high", "ratio"]
STORED = ("bfloat16", "int8")
WIDTHS = (128, 512, 768, 2304, 4096)
HOOK = "bench"
FIRST, LATER = "first epoch", "later epochs, shuffled"
BUFFER = 4 * 2**20
LR = 1e-3  # high, for a short run
DATA_SEED = 1_000  # none of the SAEs': an SAE drawn with the seed of the features would begin as their copy
MASSIVE = (40.0, -15.0, 6.0)
"""What the wide synthetic activations have besides: a few massive channels, as language models do."""


class Size(NamedTuple):
    """How much is done."""

    d_in: int
    n_tokens: int
    shard_tokens: int
    batch_tokens: int
    learn_tokens: int
    learn_batch: int
    narrow: tuple[int, int]  # d_sae and k at the organism's width
    wide: tuple[int, int, int]  # d_in, d_sae and k of the synthetic activations
    ce_tokens: int
    seeds: int


FULL = Size(768, 262_144, 65_536, 4_096, 262_144, 512, (1024, 16), (512, 2048, 16), 20_000, 4)
QUICK = Size(64, 4_096, 1_024, 256, 4_096, 256, (64, 4), (48, 96, 4), 1_000, 2)


def run(folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """Measure reading, sizes and costs."""
    size = QUICK if options.quick else FULL
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    scratch = folder / "store-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        rows = _reading(scratch / "read", size, 2 if options.quick else options.repeats)
        rows += _sizes()
        lm = load_lm(ORGANISM, device="cpu")
        corpus = prepare(
            lm,
            organism_documents(),
            ctx_len=128,
            packing="auto",
            n_tokens=size.learn_tokens,
            n_held_out_tokens=size.ce_tokens,
        )
        rows += _learning_organism(scratch / "organism", lm, corpus, size)
        rows += _learning_wide(scratch / "wide", size)
        rows += _cross_entropy(lm, corpus, scratch / "organism")
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(scratch, ignore_errors=True)
    return rows


def _row(what: str, of: str, dtype: str, values: list[float], unit: str, against: float | None) -> dict[str, Any]:
    value = statistics.median(values)
    spread = {"low": min(values), "high": max(values)} if len(values) > 1 else {"low": None, "high": None}
    ratio = None if against is None else value / against
    return {
        "what": what,
        "of": of,
        "dtype": dtype,
        "value": value,
        "unit": unit,
        **spread,
        "ratio": ratio,
        "values": values,
    }


# Reading


def _reading(folder: Path, size: Size, repeats: int) -> list[dict[str, Any]]:
    blocks = mixtures(size.d_in, size.batch_tokens)
    for dtype in STORED:
        acts = itertools.islice(blocks, 1)
        _write(folder / dtype, itertools.cycle(list(acts)), size.n_tokens, size.shard_tokens, dtype)
    paths = {
        "files": _read_files,
        FIRST: lambda store: _read_stream(store, size, epoch=0),
        "first epoch, checksums verified": lambda store: _read_stream(store, size, epoch=0, verify=True),
        LATER: lambda store: _read_stream(store, size, epoch=1),
        f"{FIRST}, prefetched": lambda store: _read_stream(store, size, epoch=0, prefetch=True),
        f"{LATER}, prefetched": lambda store: _read_stream(store, size, epoch=1, prefetch=True),
        f"{FIRST}, as stored": lambda store: _read_stream(store, size, epoch=0, dtype=None),
        f"{LATER}, as stored": lambda store: _read_stream(store, size, epoch=1, dtype=None),
    }
    # int8 is always decoded.
    pairs = [(path, dtype) for dtype in STORED for path in paths if dtype == "bfloat16" or "as stored" not in path]
    found: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for turn in range(repeats + 1):
        for path, dtype in pairs:
            rate = paths[path](folder / dtype)
            if turn:  # the first is for warming up
                found[path, dtype].append(rate)
    if hasattr(os, "posix_fadvise"):
        for path, dtype in itertools.product(("files", FIRST, LATER), STORED):
            found[f"{path}, cold", dtype] = [_cold(folder / dtype, paths[path]) for _ in range(min(3, repeats))]
    of = f"{size.n_tokens:,} x {size.d_in}"
    rows = []
    for (path, dtype), rates in found.items():
        form = next((form for form in (", prefetched", ", as stored", ", cold") if path.endswith(form)), "")
        row = _row(path, of, dtype, rates, "GB/s", None)
        # Turn by turn: what slows the machine down for a while slows both.
        ratio = statistics.median(one / two for one, two in zip(rates, found[FIRST + form, dtype], strict=True))
        rows.append({**row, "ratio": ratio})
    return rows


def _write(folder: Path, blocks: Iterator[Tensor], n_tokens: int, shard_tokens: int, dtype: str) -> None:
    first = next(blocks)
    writer = StoreWriter(folder, {HOOK: first.shape[1]}, n_tokens=n_tokens, shard_tokens=shard_tokens, dtype=dtype)
    start = 0
    for block in itertools.chain([first], blocks):
        block = block[: n_tokens - start]
        index = torch.arange(start, start + len(block), dtype=torch.int32)
        writer.add({HOOK: block}, TokenRows(index, torch.full((len(block),), 2, dtype=torch.uint8), index, index))
        start += len(block)
        if start == n_tokens:
            break
    writer.finish()


def _files(store: Path) -> list[Path]:
    return sorted(store.glob(f"shard-*/{HOOK}.safetensors"))


def _read_files(store: Path) -> float:
    """GB a second of plain reads."""
    buffer = bytearray(BUFFER)
    files = _files(store)
    n_bytes = sum(file.stat().st_size for file in files)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return n_bytes / (time.perf_counter() - start) / 1e9


def _read_stream(
    store: Path,
    size: Size,
    *,
    epoch: int,
    verify: bool = False,
    prefetch: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> float:
    """GB a second, as stored, of one epoch delivered in some type."""
    reader = StoreReader(store, verify=verify)
    stream = StoreStream(reader, batch_tokens=size.batch_tokens, dtype=dtype)
    stream.load_state_dict({"epoch": epoch, "block": 0, "row": 0})
    n_batches = size.n_tokens // size.batch_tokens
    start = time.perf_counter()
    if prefetch:
        with Prefetch(stream) as ahead:
            for _ in range(n_batches):
                ahead.next_batch()
            seconds = time.perf_counter() - start
    else:
        for _ in range(n_batches):
            acts = stream.next_batch().acts[HOOK]
            if epoch == 0 and dtype is None:  # a view of the file, of which nothing is read yet
                acts.clone()
        seconds = time.perf_counter() - start
    return reader.info.n_bytes / seconds / 1e9


def _cold(store: Path, read: Callable[[Path], float]) -> float:
    for path in _files(store):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)  # only what is on the disk can be let go
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return read(store)


# Size


def _sizes() -> list[dict[str, Any]]:
    rows = []
    for d_in in WIDTHS:
        against = record_bytes({HOOK: d_in}, "bfloat16")
        for dtype in DTYPES:
            n_bytes = record_bytes({HOOK: d_in}, dtype)
            rows.append(_row("bytes a token, fields included", f"d_in {d_in}", dtype, [n_bytes], "bytes", against))
    return rows


# Cost


def _learning_organism(folder: Path, lm: LanguageModel, corpus: Corpus, size: Size) -> list[dict[str, Any]]:
    hook_name = f"blocks.{(lm.n_layers - 1) // 2}.hook_resid_post"
    sides = {side: Passes(lm, getattr(corpus, side), [hook_name], batch_tokens=8_192) for side in corpus._fields}
    for dtype in STORED:
        harvest(sides["train"], folder / dtype, shard_tokens=65_536, dtype=dtype, seed=0)
    harvest(sides["train"], folder / "exact", shard_tokens=65_536, dtype="float32", seed=0)
    held_out = torch.cat([sides["held_out"](i).acts[hook_name] for i in range(len(sides["held_out"]))])
    return _learning(folder, held_out, f"organism {hook_name}", *size.narrow, size)


def _learning_wide(folder: Path, size: Size) -> list[dict[str, Any]]:
    d_in, d_sae, k = size.wide

    def blocks() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        for block in mixtures(d_in, size.learn_batch, seed=DATA_SEED):
            for channel, amount in zip((7, 20, 33), MASSIVE, strict=True):
                block[:, channel] += amount * (1 + 0.02 * torch.randn(len(block), generator=generator))
            yield block

    for dtype in (*STORED, "float32"):
        name = "exact" if dtype == "float32" else dtype
        _write(folder / name, blocks(), size.learn_tokens, 65_536, dtype)
    following = itertools.islice(blocks(), size.learn_tokens // size.learn_batch, None)
    held_out = torch.cat([next(following) for _ in range(8)])
    return _learning(folder, held_out, f"mixtures with massive channels, d_in {d_in}", d_sae, k, size)


def _learning(folder: Path, held_out: Tensor, of: str, d_sae: int, k: int, size: Size) -> list[dict[str, Any]]:
    """Error of the stored activations, and FVU of the same SAE trained from each."""
    exact = StoreReader(folder / "exact").read_shard(0)
    hook_name, truth = next(iter(exact.acts.items()))
    variance = float((truth.double() - truth.double().mean(dim=0)).square().sum())
    errors: dict[str, float] = {}
    fvus: dict[str, list[float]] = {}
    for dtype in STORED:
        stored = StoreReader(folder / dtype).read_shard(0)
        assert torch.equal(stored.tokens.token, exact.tokens.token)
        errors[dtype] = float((stored.acts[hook_name].double() - truth.double()).square().sum()) / variance
        fvus[dtype] = _train(folder / dtype, folder / f"{dtype}-train", hook_name, held_out, d_sae, k, size)
    middle = statistics.median(fvus["bfloat16"])
    rows = []
    for dtype in STORED:
        rows.append(_row("squared error / variance", of, dtype, [errors[dtype]], "", errors["bfloat16"]))
        what = f"held-out FVU, TopK {d_sae}, k {k}"
        rows.append(_row(what, of, dtype, fvus[dtype], "", middle))
    return rows


def _train(store: Path, folder: Path, hook_name: str, held_out: Tensor, d_sae: int, k: int, size: Size) -> list[float]:
    """Held-out FVU for each seed."""
    stream = StoreStream(StoreReader(store), batch_tokens=size.learn_batch)
    # Two epochs, so that the second, shuffled one takes part.
    settings = TrainSettings(
        total_tokens=2 * size.learn_tokens, batch_tokens=size.learn_batch, lr=LR, checkpoint_seconds=1e9
    )
    specs = grid([hook_name], [d_sae], ["topk"], [k], list(range(size.seeds)))
    variance = float((held_out.double() - held_out.double().mean(dim=0)).square().sum())
    fvus = []
    for trained in train(stream, specs, settings, folder, lm_name="bench").saes:
        sae = SAE.load(trained.folder)
        with torch.no_grad():
            errors = [block - sae.decode(sae.encode(block)) for block in held_out.float().split(4_096)]
        fvus.append(sum(float(error.double().square().sum()) for error in errors) / variance)
    return fvus


@torch.no_grad()
def _cross_entropy(lm: LanguageModel, corpus: Corpus, folder: Path) -> list[dict[str, Any]]:
    """Next-token loss on held-out text with a layer's activations as a store would give them back."""
    info = StoreReader(folder / "int8").info
    hook_name = info.hook_names[0]
    channels = torch.tensor(info.outlier_channels[hook_name])

    def eight(acts: Tensor, step: object) -> Tensor:
        return dequantize(quantize(acts.flatten(0, 1), channels), channels).view(acts.shape)

    ways = {"exact": None, "bfloat16": lambda acts, step: acts.bfloat16().float(), "int8": eight}
    losses = {}
    for dtype, edit in ways.items():
        total, count = 0.0, 0
        for start in range(0, len(corpus.held_out.tokens), 64):
            batch = corpus.held_out.batch(slice(start, start + 64))
            with lm.edit({} if edit is None else {hook_name: edit}):
                logits = lm.logits(batch)
            counted = batch.mask[:, 1:]
            picked = logits[:, :-1].double().log_softmax(dim=-1).gather(2, batch.tokens[:, 1:, None])[..., 0]
            total -= float(picked[counted].sum())
            count += int(counted.sum())
        losses[dtype] = total / count
    of = f"organism {hook_name}"
    rows = [
        _row("cross-entropy, spliced in", of, dtype, [loss], "nats", losses["bfloat16"])
        for dtype, loss in losses.items()
    ]
    return [{**row, "above_exact": row["value"] - losses["exact"]} for row in rows]
