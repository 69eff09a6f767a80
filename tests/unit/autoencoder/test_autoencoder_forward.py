"""The training forward pass: the sparse path equals plain autograd, losses have their known values."""

import pytest
import torch

from sae.autoencoder import loss
from sae.autoencoder.forward import training_loss
from sae.autoencoder.sae import SAE, SAEConfig
from sae.autoencoder.sparsity import ARCHITECTURES, BatchStats, SparsityOptions


def make(architecture, d_in=12, d_sae=40, l0=5.0):
    sae = SAE(SAEConfig(architecture, d_in, d_sae, l0, 0, "h", "toy"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, d_in, generator=generator)
    with torch.no_grad():
        sae.b_enc += 0.1 * torch.randn(d_sae, generator=generator)
        sae.b_dec += 0.3 * torch.randn(d_in, generator=generator)
        sae.sparsity.initialise(sae.pre_acts(x))
    return sae.double(), x.double()


def plain(sae, x):
    """Loss by dense autograd throughout, from the definitions."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if sae.config.architecture in ("topk", "batch_topk"):
        acts = sae.sparsity.train_acts(pre)
    else:
        acts = sae.sparsity.activate(pre, slice(None))
    mse = (x - acts @ sae.W_dec - sae.b_dec).square().sum(-1).mean() / x.shape[1]
    if sae.config.architecture == "relu":
        return mse + sae.sparsity.coefficient() * acts.sum(-1).mean() / x.shape[1] ** 0.5
    if sae.config.architecture == "jumprelu":
        options = sae.sparsity.options
        # A function whose value is L0 and whose slope in the threshold is the straight-through one.
        window = ((pre - sae.sparsity.threshold).abs() < options.bandwidth / 2).detach()
        ste = (window * (sae.sparsity.threshold.detach() - sae.sparsity.threshold) / options.bandwidth).sum(-1)
        l0 = (acts.detach() != 0).sum(-1) + ste
        return mse + options.l0_coefficient * (l0.mean() / sae.config.l0 - 1) ** 2
    return mse


@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("sparse", [True, False])
def test_equals_plain_autograd(architecture, sparse):
    sae, x = make(architecture)
    none_dead = torch.zeros(40, dtype=torch.bool)
    expected = plain(sae, x)
    expected.backward()
    grads = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    found = training_loss(sae, x, 10**6, none_dead, encoder_dtype=torch.float64, sparse=sparse)
    found.total.backward()
    torch.testing.assert_close(found.total, expected)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], msg=lambda text, n=name: f"{n}: {text}")
    acts = sae.sparsity.train_acts(sae.pre_acts(x))
    assert float(found.stats.l0) == float(loss.l0(acts))
    assert torch.equal(found.fired, (acts != 0).any(0))
    torch.testing.assert_close(found.stats.min_active, acts[acts > 0].min())


def test_nothing_active_is_no_accident():
    for architecture in ("relu", "topk", "batch_topk", "jumprelu"):
        sae, x = make(architecture)
        with torch.no_grad():
            sae.b_enc.fill_(-1e3)
        found = training_loss(sae, x, 0, torch.ones(40, dtype=torch.bool))
        found.total.backward()
        assert torch.isfinite(found.total)
        assert float(found.stats.l0) == 0
        sae.sparsity.update(found.stats)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in sae.state_dict().values())


def test_dead_latents_alone_get_the_auxiliary_gradient():
    sae, x = make("topk")
    dead = torch.zeros(40, dtype=torch.bool)
    dead[-7:] = True
    with torch.no_grad():
        sae.W_enc[:, dead] *= 1e-3  # they exist but never win
    found = training_loss(sae, x, 0, dead, auxk_alpha=1.0)
    assert 0 < float(found.auxk) < 2
    found.total.backward()
    assert not found.fired[dead].any()
    assert (sae.W_enc.grad[:, dead] != 0).any()
    with_aux = {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    training_loss(sae, x, 0, dead, auxk_alpha=0.0).total.backward()
    assert (sae.W_enc.grad[:, dead] == 0).all()
    # The residual is a target, not a path: living latents and b_dec do not feel the auxiliary loss.
    torch.testing.assert_close(with_aux["W_enc"][:, ~dead], sae.W_enc.grad[:, ~dead], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(with_aux["W_dec"][~dead], sae.W_dec.grad[~dead], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(with_aux["b_dec"], sae.b_dec.grad, atol=1e-7, rtol=1e-5)


def test_auxk_known_values():
    residual = torch.randn(200, 4)
    residual -= residual.mean(0)
    nothing = loss.auxk(residual, torch.zeros(200, 3), torch.eye(4)[:3], 2)
    torch.testing.assert_close(nothing, torch.tensor(1.0))
    both = torch.cat([residual, -residual], 1)
    perfect = loss.auxk(residual, both, torch.cat([torch.eye(4), -torch.eye(4)]), 8)
    torch.testing.assert_close(perfect, torch.tensor(0.0), atol=1e-6, rtol=0)
    assert loss.auxk(torch.zeros(5, 4), torch.zeros(5, 3), torch.eye(4)[:3], 2) == 0


def test_fvu_is_about_the_mean():
    x = torch.randn(1000, 8, dtype=torch.float64) + 1000
    assert float(loss.fvu(x, x.mean(0).expand_as(x))) == pytest.approx(1.0)
    assert float(loss.normalised_mse(x, torch.zeros_like(x))) == pytest.approx(1e6, rel=1e-2)
    assert float(loss.fvu(x, x)) == 0


def test_thresholds_take_small_steps_in_a_bf16_sae():
    sae, _ = make("jumprelu")
    sae = sae.bfloat16()
    before = sae.sparsity.threshold.detach().clone()
    assert before.dtype == torch.float32
    with torch.no_grad():
        for _ in range(100):
            sae.sparsity.threshold += 1e-5
    torch.testing.assert_close(sae.sparsity.threshold - before, torch.full_like(before, 1e-3), rtol=0.05, atol=0)


def test_batch_topk_threshold_forgets_its_start_and_averages():
    sparsity = ARCHITECTURES["batch_topk"](8, 2.0, SparsityOptions())
    zero = torch.tensor(2.0)
    sparsity.update(BatchStats(zero, torch.tensor(torch.inf), 0))
    assert float(sparsity.threshold) == 0
    sparsity.update(BatchStats(zero, torch.tensor(9.0), 1))
    assert float(sparsity.threshold) == 9.0
    for step in range(200):
        sparsity.update(BatchStats(zero, torch.tensor(1.0 + step % 2), step))
    assert float(sparsity.threshold) == pytest.approx(1.5, abs=0.05)
