"""Do work behind the caller's back: one thread, in order, a bounded number of calls late."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Behind:
    """A thread that makes calls one after another while the caller goes on.

        with Behind() as behind:
            for ...:
                behind.submit(call)

    The block ends when all calls are made. An exception in a call ends the work: no later call is made, and it is
    raised from the next `submit`, or at the end of the block. If the block itself fails, or is interrupted, calls
    that have not begun are dropped, and the one that has is waited for: nothing goes on behind after the block.

    Args:
        depth: calls that may wait; `submit` waits while there are as many.
    """

    def __init__(self, depth: int = 2) -> None:
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._dropped = False
        # A daemon, so that a caller who never ends the block cannot keep the process alive.
        self._thread = threading.Thread(target=self._work, name="behind", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._dropped = kind is not None
        self._calls.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def submit(self, call: Callable[[], object]) -> None:
        """Have a call made after those before it."""
        self._raise()
        self._calls.put(call)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            # Calls are taken, though not made, after a failure too: a caller waiting for room must not wait for ever.
            if self._error is None and not self._dropped:
                try:
                    call()
                except BaseException as error:
                    self._error = error
            del call  # let its tensors go while waiting for the next
