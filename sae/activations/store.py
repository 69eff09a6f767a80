"""The activation store: shuffled shards on disk, written once, read in order by every training run.

Layout of a store folder::

    store.json                         what it holds; written last, so a folder without it is unfinished
    shard-00000/<hook_name>.safetensors    {"acts": [row d_in]}
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

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sae.errors import UserError, unknown
from sae.files import SCHEMA_VERSION, read_json, read_tensors, sha256_file, write_json, write_tensors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKEN_FIELDS = {"token": np.int32, "role": np.uint8, "doc": np.int32, "pos": np.int32}
# Rows are held in memory until each shard's append is worth a file operation: about 1 MB a shard, within bounds.
FLUSH_BYTES_PER_SHARD = 2**20
FLUSH_BYTES = (64 * 2**20, 2 * 2**30)


class TokenRows(NamedTuple):
    """Where each activation row comes from."""

    token: Int[Tensor, " row"]
    role: UInt8[Tensor, " row"]
    doc: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]


class Shard(NamedTuple):
    """One shard in memory."""

    acts: dict[str, Float[Tensor, "row d_in"]]
    tokens: TokenRows


@dataclass(frozen=True)
class StoreInfo:
    """What `store.json` says."""

    hook_names: list[str]
    d_in: dict[str, int]
    dtype: str
    n_tokens: int
    shard_rows: list[int]
    lm_name: str
    lm_fingerprint: str
    identity: str
    checksums: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    @property
    def n_bytes(self) -> int:
        """Bytes of activations, all hook points together."""
        width = sum(self.d_in.values()) * DTYPES[self.dtype].itemsize
        return self.n_tokens * width


def estimate_bytes(d_in: Mapping[str, int], n_tokens: int, dtype: str) -> int:
    """Bytes a store of this size takes on disk (activations and token fields)."""
    fields = sum(np.dtype(kind).itemsize for kind in TOKEN_FIELDS.values())
    return n_tokens * (sum(d_in.values()) * DTYPES[dtype].itemsize + fields)


def check_disk(folder: Path, needed: int) -> None:
    """Stop before a harvest that cannot fit; what an unfinished harvest in `folder` holds already counts as there.

    Raises:
        UserError: the disk that holds `folder` has less than `needed` bytes free.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(existing).free + there
    if needed > free:
        raise UserError(
            f"this harvest would write {needed / 1e9:.1f} GB and {str(folder)!r} has {free / 1e9:.1f} GB free: "
            "lower data.n_tokens, ask for fewer harvest.hook_names, or train with train.stream=live."
        )


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
        self._widths = {name: width * DTYPES[dtype].itemsize for name, width in self.d_in.items()}
        self._widths |= {name: np.dtype(kind).itemsize for name, kind in TOKEN_FIELDS.items()}
        self._record_bytes = sum(self._widths.values())
        low, high = FLUSH_BYTES
        self._flush_bytes = min(max(low, self.n_shards * FLUSH_BYTES_PER_SHARD), high)
        self._held: list[list[bytes]] = [[] for _ in range(self.n_shards)]
        self._held_bytes = 0
        self._rows = [0] * self.n_shards  # records in the part files
        self._checksums: dict[str, str] = {}  # of the shards that are finished
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
        for shard in range(self.n_shards):
            rows = order[bounds[shard] : bounds[shard + 1]]
            if len(rows):
                self._held[shard].append(records[rows].tobytes())
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
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            self._rows[shard] += sum(map(len, pieces)) // self._record_bytes
        self._held = [[] for _ in range(self.n_shards)]
        self._held_bytes = 0
        self.next_pass = self._passes_added
        self._write_journal()

    def finish(self) -> StoreInfo:
        """Permute each shard, write it with its checksum, and complete the store."""
        self.flush()
        assert sum(self._rows) == self.n_tokens, f"{sum(self._rows)} rows came, {self.n_tokens} were announced"
        for shard in range(self.n_shards):
            if f"shard-{shard:05d}/tokens.safetensors" not in self._checksums:
                self._checksums |= self._finish_shard(shard)
                self._write_journal()
            self._part(shard).unlink(missing_ok=True)
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
        )
        write_json(self.folder / "store.json", info)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        (self.folder / "journal.json").unlink(missing_ok=True)
        return info

    def _records(self, acts: Mapping[str, Tensor], tokens: TokenRows) -> np.ndarray:
        """One row of bytes a token: its activations at every hook point, then its token fields."""
        n_rows = tokens.token.shape[0]
        columns: list[np.ndarray] = []
        for hook_name, width in self.d_in.items():
            block = acts[hook_name]
            assert block.shape == (n_rows, width), f"{hook_name}: {tuple(block.shape)}, expected {(n_rows, width)}"
            stored = block.detach().to(DTYPES[self.dtype])
            finite = torch.isfinite(stored).all(dim=1)
            if not finite.all():
                row = int((~finite).nonzero()[0])
                raise UserError(
                    f"{hook_name!r} gives NaN or infinite activations (document {int(tokens.doc[row])}, position "
                    f"{int(tokens.pos[row])}): use lm.dtype=float32, or harvest.dtype=bfloat16."
                )
            columns.append(stored.cpu().contiguous().view(torch.uint8).numpy())  # numpy has no bfloat16: raw bytes
        for name, kind in TOKEN_FIELDS.items():
            values = getattr(tokens, name).cpu().numpy().astype(kind)
            columns.append(values.view(np.uint8).reshape(n_rows, -1))
        return np.concatenate(columns, axis=1)

    def _finish_shard(self, shard: int) -> dict[str, str]:
        n_rows = self._rows[shard]
        path = self._part(shard)
        raw = np.fromfile(path, dtype=np.uint8) if path.is_file() else np.zeros(0, dtype=np.uint8)
        records = raw.reshape(n_rows, self._record_bytes)
        order = self._generator(1, shard).permutation(n_rows)
        files: dict[str, dict[str, Tensor]] = {"tokens": {}}
        start = 0
        for name, width in self._widths.items():
            column = torch.from_numpy(records[order, start : start + width])
            if name in self.d_in:
                acts = column.reshape(-1).view(DTYPES[self.dtype]).view(n_rows, self.d_in[name])
                files[name] = {"acts": acts}
            else:
                kind = torch.int32 if TOKEN_FIELDS[name] is np.int32 else torch.uint8
                files["tokens"][name] = column.reshape(-1).view(kind)
            start += width
        written = {}
        for name, tensors in files.items():
            target = self.folder / f"shard-{shard:05d}" / f"{name}.safetensors"
            write_tensors(target, tensors)
            written[f"{target.parent.name}/{target.name}"] = sha256_file(target)
        return written

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
            "lm_fingerprint": self.lm_fingerprint,
            "identity": self.identity,
        }

    def _write_journal(self) -> None:
        journal = {
            "plan": self._plan(),
            "next_pass": self.next_pass,
            "rows": self._rows,
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
        self._checksums = journal["checksums"]
        for shard in range(self.n_shards):
            if self._part(shard).is_file():  # records past the journal may be half written: cut them off
                os.truncate(self._part(shard), self._rows[shard] * self._record_bytes)


class StoreReader:
    """A finished store, opened for reading.

    Args:
        folder: the store's folder.

    Raises:
        UserError: there is no finished store in `folder`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "store.json"
        if not path.is_file():
            raise UserError(f"no finished activation store in {str(self.folder)!r}: run `sae harvest` first.")
        self.info = StoreInfo(**read_json(path))
        self._verified: set[str] = set()

    def read_shard(self, shard: int, hook_names: list[str] | None = None) -> Shard:
        """Read one shard; each file's checksum is verified the first time it is read.

        Raises:
            UserError: a file is missing, truncated or does not match its checksum, or a hook point is not stored.
        """
        names = self.info.hook_names if hook_names is None else hook_names
        for name in names:
            if name not in self.info.d_in:
                raise unknown("hook name", name, self.info.hook_names, "Only harvested hook points can be read.")
        acts = {name: self._read(f"shard-{shard:05d}/{name}.safetensors")["acts"] for name in names}
        fields = self._read(f"shard-{shard:05d}/tokens.safetensors")
        return Shard(acts, TokenRows(**fields))

    def _read(self, name: str) -> dict[str, Tensor]:
        path = self.folder / name
        if name not in self._verified:
            if not path.is_file():
                raise UserError(f"shard file {str(path)!r} is missing: run `sae harvest` again with force=true.")
            if sha256_file(path) != self.info.checksums[name]:
                raise UserError(
                    f"shard file {str(path)!r} does not match its checksum (truncated or corrupted): "
                    "run `sae harvest` again with force=true."
                )
            self._verified.add(name)
        return read_tensors(path)
