"""Prepare batches ahead: a thread reads, decodes and converts the next ones while the current one trains."""

import threading
import weakref
from collections import deque
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from sae.activations.stream import ActivationBatch, ActivationStream

_ENDED = "the prefetching thread ended without a word"


class _Item(NamedTuple):
    """A batch with the position behind it, or what was raised in its place."""

    batch: ActivationBatch | None
    state: dict[str, int]
    error: BaseException | None


class Prefetch:
    """A stream that is `depth` batches ahead of whoever reads it, and gives exactly the batches of the inner one.

        with Prefetch(stream) as ahead:
            batch = ahead.next_batch()

    `state_dict()` is the position behind the last batch handed out, whatever has been prepared since. What the inner
    stream raises is raised in place of the batch it belongs to; a further call tries that batch again. Until it is
    closed, the inner stream belongs to the thread: use it in no other way.

    Args:
        stream: the inner stream.
        depth: batches prepared ahead.
        dtype: type of the activations handed out; None leaves them as the inner stream gives them, which may be
            views of files that are only read, and waited for, when the batch is used.
        pin: put them into page-locked memory, from which a CUDA device copies without stopping the processor.
    """

    def __init__(
        self,
        stream: ActivationStream,
        *,
        depth: int = 2,
        dtype: torch.dtype | None = torch.float32,
        pin: bool = False,
    ) -> None:
        assert depth >= 1, depth
        self.d_in = stream.d_in
        self.batch_tokens = stream.batch_tokens
        self.fingerprint = stream.fingerprint
        self._stream, self._depth, self._dtype, self._pin = stream, depth, dtype, pin
        self._state = stream.state_dict()
        self._worker: _Worker | None = None
        self._end: weakref.finalize | None = None

    def next_batch(self) -> ActivationBatch:
        """Return the next batch."""
        if self._worker is None:
            self._stream.load_state_dict(self._state)
            self._worker = _Worker(self._stream, self._depth, self._dtype, self._pin)
            # Whoever drops the stream without closing it, or ends the program, ends the thread.
            self._end = weakref.finalize(self, _Worker.stop, self._worker)
        try:
            item = self._worker.take()
            if item.error is not None:
                raise item.error
            # Last in the block: if an interrupt comes before, the batch counts as not handed out.
            self._state = item.state
        except BaseException:
            self.close()
            raise
        assert item.batch is not None
        return item.batch

    def state_dict(self) -> dict[str, int]:
        """Return the position behind the last batch handed out."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; what was prepared is dropped."""
        self.close()
        self._state = dict(state)

    def close(self) -> None:
        """End the thread and drop what was prepared. The stream can be read on: the next call begins anew."""
        if self._worker is not None and self._end is not None:
            self._worker = None
            self._end()
            self._stream.load_state_dict(self._state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """The thread and the batches it has ready. Knows nothing of the `Prefetch`, so that this can be collected."""

    def __init__(self, stream: ActivationStream, depth: int, dtype: torch.dtype | None, pin: bool) -> None:
        self._stream, self._depth, self._dtype, self._pin = stream, depth, dtype, pin
        self._ready: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> _Item:
        """Wait for the next item."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not self._thread.is_alive())
            assert self._ready, _ENDED
            item = self._ready.popleft()
            self._changed.notify_all()
        return item

    def stop(self) -> None:
        """End the thread; waits for the batch it is preparing."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
                if self._stopped:
                    return
            try:
                batch = self._prepare(self._stream.next_batch())
                item = _Item(batch, self._stream.state_dict(), None)
            except BaseException as error:
                item = _Item(None, {}, error)
            with self._changed:
                if self._stopped:
                    return
                self._ready.append(item)
                self._changed.notify_all()
            if item.error is not None:
                return

    def _prepare(self, batch: ActivationBatch) -> ActivationBatch:
        if self._dtype is None and not self._pin:
            return batch
        acts = {name: self._convert(block) for name, block in batch.acts.items()}
        return ActivationBatch(acts, lambda: batch.tokens)

    def _convert(self, block: Tensor) -> Tensor:
        dtype = self._dtype or block.dtype
        # Rows of a mapped file are a small part of it; gathered ones may be cut out of little more than themselves.
        mapped = block.untyped_storage().nbytes() > 2 * block.nbytes
        if block.dtype == dtype and not mapped and not self._pin:
            return block
        return torch.empty(block.shape, dtype=dtype, pin_memory=self._pin).copy_(block)
