"""The statistics file against scipy, closed forms, and its own null distributions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats  # type: ignore[import-untyped]

from sae import stats
from sae.errors import UserError


def sparse_scores(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Like latents: mostly zero, some ties among the rest."""
    return np.where(rng.random((n, m)) < 0.8, 0.0, rng.integers(1, 6, (n, m))).astype(float)


@given(n=st.integers(1, 500), data=st.data())
def test_rate_is_wilson(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    ours, theirs = stats.rate(k, n), scipy_stats.binomtest(k, n).proportion_ci(method="wilson")
    assert ours.n == n
    assert ours.rate == k / n
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)
    assert 0 <= ours.low <= ours.rate <= ours.high <= 1


def test_rate_of_nothing_knows_nothing() -> None:
    nothing = stats.rate(0, 0)
    assert math.isnan(nothing.rate)
    assert (nothing.low, nothing.high, nothing.n) == (0.0, 1.0, 0)
    with pytest.raises(ValueError, match="3 successes out of 2"):
        stats.rate(3, 2)


@given(hits=st.lists(st.booleans(), max_size=60))
def test_a_clustered_rate_of_clusters_of_one_is_the_rate(hits: list[bool]) -> None:
    assert str(stats.clustered_rate(hits, range(len(hits)))) == str(stats.rate(sum(hits), len(hits)))  # NaN is itself


def test_records_that_are_fully_alike_count_once() -> None:
    """Clusters of equal size and one outcome each: deff is the size, but for what few clusters cost."""
    shown = np.arange(20) < 8
    alone = stats.rate(8, 20)
    alike = stats.clustered_rate(np.repeat(shown, 5).tolist(), np.repeat(np.arange(20), 5).tolist())
    assert (alike.rate, alike.n) == (0.4, 100)
    factor = (scipy_stats.t.ppf(0.975, 99) / scipy_stats.t.ppf(0.975, 19)) ** 2
    effective = factor * 100 / ((20 / 19) * 20 * 0.24 * 25 / 100**2 * 99 / 0.24)
    assert 17 < effective < 20
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    # Wilson's bounds are the p for which |0.4 - p| is z standard errors.
    for bound in (alike.low, alike.high):
        assert (0.4 - bound) ** 2 == pytest.approx(z2 * bound * (1 - bound) / effective)
    assert alike.low < alone.low
    assert alike.high > alone.high


def test_where_nothing_tells_how_alike_records_are_each_cluster_counts_once() -> None:
    for hit, bound in ((True, "low"), (False, "high")):
        found = stats.clustered_rate([hit] * 24, [index // 6 for index in range(24)])
        assert getattr(found, bound) == getattr(stats.rate(4 * hit, 4), bound)
        assert found.n == 24
    # One record that differs tells nothing either, and must not make the interval narrower than none.
    clusters = [index // 4 for index in range(100)]
    lows = [stats.clustered_rate([index >= missed for index in range(100)], clusters).low for missed in (0, 1)]
    assert lows[1] < lows[0] == stats.rate(25, 25).low
    one = stats.clustered_rate([True, False], ["a", "a"])
    assert one.low < 0.1
    assert one.high > 0.9
    assert str(stats.clustered_rate([], [])) == str(stats.rate(0, 0))
    with pytest.raises(ValueError, match="2 records, 1 clusters"):
        stats.clustered_rate([True, False], ["a"])


@pytest.mark.parametrize(("rho", "p"), [(0.0, 0.9), (0.3, 0.5), (0.3, 0.9), (0.3, 0.98)])
def test_clustered_intervals_cover_what_plain_ones_miss(rho: float, p: float) -> None:
    """25 clusters of 4 with beta-binomial counts, whose intraclass correlation is rho."""
    rng, clusters = np.random.default_rng(11), np.repeat(np.arange(25), 4).tolist()
    n_draws, covered = 600, np.zeros(2)
    for _ in range(n_draws):
        scale = 1 / rho - 1 if rho else 0.0
        rates = rng.beta(p * scale, (1 - p) * scale, 25) if rho else np.full(25, p)
        hits = rng.random(100) < np.repeat(rates, 4)
        plain, honest = stats.rate(int(hits.sum()), 100), stats.clustered_rate(hits.tolist(), clusters)
        covered += [plain.low <= p <= plain.high, honest.low <= p <= honest.high]
    assert covered[1] / n_draws >= 0.93
    if rho:
        assert covered[0] / n_draws < 0.9


def test_calling_agreeing_records_independent_would_miss_what_counting_clusters_covers() -> None:
    """15 clusters of 8 that are fully alike: exact coverage of p = .9, over the clusters that may hit."""
    clusters = np.repeat(np.arange(15), 8).tolist()
    chance = scipy_stats.binom.pmf(np.arange(16), 15, 0.9)
    found = [stats.clustered_rate([cluster < hit for cluster in clusters], clusters) for hit in range(16)]
    covered = np.array([one.low <= 0.9 <= one.high for one in found])
    assert chance @ covered > 0.98
    covered[15] = stats.rate(120, 120).low <= 0.9
    assert chance @ covered < 0.79


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40))
def test_auroc_counts_pairs_with_ties_half(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = sparse_scores(rng, n, 7), rng.permutation(np.arange(n) < max(1, n // 3))
    pairs = scores[labels][:, None] - scores[~labels][None]
    expected = (pairs > 0).mean((0, 1)) + 0.5 * (pairs == 0).mean((0, 1))
    found = stats.auroc(scores, labels)
    assert np.allclose(found, expected, atol=1e-12)
    assert np.allclose(stats.auroc(-scores, labels), 1 - found)
    assert np.allclose(stats.auroc(np.exp(scores), labels), found)  # only the order matters


def test_auroc_ends_and_errors() -> None:
    labels = [True, True, False, False]
    assert stats.auroc([3, 2, 1, 0], labels)[0] == 1.0
    assert stats.auroc(np.zeros((4, 3)), labels).tolist() == [0.5] * 3
    with pytest.raises(UserError, match="both classes"):
        stats.auroc([1, 2], [True, True])
    with pytest.raises(UserError, match="NaN"):
        stats.auroc([1, math.nan], [True, False])
    with pytest.raises(UserError, match="disagree"):
        stats.auroc([1, 2, 3], [True, False])


def test_rank_sum_matches_scipy() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(80) < 35
    scores = np.concatenate([sparse_scores(rng, 80, 20), rng.normal(size=(80, 5)) + labels[:, None] * 0.4], axis=1)
    ours = stats.rank_sum_p(scores, labels)
    theirs = scipy_stats.mannwhitneyu(scores[labels], scores[~labels], axis=0, method="asymptotic").pvalue
    large = theirs >= stats.EXACT_BELOW
    assert 0 < large.sum() < len(large)
    assert np.allclose(ours[large], theirs[large], atol=1e-12)
    without_ties = scipy_stats.mannwhitneyu(scores[labels, 20:], scores[~labels, 20:], axis=0, method="exact").pvalue
    assert np.allclose(ours[20:][~large[20:]], without_ties[~large[20:]], rtol=1e-9)
    small = rng.normal(size=(12, 6))
    flags = np.arange(12) < 5
    exact = scipy_stats.mannwhitneyu(small[flags], small[~flags], axis=0, method="exact").pvalue
    assert np.allclose(stats.rank_sum_p(small, flags), exact, atol=1e-12)
    assert stats.rank_sum_p(np.ones((12, 1)), flags)[0] == 1.0 == stats.rank_sum_p(np.ones((80, 1)), labels)[0]


def test_null_p_values_are_uniform_and_fdr_stays_silent() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(100) < 50
    p = stats.rank_sum_p(rng.normal(size=(100, 4000)), labels)
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.001
    assert abs((p < 0.05).mean() - 0.05) < 0.012
    sparse = stats.rank_sum_p(sparse_scores(rng, 100, 4000), labels)
    assert (sparse < 0.05).mean() < 0.065  # ties must not make the test liberal
    found = [
        (stats.benjamini_hochberg(stats.rank_sum_p(rng.normal(size=(60, 400)), np.arange(60) < 30)) < 0.05).any()
        for _ in range(40)
    ]
    assert np.mean(found) < 0.2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_benjamini_hochberg_matches_scipy(p: list[float]) -> None:
    ours = stats.benjamini_hochberg(p)
    assert np.allclose(ours, scipy_stats.false_discovery_control(p), atol=1e-12)
    assert (ours >= np.asarray(p) - 1e-12).all()


def test_benjamini_hochberg_keeps_shape_and_refuses_nan() -> None:
    assert stats.benjamini_hochberg(np.full((3, 4), 0.01)).shape == (3, 4)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        stats.benjamini_hochberg([0.1, math.nan])


def test_max_statistic_controls_the_family() -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(40) < 20
    false_alarms = [
        stats.max_statistic_p(rng.normal(size=(40, 100)), labels, 99, seed=draw).min() <= 0.05 for draw in range(60)
    ]
    assert np.mean(false_alarms) < 0.15
    scores = rng.normal(size=(40, 100))
    scores[:, 7] += 4 * labels
    p = stats.max_statistic_p(scores, labels, 199)
    assert p[7] == 1 / 200
    assert (np.delete(p, 7) > 0.05).all()


def test_auroc_interval_covers_and_clusters_widen() -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(60) < 30
    truth = scipy_stats.norm.cdf(1 / math.sqrt(2))
    covered = []
    for draw in range(100):
        interval = stats.auroc_interval(rng.normal(size=60) + labels, labels, n_draws=300, seed=draw)
        covered.append(interval.low <= truth <= interval.high)
        assert interval.low <= interval.estimate <= interval.high
    assert 0.87 <= np.mean(covered) <= 1.0
    topics = [f"t{index // 6}" for index in range(60)]
    shared = np.repeat(rng.normal(size=10), 6) + labels
    alone, clustered = (stats.auroc_interval(shared, labels, groups, seed=1) for groups in (None, topics))
    assert clustered.high - clustered.low > 1.3 * (alone.high - alone.low)
    assert alone == stats.auroc_interval(shared, labels, seed=1)


def test_bootstrap_mean_matches_the_standard_error() -> None:
    values = np.random.default_rng(4).normal(size=400)
    interval = stats.bootstrap_mean(values, n_draws=4000)
    width = 2 * 1.96 * values.std(ddof=1) / 20
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(width, rel=0.08)
    assert math.isnan(stats.bootstrap_mean([]).estimate)


def test_spearman_percentile_and_draws() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 5, 50), rng.normal(size=50)
    assert stats.spearman(a, b).rho == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    assert stats.spearman([1, 2, 3], [1, 8, 27]).rho == pytest.approx(1.0)
    assert math.isnan(stats.spearman([1, 1, 1], [1, 2, 3]).rho)
    draws = [0.0, 0.1, 0.1, 0.3]
    assert stats.percentile_of(0.1, draws) == 50.0
    assert stats.percentile_of(1.0, draws) == 100.0
    assert stats.draws_p(1.0, draws) == 1 / 5
    assert stats.draws_p(0.1, draws) == 4 / 5
    assert stats.draws_p(-1.0, draws, "less") == 1 / 5
    assert stats.draws_p(-1.0, draws, "two-sided") == 2 / 5
    assert stats.draws_p(1.0, []) == 1.0


def test_draws_p_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(6)
    p = np.array([stats.draws_p(rng.normal(), rng.normal(size=99)) for _ in range(2000)])
    assert abs((p <= 0.05).mean() - 0.05) < 0.02


def test_cohens_d() -> None:
    labels = np.arange(2000) < 1000
    scores = np.random.default_rng(7).normal(size=2000) + 0.8 * labels
    assert stats.cohens_d(scores, labels)[0] == pytest.approx(0.8, abs=0.12)
    assert stats.cohens_d(np.ones(2000), labels)[0] == 0.0
    assert stats.cohens_d(labels.astype(float), labels)[0] > 100


def test_hash_split_is_stable_and_in_proportion() -> None:
    topics = [f"topic {index}" for index in range(4000)]
    shares = {"find": 0.5, "select": 0.2, "report": 0.3}
    assigned = [stats.hash_split(topic, shares) for topic in topics]
    for name, share in shares.items():
        assert abs(assigned.count(name) / len(topics) - share) < 0.03
    assert assigned == [stats.hash_split(topic, shares) for topic in topics]
    other = [stats.hash_split(topic, shares, salt="b") for topic in topics]
    agree = np.mean([a == b for a, b in zip(assigned, other, strict=True)])
    assert abs(agree - (0.25 + 0.04 + 0.09)) < 0.04  # independent of the first assignment
    # Frozen: a change of the hash would silently move report topics into the find split.
    assert [stats.hash_split(topic) for topic in ("bombs", "poison", "taxes")] == FROZEN
    with pytest.raises(UserError, match="shares"):
        stats.hash_split("a", {"find": 0.0})


FROZEN = ["find", "find", "select"]


def test_kappa_in_closed_form() -> None:
    """Cohen's own kind of table: 20 + 15 agree of 50, chances 25 x 30 and 25 x 20 of 50 x 50."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = stats.kappa(first, second)
    assert found.estimate == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert (found.n, found) == (50, stats.kappa(second, first))
    assert found.low < found.estimate < found.high
    # The large-sample standard error (Cohen 1960) is sqrt(p (1 - p) / n) / (1 - chance).
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(0.7 * 0.3 / 50) / 0.5, rel=0.15)
    assert stats.kappa([1, 2, 3], [1, 2, 3]).estimate == 1.0
    assert stats.kappa([1, 2], [2, 1]).estimate == -1.0
    assert stats.kappa(["a", "b", "c"] * 4, ["b", "c", "a"] * 4).estimate == pytest.approx(-0.5)


def test_kappa_of_chance_is_nothing_and_of_one_class_unknown() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        a, b = (rng.random(120) < 0.3).tolist(), (rng.random(120) < 0.8).tolist()
        found = stats.kappa(a, b, n_draws=300, seed=seed)
        hits += found.low <= 0 <= found.high
    assert hits >= 52  # 95% of 60 is 57
    assert math.isnan(stats.kappa(["x"] * 5, ["x"] * 5).estimate)
    assert math.isnan(stats.kappa([], []).estimate)
    assert stats.kappa(["x"] * 5, ["y"] * 5).estimate == 0.0
    with pytest.raises(ValueError, match="got 1 and 2"):
        stats.kappa([1], [1, 2])


def test_kappa_resamples_whole_clusters() -> None:
    """Ten copies of every item are ten times as many rows and not more evidence."""
    rng = np.random.default_rng(1)
    a = (rng.random(60) < 0.5).tolist()
    b = [flag if rng.random() < 0.8 else not flag for flag in a]
    alone = stats.kappa(a, b)
    copies = stats.kappa(a * 10, b * 10, [*range(60)] * 10)
    naive = stats.kappa(a * 10, b * 10)
    assert copies.estimate == pytest.approx(alone.estimate)
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)


def test_average_precision_is_the_mean_over_all_orders_of_ties():
    scores, labels = [3, 2, 2, 2, 1, 1], [0, 1, 0, 1, 1, 0]

    def plain(order):
        hits = np.array([labels[i] for i in order])
        return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits == 1].mean())

    orders = [
        [0, *middle, *last] for middle in itertools.permutations([1, 2, 3]) for last in itertools.permutations([4, 5])
    ]
    assert stats.average_precision(scores, labels) == pytest.approx(np.mean([plain(order) for order in orders]))
    assert stats.average_precision([3, 2, 1], [1, 1, 0]) == 1.0
    with pytest.raises(UserError, match="one detector"):
        stats.average_precision(np.zeros((3, 2)), [1, 0, 1])


def test_overlap_p_is_the_hypergeometric_tail():
    # Of 5 things 2 are marked and 2 are drawn: both are marked in 1 of the 10 pairs, none in 3 of them.
    assert stats.overlap_p(2, 2, 2, 5) == pytest.approx(0.1)
    assert stats.overlap_p(1, 2, 2, 5) == pytest.approx(0.7)
    assert stats.overlap_p(0, 2, 2, 5) == pytest.approx(1.0)
