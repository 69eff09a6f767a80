"""Streams of activation batches for training: from a store, or live from a language model.

Both give batches of exactly `batch_tokens` rows for ever, epoch after epoch, from a position that is three integers.
A batch depends only on the seed and on that position, so restoring `state_dict()` continues the very same sequence.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.reader import OpenShard, StoreReader
from sae.activations.store import Shard, TokenRows
from sae.errors import UserError
from sae.files import sha256_json

# Later epochs move short rows in runs: a row here and a row there take twice the time of as many bytes in a row.
RUN_BYTES = 8192
MIN_RUNS = 128  # in a batch, where such runs would be a larger share of it


class ActivationBatch:
    """One training batch: the same tokens at every hook point.

    Attributes:
        acts: hook name -> `[batch d_in]`.
    """

    def __init__(self, acts: dict[str, Float[Tensor, "batch d_in"]], tokens: Callable[[], TokenRows]) -> None:
        self.acts = acts
        self._tokens: TokenRows | Callable[[], TokenRows] = tokens

    @property
    def tokens(self) -> TokenRows:
        """Where the rows come from; read when first asked for, since training does not ask."""
        if not isinstance(self._tokens, TokenRows):
            self._tokens = self._tokens()
        return self._tokens


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


class Block(Protocol):
    """Some rows in the order in which they are to be read."""

    n_rows: int

    def read(self, start: int, stop: int) -> ActivationBatch:
        """Return rows `start` to `stop` of that order."""
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
        self._position = (0, 0, 0)
        self._loaded: tuple[int, int] | None = None
        self._current: Block | None = None

    def _load_block(self, epoch: int, block: int) -> Block:
        raise NotImplementedError

    def next_batch(self) -> ActivationBatch:
        """Return the next `batch_tokens` rows. When it raises, the position is what it was."""
        pieces: list[ActivationBatch] = []
        epoch, number, row = self._position
        missing = self.batch_tokens
        empty = 0
        while missing:
            block = self._block_at(epoch, number)
            take = min(missing, block.n_rows - row)
            if take:
                pieces.append(block.read(row, row + take))
                row += take
                missing -= take
            if row >= block.n_rows:
                number, row = number + 1, 0
                if number >= self._n_blocks:
                    epoch, number = epoch + 1, 0
            empty = 0 if take else empty + 1
            if empty > self._n_blocks:
                raise UserError("the activation stream holds no token: check data.path and data.n_tokens.")
        self._position = epoch, number, row
        return _join(pieces)

    def state_dict(self) -> dict[str, int]:
        """Return the position: epoch, block within it, row within that."""
        epoch, block, row = self._position
        return {"epoch": epoch, "block": block, "row": row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position."""
        self._position = state["epoch"], state["block"], state["row"]

    def _block_at(self, epoch: int, block: int) -> Block:
        if self._loaded != (epoch, block) or self._current is None:
            self._current = None  # let the old block go before the new one is read
            self._current = self._load_block(epoch, block)
            self._loaded = (epoch, block)
        return self._current

    def _order(self, *keys: int, n: int) -> np.ndarray:
        sequence = np.random.SeedSequence([self.seed, *keys])
        return np.random.Generator(np.random.Philox(sequence)).permutation(n)


class StoreStream(_BlockStream):
    """Read a store, for ever.

    The first epoch takes shards and rows as they lie on disk, which is already a uniformly random order; every later
    epoch permutes the order of the shards and, inside each, that of runs of rows. A run is as many rows as fit into
    8 kB (one, from 2,049 channels in bfloat16): its rows, strangers to each other, share a batch in all epochs.

    Args:
        reader: an open store.
        hook_names: which hook points to read; None for all.
        batch_tokens: rows in a batch.
        seed: of the later epochs' permutations.
        dtype: of the activations handed out; None leaves them as they are stored (int8 gives float32).
    """

    def __init__(
        self,
        reader: StoreReader,
        *,
        batch_tokens: int,
        hook_names: list[str] | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(len(reader.info.shard_rows), batch_tokens, seed)
        self.reader = reader
        self.dtype = dtype
        self._scratch: dict[str, Tensor] = {}
        self.hook_names = list(reader.info.hook_names if hook_names is None else hook_names)
        self.d_in = {name: reader.info.d_in[name] for name in self.hook_names if name in reader.info.d_in}
        self.fingerprint = sha256_json([reader.info.checksums, self.hook_names, batch_tokens, seed, RUN_BYTES])

    def _load_block(self, epoch: int, block: int) -> Block:
        shard = self.reader.open_shard(self._shard(epoch, block), self.hook_names)
        last = block + 1 == self._n_blocks
        self.reader.read_ahead(self._shard(epoch + last, 0 if last else block + 1), self.hook_names)
        if epoch == 0:
            return _Sequential(shard, self.dtype)
        run = min(max(1, RUN_BYTES // shard.widest_row), max(1, self.batch_tokens // MIN_RUNS))
        order = torch.from_numpy(self._order(epoch, block, n=shard.n_rows // run))
        return _InRuns(shard, self.dtype, run, order, self._scratch)

    def _shard(self, epoch: int, block: int) -> int:
        return block if epoch == 0 else int(self._order(epoch, n=self._n_blocks)[block])


class _Sequential:
    """A shard as it lies on disk."""

    def __init__(self, shard: OpenShard, dtype: torch.dtype | None) -> None:
        self.n_rows = shard.n_rows
        self._shard, self._dtype = shard, dtype

    def read(self, start: int, stop: int) -> ActivationBatch:
        def take(column: Tensor, scratch: str | None) -> Tensor:
            return column[start:stop]

        return ActivationBatch(self._shard.acts(take, self._dtype), partial(self._shard.tokens, take))


class _InRuns:
    """A shard with its runs of `run` rows permuted; the rows that fill no run come last."""

    def __init__(
        self, shard: OpenShard, dtype: torch.dtype | None, run: int, order: Tensor, scratch: dict[str, Tensor]
    ) -> None:
        self.n_rows = shard.n_rows
        self._shard, self._dtype, self._run, self._order, self._scratch = shard, dtype, run, order, scratch

    def read(self, start: int, stop: int) -> ActivationBatch:
        take = partial(self._take, start, stop)
        return ActivationBatch(self._shard.acts(take, self._dtype), partial(self._shard.tokens, take))

    def _take(self, start: int, stop: int, column: Tensor, scratch: str | None) -> Tensor:
        run, whole = self._run, len(self._order) * self._run
        if start >= whole:
            return column[start:stop]
        shape = column.shape[1:]
        wanted = self._order[start // run : -(-min(stop, whole) // run)]
        # Runs are gathered as single rows of a narrower tensor: one copy of a page, not many of a row.
        runs = column[:whole].view(len(self._order), run * shape.numel())
        out = None if scratch is None else self._buffer(scratch, (len(wanted), runs.shape[1]), column.dtype)
        rows = torch.index_select(runs, 0, wanted, out=out).view(len(wanted) * run, *shape)
        found = rows[start % run : min(stop, whole) - start // run * run]
        return found if stop <= whole else torch.cat([found, column[whole:stop]])

    def _buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory that is used over and over: fresh memory would take longer to get than to fill."""
        held = self._scratch.get(name)
        if held is None or len(held) < shape[0] or held.shape[1] != shape[1]:
            held = self._scratch[name] = torch.empty(shape, dtype=dtype)
        return held[: shape[0]]


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

    def _load_block(self, epoch: int, block: int) -> Block:
        # The passes themselves are dealt out anew each epoch, so that a window never mixes the same texts twice.
        deal = self._order(epoch, n=self._n_passes)
        shards = [self._passes(int(number)) for number in deal[block * self._window : (block + 1) * self._window]]
        acts = {name: torch.cat([shard.acts[name] for shard in shards]) for name in shards[0].acts}
        tokens = _concatenate([shard.tokens for shard in shards])
        order = torch.from_numpy(self._order(epoch, block, n=len(tokens.token)))
        return _Permuted(Shard(acts, tokens), order)


class _Permuted:
    """Rows in memory, permuted as they are read: a permuted copy would take their memory twice."""

    def __init__(self, shard: Shard, order: Tensor) -> None:
        self.n_rows = len(order)
        self._held, self._order = shard, order

    def read(self, start: int, stop: int) -> ActivationBatch:
        rows = self._order[start:stop]
        acts = {name: block.index_select(0, rows.to(block.device)) for name, block in self._held.acts.items()}
        tokens = TokenRows(*(column.index_select(0, rows.to(column.device)) for column in self._held.tokens))
        return ActivationBatch(acts, lambda: tokens)


def batches(stream: ActivationStream, n: int) -> Iterator[ActivationBatch]:
    """Yield the next `n` batches of a stream."""
    for _ in range(n):
        yield stream.next_batch()


def _join(pieces: list[ActivationBatch]) -> ActivationBatch:
    if len(pieces) == 1:
        return pieces[0]
    acts = {name: torch.cat([piece.acts[name] for piece in pieces]) for name in pieces[0].acts}
    return ActivationBatch(acts, lambda: _concatenate([piece.tokens for piece in pieces]))


def _concatenate(tokens: list[TokenRows]) -> TokenRows:
    return TokenRows(*(torch.cat(columns) for columns in zip(*tokens, strict=True)))
