"""The activation store: shuffled shards on disk, written once, read in order by every training run.

Layout of a store folder::

    store.json                         what it holds; written last, so a folder without it is unfinished
    shard-00000/<hook_name>.safetensors    {"acts": [row d_in]}, int8: {"scale": [row], "outliers": [row outlier], ...}
    shard-00000/tokens.safetensors         {"token": [row], "role": [row], "doc": [row], "pos": [row]}

Row r of every file of a shard belongs to the same token. The rows of the store are a uniformly random permutation
of the tokens: each token is sent to an independent uniformly random shard, and each shard is permuted uniformly
before it is written for good. Concatenated, that is a uniform permutation of the whole (the classical external
shuffle), so readers need no shuffle buffer and read sequentially.

While a store is being written, `parts/` holds one append-only file per shard (a record a token: its activations at
every hook point and its token fields), and `journal.json` says how many records each has and which forward passes
they hold. After a kill the files are cut back to the journal and writing goes on from there; the random choices
depend only on the seed and the number of the forward pass, so a resumed store is byte for byte the uninterrupted one.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.layout import (
    DTYPES,
    TOKENS,
    Column,
    Shard,
    StoreInfo,
    TokenRows,
    columns,
    estimate_bytes,
    file_name,
    format_bytes,
    record_bytes,
    token_columns,
)
from sae.activations.quantize import pick_outliers, quantize
from sae.activations.reader import StoreReader, read_ahead
from sae.errors import UserError, unknown
from sae.files import atomic_path, read_json, write_json

__all__ = [
    "DTYPES",
    "Shard",
    "StoreInfo",
    "StoreReader",
    "StoreWriter",
    "TokenRows",
    "check_disk",
    "disk_bytes",
    "estimate_bytes",
    "working_bytes",
]

# Rows are held in memory until each shard's append is worth a file operation: about 1 MB a shard, within bounds.
FLUSH_BYTES_PER_SHARD = 2**20
FLUSH_BYTES = (64 * 2**20, 2 * 2**30)
# Shards finished at the same time: while one waits for the disk, the other is permuted and hashed.
FINISHERS = 2
CHUNK_BYTES = 4 * 2**20  # a shard is permuted in pieces that stay in the processor's cache
HARVEST_REMEDY = (
    "lower data.n_tokens, store half the bytes with harvest.dtype=int8, ask for fewer harvest.hook_names, or train "
    "with train.stream=live"
)
_NAMES = {
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def check_disk(folder: Path, needed: int, what: str = "this harvest", remedy: str = HARVEST_REMEDY) -> None:
    """Stop before writing what cannot fit; what an unfinished harvest in `folder` holds already counts as there.

    Raises:
        UserError: the disk that holds `folder` has less than `needed` bytes free.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(existing).free + there
    if needed > free:
        raise UserError(
            f"{what} would write {format_bytes(needed)} and {str(folder)!r} has {format_bytes(free)} free: {remedy}."
        )


def disk_bytes(d_in: Mapping[str, int], n_tokens: int, shard_tokens: int, dtype: str) -> int:
    """The most bytes a harvest takes on disk at any moment: the store, and the parts of the shards being finished."""
    whole = estimate_bytes(d_in, n_tokens, dtype)
    return whole + whole * FINISHERS // max(FINISHERS, round(n_tokens / shard_tokens))


def working_bytes(d_in: Mapping[str, int], shard_rows: int, n_tokens: int, dtype: str) -> tuple[int, int]:
    """The most memory a store takes: (while it is written, while it is read).

    Most of it are files mapped into memory, a shard's while reading and two shards' parts while finishing: pages that
    the system takes back when it needs them elsewhere.
    """
    n_shards = max(1, round(n_tokens / max(1, shard_rows)))
    shard = shard_rows * record_bytes(d_in, dtype)
    return 2 * _flush_bytes(n_shards) + min(FINISHERS, n_shards) * (shard + 2 * CHUNK_BYTES), shard


def _flush_bytes(n_shards: int) -> int:
    low, high = FLUSH_BYTES
    return min(max(low, n_shards * FLUSH_BYTES_PER_SHARD), high)


class StoreWriter:
    """Write a store, one language-model batch after another; resumable after a kill.

    Args:
        folder: the store's folder. An unfinished store of the same kind there is continued.
        d_in: width of each hook point, in the order the store lists them.
        n_tokens: how many rows will come; sets the number of shards.
        shard_tokens: mean rows in a shard.
        dtype: storage type, a key of `DTYPES`.
        seed: of the permutation.
        lm_name, lm_fingerprint: the model the activations come from.
        identity: whatever else decides which rows forward pass n gives (text, batch size, precision...), as a hash.

    Raises:
        UserError: the folder holds an unfinished store of another kind.
    """

    def __init__(
        self,
        folder: Path | str,
        d_in: Mapping[str, int],
        *,
        n_tokens: int,
        shard_tokens: int,
        dtype: str = "bfloat16",
        seed: int = 0,
        lm_name: str = "",
        lm_fingerprint: str = "",
        identity: str = "",
    ) -> None:
        if dtype not in DTYPES:
            raise unknown("storage dtype", dtype, list(DTYPES))
        if n_tokens < 1:
            raise UserError("the text gives no token to store: check data.path and data.n_tokens.")
        self.folder = Path(folder)
        self.d_in = dict(d_in)
        self.dtype = dtype
        self.seed = seed
        self.lm_name, self.lm_fingerprint, self.identity = lm_name, lm_fingerprint, identity
        self.n_tokens = n_tokens
        self.n_shards = max(1, round(n_tokens / shard_tokens))
        self.next_pass = 0
        """Number of the first forward pass that is not yet safely on disk."""
        self._record_bytes = record_bytes(self.d_in, dtype)
        self._flush_bytes = _flush_bytes(self.n_shards)
        self._held: list[list[np.ndarray]] = [[] for _ in range(self.n_shards)]
        self._held_bytes = 0
        self._rows = [0] * self.n_shards  # records in the part files
        self._checksums: dict[str, str] = {}  # of the shards that are finished
        self._channels: dict[str, list[int]] = {}  # int8: kept apart; chosen from the first rows that come
        self._passes_added = 0
        self._resume()

    def add(self, acts: Mapping[str, Float[Tensor, "row d_in"]], tokens: TokenRows) -> None:
        """Add the rows of the next forward pass.

        Raises:
            UserError: an activation is not finite.
        """
        records = self._records(acts, tokens)
        destination = self._generator(0, self._passes_added).integers(0, self.n_shards, size=len(records))
        order = np.argsort(destination, kind="stable")
        bounds = np.searchsorted(destination[order], np.arange(self.n_shards + 1))
        grouped = np.take(records, order, axis=0)
        for shard in range(self.n_shards):
            if bounds[shard] < bounds[shard + 1]:
                self._held[shard].append(grouped[bounds[shard] : bounds[shard + 1]])
        self._held_bytes += records.nbytes
        self._passes_added += 1
        if self._held_bytes >= self._flush_bytes:
            self.flush()

    def flush(self) -> None:
        """Append what is held in memory to the part files and note it in the journal."""
        for shard, pieces in enumerate(self._held):
            if not pieces:
                continue
            path = self._part(shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.writelines(piece.data for piece in pieces)
                file.flush()
                os.fsync(file.fileno())
            self._rows[shard] += sum(map(len, pieces))
        self._held = [[] for _ in range(self.n_shards)]
        self._held_bytes = 0
        self.next_pass = self._passes_added
        self._write_journal()

    def finish(self) -> StoreInfo:
        """Permute each shard, write it with its checksum, and complete the store."""
        self.flush()
        assert sum(self._rows) == self.n_tokens, f"{sum(self._rows)} rows came, {self.n_tokens} were announced"
        with ThreadPoolExecutor(FINISHERS, "finish-shard") as pool:
            running: deque[tuple[int, Future[dict[str, str]]]] = deque()
            try:
                for shard in range(self.n_shards):
                    if file_name(shard, TOKENS) in self._checksums:
                        self._part(shard).unlink(missing_ok=True)
                        continue
                    if len(running) == FINISHERS:
                        self._note_finished(*running.popleft())
                    running.append((shard, pool.submit(self._finish_shard, shard)))
                while running:
                    self._note_finished(*running.popleft())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        info = StoreInfo(
            hook_names=list(self.d_in),
            d_in=self.d_in,
            dtype=self.dtype,
            n_tokens=self.n_tokens,
            shard_rows=list(self._rows),
            lm_name=self.lm_name,
            lm_fingerprint=self.lm_fingerprint,
            identity=self.identity,
            checksums=self._checksums,
            outlier_channels=self._channels,
        )
        write_json(self.folder / "store.json", info)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        (self.folder / "journal.json").unlink(missing_ok=True)
        return info

    def _records(self, acts: Mapping[str, Tensor], tokens: TokenRows) -> np.ndarray:
        """One row of bytes a token: its activations at every hook point, then its token fields."""
        n_rows = tokens.token.shape[0]
        records = np.empty((n_rows, self._record_bytes), dtype=np.uint8)
        start = 0

        def put(column: Tensor) -> None:
            nonlocal start
            raw = column.cpu().contiguous().view(n_rows, -1).view(torch.uint8).numpy()  # numpy has no bfloat16
            records[:, start : start + raw.shape[1]] = raw
            start += raw.shape[1]

        for hook_name, width in self.d_in.items():
            block = acts[hook_name].detach()
            assert block.shape == (n_rows, width), f"{hook_name}: {tuple(block.shape)}, expected {(n_rows, width)}"
            if not n_rows:
                continue
            for stored in self._encode(hook_name, block, tokens):
                put(stored)
        if n_rows:
            for name, column in token_columns().items():
                put(getattr(tokens, name).to(column.dtype))
        return records

    def _encode(self, hook_name: str, block: Tensor, tokens: TokenRows) -> tuple[Tensor, ...]:
        """A hook point's columns, in the order of `layout.columns`."""
        if self.dtype != "int8":
            stored = block.to(DTYPES[self.dtype])
            self._check_finite(hook_name, stored, tokens)
            return (stored,)
        self._check_finite(hook_name, block.to(torch.bfloat16), tokens)
        if hook_name not in self._channels:
            self._channels[hook_name] = pick_outliers(block)
        channels = torch.tensor(self._channels[hook_name], dtype=torch.long, device=block.device)
        return tuple(quantize(block, channels))

    def _check_finite(self, hook_name: str, stored: Tensor, tokens: TokenRows) -> None:
        # A sum is one pass over memory. It may overflow where no number is infinite, so look closer before refusing.
        if torch.isfinite(stored.sum(dtype=torch.float32)):
            return
        finite = torch.isfinite(stored).all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise UserError(
                f"{hook_name!r} gives NaN or infinite activations (document {int(tokens.doc[row])}, position "
                f"{int(tokens.pos[row])}): use lm.dtype=float32, or harvest.dtype=bfloat16."
            )

    def _finish_shard(self, shard: int) -> dict[str, str]:
        """Write a shard's files, permuted; return their checksums by name."""
        n_rows = self._rows[shard]
        path = self._part(shard)
        shape = (n_rows, self._record_bytes)
        # Mapped, not read: only what is being copied is in memory. Mode c, since torch wants memory it could write to.
        records = np.memmap(path, np.uint8, "c", shape=shape) if n_rows else np.empty(shape, np.uint8)
        if n_rows:
            read_ahead(path)
        order = torch.from_numpy(self._generator(1, shard).permutation(n_rows))
        files = {name: columns(width, self.dtype) for name, width in self.d_in.items()}
        files[TOKENS] = token_columns()
        written = {}
        start = 0
        for name, held in files.items():
            file = file_name(shard, name)
            sources = {}
            for key, column in held.items():
                sources[key] = torch.from_numpy(records)[:, start : start + column.n_bytes]
                start += column.n_bytes
            written[file] = _write_permuted(self.folder / file, held, sources, order)
        return written

    def _note_finished(self, shard: int, finished: "Future[dict[str, str]]") -> None:
        self._checksums |= finished.result()
        self._write_journal()
        self._part(shard).unlink(missing_ok=True)

    def _part(self, shard: int) -> Path:
        return self.folder / "parts" / f"{shard:05d}.bin"

    def _generator(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, purpose, number])))

    def _plan(self) -> dict[str, object]:
        return {
            "d_in": self.d_in,
            "dtype": self.dtype,
            "seed": self.seed,
            "n_shards": self.n_shards,
            "n_tokens": self.n_tokens,
            "record_bytes": self._record_bytes,
            "lm_fingerprint": self.lm_fingerprint,
            "identity": self.identity,
        }

    def _write_journal(self) -> None:
        journal = {
            "plan": self._plan(),
            "next_pass": self.next_pass,
            "rows": self._rows,
            "outlier_channels": self._channels,
            "checksums": self._checksums,
        }
        write_json(self.folder / "journal.json", journal)

    def _resume(self) -> None:
        for leftover in self.folder.rglob(".*.tmp"):  # files that a kill caught before their renaming
            leftover.unlink()
        path = self.folder / "journal.json"
        if not path.is_file():
            shutil.rmtree(self.folder / "parts", ignore_errors=True)
            return
        journal = read_json(path)
        if journal.get("plan") != self._plan():
            raise UserError(
                f"{str(self.folder)!r} holds an unfinished harvest of another configuration: repeat that command to "
                "finish it, delete that folder, or choose another name=."
            )
        self.next_pass = self._passes_added = journal["next_pass"]
        self._rows = journal["rows"]
        self._channels = journal["outlier_channels"]
        self._checksums = journal["checksums"]
        for shard in range(self.n_shards):
            if self._part(shard).is_file():  # records past the journal may be half written: cut them off
                os.truncate(self._part(shard), self._rows[shard] * self._record_bytes)


def _write_permuted(target: Path, held: Mapping[str, Column], sources: Mapping[str, Tensor], order: Tensor) -> str:
    """Write permuted columns as one safetensors file, atomically, without ever holding one whole; return its SHA-256.

    Args:
        target: the file.
        held: the tensors, in the order in which they lie in the file.
        sources: `[row bytes]` of each, in the order they came.
        order: `[row]`, which of these comes where.
    """
    n_rows, offset = len(order), 0
    entries: dict[str, dict[str, object]] = {}
    for name, column in held.items():
        end = offset + n_rows * column.n_bytes
        shape = [n_rows, *column.shape]
        entries[name] = {"dtype": _NAMES[column.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with atomic_path(target) as temporary, temporary.open("wb") as file:

        def write(piece: bytes | memoryview) -> None:
            digest.update(piece)
            file.write(piece)

        write(len(header).to_bytes(8, "little") + header)
        for name, column in held.items():
            step = max(1, CHUNK_BYTES // max(1, column.n_bytes))
            buffer = torch.empty((min(step, n_rows), sources[name].shape[1]), dtype=torch.uint8)
            for start in range(0, n_rows, step):
                rows = order[start : start + step]
                # Into the same buffer each time: fresh memory would cost more than the copying.
                torch.index_select(sources[name], 0, rows, out=buffer[: len(rows)])
                write(buffer[: len(rows)].numpy().reshape(-1).data)
    return digest.hexdigest()
