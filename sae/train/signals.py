"""SIGINT and SIGTERM as a request to stop at the next safe point."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While active, a signal sets `requested`. A second SIGINT is a person insisting, and acts as without this.

    SIGTERM often comes twice (schedulers and shells pass it on), so it stays caught while the state is being saved. A
    signal that came too late to be acted on is delivered when the block ends.

    Signals can only be caught in the main thread; elsewhere this does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._stop) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self.number is not None and kind is None:
            signal.raise_signal(self.number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.requested, self.number = True, number
        if number == signal.SIGINT and number in self._previous:
            signal.signal(number, self._previous.pop(number))
