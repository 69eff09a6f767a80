"""Tokens with a mask and a role each, and packing documents into rows.

Every token carries a `Role`, so that later stages can say "the assistant's first token" or "no template tokens"
without knowing any chat format. A `TokenBatch` is padded on either side; a `PackedTokens` has rows of equal length.
"""

import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from sae.errors import UserError, unknown


class Role(enum.IntEnum):
    """What a token is. Values are stored in `uint8` tensors and files: never renumber them."""

    PAD = 0
    SPECIAL = 1  #: BOS, EOS and the like
    TEXT = 2  #: a plain document
    SYSTEM = 3
    USER = 4
    TEMPLATE = 5  #: chat-template tokens such as "user :" or "<start_of_turn>model"
    ASSISTANT = 6
    FIRST_RESPONSE = 7  #: the first token of an assistant message


class Tokenized(NamedTuple):
    """One tokenized text: `tokens[i]` has role `roles[i]`."""

    tokens: list[int]
    roles: list[int]


class TokenBatch(NamedTuple):
    """Padded token rows. Real tokens of a row are contiguous, with padding on one side only."""

    tokens: Int[Tensor, "batch pos"]  #: int64
    mask: Bool[Tensor, "batch pos"]  #: True = a real token
    roles: UInt8[Tensor, "batch pos"]  #: `Role` values; PAD where the mask is False

    @property
    def lengths(self) -> list[int]:
        """Number of real tokens in each row."""
        return self.mask.sum(dim=1).tolist()

    def positions(self) -> Int[Tensor, "batch pos"]:
        """Index of each token within its unpadded row (0 at padding before it)."""
        return (self.mask.long().cumsum(dim=1) - 1).clamp_min(0)

    def last_positions(self) -> Int[Tensor, " batch"]:
        """Column of the last real token of each row, whichever side the padding is on."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return torch.where(self.mask, columns, -1).amax(dim=1)

    def select(self, rows: Sequence[int] | Tensor) -> "TokenBatch":
        """Keep some rows, in the given order; columns that are padding in all of them are cut off."""
        index = torch.as_tensor(rows, device=self.tokens.device)
        mask = self.mask[index]
        used = mask.any(dim=0).nonzero().flatten()
        keep = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
        return TokenBatch(self.tokens[index][:, keep], mask[:, keep], self.roles[index][:, keep])

    def repeat(self, times: int) -> "TokenBatch":
        """All rows, then all rows again, and so on."""
        return TokenBatch(self.tokens.repeat(times, 1), self.mask.repeat(times, 1), self.roles.repeat(times, 1))

    def split(self, batch_size: int) -> Iterator["TokenBatch"]:
        """Yield consecutive batches of at most `batch_size` rows, each cut to its own longest row."""
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is not positive: give 1 or more.")
        for start in range(0, len(self.tokens), batch_size):
            yield self.select(range(start, min(start + batch_size, len(self.tokens))))

    def to(self, device: str | torch.device) -> "TokenBatch":
        """Move to a device."""
        return TokenBatch(self.tokens.to(device), self.mask.to(device), self.roles.to(device))

    def rows(self) -> list[Tokenized]:
        """The unpadded rows."""
        return [
            Tokenized(self.tokens[i][self.mask[i]].tolist(), self.roles[i][self.mask[i]].tolist())
            for i in range(len(self.tokens))
        ]

    def repad(self, padding_side: str, pad_id: int = 0) -> "TokenBatch":
        """Move the padding to the given side; the batch itself when it is there already."""
        edge = self.mask[:, -1] if padding_side == "left" else self.mask[:, 0]
        if bool(edge.all()):
            return self
        return pad(self.rows(), padding_side=padding_side, pad_id=pad_id).to(self.tokens.device)


def pad(rows: Sequence[Tokenized], *, padding_side: str = "right", pad_id: int = 0) -> TokenBatch:
    """Pad rows to a common length.

    Raises:
        UserError: no rows, an empty row, or an unknown side.
    """
    if padding_side not in ("left", "right"):
        raise unknown("padding side", padding_side, ["left", "right"])
    if not rows:
        raise UserError("an empty list of texts cannot be tokenized: give at least one.")
    for number, row in enumerate(rows):
        assert len(row.tokens) == len(row.roles), "one role a token"
        if not row.tokens:
            raise UserError(f"text number {number} has no tokens: remove empty texts, or set prepend_bos=True.")
    width = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    roles = torch.zeros((len(rows), width), dtype=torch.uint8)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for number, row in enumerate(rows):
        length = len(row.tokens)
        where = slice(width - length, width) if padding_side == "left" else slice(0, length)
        tokens[number, where] = torch.tensor(row.tokens, dtype=torch.int64)
        roles[number, where] = torch.tensor(row.roles, dtype=torch.uint8)
        mask[number, where] = True
    return TokenBatch(tokens, mask, roles)


def by_length(lengths: Int[Tensor, " n"], batch_tokens: int) -> Iterator[Int[Tensor, " rows"]]:
    """Yield all rows in batches of about `batch_tokens`, padding included; shortest first, so that little is padded.

    Args:
        lengths: real tokens of each row.
        batch_tokens: rows times the length of the longest are no more than this; a single row may be.
    """
    order = torch.argsort(lengths, stable=True)
    start = 0
    while start < len(order):
        n_rows = 1
        while start + n_rows < len(order) and int(lengths[order[start + n_rows]]) * (n_rows + 1) <= batch_tokens:
            n_rows += 1
        yield order[start : start + n_rows]
        start += n_rows


def sae_mask(roles: UInt8[Tensor, "..."], include_special: bool = False) -> Bool[Tensor, "..."]:
    """Which tokens may reach an SAE: never padding, and BOS/EOS only when asked for.

    BOS activations are norm outliers that would take over the reconstruction loss.
    """
    mask = roles != Role.PAD
    return mask if include_special else mask & (roles != Role.SPECIAL)


class PackedTokens(NamedTuple):
    """Rows of exactly `ctx_len` tokens. Padding (role PAD) is only ever at the end of a row."""

    tokens: Int[Tensor, "n ctx"]  #: int32
    roles: UInt8[Tensor, "n ctx"]
    doc: Int[Tensor, "n ctx"]  #: int32, index of the document each token is from; -1 at padding

    @property
    def mask(self) -> Bool[Tensor, "n ctx"]:
        """True = a real token."""
        return self.roles != Role.PAD

    def batch(self, rows: slice | Sequence[int] | Tensor) -> TokenBatch:
        """Some rows as a right-padded `TokenBatch`."""
        roles = self.roles[rows]
        return TokenBatch(self.tokens[rows].long(), roles != Role.PAD, roles)


PACK_MODES = ["concat", "document"]


def pack(
    documents: Iterable[Tokenized],
    ctx_len: int,
    mode: str = "concat",
    *,
    lead_id: int | None = None,
    bos_each_row: bool = False,
    pad_id: int = 0,
) -> PackedTokens:
    """Pack all documents; see `iter_packed`, which does it as a stream."""
    parts = list(iter_packed(documents, ctx_len, mode, lead_id=lead_id, bos_each_row=bos_each_row, pad_id=pad_id))
    if not parts:
        raise UserError("the documents hold no tokens: check the data path and its text field.")
    return PackedTokens(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def iter_packed(
    documents: Iterable[Tokenized],
    ctx_len: int,
    mode: str = "concat",
    *,
    lead_id: int | None = None,
    bos_each_row: bool = False,
    pad_id: int = 0,
    rows_per_part: int = 1024,
) -> Iterator[PackedTokens]:
    """Pack a stream of tokenized documents into rows of `ctx_len`, `rows_per_part` rows at a time.

    Args:
        documents: tokenized documents; empty ones are skipped but still counted in `doc`.
        ctx_len: tokens a row.
        mode: "concat" joins the documents and cuts: no token is lost, only the very last row is padded, and a row
            may hold several documents. "document" gives every document a row of its own, cut off at `ctx_len`.
        lead_id: BOS, or EOS as a separator for a tokenizer without BOS. Every document is made to start with it
            (it is added where missing, role SPECIAL); None adds nothing.
        bos_each_row: in "concat" mode, rows that continue a document start with `lead_id` too.
        pad_id: the token at padding.
        rows_per_part: rows in each yielded part (the last may have fewer).

    Raises:
        UserError: unknown mode, or `ctx_len` below 2.
    """
    if mode not in PACK_MODES:
        raise unknown("packing mode", mode, PACK_MODES)
    if ctx_len < 2:
        raise UserError(f"ctx_len={ctx_len} is too short: give 2 or more.")
    if bos_each_row and lead_id is None:
        raise UserError("bos_each_row=True needs a lead_id: give the tokenizer's BOS or EOS id.")
    rows = _Rows(ctx_len, pad_id)
    for number, document in enumerate(documents):
        tokens, roles = list(document.tokens), list(document.roles)
        if not tokens:
            continue
        if lead_id is not None and tokens[0] != lead_id:
            tokens, roles = [lead_id, *tokens], [int(Role.SPECIAL), *roles]
        if mode == "document":
            rows.extend(tokens[:ctx_len], roles[:ctx_len], number)
            rows.close()
        else:
            start = 0
            while start < len(tokens):
                if bos_each_row and start and not rows.filled:
                    assert lead_id is not None
                    rows.extend([lead_id], [int(Role.SPECIAL)], number)
                stop = start + rows.free
                rows.extend(tokens[start:stop], roles[start:stop], number)
                if not rows.free:
                    rows.close()
                start = stop
        if rows.count >= rows_per_part:
            yield from rows.take(rows_per_part)
    if rows.filled:
        rows.close()
    yield from rows.take(rows_per_part, rest=True)


class _Rows:
    """Rows being filled, as flat Python lists (appending to tensors would cost a copy each)."""

    def __init__(self, ctx_len: int, pad_id: int) -> None:
        self.ctx_len, self.pad_id = ctx_len, pad_id
        self.tokens: list[int] = []
        self.roles: list[int] = []
        self.doc: list[int] = []

    @property
    def filled(self) -> int:
        return len(self.tokens) % self.ctx_len

    @property
    def free(self) -> int:
        return self.ctx_len - self.filled

    @property
    def count(self) -> int:
        return len(self.tokens) // self.ctx_len

    def extend(self, tokens: list[int], roles: list[int], doc: int) -> None:
        self.tokens += tokens
        self.roles += roles
        self.doc += [doc] * len(tokens)

    def close(self) -> None:
        """Pad the row being filled; a full or empty row stays as it is."""
        missing = -len(self.tokens) % self.ctx_len
        self.tokens += [self.pad_id] * missing
        self.roles += [int(Role.PAD)] * missing
        self.doc += [-1] * missing

    def take(self, rows: int, rest: bool = False) -> Iterator[PackedTokens]:
        """Yield and drop parts of `rows` full rows, and the rest when asked for."""
        while self.count >= rows or (rest and self.count):
            size = min(rows, self.count) * self.ctx_len
            shape = (-1, self.ctx_len)
            yield PackedTokens(
                torch.tensor(self.tokens[:size], dtype=torch.int32).view(shape),
                torch.tensor(self.roles[:size], dtype=torch.uint8).view(shape),
                torch.tensor(self.doc[:size], dtype=torch.int32).view(shape),
            )
            del self.tokens[:size], self.roles[:size], self.doc[:size]
