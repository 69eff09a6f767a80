"""Ranking over a whole family, and directions, on data with a known answer."""

import numpy as np
import pytest

from sae import stats
from sae.behavior.directions import difference_of_means, random_directions
from sae.behavior.latents import SiteActs, rank_latents
from sae.errors import UserError


def sites(rng, n=120, d_sae=300, n_sites=3):
    return [
        SiteActs(i, f"blocks.{i}.hook_resid_post", d_sae, "-1", np.maximum(rng.normal(size=(n, d_sae)) - 1, 0))
        for i in range(n_sites)
    ]


LABELS = np.arange(120) < 60
TOPICS = [f"t{index // 4}" for index in range(120)]


def test_planted_latents_are_found_over_the_family():
    parts = sites(np.random.default_rng(0))
    parts[1].acts[:, 17] = np.where(LABELS, 3.0, 0.0)
    parts[2].acts[:, 5] = np.where(LABELS, 0.0, 2.0)
    parts[1].acts[:, 18] = np.where(LABELS, 9.0, 0.0)  # same AUROC, larger effect: first
    parts[0].acts[:, 3] = 0.0
    ranking = rank_latents(parts, LABELS.tolist(), TOPICS, n_permutations=200, n_bootstrap=100)
    assert ranking.n_tested == 900
    assert [(row.encoder, row.latent) for row in ranking.scores] == [(1, 18), (1, 17), (2, 5)]
    first = ranking.scores[0]
    assert (first.auroc, first.low, first.high) == (1.0, 1.0, 1.0)
    assert (first.effect, first.typical) == (9.0, 9.0)
    assert first.q < 1e-4  # topics are the units, and there are few of them
    assert first.p_family == 1 / 201
    assert ranking.scores[2].auroc == 0.0
    assert [row.latent for row in ranking.candidates(1, 5)] == [18, 17]
    assert ranking.candidates(2, 5) == []  # it fires on negatives: nothing to ablate on positives
    assert ranking.candidates(0, 5) == []


def test_a_larger_family_costs_significance():
    rng = np.random.default_rng(1)
    few, many = sites(rng, n_sites=1), sites(rng, n_sites=4)
    many[0] = few[0]
    few[0].acts[:, 0] = np.where(LABELS, 0.9, 0.0) * (rng.random(120) < 0.5)
    small, large = (
        rank_latents(part, LABELS.tolist(), TOPICS, fdr=0.5, n_permutations=50, n_bootstrap=50) for part in (few, many)
    )
    q = [next(row.q for row in ranking.scores if (row.encoder, row.latent) == (0, 0)) for ranking in (small, large)]
    assert q[1] > q[0]


def test_shuffled_labels_report_nothing():
    parts = sites(np.random.default_rng(2))
    parts[1].acts[:, 17] = np.where(LABELS, 3.0, 0.0)
    hits = [
        rank_latents(parts, stats.shuffled(LABELS, seed).tolist(), TOPICS, n_permutations=100, n_bootstrap=20)
        for seed in range(20)
    ]
    assert sum(ranking.n_significant for ranking in hits) == 0


def test_rank_errors():
    with pytest.raises(UserError, match="no SAEs"):
        rank_latents([], [True, False])
    with pytest.raises(UserError, match="both classes"):
        rank_latents(sites(np.random.default_rng(0), n=4), [True] * 4)


def test_difference_of_means():
    rng = np.random.default_rng(3)
    labels = np.arange(400) % 2 == 0
    x = rng.normal(size=(400, 16)) + 5.0 + 4.0 * labels[:, None] * np.eye(16)[2]
    direction = difference_of_means(x, labels.tolist(), "hook", "-1")
    assert direction.norm == pytest.approx(np.linalg.norm(x[labels].mean(0) - x[~labels].mean(0)))
    assert direction.positive_mean - direction.negative_mean == pytest.approx(direction.norm)
    assert direction.project(x[~labels]).mean() == pytest.approx(direction.negative_mean)
    with pytest.raises(UserError, match="same mean"):
        difference_of_means(np.ones((4, 3)), [True, False] * 2, "hook", "-1")
    with pytest.raises(UserError, match="both classes"):
        difference_of_means(x, [True] * 400, "hook", "-1")


def test_random_directions_are_uniform_and_seeded():
    found = random_directions(2000, 32, 3.0, seed=1)
    assert np.allclose(np.linalg.norm(found, axis=1), 3.0)
    assert np.abs(found.mean(axis=0)).max() < 0.06
    assert np.allclose(found.T @ found / 2000 * 32 / 9, np.eye(32), atol=0.2)
    assert np.array_equal(found, random_directions(2000, 32, 3.0, seed=1))


def test_a_latent_that_likes_some_topics_is_not_a_finding():
    """Each topic has one label and every latent its own mean per topic: shuffled between topics, nothing is found."""
    rng = np.random.default_rng(3)
    topics = [f"topic {i // 6}" for i in range(240)]
    offsets = rng.normal(size=(40, 300)).repeat(6, axis=0)
    acts = (offsets + 0.1 * rng.normal(size=(240, 300))).astype(np.float32)
    labels = np.arange(240) // 6 % 2 == 0
    site = SiteActs(0, "blocks.0.hook_resid_post", 300, "-1", acts, None)
    for seed in range(5):
        shuffled = stats.shuffled(labels, seed, topics)
        assert rank_latents([site], shuffled.tolist(), topics, n_permutations=200, n_bootstrap=10).n_significant == 0
        naive = rank_latents([site], shuffled.tolist(), None, n_permutations=200, n_bootstrap=10).n_significant
        assert naive > 0, "counting prompts as independent would have reported something"
