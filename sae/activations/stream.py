"""Streams of activation batches for training: from a store, or live from a language model.

Both give batches of exactly `batch_tokens` rows for ever, epoch after epoch, from a position that is two integers.
A batch depends only on the seed and on that position, so restoring `state_dict()` continues the very same sequence.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.store import Shard, StoreReader, TokenRows
from sae.errors import UserError
from sae.files import sha256_json


class ActivationBatch(NamedTuple):
    """One training batch: the same tokens at every hook point."""

    acts: dict[str, Float[Tensor, "batch d_in"]]
    tokens: TokenRows


class ActivationStream(Protocol):
    """What the trainer needs of a stream."""

    d_in: dict[str, int]
    batch_tokens: int
    fingerprint: str  # equal fingerprints give equal batches

    def next_batch(self) -> ActivationBatch:
        """Return the next batch."""
        ...

    def state_dict(self) -> dict[str, int]:
        """Return the position, as plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position that `state_dict` returned."""
        ...


class _BlockStream:
    """Batches cut from a sequence of blocks (shards, or live windows), epoch after epoch.

    Subclasses say how many blocks an epoch has and load one block in the order its rows are to be read.
    The position is (epoch, block, row): the next row to give out.
    """

    d_in: dict[str, int]

    def __init__(self, n_blocks: int, batch_tokens: int, seed: int) -> None:
        if batch_tokens < 1:
            raise UserError(f"train.batch_tokens={batch_tokens} must be at least 1.")
        self.batch_tokens = batch_tokens
        self.seed = seed
        self._n_blocks = n_blocks
        self._epoch, self._block, self._row = 0, 0, 0
        self._loaded: tuple[int, int] | None = None
        self._current: Shard | None = None

    def _load_block(self, epoch: int, block: int) -> Shard:
        raise NotImplementedError

    def next_batch(self) -> ActivationBatch:
        """Return the next `batch_tokens` rows."""
        pieces: list[Shard] = []
        missing = self.batch_tokens
        empty = 0
        while missing:
            block = self._block_at(self._epoch, self._block)
            n_rows = block.tokens.token.shape[0]
            take = min(missing, n_rows - self._row)
            if take:
                pieces.append(_slice(block, self._row, self._row + take))
                self._row += take
                missing -= take
            if self._row >= n_rows:
                self._row = 0
                self._block += 1
                if self._block >= self._n_blocks:
                    self._epoch, self._block = self._epoch + 1, 0
            empty = 0 if take else empty + 1
            if empty > self._n_blocks:
                raise UserError("the activation stream holds no token: check data.path and data.n_tokens.")
        return _join(pieces)

    def state_dict(self) -> dict[str, int]:
        """Return the position: epoch, block within it, row within that."""
        return {"epoch": self._epoch, "block": self._block, "row": self._row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position."""
        self._epoch, self._block, self._row = state["epoch"], state["block"], state["row"]

    def _block_at(self, epoch: int, block: int) -> Shard:
        if self._loaded != (epoch, block) or self._current is None:
            self._current = None  # let the old block go before the new one is read
            self._current = self._load_block(epoch, block)
            self._loaded = (epoch, block)
        return self._current

    def _order(self, *keys: int, n: int) -> np.ndarray:
        sequence = np.random.SeedSequence([self.seed, *keys])
        return np.random.Generator(np.random.Philox(sequence)).permutation(n)


class StoreStream(_BlockStream):
    """Read a store sequentially, for ever.

    The first epoch takes shards and rows as they lie on disk, which is already a uniformly random order; every later
    epoch permutes the order of the shards and the rows inside each.

    Args:
        reader: an open store.
        hook_names: which hook points to read; None for all.
        batch_tokens: rows in a batch.
        seed: of the later epochs' permutations.
    """

    def __init__(
        self, reader: StoreReader, *, batch_tokens: int, hook_names: list[str] | None = None, seed: int = 0
    ) -> None:
        super().__init__(len(reader.info.shard_rows), batch_tokens, seed)
        self.reader = reader
        self.hook_names = list(reader.info.hook_names if hook_names is None else hook_names)
        self.d_in = {name: reader.info.d_in[name] for name in self.hook_names if name in reader.info.d_in}
        self.fingerprint = sha256_json([reader.info.checksums, self.hook_names, batch_tokens, seed])

    def _load_block(self, epoch: int, block: int) -> Shard:
        if epoch == 0:
            return self.reader.read_shard(block, self.hook_names)
        shard = self.reader.read_shard(int(self._order(epoch, n=self._n_blocks)[block]), self.hook_names)
        order = torch.from_numpy(self._order(epoch, block, n=shard.tokens.token.shape[0]))
        return _take(shard, order)


class LiveStream(_BlockStream):
    """Run the language model as training goes; nothing is stored.

    Rows are shuffled uniformly within windows: each window is filled by consecutive forward passes, permuted, and
    given out whole. Resuming inside a window runs its passes again.

    Args:
        passes: called with a forward pass's number, gives its rows (see `sae.activations.harvest.Passes`).
        n_passes: forward passes in one epoch.
        passes_per_window: forward passes in one window.
        d_in: width of each hook point.
        batch_tokens: rows in a batch.
        seed: of the windows' permutations.
        fingerprint: identifies what the passes read.
    """

    def __init__(
        self,
        passes: Callable[[int], Shard],
        *,
        n_passes: int,
        passes_per_window: int,
        d_in: dict[str, int],
        batch_tokens: int,
        seed: int = 0,
        fingerprint: str = "",
    ) -> None:
        super().__init__(-(-n_passes // passes_per_window), batch_tokens, seed)
        self.fingerprint = sha256_json([fingerprint, n_passes, passes_per_window, batch_tokens, seed])
        self.d_in = dict(d_in)
        self._passes = passes
        self._n_passes = n_passes
        self._window = passes_per_window

    def _load_block(self, epoch: int, block: int) -> Shard:
        # The passes themselves are dealt out anew each epoch, so that a window never mixes the same texts twice.
        deal = self._order(epoch, n=self._n_passes)
        shards = [self._passes(int(number)) for number in deal[block * self._window : (block + 1) * self._window]]
        joined = _join(shards)
        n_rows = joined.tokens.token.shape[0]
        order = torch.from_numpy(self._order(epoch, block, n=n_rows))
        return _take(Shard(joined.acts, joined.tokens), order)


def batches(stream: ActivationStream, n: int) -> Iterator[ActivationBatch]:
    """Yield the next `n` batches of a stream."""
    for _ in range(n):
        yield stream.next_batch()


def _slice(shard: Shard, start: int, stop: int) -> Shard:
    acts = {name: block[start:stop] for name, block in shard.acts.items()}
    return Shard(acts, TokenRows(*(column[start:stop] for column in shard.tokens)))


def _take(shard: Shard, order: Tensor) -> Shard:
    return Shard(
        {name: block[order] for name, block in shard.acts.items()},
        TokenRows(*(column[order] for column in shard.tokens)),
    )


def _join(pieces: list[Shard]) -> ActivationBatch:
    if len(pieces) == 1:
        return ActivationBatch(pieces[0].acts, pieces[0].tokens)
    acts = {name: torch.cat([piece.acts[name] for piece in pieces]) for name in pieces[0].acts}
    tokens = TokenRows(*(torch.cat(columns) for columns in zip(*(piece.tokens for piece in pieces), strict=True)))
    return ActivationBatch(acts, tokens)
