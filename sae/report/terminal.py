"""Tables for a person: fixed width for the terminal, Markdown for a file or an issue.

Cells may come from models and datasets, so control characters (among them terminal escape codes) are
removed.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CELL = 48
DASH = "\u2013"


def clean(text: object) -> str:
    """Return text on one line without control or direction-changing characters."""
    flat = " ".join(str(text).split())
    return "".join(char for char in flat if unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def format_cell(value: Any) -> str:
    """Format one value: four significant digits, thousands separated, None and NaN as a dash."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return DASH
        if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if hasattr(value, "rate") and hasattr(value, "low"):
        return _rate(value.rate, value.low, getattr(value, "high", None))
    if isinstance(value, Mapping) and "rate" in value:
        return _rate(value["rate"], value.get("low"), value.get("high"))
    if isinstance(value, list | tuple):
        return " ".join(clean(item) for item in value)
    return clean(value)


def _rate(rate: Any, low: Any, high: Any) -> str:
    """Format a rate with its interval, as percentages."""
    if not isinstance(rate, int | float) or not math.isfinite(rate):
        return DASH
    if isinstance(low, int | float) and isinstance(high, int | float):
        return f"{100 * rate:.3g}% [{100 * low:.3g}, {100 * high:.3g}]"
    return f"{100 * rate:.3g}%"


def text_cells(text: str) -> int:
    """Return how many terminal columns a string takes: East Asian characters take two."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def _clip(text: str) -> str:
    """Shorten a cell in its middle: the ends of hook names and paths tell them apart."""
    if len(text) <= MAX_CELL:
        return text
    head = MAX_CELL // 2
    return text[:head] + "…" + text[len(text) - (MAX_CELL - head - 1) :]


def _cells(rows: Sequence[Any], columns: Sequence[str]) -> list[list[Any]]:
    """Return the rows as lists in the order of the columns; a missing cell is None."""
    table = []
    for row in rows:
        if isinstance(row, Mapping):
            table.append([row.get(name) for name in columns])
        else:
            cells = list(row)[: len(columns)]
            table.append(cells + [None] * (len(columns) - len(cells)))
    return table


def summary_table(rows: Sequence[Mapping[str, Any] | Sequence[Any]], columns: Sequence[str]) -> str:
    """Lay rows out as a fixed-width table: numbers to the right, text to the left, a rule under the header.

    Args:
        rows: dictionaries by column name, or sequences in the order of the columns.
        columns: the columns to show.
    """
    raw = _cells(rows, columns)
    header = [clean(name) for name in columns]
    body = [[_clip(format_cell(value)) for value in row] for row in raw]
    numeric = [
        any(_is_number(row[i]) for row in raw) and all(row[i] is None or _is_number(row[i]) for row in raw)
        for i in range(len(columns))
    ]
    widths = [max([text_cells(header[i]), *(text_cells(row[i]) for row in body)]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for cell, width, right in zip(cells, widths, numeric, strict=True):
            gap = " " * (width - text_cells(cell))
            padded.append(gap + cell if right else cell + gap)
        return "  ".join(padded).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(header), rule, *(line(row) for row in body)] if body else [line(header), rule, "(no rows)"])


def _is_number(value: Any) -> bool:
    """Tell whether a cell is a number or a rate."""
    if isinstance(value, Mapping):
        return "rate" in value
    return (isinstance(value, int | float) and not isinstance(value, bool)) or hasattr(value, "rate")


def markdown_table(rows: Sequence[Mapping[str, Any] | Sequence[Any]], columns: Sequence[str]) -> str:
    """Lay rows out as a Markdown table; characters that would break it are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    body = [line([format_cell(value) for value in row]) for row in _cells(rows, columns)]
    return "\n".join([line([clean(name) for name in columns]), line(["---"] * len(columns)), *body])
