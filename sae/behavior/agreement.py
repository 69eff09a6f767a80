"""How far judges agree: with people (`agreement`), and with each other (`compare_judges`).

Agreement by chance is high where one class is rare, so Cohen's kappa stands beside the rate, with an interval from
resampling prompts: replies to one prompt are not independent, which the rates' intervals know, too. Where judges part,
the examples say why.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from sae import stats
from sae.behavior.contrast import ContrastRecord
from sae.behavior.judge import Judge, Verdict, share_of
from sae.behavior.topic import TopicMatch, topic_match
from sae.errors import UserError


class Agreement(NamedTuple):
    """How a judge compares with labels given by people."""

    agree: stats.Rate
    kappa: stats.Interval  #: prompts resampled
    confusion: dict[str, dict[str, int]]  #: label -> verdict -> count
    recall: dict[str, stats.Rate]  #: of each label's replies, the share that the judge gives the same verdict


def agreement(judge: Judge, items: Iterable[tuple[str, ContrastRecord, Verdict]], seed: int = 0) -> Agreement:
    """Compare a judge with human labels: (completion, record, label) triples."""
    given = list(items)
    verdicts = [judge(completion, record) for completion, record, _ in given]
    return verdict_agreement(verdicts, [label for *_, label in given], [record.prompt for _, record, _ in given], seed)


def verdict_agreement(
    verdicts: Sequence[Verdict], labels: Sequence[Verdict], prompts: Sequence[Hashable], seed: int = 0
) -> Agreement:
    """Compare verdicts with labels; equal `prompts` are resampled together, and count as alike in the rates."""
    confusion = {label.value: {verdict.value: 0 for verdict in Verdict} for label in Verdict}
    for verdict, label in zip(verdicts, labels, strict=True):
        confusion[label.value][verdict.value] += 1
    same = [verdict is label for verdict, label in zip(verdicts, labels, strict=True)]

    def recalled(label: Verdict) -> stats.Rate:
        rows = [row for row, given in enumerate(labels) if given is label]
        return stats.clustered_rate([same[row] for row in rows], [prompts[row] for row in rows])

    kappa = stats.kappa(labels, verdicts, prompts, seed=seed)
    recall = {label.value: recalled(label) for label in Verdict}
    return Agreement(stats.clustered_rate(same, prompts), kappa, confusion, recall)


class Parting(NamedTuple):
    """A reply on which two judges part."""

    prompt: str
    completion: str
    first: str
    second: str


class Pair(NamedTuple):
    """Two judges on the same replies."""

    first: str
    second: str
    kappa: stats.Interval  #: prompts resampled; NaN where both give one class throughout
    n_apart: int
    examples: list[Parting]


class JudgeComparison(NamedTuple):
    """Several judges on the same replies: what goes beside a result that rests on one of them."""

    n: int
    rates: dict[str, dict[str, stats.Rate]]  #: judge -> verdict -> share of the replies
    pairs: list[Pair]
    topic: TopicMatch  #: whether the replies, as a set, are about their own prompts


def compare_judges(
    texts: Sequence[str],
    records: Sequence[ContrastRecord],
    judges: Mapping[str, Judge],
    n_examples: int = 3,
    seed: int = 0,
) -> JudgeComparison:
    """Judge the same replies by several judges and say how far they agree.

    Args:
        texts: completions.
        records: the prompt of each.
        judges: by name; `sae.behavior.judges.registry.panel` has those that need no network.
        n_examples: replies shown of each pair that parts.
        seed: of intervals.

    Raises:
        UserError: not as many texts as records, or no judge.
    """
    if not judges:
        raise UserError("no judges were given to compare: name one or more.")
    if len(texts) != len(records):
        raise UserError(f"{len(texts)} completions and {len(records)} records: give one of each.")
    verdicts = {
        name: [judge(text, record) for text, record in zip(texts, records, strict=True)]
        for name, judge in judges.items()
    }
    return compare_verdicts(texts, records, verdicts, n_examples, seed)


def compare_verdicts(
    texts: Sequence[str],
    records: Sequence[ContrastRecord],
    verdicts: Mapping[str, Sequence[Verdict]],
    n_examples: int = 3,
    seed: int = 0,
) -> JudgeComparison:
    """Say how far verdicts that are there already agree; see `compare_judges`."""
    prompts = [record.prompt for record in records]
    rates = {name: {one.value: share_of(given, records, one) for one in Verdict} for name, given in verdicts.items()}
    pairs = []
    for first, second in combinations(verdicts, 2):
        both = list(zip(verdicts[first], verdicts[second], strict=True))
        apart = [row for row, (one, other) in enumerate(both) if one is not other]
        examples = [
            Parting(prompts[row], texts[row], both[row][0].value, both[row][1].value) for row in apart[:n_examples]
        ]
        kappa = stats.kappa(verdicts[first], verdicts[second], prompts, seed=seed)
        pairs.append(Pair(first, second, kappa, len(apart), examples))
    asked = [" ".join(item["content"] for item in record.messages if item["role"] == "user") for record in records]
    return JudgeComparison(len(texts), rates, pairs, topic_match(asked, texts, seed=seed))
