"""Every statistic of the project, in one seeded place: rates, AUROC, permutation tests, FDR, bootstrap, splits.

Conventions: `scores` are `[n m]` (n records, m latents, directions or other detectors), `labels` are `[n]` booleans
with True for the behaviour. Computations are float64; every random draw comes from an explicit `seed`.
A p-value from draws is (1 + hits) / (1 + draws), never zero (Phipson & Smyth 2010).

    >>> rate(9, 10)
    Rate(rate=0.9, low=0.596, high=0.982, n=10)     # rounded here
"""

import hashlib
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy import special, stats

from sae.errors import UserError
from sae.rank_sum import exact_p

SPLITS: Mapping[str, float] = {"find": 0.4, "select": 0.25, "report": 0.35}
"""Default shares of the three splits: where latents are found, where settings are chosen, what is reported."""

PERMUTATIONS = 9_999  # of a rank correlation
EXACT_ASSIGNMENTS = 20_000
"""Rank-sum tests enumerate all label assignments up to this many."""
EXACT_BELOW = 0.01
"""Beyond that, p-values that the normal approximation puts below this are made exact: it is close only above."""

_COLUMNS = 4096  # columns ranked at once: bounds memory at about 4096 * n * 40 bytes
_Z95 = 1.959963984540054

Array = np.ndarray


class Rate(NamedTuple):
    """A proportion of n records with a 95% interval: see `rate`, and `clustered_rate` for records that are alike.

    With n = 0 the rate is NaN and the interval is [0, 1].
    """

    rate: float
    low: float
    high: float
    n: int


class Interval(NamedTuple):
    """An estimate with a 95% percentile-bootstrap interval, from n records."""

    estimate: float
    low: float
    high: float
    n: int


class Correlation(NamedTuple):
    """Spearman's rank correlation, its two-sided p-value, and the number of pairs. NaN if either side is constant."""

    rho: float
    p: float
    n: int


def rate(successes: int, n: int) -> Rate:
    """Return `successes / n` with the Wilson score interval (Wilson 1927), which stays inside [0, 1] at the ends.

    Raises:
        ValueError: `successes` is not between 0 and n.
    """
    successes, n = int(successes), int(n)
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n}: need 0 <= successes <= n.")
    return _wilson(successes, n, n)


def _wilson(successes: int, n: int, effective: float) -> Rate:
    """Return `successes / n` with the Wilson interval of a sample of `effective` independent records."""
    if n == 0:
        return Rate(math.nan, 0.0, 1.0, 0)
    share, z2 = successes / n, _Z95**2
    centre = (share + z2 / (2 * effective)) / (1 + z2 / effective)
    spread = share * (1 - share) / effective + z2 / (4 * effective * effective)
    half = _Z95 * math.sqrt(spread) / (1 + z2 / effective)
    # At the ends the bound equals the share exactly; rounding must not push it past.
    return Rate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n)


def clustered_rate(hits: Sequence[bool], clusters: Sequence[Hashable]) -> Rate:
    """Return the share of hits with the Wilson interval on the effective sample size: records of a cluster are alike.

    The effective size is n / deff (Rao & Scott 1992), shrunk for the few clusters that deff was estimated from, as
    Korn & Graubard (1998) do: n / deff * (t[n - 1] / t[k - 1])^2, with k clusters, t the 97.5% points of Student's
    distribution, and deff = v (n - 1) / (p (1 - p)), at least 1. v is the linearised variance of a ratio,
    k / (k - 1) * sum over clusters of (hits - p * size)^2 / n^2. Where each cluster is one record this is `rate`.

    Where all records agree but for one at most, or there is one cluster, nothing tells how alike the records of a
    cluster are: deff is undefined, or 1 whatever the clusters. Each cluster then counts as one record: right if its
    records are fully alike, cautious otherwise. Korn and Graubard take deff = 1 where all agree; with 15 clusters of 8
    that are fully alike, and p = .9, that covers p in 78% of samples, this in 99%.

    Args:
        hits: [n] whether each record counts.
        clusters: [n] what each belongs to, such as its topic.

    Raises:
        ValueError: sequences of different lengths.
    """
    n = len(hits)
    if len(clusters) != n:
        raise ValueError(f"clustered_rate needs a cluster for each record: got {n} records, {len(clusters)} clusters.")
    number = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    k, flags = len(number), np.asarray(hits, dtype=bool)
    successes = int(flags.sum())
    if k == n:
        return rate(successes, n)
    if k == 1 or min(successes, n - successes) < 2:
        return _wilson(successes, n, k)
    cluster_of = np.array([number[name] for name in clusters])
    sizes = np.bincount(cluster_of, minlength=k)
    counts = np.bincount(cluster_of, weights=flags, minlength=k)
    share = successes / n
    variance = k / (k - 1) * float(((counts - share * sizes) ** 2).sum()) / n**2
    deff = max(1.0, variance * (n - 1) / (share * (1 - share)))
    few = float((special.stdtrit(n - 1, 0.975) / special.stdtrit(k - 1, 0.975)) ** 2)
    return _wilson(successes, n, max(1.0, n / deff * few))


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    """Return scores as float [n m] and labels as bool [n], or explain what is wrong with them."""
    scores, labels = np.asarray(scores), np.asarray(labels).astype(bool)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2 or labels.ndim != 1 or len(scores) != len(labels):
        raise UserError(f"scores {scores.shape} and labels {labels.shape} disagree: need [n m] and [n].")
    if labels.all() or not labels.any():
        raise UserError(
            f"all {len(labels)} labels are {bool(labels.all())}: a comparison needs both classes; add records."
        )
    if not np.isfinite(scores).all():
        raise UserError("scores hold NaN or infinite values: check the activations they come from.")
    return scores, labels


def midranks(scores: ArrayLike) -> Float[Array, "n m"]:
    """Return the rank of every score within its column, ties sharing the mean rank. Constant columns cost nothing."""
    scores = np.asarray(scores)
    scores = scores[:, None] if scores.ndim == 1 else scores
    n, m = scores.shape
    ranks = np.full((n, m), (n + 1) / 2)
    # Most latents of a large dictionary are silent on a few hundred prompts: rank only the others.
    varied = np.flatnonzero((scores != scores[:1]).any(axis=0))
    for start in range(0, len(varied), _COLUMNS):
        columns = varied[start : start + _COLUMNS]
        ranks[:, columns] = stats.rankdata(scores[:, columns], axis=0)
    return ranks


def auroc(scores: ArrayLike, labels: ArrayLike) -> Float[Array, " m"]:
    """Return each column's area under the ROC curve: P(positive > negative) + P(tie) / 2, exactly.

    Args:
        scores: [n m] or [n]; all columns are computed at once from mid-ranks (Mann-Whitney U).
        labels: [n], True for positives.

    Raises:
        UserError: one class only, non-finite scores, or shapes that disagree.
    """
    scores, flags = _checked(scores, labels)
    return _auroc_of_ranks(midranks(scores), flags)


def _auroc_of_ranks(ranks: Array, labels: Array) -> Array:
    n_pos, n_neg = int(labels.sum()), int((~labels).sum())
    area: Array = (ranks[labels].sum(axis=0) - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg)
    return area


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the precision-recall curve: the mean, over positives, of the precision at their place.

    Of tied scores all orders are equally likely, and the expectation over them is returned: a constant score gives
    about the base rate, whatever the order of the records.

    Args:
        scores: [n], one detector.
        labels: [n], True for positives.

    Raises:
        UserError: one class only, non-finite scores, several detectors, or shapes that disagree.
    """
    values, flags = _checked(scores, labels)
    if values.shape[1] != 1:
        raise UserError(f"average_precision takes one detector, got {values.shape[1]}: loop over the columns.")
    _, group = np.unique(-values[:, 0], return_inverse=True)
    sizes = np.bincount(group.ravel())
    hits = np.bincount(group.ravel(), weights=flags)
    total, before, hits_before = 0.0, 0, 0.0
    for size, hit in zip(sizes.tolist(), hits.tolist(), strict=True):
        if hit:
            # At place i of a tie, given a positive there: the others are spread evenly over the other places.
            place = np.arange(1, size + 1)
            others = (place - 1) * (hit - 1) / max(1, size - 1)
            total += hit * float(((hits_before + 1 + others) / (before + place)).mean())
        before, hits_before = before + size, hits_before + hit
    return total / float(flags.sum())


def cohens_d(scores: ArrayLike, labels: ArrayLike) -> Float[Array, " m"]:
    """Return each column's standardised mean difference (pooled standard deviation); 0 where both are constant."""
    scores, flags = _checked(scores, labels)
    positive, negative = scores[flags].astype(np.float64), scores[~flags].astype(np.float64)
    squares = ((positive - positive.mean(0)) ** 2).sum(0) + ((negative - negative.mean(0)) ** 2).sum(0)
    pooled = np.sqrt(squares / max(1, len(flags) - 2))
    gap = positive.mean(0) - negative.mean(0)
    # Two constants that differ are infinitely far apart; report the sign with a finite, sortable size.
    return np.where(pooled > 0, gap / np.where(pooled > 0, pooled, 1.0), np.sign(gap) * 1e6)


def rank_sum_p(scores: ArrayLike, labels: ArrayLike) -> Float[Array, " m"]:
    """Return each column's two-sided Wilcoxon-Mann-Whitney p-value, ties accounted for.

    Exact (every label assignment enumerated, on mid-ranks) when there are at most `EXACT_ASSIGNMENTS`. Else the normal
    approximation with tie and continuity correction, and where that says less than `EXACT_BELOW`, the exact value again
    (`sae.rank_sum`), unless there are so many different ranks that counting would take long. A constant column gives 1.
    """
    scores, flags = _checked(scores, labels)
    ranks, n, n_pos = midranks(scores), len(flags), int(flags.sum())
    centre = n_pos * (n + 1) / 2
    gaps = np.abs(ranks[flags].sum(axis=0) - centre)
    if math.comb(n, n_pos) <= EXACT_ASSIGNMENTS:
        chosen = np.zeros((math.comb(n, n_pos), n))
        for row, subset in enumerate(itertools.combinations(range(n), n_pos)):
            chosen[row, list(subset)] = 1.0
        p = np.empty(len(gaps))
        for start in range(0, len(gaps), _COLUMNS // 8):
            part = slice(start, start + _COLUMNS // 8)
            reach = np.abs(chosen @ ranks[:, part] - centre) >= gaps[part] - 1e-9
            p[part] = reach.mean(axis=0)
        return p
    sd = _rank_sum_sd(ranks, n_pos)
    z = np.maximum(gaps - 0.5, 0.0) / np.where(sd > 0, sd, 1.0)
    p = np.where(sd > 0, np.minimum(1.0, special.erfc(z / math.sqrt(2))), 1.0)
    small = np.flatnonzero(p < EXACT_BELOW)
    exact = exact_p(ranks[:, small], n_pos, gaps[small])
    p[small] = np.where(np.isnan(exact), p[small], exact)
    return p


def _rank_sum_sd(ranks: Array, n_pos: int) -> Array:
    """Return the permutation standard deviation of the positives' rank sum; ties shrink it through the ranks."""
    n = len(ranks)
    sd: Array = np.sqrt(ranks.var(axis=0) * n_pos * (n - n_pos) / max(1, n - 1))
    return sd


def benjamini_hochberg(p: ArrayLike) -> Float[Array, "..."]:
    """Return the FDR-adjusted q-value of every p-value (Benjamini & Hochberg 1995), in the shape given.

    Pass the whole family at once: all latents, positions and dictionaries that were looked at.
    """
    values = np.asarray(p, dtype=np.float64)
    if values.size and not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p-values must lie in [0, 1]; got NaN or values outside.")
    flat = values.ravel()
    order = np.argsort(flat, kind="stable")
    scaled = flat[order] * flat.size / np.arange(1, flat.size + 1)
    q = np.empty_like(flat)
    q[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return q.reshape(values.shape)


class MaxStatistic(NamedTuple):
    """Observed statistics of a family's columns and, per permutation, the largest of all columns."""

    observed: Float[Array, " m"]
    best: Float[Array, " n_permutations"]

    def p(self) -> Float[Array, " m"]:
        """Return family-wise p-values of the columns."""
        n = len(self.best)
        beaten = n - np.searchsorted(np.sort(self.best), self.observed - 1e-9, side="left")
        return (1.0 + beaten) / (1.0 + n)

    def joined(self, others: "Sequence[MaxStatistic]") -> "MaxStatistic":
        """Return the same columns within a larger family: `others` hold further columns of the same records."""
        return MaxStatistic(self.observed, np.max([self.best, *(other.best for other in others)], axis=0))


def max_statistic(scores: ArrayLike, labels: ArrayLike, n_permutations: int = 1000, seed: int = 0) -> MaxStatistic:
    """Return each column's tie-corrected rank-sum |z| and the largest |z| under each shuffle of the labels.

    Labels are permuted jointly for all columns, so correlation between latents is kept (Westfall & Young 1993). Equal
    seeds give equal shuffles, so parts of a family can be computed one by one and `joined`.
    """
    scores, flags = _checked(scores, labels)
    ranks, n, n_pos = midranks(scores), len(flags), int(flags.sum())
    sd = _rank_sum_sd(ranks, n_pos)
    centred = np.where(sd > 0, (ranks - (n + 1) / 2) / np.where(sd > 0, sd, 1.0), 0.0)
    observed = np.abs(centred[flags].sum(axis=0))
    rng = np.random.default_rng(seed)
    permuted = np.stack([rng.permutation(flags) for _ in range(n_permutations)]).astype(np.float64)
    best = np.zeros(n_permutations)
    for start in range(0, centred.shape[1], _COLUMNS):
        best = np.maximum(best, np.abs(permuted @ centred[:, start : start + _COLUMNS]).max(axis=1))
    return MaxStatistic(observed, best)


def max_statistic_p(
    scores: ArrayLike, labels: ArrayLike, n_permutations: int = 1000, seed: int = 0
) -> Float[Array, " m"]:
    """Return family-wise p-values: how often the best column under shuffled labels beats this column's |z|."""
    return max_statistic(scores, labels, n_permutations, seed).p()


def resample_weights(strata: Array, clusters: Array, n_draws: int, rng: np.random.Generator) -> Array:
    """Return [n_draws n] counts: whole clusters drawn with replacement within each stratum of records."""
    _, cluster_of = np.unique(clusters, return_inverse=True)
    n_clusters = int(cluster_of.max()) + 1
    # A cluster's stratum is the set of strata its records fall in, so that every draw keeps every class.
    kinds = np.zeros((n_clusters, int(strata.max()) + 1), dtype=bool)
    kinds[cluster_of, strata] = True
    _, kind_of = np.unique(kinds, axis=0, return_inverse=True)
    counts = np.zeros((n_draws, n_clusters))
    for kind in np.unique(kind_of):
        members = np.flatnonzero(kind_of.ravel() == kind)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=n_draws)
    weights: Array = counts[:, cluster_of.ravel()]
    return weights


def auroc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    clusters: Sequence[str] | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return one detector's AUROC with a 95% bootstrap interval, resampled within each class.

    Args:
        scores: [n], one detector.
        labels: [n].
        clusters: [n] topics; given, whole topics are resampled, because prompts on one topic are not independent.
        n_draws: bootstrap draws.
        seed: of the draws.
    """
    values, flags = _checked(scores, labels)
    if values.shape[1] != 1:
        raise UserError(f"auroc_interval takes one detector, got {values.shape[1]}: loop over the columns of interest.")
    units = np.arange(len(flags)) if clusters is None else np.asarray(clusters)
    weights = resample_weights(flags.astype(int), units, n_draws, np.random.default_rng(seed))
    positive, negative = values[flags, 0], values[~flags, 0]
    wins = (positive[:, None] > negative).astype(np.float64) + 0.5 * (positive[:, None] == negative)
    w_pos, w_neg = weights[:, flags], weights[:, ~flags]
    draws = ((w_pos @ wins) * w_neg).sum(axis=1) / (w_pos.sum(axis=1) * w_neg.sum(axis=1))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(wins.mean()), float(low), float(high), len(flags))


def bootstrap_mean(
    values: ArrayLike, clusters: Sequence[str] | None = None, n_draws: int = 1000, seed: int = 0
) -> Interval:
    """Return the mean of `values` [n] with a 95% bootstrap interval; whole `clusters` are resampled when given.

    No values give NaN; a single one (or a single cluster) gives an interval of zero width, which is not certainty.
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    if flat.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    units = np.arange(flat.size) if clusters is None else np.asarray(clusters)
    weights = resample_weights(np.zeros(flat.size, dtype=int), units, n_draws, np.random.default_rng(seed))
    draws = (weights @ flat) / weights.sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(flat.mean()), float(low), float(high), int(flat.size))


def kappa(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    clusters: Sequence[Hashable] | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return Cohen's kappa of two raters (Cohen 1960) with a 95% bootstrap interval.

    kappa = (p_agree - p_chance) / (1 - p_chance), with p_chance from each rater's own shares of the classes. It is 1
    for full agreement, 0 for chance, and NaN where both raters give one and the same class throughout: then agreement
    says nothing. Draws in which that happens are left out of the interval.

    Args:
        first: [n] classes, of any hashable kind.
        second: [n] the other rater's.
        clusters: [n] units that are resampled whole, e.g. prompts with several replies; every item by itself if None.
        n_draws: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: sequences of different lengths.
    """
    n = len(first)
    if len(second) != n or (clusters is not None and len(clusters) != n):
        raise ValueError(f"kappa needs pairs: got {n} and {len(second)} ratings.")
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    number = {name: index for index, name in enumerate(dict.fromkeys([*first, *second]))}
    k = len(number)
    cells = np.zeros((n, k * k))
    cells[np.arange(n), [number[a] * k + number[b] for a, b in zip(first, second, strict=True)]] = 1.0
    names: dict[Hashable, int] = {}
    units = np.array([names.setdefault(name, len(names)) for name in (range(n) if clusters is None else clusters)])
    weights = resample_weights(np.zeros(n, dtype=int), units, n_draws, np.random.default_rng(seed))
    draws = _kappa_of((weights @ cells).reshape(-1, k, k))
    estimate = float(_kappa_of(cells.sum(axis=0).reshape(1, k, k))[0])
    kept = draws[np.isfinite(draws)]
    if math.isnan(estimate) or not kept.size:
        return Interval(estimate, math.nan, math.nan, n)
    low, high = np.quantile(kept, [0.025, 0.975])
    return Interval(estimate, float(low), float(high), n)


def _kappa_of(tables: Array) -> Array:
    """Return kappa of each table of counts [draws k k]."""
    shares = tables / tables.sum(axis=(1, 2), keepdims=True)
    agree = np.trace(shares, axis1=1, axis2=2)
    chance = (shares.sum(axis=1) * shares.sum(axis=2)).sum(axis=1)
    room = 1 - chance
    found: Array = np.where(room > 1e-12, (agree - chance) / np.where(room > 1e-12, room, 1.0), np.nan)
    return found


def spearman(first: ArrayLike, second: ArrayLike) -> Correlation:
    """Return Spearman's rank correlation of two equally long sequences; NaN when either is constant.

    The p-value is of a seeded permutation test, so it is never zero.
    """
    a, b = np.asarray(first, dtype=np.float64).ravel(), np.asarray(second, dtype=np.float64).ravel()
    if len(a) != len(b):
        raise ValueError(f"spearman needs pairs: got {len(a)} and {len(b)} values.")
    if len(a) < 3 or (a == a[0]).all() or (b == b[0]).all():
        return Correlation(math.nan, math.nan, len(a))
    rho = float(stats.spearmanr(a, b).statistic)
    ranks_a, ranks_b = midranks(a[:, None])[:, 0], midranks(b[:, None])[:, 0]
    rng = np.random.default_rng(0)
    shuffles = np.stack([rng.permutation(ranks_b) for _ in range(PERMUTATIONS)])
    centred = ranks_a - ranks_a.mean()
    reach = np.abs(shuffles @ centred) >= abs(float(ranks_b @ centred)) - 1e-9
    return Correlation(rho, (1 + int(reach.sum())) / (1 + PERMUTATIONS), len(a))


def percentile_of(value: float, draws: ArrayLike) -> float:
    """Return where `value` stands among `draws`, 0 to 100; ties count half. NaN without draws."""
    sample = np.asarray(draws, dtype=np.float64).ravel()
    if sample.size == 0:
        return math.nan
    return float(100 * ((sample < value).mean() + 0.5 * (sample == value).mean()))


def draws_p(value: float, draws: ArrayLike, alternative: Literal["greater", "less", "two-sided"] = "greater") -> float:
    """Return the p-value of `value` against control draws: (1 + draws at least as extreme) / (1 + draws)."""
    sample = np.asarray(draws, dtype=np.float64).ravel()
    above = (1 + int((sample >= value).sum())) / (1 + sample.size)
    below = (1 + int((sample <= value).sum())) / (1 + sample.size)
    return {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]


def overlap_p(right: int, chosen: int, marked: int, n: int) -> float:
    """Return the chance that at least `right` of `chosen` things drawn at random among `n` are of the `marked` ones.

    The hypergeometric tail (Fisher's exact test, one-sided).
    """
    return float(stats.hypergeom.sf(right - 1, n, marked, chosen))


def hash_split(topic: str, splits: Mapping[str, float] = SPLITS, salt: str = "") -> str:
    """Return the split a topic belongs to, from a hash of its name: stable across runs, machines and new topics.

    Args:
        topic: all records of one topic go to one split, so that nothing learnt on a topic is reported on it.
        splits: name -> share; shares are normalised.
        salt: another salt gives another, independent assignment.

    Raises:
        UserError: no splits, or a share that is negative or sums to zero.
    """
    total = sum(splits.values())
    if not splits or min(splits.values()) < 0 or not math.isfinite(total) or total <= 0:
        raise UserError(f"splits {dict(splits)!r} are not shares: give non-negative numbers with a positive sum.")
    digest = hashlib.sha256(f"{salt}\x1f{topic}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * total
    for name, share in splits.items():
        point -= share
        if point < 0:
            return name
    return [name for name, share in splits.items() if share > 0][-1]


class Units(NamedTuple):
    """Independent observations: the means of the records of one topic and one label."""

    scores: Float[Array, "unit m"]
    labels: Bool[Array, " unit"]


def topic_units(scores: ArrayLike, labels: ArrayLike, topics: Sequence[str]) -> Units:
    """Average [n m] scores over the records of each topic and label.

    Prompts on one topic are alike, so a test that counts them as independent finds differences between any two groups
    of topics; a test on these units does not. A topic with both labels gives two units.
    """
    values, flags = _checked(scores, labels)
    names = np.asarray(topics)
    _, unit_of = np.unique(
        [f"{int(flag)} {name}" for flag, name in zip(flags, names, strict=True)], return_inverse=True
    )
    unit_of = unit_of.ravel()
    counts = np.bincount(unit_of)
    order = np.argsort(unit_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sums = np.add.reduceat(values[order].astype(np.float64), starts, axis=0)
    return Units(sums / counts[:, None], flags[order][starts])


def shuffled(labels: ArrayLike, seed: int = 0, topics: Sequence[str] | None = None) -> Bool[Array, " n"]:
    """Return a random permutation of `labels`: the null against which a whole pipeline is checked.

    Args:
        labels: [n].
        seed: of the permutation.
        topics: given, labels move as topics do: between the topics that have one label, within those that have both.
    """
    rng = np.random.default_rng(seed)
    found = np.asarray(labels).astype(bool).copy()
    if topics is None:
        return rng.permutation(found)
    names = np.asarray(topics)
    pure = []
    for topic in np.unique(names):
        rows = np.flatnonzero(names == topic)
        if found[rows].all() or not found[rows].any():
            pure.append(rows)
        else:
            found[rows] = rng.permutation(found[rows])
    for rows, label in zip(pure, rng.permutation([found[rows[0]] for rows in pure]), strict=True):
        found[rows] = label
    return found
