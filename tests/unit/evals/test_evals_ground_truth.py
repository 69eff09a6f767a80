"""Metrics against a known truth: SAEs built by hand have the answers that can be worked out by hand."""

import itertools
import math

import pytest
import torch

from sae import files
from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.evals.ground_truth import GroundTruthMeter, cosines, mcc, measure
from sae.evals.reconstruction import ReconstructionMeter
from sae.evals.world import HOOK_NAME, Sample
from sae.evals.worlds import absorption, t1, t4

N = 20_480
P = 0.25  # with which every feature of t1 fires


def oracle(world, rows=None):
    """Knows the directions (those in `rows`); a latent fires above half a feature's mean."""
    directions = world.directions if rows is None else world.directions[rows]
    sae = SAE(SAEConfig("batch_topk", world.d_in, len(directions), 1, 0, HOOK_NAME, world.name))
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
        sae.sparsity.threshold.fill_(0.5)
    return sae


def judge(sae, world=None, **more):
    return measure(sae, world or t1(), n_tokens=N, **more)


def change(sae, **parameters):
    """Overwrite parameters by functions of themselves."""
    with torch.no_grad():
        for name, function in parameters.items():
            getattr(sae, name).copy_(function(getattr(sae, name).clone()))
    return sae


def test_an_oracle_is_perfect():
    found = judge(oracle(t1()))
    for name in ("mcc", "mmcs", "f1", "precision", "recall", "f1_alive", "fve", "shrinkage"):
        assert getattr(found, name) == pytest.approx(1, abs=1e-6), name
    assert found.uniqueness == 1
    assert found.dead_fraction == 0
    assert found.l0 == found.true_l0 == pytest.approx(4, abs=5 * math.sqrt(3 / N))
    assert found.features.tolist() == list(range(16))
    assert found.latent_f1.tolist() == pytest.approx([1] * 16)
    assert found.n_tokens == N
    files.to_plain(found)


def test_the_order_of_latents_does_not_matter():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    found = judge(oracle(t1(), order))
    assert found.mcc == pytest.approx(1)
    assert found.f1 == 1
    assert found.features.tolist() == order.tolist()


def test_decoder_rows_in_another_order_than_the_encoder():
    """Directions are all there; firing tells of another, independent feature: precision and recall are P."""
    found = judge(change(oracle(t1()), W_dec=lambda rows: rows.roll(1, 0)))
    assert found.mcc == pytest.approx(1)
    error = 5 * math.sqrt(P * (1 - P) / (N * P * 16))
    assert found.precision == pytest.approx(P, abs=error)
    assert found.recall == pytest.approx(P, abs=error)
    assert found.f1 == pytest.approx(P, abs=error)
    # Each of the two features that are mistaken for each other leaves its whole second moment as an error.
    second, variance = P * (1 + 0.05**2), P * (1 + 0.05**2) - P**2
    assert found.fve == pytest.approx(1 - 2 * (second - P**2) / variance, abs=0.05)


def test_a_decoder_that_points_the_wrong_way():
    """MCC does not mind a sign and MMCS does; the reconstruction is -x."""
    found = judge(change(oracle(t1()), W_dec=torch.neg))
    assert found.mcc == pytest.approx(1)
    assert found.mmcs == pytest.approx(0, abs=1e-6)
    assert found.f1 == 1
    assert found.shrinkage == pytest.approx(1)
    second = 16 * P * (1 + 0.05**2)
    variance = 16 * (P * (1 + 0.05**2) - P**2)
    assert found.fve == pytest.approx(1 - 4 * second / variance, abs=0.1)


def test_latents_that_are_there_twice():
    world = t1()
    found = judge(oracle(world, torch.arange(32) % 16))
    assert found.uniqueness == 0.5
    assert found.mcc == pytest.approx(1)  # sixteen of them can be matched
    assert found.f1 == 1
    assert found.shrinkage == pytest.approx(2, abs=1e-5)
    assert found.l0 == 2 * found.true_l0


def test_features_that_have_no_latent():
    found = judge(oracle(t1(), torch.arange(8)))
    assert found.mcc == pytest.approx(1)  # of the eight that can be matched
    assert found.mmcs == pytest.approx(0.5, abs=1e-6)
    assert found.f1 == 1
    assert found.l0 == pytest.approx(2, abs=5 * math.sqrt(1.5 / N))
    second = P * (1 + 0.05**2)
    assert found.fve == pytest.approx(1 - 0.5 * second / (second - P**2), abs=0.02)


def test_dead_latents_count_as_detectors_of_nothing():
    dead = torch.arange(16) < 4
    found = judge(change(oracle(t1()), b_enc=lambda bias: bias.masked_fill(dead, -1e9)))
    assert found.dead_fraction == 0.25
    assert found.f1 == pytest.approx(0.75)
    assert found.precision == pytest.approx(0.75)
    assert found.recall == pytest.approx(0.75)
    assert found.f1_alive == pytest.approx(1)
    assert found.mcc == pytest.approx(1)  # directions alone
    assert found.latent_f1[:4].tolist() == [0] * 4


def test_an_sae_that_never_fires():
    found = judge(change(oracle(t1()), b_enc=lambda bias: bias - 1e9))
    assert found.f1 == found.precision == found.recall == found.l0 == found.shrinkage == 0
    assert found.dead_fraction == 1
    assert math.isnan(found.f1_alive)


def test_a_latent_that_always_fires_has_the_precision_of_its_feature():
    found = judge(change(oracle(t1()), b_enc=lambda bias: bias + 10))
    assert found.recall == 1
    error = 5 * math.sqrt(P * (1 - P) / (N * 16))
    assert found.precision == pytest.approx(P, abs=error)
    assert found.f1 == pytest.approx(2 * P / (1 + P), abs=2 * error)


def test_shrinkage_is_the_ratio_of_lengths():
    found = judge(change(oracle(t1()), W_enc=lambda weights: 0.8 * weights))
    assert found.shrinkage == pytest.approx(0.8)
    assert found.f1 == 1


def test_untrained_saes_score_low():
    scores = [judge(SAE(SAEConfig("batch_topk", 32, 16, 4, seed, HOOK_NAME, "t1"))) for seed in range(3)]
    # The best of 16 matches in 32 dimensions: |cosines| are |N(0, 1/32)|, of which even the largest of 16 is about .4.
    assert all(found.mcc < 0.45 for found in scores)
    assert all(found.f1 < 0.55 for found in scores)
    assert all(found.mmcs < 0.45 for found in scores)


def test_silent_tokens_have_no_length_to_compare():
    world = t1()
    meter = GroundTruthMeter(oracle(world), world)
    meter.update(Sample(torch.zeros(5, 32), torch.zeros(5, 16)))
    found = meter.result()
    assert math.isnan(found.shrinkage)
    assert found.true_l0 == found.l0 == found.f1 == 0
    meter.update(Sample(world.directions[:3], torch.eye(16)[:3]))
    found = meter.result()
    assert found.shrinkage == pytest.approx(1)
    assert found.n_tokens == 8
    # The other thirteen features never fired here, so their latents told nothing.
    assert found.f1 == pytest.approx(3 / 16)


def test_absorption_shows_as_recall():
    """The latent of feature 1 carries feature 0 too, and that of feature 0 is silent where both fire."""
    world = absorption()
    both = 0.7 * world.directions[0] + 0.51**0.5 * world.directions[1]
    sae = change(
        oracle(world),
        W_dec=lambda rows: torch.stack([rows[0], both, rows[2], rows[3]]),
        W_enc=lambda columns: torch.stack(
            [columns[:, 0] - columns[:, 1], columns[:, 1] / 0.51**0.5, columns[:, 2], columns[:, 3]], dim=1
        ),
    )
    found = judge(sae, world)
    assert found.fve == pytest.approx(1, abs=2e-3)  # nothing of this shows in the reconstruction
    assert found.features.tolist() == [0, 1, 2, 3]
    assert found.mcc == pytest.approx((3 + 0.51**0.5) / 4, abs=1e-6)
    assert found.precision == 1
    # A fifth of the N * 0.2 tokens that have feature 0 have feature 1 too.
    error = 5 * math.sqrt(0.2 * 0.8 / (0.2 * N))
    assert found.recall == pytest.approx((3 + 0.8) / 4, abs=error / 4)
    assert float(found.latent_f1[0]) == pytest.approx(1.6 / 1.8, abs=error)


def brute_force(fires, truth):
    f1 = []
    for latent, feature in zip(fires.T.tolist(), truth.T.tolist(), strict=True):
        tp = sum(a and b for a, b in zip(latent, feature, strict=True))
        fp = sum(a and not b for a, b in zip(latent, feature, strict=True))
        fn = sum(b and not a for a, b in zip(latent, feature, strict=True))
        f1.append(2 * tp / (2 * tp + fp + fn) if tp else 0.0)
    return f1


def test_detection_equals_a_count_by_hand():
    world = t4()
    sae = SAE(SAEConfig("topk", 64, 40, 3, 0, HOOK_NAME, "t4"))
    samples = list(world.held_out(3, 100))
    meter = GroundTruthMeter(sae, world)
    for sample in samples:
        meter.update(sample)
    found = meter.result()
    acts = torch.cat([sample.acts for sample in samples])
    truth = torch.cat([sample.feature_acts for sample in samples]) > 0
    expected = brute_force(sae.encode(acts) != 0, truth[:, found.features])
    assert found.latent_f1.tolist() == pytest.approx(expected)
    assert found.f1 == pytest.approx(sum(expected) / 40)
    assert found.true_l0 == pytest.approx(float(truth.sum(1).double().mean()))
    plain = ReconstructionMeter(sae)
    plain.update(acts)
    assert found.fve == pytest.approx(plain.result().fve)
    assert found.l0 == plain.result().l0


def test_batching_does_not_matter():
    world = t4()
    sae = SAE(SAEConfig("topk", 64, 40, 3, 0, HOOK_NAME, "t4"))
    (sample,) = world.held_out(1, 120)
    results = []
    for sizes in ([120], [1, 19, 100]):
        meter = GroundTruthMeter(sae, world)
        for acts, feature_acts in zip(sample.acts.split(sizes), sample.feature_acts.split(sizes), strict=True):
            meter.update(Sample(acts, feature_acts))
        results.append(meter.result())
    for name in ("mcc", "f1", "precision", "recall", "l0", "true_l0", "fve", "shrinkage", "dead_fraction"):
        assert getattr(results[0], name) == pytest.approx(getattr(results[1], name)), name


def test_mcc_is_the_best_of_all_matchings():
    generator = torch.Generator().manual_seed(0)
    for m, n in ((5, 5), (3, 6), (6, 3)):
        cosine = cosines(torch.randn(m, 4, generator=generator), torch.randn(n, 4, generator=generator))
        size = cosine.abs() if m <= n else cosine.abs().T
        best = max(
            sum(float(size[row, col]) for row, col in enumerate(cols)) / len(size)
            for cols in itertools.permutations(range(size.shape[1]), len(size))
        )
        assert mcc(cosine) == pytest.approx(best)


def test_a_direction_of_no_length_has_no_cosine():
    assert cosines(torch.zeros(2, 3), torch.eye(3)).tolist() == [[0] * 3] * 2


def test_mistakes():
    with pytest.raises(UserError, match="d_in = 32"):
        measure(oracle(t1()), t4())
    with pytest.raises(UserError, match="n_tokens = 0"):
        measure(oracle(t1()), t1(), n_tokens=0)
    with pytest.raises(UserError, match="no tokens"):
        GroundTruthMeter(oracle(t1()), t1()).result()
