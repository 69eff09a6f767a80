"""Contrast sets: prompts on which a behaviour is due, and matched prompts on which it is not.

A record is one prompt; in a JSONL file, one line:

    {"messages": [{"role": "user", "content": "..."}], "label": 1, "topic": "pick/lock", "arm": "harmful",
     "behavior_texts": ["I cannot help with that."], "alternative_texts": ["Sure, ..."], "answer": null}

`label` is 1 where the behaviour is due. `topic` is the unit of splitting: latents are found on some topics, settings
chosen on others, and results reported on topics never looked at. `behavior_texts` and `alternative_texts` are what
either outcome would sound like; where they part is the logit margin (`sae.behavior.measure`). `arm`, `answer` and
`split` are optional; further keys are kept in `extra` for judges.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae import stats
from sae.behavior.provenance import Provenance
from sae.errors import UserError, unknown
from sae.files import read_jsonl

REQUIRED = ("messages", "label", "topic", "behavior_texts", "alternative_texts")


@dataclass(frozen=True)
class ContrastRecord:
    """One prompt.

    Attributes:
        messages: the chat up to the model's turn.
        label: True where the behaviour is due.
        topic: the unit of splitting.
        arm: the kind of prompt, e.g. ``"lookalike"``; "" if not given.
        behavior_texts: replies that show the behaviour.
        alternative_texts: replies that do not.
        answer: the true answer, for questions of fact.
        split: ``"find"``, ``"select"`` or ``"report"``.
        extra: the file's other fields.
    """

    messages: list[dict[str, str]]
    label: bool
    topic: str
    arm: str
    behavior_texts: tuple[str, ...]
    alternative_texts: tuple[str, ...]
    answer: str | None
    split: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The messages as plain text, for tables."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


@dataclass(frozen=True)
class ContrastSet:
    """A behaviour's records, in the order given.

    Attributes:
        behavior: its name.
        records: the prompts.
        provenance: where they come from, for a set that `sae.behavior.sets` read; parts of it do not carry it on.
    """

    behavior: str
    records: tuple[ContrastRecord, ...]
    provenance: Provenance | None = None

    def __len__(self) -> int:
        return len(self.records)

    def split(self, name: str) -> "ContrastSet":
        """Return the records of one split.

        Raises:
            UserError: no such split, or it lacks one of the classes.
        """
        if name not in stats.SPLITS:
            raise unknown("split", name, list(stats.SPLITS))
        part = ContrastSet(self.behavior, tuple(record for record in self.records if record.split == name))
        _need_both(part, f"the {name!r} split of {self.behavior!r}", "add topics, or try another salt.")
        return part

    @property
    def positives(self) -> tuple[ContrastRecord, ...]:
        """Records where the behaviour is due."""
        return tuple(record for record in self.records if record.label)

    @property
    def negatives(self) -> tuple[ContrastRecord, ...]:
        """Records where it is not."""
        return tuple(record for record in self.records if not record.label)

    @property
    def labels(self) -> list[bool]:
        """Each record's label."""
        return [record.label for record in self.records]

    @property
    def topics(self) -> list[str]:
        """Each record's topic."""
        return [record.topic for record in self.records]

    @property
    def unanswerable(self) -> str:
        """Why a model's replies to these prompts cannot be judged; "" if they can.

        Such a set serves to find and measure directions, probes and latents, not to test them by generating.
        """
        for record in self.records:
            if record.messages[-1]["role"] in ("assistant", "model"):
                return "its prompts end with a reply already given"
            if not record.behavior_texts or not record.alternative_texts:
                return "it does not say how a reply that shows the behaviour begins, and one that does not"
        return ""

    def relabelled(self, labels: Sequence[bool]) -> "ContrastSet":
        """Return the set with other labels; with shuffled ones the whole pipeline must find nothing."""
        pairs = zip(self.records, labels, strict=True)
        return ContrastSet(self.behavior, tuple(dataclasses.replace(item, label=bool(flag)) for item, flag in pairs))

    def shuffled(self, seed: int = 0) -> "ContrastSet":
        """Return the set with labels permuted within each split, between topics where each topic has one label.

        Filter on behaviour before shuffling: a filter afterwards keeps the records whose shuffled label happens to be
        right, and so undoes the shuffle.
        """
        labels = np.array(self.labels)
        for number, name in enumerate(stats.SPLITS):
            rows = [index for index, record in enumerate(self.records) if record.split == name]
            if rows:
                labels[rows] = stats.shuffled(labels[rows], seed + number, [self.records[row].topic for row in rows])
        return self.relabelled(labels.tolist())


def _need_both(contrast: ContrastSet, what: str, remedy: str) -> None:
    n_pos, n_neg = len(contrast.positives), len(contrast.negatives)
    if not n_pos or not n_neg:
        raise UserError(f"{what} has {n_pos} positives and {n_neg} negatives, and both are needed: {remedy}")


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {name}={value!r} is not a list of texts.")
    kept = tuple(text for text in texts if text.strip())
    if not kept:
        raise UserError(f"{where}: {name} is empty; give at least one reply.")
    return kept


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    ok = isinstance(value, list | tuple) and value
    if not ok or not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and "role" in m for m in value):
        raise UserError(f'{where}: messages={value!r}; give a list of {{"role": ..., "content": text}}.')
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in value]


def _record(raw: Any, where: str, splits: Mapping[str, float], salt: str) -> ContrastRecord:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where} is {type(raw).__name__}, not an object with the fields {', '.join(REQUIRED)}.")
    missing = [name for name in REQUIRED if name not in raw]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}: a record needs {', '.join(REQUIRED)}.")
    if raw["label"] not in (0, 1):
        raise UserError(f"{where}: label={raw['label']!r}; give 1 where the behaviour is due, else 0.")
    topic = "" if raw["topic"] is None else str(raw["topic"]).strip()
    if not topic:
        raise UserError(
            f"{where}: topic={raw['topic']!r} is empty; name what the prompt is about: it is dealt by that."
        )
    split = raw.get("split") or stats.hash_split(topic, splits, salt)
    extra = raw.get("extra") or {}
    if not isinstance(extra, Mapping):
        raise UserError(f"{where}: extra={extra!r} is not an object; give fields and values.")
    if not isinstance(split, str) or split not in stats.SPLITS:
        raise unknown("split", split, list(stats.SPLITS), f"({where})")
    known = {*REQUIRED, "arm", "answer", "split", "extra"}
    return ContrastRecord(
        messages=_messages(raw["messages"], where),
        label=bool(raw["label"]),
        topic=topic,
        arm=str(raw.get("arm") or ""),
        behavior_texts=_texts(raw["behavior_texts"], "behavior_texts", where),
        alternative_texts=_texts(raw["alternative_texts"], "alternative_texts", where),
        answer=None if raw.get("answer") is None else str(raw["answer"]),
        split=split,
        extra={**extra, **{key: item for key, item in raw.items() if key not in known}},
    )


def load_contrast(
    path_or_records: str | Path | Sequence[Mapping[str, Any]],
    behavior: str = "",
    splits: Mapping[str, float] = stats.SPLITS,
    salt: str = "",
) -> ContrastSet:
    """Read a contrast set from a JSONL file or from records already in memory.

    Args:
        path_or_records: a JSONL path, or dictionaries of the same shape.
        behavior: its name; the file's stem if not given.
        splits: shares of find, select and report, for records without a `split` of their own.
        salt: another salt gives another assignment of topics to splits.

    Raises:
        UserError: no records, one class only, a field missing or malformed, an unknown split, or a topic in two splits.
    """
    check_splits(splits)
    if isinstance(path_or_records, str | Path):
        raws, source = read_jsonl(path_or_records), str(path_or_records)
        behavior = behavior or Path(path_or_records).stem
    else:
        raws, source = list(path_or_records), "the contrast set"
    if not raws:
        raise UserError(f"{source!r} holds no records: give prompts with and without the behaviour.")
    records = tuple(_record(raw, f"{source}, record {n}", splits, salt) for n, raw in enumerate(raws, start=1))
    return checked(ContrastSet(behavior or "behavior", records), f"{source!r}")


def check_splits(splits: Mapping[str, float]) -> None:
    """Refuse shares of splits that there are not.

    Raises:
        UserError: naming one.
    """
    for name in splits:
        if name not in stats.SPLITS:
            raise unknown("split", name, list(stats.SPLITS))


def checked(contrast: ContrastSet, source: str) -> ContrastSet:
    """Return a set that can be searched, or say why not.

    Raises:
        UserError: a topic in two splits, a prompt in two splits or both classes, or one class only.
    """
    split_of: dict[str, str] = {}
    place_of: dict[str, tuple[str, bool]] = {}
    for record in contrast.records:
        split, label = place_of.setdefault(record.prompt, (record.split, record.label))
        if label is not record.label or split != record.split:
            both = "both classes" if label is not record.label else f"the splits {split!r} and {record.split!r}"
            raise UserError(f"{source}: the prompt {record.prompt[:80]!r} is in {both}: keep one of them.")
        if split_of.setdefault(record.topic, record.split) != record.split:
            raise UserError(
                f"topic {record.topic!r} is in the splits {split_of[record.topic]!r} and {record.split!r}: "
                "what is learnt on a topic must not be reported on it; split by topic."
            )
    _need_both(contrast, source, "add records of the other class.")
    return contrast


class Filtered(NamedTuple):
    """A contrast set kept to prompts where the unsteered model does what the label says, and what was dropped."""

    contrast: ContrastSet
    kept: list[int]  #: indices of the records kept
    n_positives: int
    n_negatives: int
    dropped_positives: int  #: the behaviour was due but did not show
    dropped_negatives: int  #: it showed, or the reply was broken, although it was not due
    report_rates: dict[bool, stats.Rate]  #: by label, the behaviour on the report split before anything was dropped


def unfiltered(contrast: ContrastSet) -> Filtered:
    """Keep everything; what the model does on these prompts is not known."""
    nothing = {True: stats.rate(0, 0), False: stats.rate(0, 0)}
    n_pos, n_neg = len(contrast.positives), len(contrast.negatives)
    return Filtered(contrast, list(range(len(contrast))), n_pos, n_neg, 0, 0, nothing)


def filter_on_behavior(
    contrast: ContrastSet, completions: Sequence[str], judge: Callable[[str, ContrastRecord], Any]
) -> Filtered:
    """Keep positives on which the unsteered model shows the behaviour and negatives on which it does the alternative.

    A prompt on which the model does not do what its label says teaches nothing about how it does it.

    Args:
        contrast: the records.
        completions: the unsteered model's reply to each.
        judge: see `sae.behavior.judge`.

    Raises:
        UserError: a class is empty afterwards.
    """
    kept = []
    shown: dict[bool, list[bool]] = {True: [], False: []}
    topics: dict[bool, list[str]] = {True: [], False: []}
    for index, (record, text) in enumerate(zip(contrast.records, completions, strict=True)):
        verdict = judge(text, record).value
        if verdict == ("behavior" if record.label else "alternative"):
            kept.append(index)
        if record.split == "report":
            shown[record.label].append(verdict == "behavior")
            topics[record.label].append(record.topic)
    rates = {label: stats.clustered_rate(hits, topics[label]) for label, hits in shown.items()}
    result = ContrastSet(contrast.behavior, tuple(contrast.records[index] for index in kept))
    n_pos, n_neg = len(result.positives), len(result.negatives)
    _need_both(
        result,
        f"{contrast.behavior!r}, kept to prompts where the model does what the label says,",
        "the model does not show this behaviour on these prompts; use other prompts or another judge.",
    )
    dropped = (len(contrast.positives) - n_pos, len(contrast.negatives) - n_neg)
    return Filtered(result, kept, n_pos, n_neg, *dropped, rates)
