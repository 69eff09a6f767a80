"""The activation store: shuffled shards on disk, written once, read in order by every training run.

Layout of a store folder::

    store.json                         what it holds; written last, so a folder without it is unfinished
    shard-00000/<hook_name>.safetensors    {"acts": [row d_in]}
    shard-00000/tokens.safetensors         {"token": [row], "role": [row], "doc": [row], "pos": [row]}

Row r of every file of a shard belongs to the same token. The rows of the store are a uniformly random permutation
of the tokens: each token is sent to an independent uniformly random shard, and each shard is permuted uniformly
before it is written for good. Concatenated, that is a uniform permutation of the whole (the classical external
shuffle), so readers need no shuffle buffer and read sequentially.

While a store is being written, `parts/` holds one append-only file per shard and hook point, and `journal.json`
says how long each is and which forward passes they hold. After a kill the files are cut back to the journal and
writing goes on from there; the random choices depend only on the seed and the number of the forward pass, so a
resumed store is byte for byte the uninterrupted one.
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
FLUSH_BYTES = 64 * 2**20  # rows held in memory, all shards together, before they are appended to the part files


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
    """Stop before a harvest that cannot fit.

    Writing keeps the part files until their shard is finished, so one shard's worth is counted on top.

    Raises:
        UserError: the disk that holds `folder` has less than `needed` bytes free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
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
    ) -> None:
        if dtype not in DTYPES:
            raise unknown("storage dtype", dtype, list(DTYPES))
        if n_tokens < 1:
            raise UserError("the text gives no token to store: check data.path and data.n_tokens.")
        self.folder = Path(folder)
        self.d_in = dict(d_in)
        self.dtype = dtype
        self.seed = seed
        self.lm_name, self.lm_fingerprint = lm_name, lm_fingerprint
        self.n_shards = max(1, round(n_tokens / shard_tokens))
        self._plan = {
            "d_in": self.d_in,
            "dtype": dtype,
            "seed": seed,
            "n_shards": self.n_shards,
            "n_tokens": n_tokens,
            "lm_fingerprint": lm_fingerprint,
        }
        self._held: list[list[tuple[dict[str, bytes], int]]] = [[] for _ in range(self.n_shards)]
        self._held_bytes = 0
        self._rows = [0] * self.n_shards  # rows in the part files
        self._done_checksums: dict[str, str] = {}
        self.next_pass = 0
        """Number of the first forward pass that is not yet safely on disk."""
        self._passes_added = 0
        self._resume()

    def add(self, acts: Mapping[str, Float[Tensor, "row d_in"]], tokens: TokenRows) -> None:
        """Add the rows of the next forward pass.

        Raises:
            UserError: an activation is not finite.
        """
        n_rows = tokens.token.shape[0]
        for hook_name, width in self.d_in.items():
            block = acts[hook_name]
            assert block.shape == (n_rows, width), f"{hook_name}: {tuple(block.shape)}, expected {(n_rows, width)}"
            stored = block.to(DTYPES[self.dtype])
            if not torch.isfinite(stored).all():
                row = int((~torch.isfinite(stored).all(dim=1)).nonzero()[0])
                raise UserError(
                    f"{hook_name!r} gives NaN or infinite activations (document {int(tokens.doc[row])}, position "
                    f"{int(tokens.pos[row])}): load the model with lm.dtype=float32 or store harvest.dtype=bfloat16."
                )
        destination = self._generator(0, self._passes_added).integers(0, self.n_shards, size=n_rows)
        order = np.argsort(destination, kind="stable")
        bounds = np.searchsorted(destination[order], np.arange(self.n_shards + 1))
        columns = self._columns(acts, tokens)
        for shard in range(self.n_shards):
            rows = order[bounds[shard] : bounds[shard + 1]]
            if len(rows):
                data = {name: column[rows].tobytes() for name, column in columns.items()}
                self._held[shard].append((data, len(rows)))
                self._held_bytes += sum(map(len, data.values()))
        self._passes_added += 1
        if self._held_bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append what is held in memory to the part files and note it in the journal."""
        for shard, pieces in enumerate(self._held):
            if not pieces:
                continue
            for name in pieces[0][0]:
                path = self._part(shard, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as file:
                    for data, _ in pieces:
                        file.write(data[name])
                    file.flush()
                    os.fsync(file.fileno())
            self._rows[shard] += sum(n for _, n in pieces)
        self._held = [[] for _ in range(self.n_shards)]
        self._held_bytes = 0
        self.next_pass = self._passes_added
        self._write_journal([])

    def finish(self) -> StoreInfo:
        """Permute each shard, write it with its checksum, and complete the store."""
        self.flush()
        checksums: dict[str, str] = dict(self._done_checksums)
        for shard in range(self.n_shards):
            if f"shard-{shard:05d}/tokens.safetensors" not in checksums:
                checksums |= self._finish_shard(shard)
                self._done_checksums = checksums
                self._write_journal(list(checksums))
            shutil.rmtree(self._part(shard, "token").parent, ignore_errors=True)
        info = StoreInfo(
            hook_names=list(self.d_in),
            d_in=self.d_in,
            dtype=self.dtype,
            n_tokens=sum(self._rows),
            shard_rows=list(self._rows),
            lm_name=self.lm_name,
            lm_fingerprint=self.lm_fingerprint,
            checksums=checksums,
        )
        write_json(self.folder / "store.json", info)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        (self.folder / "journal.json").unlink(missing_ok=True)
        return info

    def _finish_shard(self, shard: int) -> dict[str, str]:
        n_rows = self._rows[shard]
        order = torch.from_numpy(self._generator(1, shard).permutation(n_rows))
        folder = self.folder / f"shard-{shard:05d}"
        written = {}
        for hook_name, width in self.d_in.items():
            raw = self._read_part(shard, hook_name, np.uint8).view(-1)
            acts = raw.view(DTYPES[self.dtype]).view(n_rows, width)
            write_tensors(folder / f"{hook_name}.safetensors", {"acts": acts[order]})
            written[f"{folder.name}/{hook_name}.safetensors"] = sha256_file(folder / f"{hook_name}.safetensors")
        fields = {name: self._read_part(shard, name, kind)[order] for name, kind in TOKEN_FIELDS.items()}
        write_tensors(folder / "tokens.safetensors", fields)
        written[f"{folder.name}/tokens.safetensors"] = sha256_file(folder / "tokens.safetensors")
        return written

    def _columns(self, acts: Mapping[str, Tensor], tokens: TokenRows) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = {}
        for hook_name in self.d_in:
            stored = acts[hook_name].detach().to(DTYPES[self.dtype]).cpu().contiguous()
            columns[hook_name] = stored.view(torch.uint8).numpy()  # numpy has no bfloat16: rows of raw bytes
        for name, kind in TOKEN_FIELDS.items():
            columns[name] = getattr(tokens, name).cpu().numpy().astype(kind)
        return columns

    def _part(self, shard: int, name: str) -> Path:
        return self.folder / "parts" / f"{shard:05d}" / f"{name}.bin"

    def _read_part(self, shard: int, name: str, kind: type) -> Tensor:
        path = self._part(shard, name)
        data: np.ndarray = np.fromfile(path, dtype=kind) if path.is_file() else np.zeros(0, dtype=kind)
        return torch.from_numpy(data)

    def _generator(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, purpose, number])))

    def _write_journal(self, finished: list[str]) -> None:
        write_json(
            self.folder / "journal.json",
            {
                "plan": self._plan,
                "next_pass": self.next_pass,
                "rows": self._rows,
                "checksums": {name: self._done_checksums[name] for name in finished},
            },
        )

    def _resume(self) -> None:
        path = self.folder / "journal.json"
        if not path.is_file():
            shutil.rmtree(self.folder / "parts", ignore_errors=True)
            return
        journal = read_json(path)
        if journal.get("plan") != self._plan:
            raise UserError(
                f"{str(self.folder)!r} holds an unfinished harvest of another configuration: delete that folder, "
                "or choose another name=."
            )
        self.next_pass = self._passes_added = journal["next_pass"]
        self._rows = journal["rows"]
        self._done_checksums = journal["checksums"]
        widths = {name: width * DTYPES[self.dtype].itemsize for name, width in self.d_in.items()}
        widths |= {name: np.dtype(kind).itemsize for name, kind in TOKEN_FIELDS.items()}
        for shard in range(self.n_shards):
            for name, width in widths.items():
                part = self._part(shard, name)
                if part.is_file():  # rows past the journal may be half written: cut them off
                    os.truncate(part, self._rows[shard] * width)


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
