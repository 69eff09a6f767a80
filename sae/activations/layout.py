"""What a store holds for each token, in which types, and how many bytes that takes.

A hook point's activations are stored as one or more columns: a single one of 16- or 32-bit floats, or the three of
`int8` (see `sae.activations.quantize`). The four token fields follow. While a store is being written, a token's
columns lie side by side, as a record; in a finished shard, every column is a tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sae.activations.quantize import n_outliers
from sae.files import SCHEMA_VERSION

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
TOKEN_FIELDS = {"token": torch.int32, "role": torch.uint8, "doc": torch.int32, "pos": torch.int32}

TOKENS = "tokens"


class TokenRows(NamedTuple):
    """Where each activation row comes from."""

    token: Int[Tensor, " row"]
    role: UInt8[Tensor, " row"]
    doc: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]


class Shard(NamedTuple):
    """Rows in memory."""

    acts: dict[str, Float[Tensor, "row d_in"]]
    tokens: TokenRows


class Column(NamedTuple):
    """One stored tensor, `[row *shape]`."""

    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes a token."""
        return math.prod(self.shape) * self.dtype.itemsize


def columns(d_in: int, dtype: str) -> dict[str, Column]:
    """The tensors of one hook point, by name, widest type first: in a file each then lies at a multiple of its size."""
    if dtype == "int8":
        return {
            "scale": Column(torch.float32),
            "outliers": Column(torch.bfloat16, (n_outliers(d_in),)),
            "acts": Column(torch.int8, (d_in,)),
        }
    return {"acts": Column(DTYPES[dtype], (d_in,))}


def token_columns() -> dict[str, Column]:
    """The token fields as tensors, by name, widest type first."""
    return {name: Column(dtype) for name, dtype in sorted(TOKEN_FIELDS.items(), key=lambda item: -item[1].itemsize)}


def row_bytes(d_in: int, dtype: str) -> int:
    """Bytes one token takes at one hook point."""
    return sum(column.n_bytes for column in columns(d_in, dtype).values())


def record_bytes(d_in: Mapping[str, int], dtype: str) -> int:
    """Bytes one token takes in all: activations at every hook point, and token fields."""
    fields = sum(column.n_bytes for column in token_columns().values())
    return sum(row_bytes(width, dtype) for width in d_in.values()) + fields


def estimate_bytes(d_in: Mapping[str, int], n_tokens: int, dtype: str) -> int:
    """Bytes a store of this size takes on disk; file headers, under 1 kB a file, come on top."""
    return n_tokens * record_bytes(d_in, dtype)


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
    outlier_channels: dict[str, list[int]] = field(default_factory=dict)
    """int8 only: the channels kept apart in bfloat16 at each hook point, in ascending order."""
    schema_version: int = SCHEMA_VERSION

    @property
    def n_bytes(self) -> int:
        """Bytes of activations, all hook points together, with their scales and outlier channels."""
        return self.n_tokens * sum(row_bytes(width, self.dtype) for width in self.d_in.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes, token fields included."""
        return record_bytes(self.d_in, self.dtype)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole store, but for file headers."""
        return estimate_bytes(self.d_in, self.n_tokens, self.dtype)


def file_name(shard: int, name: str) -> str:
    """A shard's file of one hook point, or of the token fields (`TOKENS`)."""
    return f"shard-{shard:05d}/{name}.safetensors"


def format_bytes(n_bytes: int) -> str:
    """A size for people: `81.1 MB`."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.1f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"
