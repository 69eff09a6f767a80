"""Texts with labels, from a JSON-lines file: what probes are fitted and tested on.

    {"text": "The city of Krasnodar is in Russia.", "label": true, "group": "Krasnodar"}

A label may be text, a number, or true and false; there may be any number of them. Rows of one group (a topic, a city, a
template) are never on both sides of a split. Where no record has a group, every text is its own.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from sae.errors import UserError
from sae.files import read_jsonl

MIN_ROWS = 10
"""Fewest rows of a label: below, a side of the split may have none."""


class Labelled(NamedTuple):
    """Texts, each with its label and its group."""

    texts: list[str]
    labels: list[str]
    groups: list[str]
    grouped: bool
    """Whether the file names the groups."""

    def take(self, rows: list[int]) -> "Labelled":
        """Some rows, in the given order."""
        texts, labels, groups = ([column[row] for row in rows] for column in self[:3])
        return Labelled(texts, labels, groups, self.grouped)

    def tasks(self) -> dict[str, Bool[NDArray[np.bool_], " n"]]:
        """What is told apart: each label from all others, [n] booleans by label.

        Of two labels only the later in the alphabet is a task ("1" of "0" and "1", "true" of "false" and "true"): the
        other would be the same probe with its sign turned.
        """
        given = np.asarray(self.labels)
        names = sorted(set(self.labels))
        return {name: given == name for name in (names[1:] if len(names) == 2 else names)}


def read_labelled(path: Path | str) -> Labelled:
    """Read such a file.

    Raises:
        UserError: no such file, a record without text or label, a group in some records only, one label only, or a
            label with too few rows.
    """
    where = repr(str(path))
    records = read_jsonl(path)
    texts, labels, groups = [], [], []
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(f'{where}, record {number} is no mapping: write {{"text": "...", "label": "..."}}.')
        text = _field(record, "text", where, number)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}, record {number} has text {text!r}: give words, or remove the record.")
        texts.append(text)
        labels.append(_name(_field(record, "label", where, number), "label", where, number))
        if record.get("group") is not None:
            groups.append(_name(record["group"], "group", where, number))
        if len(groups) not in (0, number):
            raise UserError(f"{where}, record {number}: some records have a 'group' and some have none: give all one.")
    _check_labels(labels, where)
    return Labelled(texts, labels, groups or texts, bool(groups))


def _field(record: dict[str, Any], name: str, where: str, number: int) -> Any:
    if record.get(name) is None:
        has = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where}, record {number} has no {name!r} among its fields ({has}): add or rename one.")
    return record[name]


def _name(value: Any, name: str, where: str, number: int) -> str:
    """A label or group as text; 1 and 1.0 are one label, and true is not 1."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}, record {number} has {name} {value!r}: give text, a number, or true or false.")
    return str(value)


def _check_labels(labels: list[str], where: str) -> None:
    counts = Counter(labels)
    if len(counts) < 2:
        what = f"only the label {labels[0]!r}" if labels else "no record"
        raise UserError(f"{where} has {what}: a probe tells two or more labels apart.")
    label, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < MIN_ROWS:
        raise UserError(
            f"{where} has {fewest} rows of label {label!r}: give {MIN_ROWS} or more of each, or leave it out."
        )
