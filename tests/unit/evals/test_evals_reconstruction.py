"""Reconstruction metrics: known answers, and no dependence on batching."""

import math

import pytest
import torch
from fake_lm import coder
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import files
from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.evals.reconstruction import ReconstructionMeter


def measure(sae, x, cuts=()):
    meter = ReconstructionMeter(sae)
    for part in torch.tensor_split(x, sorted(cuts)):
        meter.update(part)
    return meter.result()


def test_perfect_reconstruction():
    x = torch.randn(300, 4)
    x[:, 3] = 0
    found = measure(coder("identity", 4), x)
    assert found.fvu == pytest.approx(0, abs=1e-12)
    assert found.fve == pytest.approx(1)
    assert found.cosine == pytest.approx(1)
    assert found.relative_bias == pytest.approx(1)
    assert found.l0 == 3
    assert found.dead_fraction == 0.25
    assert found.n_tokens == 300
    assert found.density.sum() == pytest.approx(3)
    assert sum(found.density_histogram.counts) == 6
    files.to_plain(found)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_fvu_is_about_the_mean_however_large(mean):
    """An SAE that outputs the mean explains nothing; one that halves the deviations explains three quarters."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4000, 4, generator=generator) + mean).float()
    sae = coder("identity", 4)
    with torch.no_grad():
        sae.b_dec.copy_(x.double().mean(0))
        sae.b_enc.fill_(-1e9)
    assert measure(sae, x).fvu == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        sae.b_enc.fill_(0)
        sae.W_enc.mul_(0.5)
    assert measure(sae, x).fvu == pytest.approx(0.25, abs=5e-3)


@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (1.0, 0.0), (1.0, 30.0), (50.0, -4.0)])
def test_fve_has_neither_unit_nor_origin(scale, shift):
    """Pitfall: a variance about zero, or E||x||^2 - (mean over d of E[x_d^2])^2, which is neither and has no unit.

    An SAE that halves the deviations explains three quarters of their variance, wherever the data lie and whatever
    they are measured in.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator).double() + torch.linspace(1, 5, 16)
    x = scale * x + shift
    sae = coder("identity", 16).double()
    with torch.no_grad():
        sae.W_enc.mul_(0.5)
        sae.b_dec.copy_(x.mean(0))
    assert measure(sae, x).fve == pytest.approx(0.75, rel=1e-6)
    error = 0.25 * (x - x.mean(0)).square().sum(1).mean()
    about_zero = float(1 - error / x.square().sum(1).mean())
    no_unit = float(1 - error / (x.square().sum(1).mean() - x.square().mean(0).mean().square()))
    assert abs(about_zero - 0.75) > 0.1
    assert abs(no_unit - 0.75) > 0.1


def test_shrinkage_shows_as_relative_bias():
    sae = coder("identity", 4)
    with torch.no_grad():
        sae.W_enc.mul_(0.8)
    found = measure(sae, torch.randn(500, 4))
    assert found.relative_bias == pytest.approx(0.8)
    assert found.fvu == pytest.approx(0.04, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 120), max_size=6), seed=st.integers(0, 99), mean=st.sampled_from([0.0, 50.0]))
def test_batching_does_not_matter(cuts, seed, mean):
    x = torch.randn(120, 4, generator=torch.Generator().manual_seed(seed)) + mean
    sae = SAE(SAEConfig("topk", 4, 9, 2.0, seed, "h", "toy"))
    whole, parts = measure(sae, x), measure(sae, x, cuts)
    for name in ("l0", "fvu", "mse", "cosine", "relative_bias", "dead_fraction", "n_tokens"):
        assert getattr(whole, name) == pytest.approx(getattr(parts, name), rel=1e-5, nan_ok=True)
    assert torch.equal(whole.density, parts.density)


def test_nothing_and_constant_input():
    with pytest.raises(UserError, match="no tokens"):
        ReconstructionMeter(coder("identity", 4)).result()
    with pytest.raises(UserError, match="5 wide"):
        ReconstructionMeter(coder("identity", 4)).update(torch.zeros(2, 5))
    assert math.isnan(measure(coder("identity", 4), torch.ones(7, 4)).fvu)
