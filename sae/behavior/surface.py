"""What a prompt looks like, whatever it means: length, ending, casing, digits, marks, first word, place in the chat.

A family is a group of columns that one classifier of the confound audit reads, and for each prompt the stratum that
matching keeps apart. What needs choosing (the common words, the edges of bins) is chosen on the rows `fit` says, where
both classes count the same, however many prompts they have.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sae.behavior.contrast import ContrastRecord

Array = np.ndarray

ENDINGS = {".": "stop", "?": "question mark", "!": "exclamation mark", ":": "colon", ";": "colon", "…": "stop"}
QUOTES = "\"'”\u2019»`"
SENTENCE_ENDS = ".!?…:;"  # what `strip` takes off
N_FIRST_WORDS = 30
N_WORDS = 400
MIN_COUNT = 3  # a word is a column from so many prompts on
N_BINS = 10  # of lengths, for a classifier
N_STRATA = 20  # of lengths, for matching: within a bin classes may still differ

SURFACE = ("length", "punctuation", "first_word", "casing", "digits", "marks", "position")
"""Families that say nothing of what a prompt asks for."""


class Family(NamedTuple):
    """A group of columns.

    `strata` [n] are names of what is alike in this respect; empty for families that cannot be matched.
    """

    name: str
    columns: list[str]
    x: Float[Array, "n d"]
    strata: list[str]


def ending(text: str) -> str:
    """How a text ends: "stop", "question mark", "exclamation mark", "colon", "quote", "word" or "other mark"."""
    last = text.rstrip()[-1:]
    if last.isalnum() or not last:
        return "word"
    return ENDINGS.get(last, "quote" if last in QUOTES else "other mark")


def strip_ending(text: str) -> str:
    """Take stops, question and exclamation marks, and colons off the end; quotes and brackets stay closed."""
    return text.rstrip().rstrip(SENTENCE_ENDS + " \n\t").rstrip() or text


def families(records: Sequence[ContrastRecord], fit: Bool[Array, " n"], tokenizer: Any | None = None) -> list[Family]:
    """Return the surface families of a set's prompts, in the order of `SURFACE`.

    The last message is what counts, since what is read at a prompt's end follows it; `length` and `position` know the
    whole chat.

    Args:
        records: [n] the prompts.
        fit: [n] True for the rows on which words and bins are chosen.
        tokenizer: a Hugging Face tokenizer, for lengths in tokens, in which they are then binned and matched; without
            one they are in characters and words, and binned and matched in characters.
    """
    last = [record.messages[-1]["content"] for record in records]
    whole = ["\n".join(message["content"] for message in record.messages) for record in records]
    return [
        _length(whole, records, fit, tokenizer),
        _one_hot("punctuation", [ending(text) for text in last], "ends in {}"),
        _first_word(last, records, fit),
        _casing(last),
        _digits(last),
        _marks(last),
        _position(records, whole, last),
    ]


def words(records: Sequence[ContrastRecord], fit: Bool[Array, " n"]) -> Family:
    """Return which of the commonest words each chat has: its content, mostly, and no surface."""
    bags = [set(_words("\n".join(message["content"] for message in record.messages))) for record in records]
    common = _commonest(bags, records, fit, N_WORDS)
    x = np.array([[word in bag for word in common] for bag in bags], dtype=np.float64).reshape(len(bags), len(common))
    return Family("words", [f"has {word!r}" for word in common], x, [])


def _commonest(
    bags: Sequence[Collection[str]], records: Sequence[ContrastRecord], fit: Bool[Array, " n"], n: int
) -> list[str]:
    """The words that most prompts have, as the mean of both classes' shares; those of few prompts are left out."""
    counts: Counter[str] = Counter()
    shares: dict[str, float] = {}
    for label in (True, False):
        found = [bag for bag, record, ok in zip(bags, records, fit, strict=True) if ok and record.label is label]
        part = Counter(word for bag in found for word in bag)
        counts.update(part)
        for word, count in part.items():
            shares[word] = shares.get(word, 0.0) + count / len(found)
    likely = [word for word in shares if word and counts[word] >= MIN_COUNT]
    return sorted(likely, key=lambda word: (-shares[word], word))[:n]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['\u2019]\w+)*", text.lower())


def _table(name: str, columns: Mapping[str, Sequence[float]], strata: Sequence[object]) -> Family:
    x = np.array([list(column) for column in columns.values()], dtype=np.float64).T
    return Family(name, list(columns), x, [str(stratum) for stratum in strata])


def _one_hot(name: str, values: Sequence[str], title: str, common: Sequence[str] | None = None) -> Family:
    """A column for each value; strata are the values, those that are not `common` together."""
    kinds = sorted(set(values)) if common is None else list(common)
    columns = {title.format(kind): [float(value == kind) for value in values] for kind in kinds}
    return _table(name, columns, [value if value in kinds else "other" for value in values])


def _length(whole: Sequence[str], records: Sequence[ContrastRecord], fit: Bool[Array, " n"], tokenizer: Any) -> Family:
    counts = {
        "characters": np.array([len(text) for text in whole]),
        "words": np.array([len(text.split()) for text in whole]),
    }
    if tokenizer is not None:
        found = tokenizer(list(whole), add_special_tokens=False, verbose=False)["input_ids"]
        counts["tokens"] = np.array([len(ids) for ids in found])
    columns = {f"{name} (log)": np.log1p(count).tolist() for name, count in counts.items()}
    # Bins besides, since one class may be of middling length only. They and the strata are of what the model reads.
    labels = np.array([record.label for record in records], dtype=bool)
    bins, strata = (_bins(counts[length_unit(tokenizer)], labels, fit, n) for n in (N_BINS, N_STRATA))
    columns |= {f"length bin {index}": (bins == index).astype(float).tolist() for index in np.unique(bins)}
    return _table("length", columns, strata.tolist())


def length_unit(tokenizer: Any | None) -> str:
    """In what lengths are binned and matched: in tokens where there is a tokenizer, else in characters."""
    return "characters" if tokenizer is None else "tokens"


def _bins(values: Array, labels: Bool[Array, " n"], fit: Bool[Array, " n"], n: int) -> Array:
    """The bin of each value; the edges are quantiles among the rows to fit, both classes weighing the same."""
    order = np.argsort(values[fit], kind="stable")
    sorted_values, sorted_labels = values[fit][order], labels[fit][order]
    weights = np.where(sorted_labels, 1 / max(1, sorted_labels.sum()), 1 / max(1, (~sorted_labels).sum()))
    reached = np.cumsum(weights) / weights.sum()
    places = np.searchsorted(reached, np.arange(1, n) / n)
    edges = np.unique(sorted_values[np.minimum(places, len(sorted_values) - 1)])
    return np.searchsorted(edges, values, side="left")


def _first_word(last: Sequence[str], records: Sequence[ContrastRecord], fit: Bool[Array, " n"]) -> Family:
    first = [next(iter(_words(text)), "") for text in last]
    common = _commonest([{word} for word in first], records, fit, N_FIRST_WORDS)
    return _one_hot("first_word", first, "begins with {!r}", common)


def _share(text: str, is_so: Callable[[str], bool], among: Callable[[str], bool]) -> float:
    base = [char for char in text if among(char)]
    return sum(map(is_so, base)) / len(base) if base else 0.0


def _casing(last: Sequence[str]) -> Family:
    begins = [float(text.lstrip()[:1].isupper()) for text in last]
    shares = [_share(text, str.isupper, str.isalpha) for text in last]
    shouts = [float(any(len(word) > 1 and word.isupper() for word in text.split())) for text in last]
    more = [float(sum(word[:1].isupper() for word in text.split()) > 1) for text in last]
    columns = {
        "begins with a capital": begins,
        "share of capitals": shares,
        "has a word in capitals": shouts,
        "has further capitals": more,
    }
    levels = [min(3, int(share * 50)) for share in shares]  # up to 2%, 4%, 6% and more are capitals
    return _table("casing", columns, list(zip(begins, shouts, levels, strict=True)))


def _digits(last: Sequence[str]) -> Family:
    has = [float(any(char.isdigit() for char in text)) for text in last]
    shares = [_share(text, str.isdigit, lambda char: True) for text in last]
    return _table("digits", {"has a digit": has, "share of digits": shares}, has)


def _marks(last: Sequence[str]) -> Family:
    """Marks within the text: how it ends is a family of its own."""
    inner = [strip_ending(text) for text in last]
    found = {
        "line breaks": [text.count("\n") for text in inner],
        "quotes": [sum(text.count(mark) for mark in '"“”«»`') for text in inner],
        "brackets": [sum(text.count(mark) for mark in "()[]{}<>") for text in inner],
        "commas": [text.count(",") for text in inner],
        "colons": [text.count(":") + text.count(";") for text in inner],
        "sentence ends within": [len(re.findall(r"[.!?…](?=\s)", text)) for text in inner],
    }
    columns = {f"has {name}": [float(count > 0) for count in counts] for name, counts in found.items()}
    columns["marks (log)"] = np.log1p(np.sum(list(found.values()), axis=0)).tolist()
    strata = [tuple(count > 0 for count in counts) for counts in zip(*found.values(), strict=True)]
    return _table("marks", columns, strata)


def _position(records: Sequence[ContrastRecord], whole: Sequence[str], last: Sequence[str]) -> Family:
    """Where the last message begins: after how many messages, and how much text."""
    before = [len(text) - len(end) for text, end in zip(whole, last, strict=True)]
    columns: dict[str, Sequence[float]] = {
        "messages": [float(len(record.messages)) for record in records],
        "has a system message": [float(record.messages[0]["role"] == "system") for record in records],
        "characters before (log)": np.log1p(before).tolist(),
    }
    return _table("position", columns, before)
