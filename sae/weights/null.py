"""The null: with labels shuffled between topics, what is located is no behaviour's.

A method's *contrast* is its score on prompts where the behaviour is due less its score on as many others, of as many
topics. With shuffled labels both sides are drawn alike, so the contrast is as likely as its opposite, and its AUROC is
.5 on average over shuffles, if no label reaches the method by another way. (As many topics: the mix of few topics
varies more than that of many, which is enough to move the average. A score of the positives alone is no such test: the
margin is taken between tokens that name the behaviour, so its gradient finds the behaviour's weights on any prompts.)

What is symmetric is the ranking, not its top: parts on which the margin depends have large contrasts of either sign.
So the share of true parts in a set that shuffled labels locate may be above the base rate; it is reported beside it, to
say how much of a located set's precision is due to the labels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sae import stats
from sae.behavior.contrast import ContrastRecord, ContrastSet
from sae.behavior.measure import Progress
from sae.errors import UserError
from sae.lm.matrices import Part
from sae.organism.truth import Truth
from sae.weights import truth
from sae.weights.attribution import Scores
from sae.weights.levels import aggregate
from sae.weights.methods import EXPENSIVE, ONE_SIDED, PARAMETER_METHODS, Problem

Side = Callable[[Sequence[ContrastRecord]], Problem]
"""A problem whose behaviour's side is about these prompts."""

CONTRASTED = tuple(name for name in PARAMETER_METHODS if name not in (*ONE_SIDED, *EXPENSIVE))
"""Methods with a contrast: their scores depend on which prompts they are taken on, and on one kind at a time."""


class NullRow(NamedTuple):
    """A line of `null` in `result.json`: one method at one level; means over shuffles with 95% bootstrap intervals.

    Attributes:
        behavior, method, level: which.
        n_runs: shuffles.
        auroc: under shuffled labels.
        covers_half: whether its interval holds .5.
        located: share of true parts among as many best-scored ones as there are true ones, under shuffled labels.
        base_rate: that share by chance.
        decoy_share: under shuffled labels.
        true_auroc, true_located: the same contrast under the true labels.
        p: of `true_auroc` among the shuffles': (1 + those at least as high) / (1 + shuffles).
    """

    behavior: str
    method: str
    level: str
    n_runs: int
    auroc: stats.Interval
    covers_half: bool
    located: stats.Interval
    base_rate: float
    decoy_share: stats.Interval
    true_auroc: float
    true_located: float
    p: float


def null_rows(
    side: Side,
    find: ContrastSet,
    methods: Sequence[str],
    parts: Mapping[str, Sequence[Part]],
    planted: Truth,
    n_runs: int,
    *,
    n_prompts: int = 64,
    threshold: float = truth.THRESHOLD,
    progress: Progress | None = None,
) -> list[NullRow]:
    """Locate with the true labels and with `n_runs` shuffles of them.

    Args:
        side: what methods are given.
        find: the records that are searched.
        methods: those to test; see `CONTRASTED`.
        parts: of every level; none for "parameter".
        planted: what there is to find.
        n_runs: shuffles, with seeds from 0.
        n_prompts: of either kind, at most; see `two_sides`.
        threshold: what counts as an effect, as a share of the behaviour's margin.
        progress: called after every method of every run.

    Returns:
        A row for every method and level; none for levels where everything, or nothing, is to be found.

    Raises:
        UserError: a method without a contrast, or a behaviour or level without truth.
    """
    for method in methods:
        if method not in CONTRASTED:
            raise UserError(f"method {method!r} has no contrast to shuffle: give one of {', '.join(CONTRASTED)}.")
    effects = {
        level: truth.effects_of(planted, own) if own else planted.sample_effects.numpy() for level, own in parts.items()
    }
    found: dict[tuple[str, str], list[truth.Score]] = {(method, level): [] for method in methods for level in parts}
    for run in range(n_runs + 1):
        contrast = find if run == 0 else find.shuffled(run - 1)
        due, other = (side(records) for records in two_sides(contrast, n_prompts, seed=run))
        for method in methods:
            scores = _contrast(method, due, other)
            for level, own in parts.items():
                values = aggregate(scores, own) if own else truth.sampled(planted, scores)
                found[method, level].append(truth.score(values, effects[level], planted, find.behavior, threshold))
            if progress is not None:
                progress(f"null of {method}", run + 1, n_runs + 1)
    return [_row(find.behavior, *key, every) for key, every in found.items() if every[0].auroc is not None]


def two_sides(contrast: ContrastSet, n_prompts: int, seed: int) -> tuple[list[ContrastRecord], list[ContrastRecord]]:
    """Draw positives and negatives: as many of each, of as many topics; of a topic with both labels as many of each.

    Args:
        contrast: with true labels or shuffled ones.
        n_prompts: of each, at most.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    first, second = (_by_topic(records, rng) for records in (contrast.positives, contrast.negatives))
    both = sorted(first.keys() & second.keys())
    n_pure = min(len(own) - len(both) for own in (first, second))
    left: list[list[ContrastRecord]] = []
    for own in (first, second):
        pure = rng.permutation(sorted(own.keys() - set(both)))[:n_pure].tolist()
        equal = [own[topic][: min(len(first[topic]), len(second[topic]))] for topic in both]
        left.append([record for records in (*equal, *(own[topic] for topic in pure)) for record in records])
    n = min(n_prompts, *map(len, left))
    due, other = ([records[index] for index in rng.permutation(len(records))[:n]] for records in left)
    return due, other


def _by_topic(records: Sequence[ContrastRecord], rng: np.random.Generator) -> dict[str, list[ContrastRecord]]:
    """Records of each topic, in random order."""
    found: dict[str, list[ContrastRecord]] = {}
    for index in rng.permutation(len(records)):
        found.setdefault(records[index].topic, []).append(records[index])
    return found


def _contrast(method: str, due: Problem, other: Problem) -> Scores:
    found, less = (PARAMETER_METHODS[method](one, "behavior") for one in (due, other))
    return {name: values - less[name] for name, values in found.items()}


def _row(behavior: str, method: str, level: str, every: Sequence[truth.Score]) -> NullRow:
    true, shuffled = every[0], every[1:]

    def over(name: str) -> stats.Interval:
        return stats.bootstrap_mean([getattr(one, name) for one in shuffled])

    aurocs = np.array([one.auroc for one in every], dtype=np.float64)
    auroc = stats.bootstrap_mean(aurocs[1:])
    return NullRow(
        behavior, method, level, len(shuffled), auroc, bool(auroc.low <= 0.5 <= auroc.high), over("located"),
        true.base_rate, over("decoy_share"), float(aurocs[0]), float(true.located or 0),
        stats.draws_p(float(aurocs[0]), aurocs[1:]),
    )  # fmt: skip
