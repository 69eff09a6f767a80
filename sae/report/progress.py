"""A progress bar with an estimate of the time left; plain occasional lines where there is no terminal.

    with Progress(total=n_steps, label="training", unit="step") as bar:
        for step in range(n_steps):
            ...
            bar.update(1, fvu=0.12)

Everything goes to stderr, so that stdout stays a result another program can read.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TextIO, TypeVar

from sae.report.terminal import clean, format_cell

Item = TypeVar("Item")
_BAR = 24


def format_time(seconds: float) -> str:
    """Format a duration: `8s`, `3m 05s`, `2h 07m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def _is_terminal(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal; a closed one is not."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


class Progress:
    """Counts work done and tells the person waiting how much is left."""

    def __init__(
        self,
        total: int | None,
        label: str,
        *,
        unit: str = "it",
        start: int = 0,
        stream: TextIO | None = None,
        every_s: float | None = None,
        enabled: bool = True,
    ) -> None:
        """Start the clock.

        Args:
            total: the amount of work, or None when it is not known.
            label: what is being done.
            unit: what is counted.
            start: work done before (a resumed run); it does not count towards the speed.
            stream: where to write; stderr by default.
            every_s: the shortest time between two displays; 0.2 s on a terminal, 30 s elsewhere.
            enabled: False shows nothing (e.g. on every rank but the first).
        """
        self.total, self.label, self.unit = total, clean(label), unit
        self.done, self._start = start, start
        self._stream = stream if stream is not None else sys.stderr
        self._tty = _is_terminal(self._stream)
        self._every = every_s if every_s is not None else (0.2 if self._tty else 30.0)
        self._enabled, self._closed = enabled, False
        self._values: dict[str, object] = {}
        self._began = time.monotonic()
        self._shown = self._began if not self._tty else self._began - self._every
        self._width = 0

    def update(self, n: int = 1, **values: object) -> None:
        """Count `n` more units; `values` are shown beside the bar until they are replaced."""
        self.done += n
        self._values.update(values)
        now = time.monotonic()
        if now - self._shown >= self._every:
            self._shown = now
            self._write(final=False)

    def close(self) -> None:
        """Show the final state and end the line; further calls do nothing."""
        if not self._closed:
            self._closed = True
            self._write(final=True)

    def line(self) -> str:
        """Return the current state as one line of text."""
        elapsed = time.monotonic() - self._began
        speed = (self.done - self._start) / elapsed if elapsed > 0 else 0.0
        parts = [self.label]
        if self.total:
            share = min(1.0, self.done / self.total)
            if self._tty:
                full = round(share * _BAR)
                parts.append("█" * full + "░" * (_BAR - full))
            parts.append(f"{100 * share:3.0f}%  {self.done:,}/{self.total:,} {self.unit}")
        else:
            parts.append(f"{self.done:,} {self.unit}")
        parts.append(format_time(elapsed))
        if speed > 0:
            parts.append(f"{speed:,.1f} {self.unit}/s" if speed >= 1 else f"{1 / speed:,.1f} s/{self.unit}")
            if self.total and self.done < self.total:
                parts.append(f"{format_time((self.total - self.done) / speed)} left")
        parts += [f"{name} {format_cell(value)}" for name, value in self._values.items()]
        return "  ".join(parts)

    def _write(self, *, final: bool) -> None:
        """Show the line; a closed or broken stream never stops the work."""
        if not self._enabled:
            return
        text = self.line()
        try:
            if self._tty:
                import shutil

                text = text[: max(20, shutil.get_terminal_size().columns - 1)]
                self._stream.write("\r" + text.ljust(self._width) + ("\n" if final else ""))
                self._width = len(text)
            else:
                self._stream.write(text + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._enabled = False

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, whether the work succeeded or not."""
        self.close()


def track(items: Iterable[Item], label: str, *, total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """Yield the items, showing progress; the total is the length where there is one."""
    if total is None:
        length = getattr(items, "__len__", None)
        total = length() if length is not None else None
    with Progress(total, label, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()
