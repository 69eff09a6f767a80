"""Candidates and rivals on a model whose cause is known: who reads, who writes, who controls."""

import dataclasses
from pathlib import Path

import numpy as np
import planted
import pytest
import torch

from sae import stats
from sae.behavior.candidates import output_scores, score_candidates, spread_sample
from sae.behavior.causal import Beside
from sae.behavior.controls import random_effect
from sae.behavior.decoys import find_decoys, planted_directions
from sae.behavior.directions import along, difference_of_means, paired_component
from sae.behavior.find import find_behavior
from sae.behavior.measure import collect, prepare, prepare_margins
from sae.behavior.settings import BehaviorSettings
from sae.errors import UserError

SETTINGS = BehaviorSettings(
    n_random=10, n_random_per_size=0, n_random_dose=1, n_permutations=200, n_bootstrap=100, max_new_tokens=4,
    n_stability=20, null_runs=30, n_steps=5, n_interaction=3,
)  # fmt: skip
ORGANISM = Path(__file__).resolve().parents[3] / "checkpoints" / "organism"
AXES = np.eye(planted.D_IN)


@pytest.fixture(scope="module")
def lm():
    return planted.PlantedLM()


@pytest.fixture(scope="module")
def sae():
    return planted.planted_sae()


@pytest.fixture(scope="module")
def report(lm, sae):
    directions = {"refusal": AXES[0], "other": AXES[1]}
    return find_behavior(lm, [sae], planted.contrast(), planted.judge, SETTINGS, beside=Beside(planted=directions))


def test_rivals_detect_alike_and_only_the_cause_controls(report):
    assert list(report.rivals) == [
        "latent", "latents", "sparse_probe_1", "sparse_probe_5", "sparse_probe_20",
        "difference_of_means", "pca", "dense_probe", "dimension",
    ]  # fmt: skip
    for name, rival in report.rivals.items():
        assert rival.method == name
        assert rival.auroc.estimate == 1.0
        assert rival.auroc.n == rival.ablate_rate.n + rival.add_rate.n
    for name in ("latents", "sparse_probe_5", "difference_of_means", "pca", "dense_probe"):
        rival = report.rivals[name]
        assert (rival.ablate_rate.rate, rival.ablate_restored_rate.rate) == (0.0, 1.0)
        assert (rival.add_rate.rate, rival.add_degenerate_rate.rate) == (1.0, 0.0)
    # Two latents and two coordinates detect equally well; only one of each does anything.
    for name, what in (("latent", "latent"), ("sparse_probe_1", "latent"), ("dimension", "dimension")):
        cause = {"latent": planted.CAUSE, "dimension": 0}[what]
        does = report.rivals[name].detail == f"{what} {cause}"
        assert report.rivals[name].ablate_restored_rate.rate == float(does)
        assert report.rivals[name].add_rate.rate == float(does)
    tested, causal = report.rivals["latents"], report.causal
    assert (tested.ablate_rate, tested.add_rate) == (causal.ablate_rate, causal.clamp_rate)
    # Nothing else depends on the cause, so taking it away costs nothing, and what does nothing is no bargain.
    assert tested.remove_cost.own.kl == pytest.approx(causal.kl_harmless, abs=1e-6)
    fronts = {name for name, rival in report.rivals.items() if rival.on_remove_front}
    assert fronts
    assert all(report.rivals[name].ablate_restored_rate.rate == 1.0 for name in fronts)
    assert report.base_cost.own.kl == 0
    assert [item.name.split()[0] for item in report.detection] == ["latent", "difference", "probe"]


def test_candidates_tell_the_cause_from_the_decoy(report):
    rows = {item.latent: item for item in report.candidates.scores}
    cause, decoy = rows[planted.CAUSE], rows[planted.DECOY]
    assert cause.ranked
    assert decoy.ranked
    assert cause.input_score == decoy.input_score == 1.0
    assert cause.gradient == pytest.approx(-4 * 5.7)  # the margin reads 4 times what the latent gives, 6 less its bias
    assert cause.ablation_effect.estimate == pytest.approx(cause.gradient) == pytest.approx(cause.integrated)
    assert decoy.ablation_effect.estimate == pytest.approx(0.0, abs=1e-6) == pytest.approx(decoy.gradient)
    assert cause.output_score.estimate > 5
    assert cause.output_probability.estimate > 0.9
    assert abs(decoy.output_score.estimate) < 1e-6
    found = report.candidates
    assert found.agreement_listed.gradient.n == found.agreement_listed.integrated.n == len(rows)
    assert found.agreement_sampled.gradient.n == found.agreement_sampled.integrated.n == len(found.sampled) == 48


class OtherLM(planted.PlantedLM):
    """The same activations; the reply reads them along another direction."""

    def state(self, x):
        return x @ torch.randn(planted.D_IN, generator=torch.Generator().manual_seed(5))


def test_agreement_is_over_latents_that_no_attribution_chose(lm, sae, report):
    """Another read-out has other attributions, and puts other latents on the table; the sample stays as it is."""
    contrast = planted.contrast()
    splits = {name: contrast.split(name) for name in stats.SPLITS}
    site = collect(lm, [sae], prepare(lm, splits["find"].records)).sites[0]
    ranked = report.ranking[:2]
    here, there = (score_candidates(one, sae, site, ranked, splits, SETTINGS) for one in (lm, OtherLM()))
    assert {item.latent for item in here.scores} != {item.latent for item in there.scores}
    assert here.sampled == there.sampled == report.candidates.sampled
    # The read-out is linear, so the attributions are right about all latents, not only about those that they chose.
    assert there.agreement_sampled.gradient.rho > 0.99
    none = score_candidates(lm, sae, site, ranked, splits, dataclasses.replace(SETTINGS, n_agreement=0))
    assert none.sampled == []
    assert none.agreement_sampled.gradient.n == 0


def test_a_sample_is_spread_over_densities_and_takes_none_that_is_silent():
    density = np.concatenate([np.zeros(40), np.geomspace(1e-4, 1, 100)])
    order = np.random.default_rng(0).permutation(140)
    draws = [spread_sample(density[order], 20, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for drawn in draws:
        ranks = np.sort(np.argsort(np.argsort(density[order]))[drawn]) - 40
        assert (ranks // 5).tolist() == list(range(20)), "one of every five that are neighbours in density"
    assert len(spread_sample(density, 500)) == 100
    assert spread_sample(np.zeros(5), 3) == spread_sample(density, 0) == []


def test_output_score_in_closed_form(lm, sae):
    task = prepare_margins(lm, planted.contrast().negatives[:4])
    found = output_scores(lm, sae, {planted.CAUSE: 3.0, planted.DECOY: 3.0}, task)
    # At half of KAPPA both replies are equally likely; before, the odds were exp(-12). (Others' share is below 1e-6.)
    assert np.allclose(found.log_probability[0], np.log(0.5) + 12, atol=1e-3)
    assert np.allclose(found.probability[0], 0.5, atol=1e-4)
    assert np.allclose(found.probability[1], 0.0, atol=1e-6)
    assert output_scores(lm, sae, {}, task).probability.shape == (0, 4)


def test_the_report_says_what_chance_does(report):
    assert report.null_share_protocol.rate == 0.0
    assert report.null_share.n == 30
    assert report.null_share.rate < 0.2
    assert all(row.stability == row.stability_halves == 1.0 for row in report.ranking[:2])
    for effect in (report.causal.random_latents, report.causal.random_directions, report.causal.random_latents_clamp):
        assert (effect.effect, effect.n, effect.mean, effect.p99, effect.p) == (1.0, 10, 0.0, 0.0, 1 / 11)
        assert effect.beyond
    assert report.causal.dose_spearman == report.causal.dose_correlation.rho
    assert report.sizes[-1].restored.rate == 1.0
    assert report.interactions.hydras == []


def test_random_effect_needs_to_be_beyond_its_draws():
    draws = [0.0] * 95 + [0.5] * 5
    assert random_effect(0.6, draws).beyond
    assert not random_effect(0.5, draws).beyond  # five in a hundred do as much
    assert not random_effect(0.0, [0.0] * 100).beyond
    none = random_effect(1.0, [])
    assert (none.n, none.beyond) == (0, False)
    assert np.isnan(none.percentile)


def test_decoys_by_the_planted_directions(report, sae, tmp_path):
    directions = {"refusal": AXES[0], "other": AXES[1]}
    found = find_decoys(sae, [planted.CAUSE, planted.DECOY], "refusal", directions)
    assert (found.share, found.owners) == (0.5, ["refusal", "other"])
    assert found.cosines == [1.0, 0.0]
    assert find_decoys(sae, [planted.CAUSE], "unplanted", directions) is None
    assert find_decoys(sae, [planted.CAUSE], "refusal", {"refusal": np.ones(3)}) is None
    assert report.decoy_share == report.decoys.share < 1
    assert planted_directions(tmp_path) is None is planted_directions(None)
    assert set(planted_directions(ORGANISM)) == {"refusal", "deception", "style"}


def test_directions_have_the_length_of_the_gap_and_point_to_the_positives():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2 == 0
    topics = [f"t{index // 4}" for index in range(200)]  # every topic has both classes
    x = rng.normal(size=(200, 8)) + 10 * rng.normal(size=(50, 1, 8)).repeat(4, axis=1).reshape(200, 8)
    x += 4.0 * labels[:, None] * AXES[2][:8]
    component = paired_component(x, labels.tolist(), topics)
    assert abs(component[2]) > 0.9  # differences within topics are free of what topics have in common
    for vector in (component, -7 * component):
        direction = along(vector, x, labels.tolist(), "h", "-1")
        assert direction.norm == pytest.approx(direction.positive_mean - direction.negative_mean)
        assert direction.vector @ (x[labels].mean(0) - x[~labels].mean(0)) > 0
        assert direction.project(x[labels]).mean() == pytest.approx(direction.positive_mean)
    means = difference_of_means(x, labels.tolist(), "h", "-1")
    assert np.allclose(means.vector, x[labels].mean(0) - x[~labels].mean(0))
    # A topic of one class is compared with the other class's mean.
    alone = [f"t{index}" for index in range(200)]
    assert paired_component(x, labels.tolist(), alone).shape == (8,)
    with pytest.raises(UserError, match="same mean"):
        along(np.zeros(8), x, labels.tolist(), "h", "-1")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_steps": 0}, "n_steps=0"),
        ({"null_runs": -1}, "null_runs=-1"),
        ({"output_dose": 0.0}, "output_dose=0"),
        ({"sparse_ks": (0,)}, "sparse_ks"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(UserError, match=message):
        BehaviorSettings(**wrong)
