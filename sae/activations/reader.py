"""Reading a finished store: files are mapped into memory, and rows decoded when they are asked for."""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.layout import TOKENS, Shard, StoreInfo, TokenRows, file_name, row_bytes
from sae.activations.quantize import Quantized, dequantize
from sae.errors import UserError, unknown
from sae.files import read_json, read_tensors, sha256_file

CHECKERS = 2  # files whose checksums are computed at the same time
_MADV_POPULATE_READ = 22  # Linux; Python's mmap has no name for it
Take = Callable[[Tensor, str | None], Tensor]
"""Takes rows out of a column `[row ...]`; named scratch memory may hold them until the next rows of that name."""


class OpenShard:
    """A shard on disk: rows are read, and taken out of their stored form, when they are asked for.

    Attributes:
        n_rows: rows of the shard.
        widest_row: bytes of a row at the hook point where that is most.
    """

    def __init__(self, reader: "StoreReader", shard: int, hook_names: list[str]) -> None:
        info = reader.info
        self.n_rows = info.shard_rows[shard]
        self.widest_row = max((row_bytes(info.d_in[name], info.dtype) for name in hook_names), default=1)
        self._reader, self._shard = reader, shard
        self._channels = {
            name: torch.tensor(info.outlier_channels.get(name, []), dtype=torch.long) for name in hook_names
        }
        self._held = {name: reader.read_file(shard, name) for name in hook_names}

    @cached_property
    def _fields(self) -> dict[str, Tensor]:
        return self._reader.read_file(self._shard, TOKENS)

    def acts(self, take: Take, dtype: torch.dtype | None = None) -> dict[str, Float[Tensor, "row d_in"]]:
        """Activations of some rows.

        Args:
            take: takes the wanted rows out of a stored column.
            dtype: of the result; None for float32 from int8, else as stored, which may be a view of the file.
        """
        found = {}
        for name, held in self._held.items():
            decoded = len(held) > 1
            # What is decoded or converted is new memory, so its source may lie where the next batch's will.
            copied = decoded or dtype not in (None, held["acts"].dtype)
            rows = {key: take(column, f"{name} {key}" if copied else None) for key, column in held.items()}
            acts = dequantize(Quantized(**rows), self._channels[name]) if decoded else rows["acts"]
            found[name] = acts if dtype is None else acts.to(dtype)
        return found

    def tokens(self, take: Take) -> TokenRows:
        """The token fields of the same rows."""
        return TokenRows(**{name: take(column, None) for name, column in self._fields.items()})


class StoreReader:
    """A finished store, opened for reading.

    Args:
        folder: the store's folder.
        verify: compare each file with its checksum before it is first read.

    Raises:
        UserError: there is no finished store in `folder`.
    """

    def __init__(self, folder: Path | str, verify: bool = True) -> None:
        self.folder = Path(folder)
        path = self.folder / "store.json"
        if not path.is_file():
            raise UserError(f"no finished activation store in {str(self.folder)!r}: run `sae harvest` first.")
        self.info = StoreInfo(**read_json(path))
        self._verify = verify
        self._checks: dict[str, Future[None]] = {}

    @cached_property
    def _checkers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(CHECKERS, "verify-shard")

    def open_shard(self, shard: int, hook_names: list[str] | None = None) -> OpenShard:
        """Open one shard; each file's checksum is verified the first time it is opened.

        Raises:
            UserError: a file is missing, truncated or does not match its checksum, or a hook point is not stored.
        """
        return OpenShard(self, shard, self._names(hook_names))

    def read_shard(self, shard: int, hook_names: list[str] | None = None) -> Shard:
        """Read one shard whole; see `open_shard`."""
        opened = self.open_shard(shard, hook_names)
        return Shard(opened.acts(_everything), opened.tokens(_everything))

    def read_ahead(self, shard: int, hook_names: list[str] | None = None) -> None:
        """Have a shard that is wanted soon verified, or just fetched from the disk, in the background."""
        for name in self._names(hook_names):
            file = file_name(shard, name)
            if self._verify and file not in self._checks:
                self._check(file)
            elif (self.folder / file).is_file():
                self._checkers.submit(read_ahead, self.folder / file)

    def read_file(self, shard: int, name: str) -> dict[str, Tensor]:
        """The tensors of one file of a shard, mapped into memory; `name` is a hook point or `TOKENS`.

        Raises:
            UserError: the file is missing or damaged.
        """
        file = file_name(shard, name)
        if self._verify:
            self._check(file).result()
        elif not (self.folder / file).is_file():
            raise _missing(self.folder / file)
        tensors = read_tensors(self.folder / file)
        for tensor in tensors.values():
            _map_pages(tensor)
        return tensors

    def _names(self, hook_names: list[str] | None) -> list[str]:
        names = self.info.hook_names if hook_names is None else hook_names
        for name in names:
            if name not in self.info.d_in:
                raise unknown("hook name", name, self.info.hook_names, "Only harvested hook points can be read.")
        return names

    def _check(self, file: str) -> "Future[None]":
        if file not in self._checks:
            self._checks[file] = self._checkers.submit(self._compare, file)
        return self._checks[file]

    def _compare(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise _missing(path)
        if sha256_file(path) != self.info.checksums[file]:
            raise UserError(
                f"shard file {str(path)!r} does not match its checksum (truncated or corrupted): "
                "run `sae harvest` again with force=true."
            )


def _everything(column: Tensor, scratch: str | None) -> Tensor:
    return column


def _missing(path: Path) -> UserError:
    return UserError(f"shard file {str(path)!r} is missing: run `sae harvest` again with force=true.")


def _map_pages(tensor: Tensor) -> None:
    """Enter all pages of a mapped file into the page table at once: a fault for each few of them takes longer."""
    if sys.platform == "linux" and tensor.nbytes:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        # Only advice: a kernel that does not know it (before 5.14) says so, and pages fault one by one.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_READ)


def read_ahead(path: Path) -> None:
    """Ask the system to start reading a file from the disk: it will be read in random order."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)
