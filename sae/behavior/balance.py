"""Taking a confound out of a contrast set: dropping prompts until the classes look alike, or changing how they end.

    balanced = balance(contrast, "match", ["punctuation", "length"])
    balanced.contrast, balanced.counts

`match`: prompts of one stratum (the same ending, the same bin of lengths, ...) are kept in the same ratio of classes in
every stratum of a split, so that within a split the classes have exactly the same distribution over strata. The strata
are of what the audit reads, so lengths are in tokens where there is a tokenizer. The ratio, one to a whole number, is
the one that leaves most to compare with: the largest 1 / (1/n_positives + 1/n_negatives). Which prompts stay is decided
by their hash, so that adding others moves few.

`strip`: stops, question marks, exclamation marks and colons are taken off the end of every last message.
"""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae import stats
from sae.behavior.audit import audit
from sae.behavior.contrast import ContrastRecord, ContrastSet, checked
from sae.behavior.surface import SURFACE, families, length_unit, strip_ending
from sae.errors import UserError, unknown

METHODS = ("none", "match", "strip")
STRIPPED = ("punctuation",)
MAX_RATIO = 64  # classes more lopsided than this gain nothing from the surplus


@dataclass(frozen=True)
class Balanced:
    """A balanced set.

    Attributes:
        contrast: the set.
        method: how it was balanced.
        features: the families that were balanced.
        counts: split -> class -> (before, after).
        n_changed: prompts whose ending was taken off.
        length_unit: in what lengths were told apart: "tokens", or "characters" without a tokenizer.
    """

    contrast: ContrastSet
    method: str
    features: tuple[str, ...]
    counts: dict[str, dict[str, tuple[int, int]]]
    n_changed: int
    length_unit: str


def balance(
    contrast: ContrastSet,
    method: str = "match",
    features: Sequence[str] | None = None,
    tokenizer: Any | None = None,
    seed: int = 0,
) -> Balanced:
    """Make the classes of a set look alike.

    Args:
        contrast: the set.
        method: ``"match"`` drops prompts, ``"strip"`` changes endings, ``"none"`` leaves the set as it is.
        features: families of `sae.behavior.surface.SURFACE`. If not given, those that `audit` flags; of these, `strip`
            takes the ones that it can.
        tokenizer: of the model that is to read the set: lengths are audited and matched in its tokens. Without one they
            are in characters.
        seed: of the audit. Give `audit` the same tokenizer and seed, and it flags what is balanced here.

    Raises:
        UserError: an unknown method or family, one that cannot be stripped, or a split whose strata have one
            class each.
    """
    if method not in METHODS:
        raise unknown("way to balance", method, list(METHODS))
    for name in features or ():
        if name not in SURFACE:
            raise unknown("feature", name, list(SURFACE))
        if method == "strip" and name not in STRIPPED:
            raise UserError(f"{name!r} cannot be stripped from a prompt, only {', '.join(STRIPPED)}: match it instead.")
    unit = length_unit(tokenizer)
    if method == "none":
        return _counted(contrast, contrast, method, (), 0, unit)
    wanted = tuple(audit(contrast, tokenizer=tokenizer, seed=seed).flagged if features is None else features)
    if method == "strip":
        wanted = tuple(name for name in wanted if name in STRIPPED)
        stripped = [_stripped(record) if wanted else record for record in contrast.records]
        changed = sum(new != old for new, old in zip(stripped, contrast.records, strict=True))
        return _counted(contrast, dataclasses.replace(contrast, records=tuple(stripped)), method, wanted, changed, unit)
    kept = _matched(contrast, wanted, tokenizer) if wanted else list(contrast.records)
    what = f"{contrast.behavior!r}, matched on {', '.join(wanted)},"
    after = checked(dataclasses.replace(contrast, records=tuple(kept)), what)
    return _counted(contrast, after, method, wanted, 0, unit)


def _counted(
    before: ContrastSet, after: ContrastSet, method: str, features: tuple[str, ...], changed: int, unit: str
) -> Balanced:
    counts: dict[str, dict[str, tuple[int, int]]] = {
        split: {
            name: (
                sum(record.split == split and record.label is label for record in before.records),
                sum(record.split == split and record.label is label for record in after.records),
            )
            for name, label in (("positives", True), ("negatives", False))
        }
        for split in stats.SPLITS
    }
    return Balanced(after, method, features, counts, changed, unit)


def _stripped(record: ContrastRecord) -> ContrastRecord:
    *before, last = record.messages
    return dataclasses.replace(record, messages=[*before, {**last, "content": strip_ending(last["content"])}])


def _matched(contrast: ContrastSet, features: Sequence[str], tokenizer: Any | None) -> list[ContrastRecord]:
    """Keep the same ratio of classes in every stratum of a split."""
    find = np.array([record.split == "find" for record in contrast.records], dtype=bool)
    chosen = [family for family in families(contrast.records, find, tokenizer) if family.name in features]
    keys = list(zip(*(family.strata for family in chosen), strict=True))
    kept: set[int] = set()
    for split in dict.fromkeys(record.split for record in contrast.records):
        strata: dict[tuple[str, ...], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for index, record in enumerate(contrast.records):
            if record.split == split:
                strata[keys[index]][0 if record.label else 1].append(index)
        sizes = [(len(positives), len(negatives)) for positives, negatives in strata.values()]
        if not any(min(size) for size in sizes):
            raise UserError(
                f"no stratum of {', '.join(features)} has both classes in the {split!r} split of "
                f"{contrast.behavior!r}: "
                "match fewer features, or add prompts that look alike."
            )
        ratio = _best_ratio(sizes)
        for rows, size in zip(strata.values(), sizes, strict=True):
            for members, count in zip(rows, _kept(*size, ratio), strict=True):
                kept.update(sorted(members, key=lambda index: _place(contrast.records[index]))[:count])
    return [record for index, record in enumerate(contrast.records) if index in kept]


def _kept(n_pos: int, n_neg: int, ratio: tuple[int, int]) -> tuple[int, int]:
    """The most positives and negatives that are in this ratio."""
    units = min(n_pos // ratio[0], n_neg // ratio[1])
    return units * ratio[0], units * ratio[1]


def _best_ratio(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The ratio of positives to negatives, 1 to k or k to 1, under which most can be compared."""

    def worth(ratio: tuple[int, int]) -> float:
        n_pos, n_neg = np.sum([_kept(*size, ratio) for size in sizes], axis=0)
        return float(n_pos * n_neg / (n_pos + n_neg)) if n_pos and n_neg else 0.0

    steps = range(1, MAX_RATIO + 1)
    return max([*((1, step) for step in steps), *((step, 1) for step in steps[1:])], key=worth)


def _place(record: ContrastRecord) -> str:
    return hashlib.sha256(f"{record.topic}\x1f{record.prompt}".encode()).hexdigest()
