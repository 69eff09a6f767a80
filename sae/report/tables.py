"""Tables of the page as records: cells are text by the time the template sees them, and empty columns are gone."""

from collections.abc import Sequence
from typing import NamedTuple

from sae.report.evidence import Interval, Rate
from sae.report.svg import DASH, MINUS, number, percent


class Cell(NamedTuple):
    """What stands in a cell, and in small letters below."""

    text: str
    small: str = ""


class Column(NamedTuple):
    """A column's name, what it means, and how it is set."""

    name: str
    hint: str = ""
    is_number: bool = True
    wraps: bool = False


class Line(NamedTuple):
    """A row; `look` is the class of its style: best, control or side."""

    cells: list[Cell]
    look: str = ""


class Table(NamedTuple):
    """A table with its name, for screen readers and, if `caption`, for all."""

    name: str
    columns: list[Column]
    rows: list[Line]
    caption: bool = False
    tall: bool = False  #: scrolls in itself
    hidden: int = 0  #: rows that are not shown
    source: str = "behavior/result.json"  #: the file that has them


EMPTY = Cell(DASH)


def table(
    name: str,
    columns: Sequence[Column],
    rows: Sequence[Line],
    *,
    limit: int | None = None,
    caption: bool = False,
    tall: bool = False,
    source: str = "behavior/result.json",
) -> Table | None:
    """Build a table without the columns that have nothing in them; None without rows.

    Args:
        name: what it shows.
        columns: all there may be; the first is kept.
        rows: with a cell for each.
        limit: rows shown; `Table.hidden` counts the others.
        caption: show the name above it.
        tall: let a long one scroll in itself.
        source: the file that has the other rows.
    """
    if not rows:
        return None
    kept = [place for place in range(len(columns)) if not place or any(row.cells[place] != EMPTY for row in rows)]
    shown = [Line([row.cells[place] for place in kept], row.look) for row in rows[:limit]]
    return Table(name, [columns[place] for place in kept], shown, caption, tall, len(rows) - len(shown), source)


def text_cell(text: str, small: str = "") -> Cell:
    """Text, or a dash."""
    return Cell(text or DASH, small)


def number_cell(value: float | None) -> Cell:
    """A number, or a dash."""
    return EMPTY if value is None else Cell(number(value))


def count_cell(value: int | None) -> Cell:
    """A count with its thousands set apart, or a dash."""
    return EMPTY if value is None else Cell(f"{value:,}")


def share_cell(value: float | None) -> Cell:
    """A share in percent, or a dash."""
    return EMPTY if value is None else Cell(percent(value))


def rate_cell(rate: Rate | None) -> Cell:
    """A rate with its interval below, or a dash."""
    return EMPTY if rate is None else Cell(percent(rate.rate), spread(rate))


def interval_cell(found: Interval | None) -> Cell:
    """An estimate with its interval below, or a dash."""
    if found is None:
        return EMPTY
    values = [value for value in (found.estimate, found.low, found.high) if value is not None]
    # The same decimals in a column of effects and scores; very small or large ones get as many digits as they need.
    even = 1e-3 <= max(map(abs, values)) < 1000
    said = [f"{value:.3f}".replace("-", MINUS) if even else number(value) for value in values]
    return Cell(said[0], f"{said[1]} to {said[2]}" if len(said) == 3 else "")


def score_cell(value: float | None) -> Cell:
    """A score or an effect with the decimals that `interval_cell` gives its like, or a dash."""
    return EMPTY if value is None else interval_cell(Interval(value))


def spread(rate: Rate | None) -> str:
    """Format a rate's interval."""
    if rate is None or rate.low is None or rate.high is None:
        return ""
    return f"{percent(rate.low)} to {percent(rate.high)}"
