"""Tensors that lie on disk and are read one at a time: scores, and copies of weights, as large as a model."""

import mmap
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sae.errors import UserError

K = TypeVar("K", bound=Hashable)


class _Entry(NamedTuple):
    start: int
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


class Stored(Mapping[K, Tensor]):
    """Named tensors in a file without a name, which is gone with this object, however the process ends.

    A tensor is mapped into memory when it is asked for, and let go with the last reference to it. It is a copy: writing
    to it changes nothing here.
    """

    def __init__(self, items: Iterable[tuple[K, Tensor]], folder: Path | str | None = None) -> None:
        """Write tensors, one at a time.

        Args:
            items: names and tensors, which may be made one by one.
            folder: of the file, made if need be; the system's for temporary files if None.

        Raises:
            UserError: there is no room.
        """
        self._entries: dict[K, _Entry] = {}
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this object is there)
            for name, tensor in items:
                self._write(name, tensor.detach())
            self._file.flush()
        except OSError as error:
            where = str(folder or tempfile.gettempdir())
            raise UserError(
                f"what is too large for memory cannot be kept in {where!r} ({error.strerror}): free some of that disk."
            ) from None

    def _write(self, name: K, tensor: Tensor) -> None:
        if name in self._entries:
            raise ValueError(f"{name!r} comes twice")
        start = -(-self._file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._entries[name] = _Entry(start, tensor.dtype, tensor.shape, tensor.device)

    def __getitem__(self, name: K) -> Tensor:
        start, dtype, shape, device = self._entries[name]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype, device=device)
        size = shape.numel() * dtype.itemsize
        mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=start)
        return torch.frombuffer(mapped, dtype=dtype).view(shape).to(device)

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
