"""The training step's loss and gradients: every path equals plain autograd, losses have their known values."""

import pytest
import torch

from sae.autoencoder import loss
from sae.autoencoder.gradients import AuxK, loss_and_gradients
from sae.autoencoder.sae import SAE, SAEConfig
from sae.autoencoder.sparsity import ARCHITECTURES, BatchStats, SparsityOptions
from sae.kernels import pick
from sae.kernels.build import library
from sae.kernels.operands import Precision

KERNELS = ["reference", "torch", *(["cpp"] if library().handle is not None else [])]


def make(architecture, d_in=12, d_sae=40, l0=5.0):
    sae = SAE(SAEConfig(architecture, d_in, d_sae, l0, 0, "h", "toy"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, d_in, generator=generator)
    with torch.no_grad():
        sae.b_enc += 0.1 * torch.randn(d_sae, generator=generator)
        sae.b_dec += 0.3 * torch.randn(d_in, generator=generator)
        sae.sparsity.initialise(sae.pre_acts(x))
    return sae, x


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


def gradients(sae):
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


def assert_equal_gradients(sae, expected):
    """Within 1e-4 of the largest element of each gradient."""
    for name, found in gradients(sae).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            found, expected[name], rtol=1e-4, atol=1e-4 * scale + 1e-9, msg=lambda t, n=name: n + t
        )


@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dense", [False, True])
def test_equals_plain_autograd(architecture, kernels, dense, monkeypatch):
    sae, x = make(architecture)
    kernels = pick("cpu", kernels)
    if dense:
        monkeypatch.setattr(type(sae.sparsity), "select", lambda *arguments: None)
    else:
        monkeypatch.setattr(type(kernels), "max_density", lambda *arguments: 1.0)
    expected = plain(sae, x)
    expected.backward()
    expected_grads = gradients(sae)
    found = loss_and_gradients(sae, x, 10**6, None, kernels=kernels)
    torch.testing.assert_close(found.total, expected.detach(), rtol=1e-5, atol=0)
    assert_equal_gradients(sae, expected_grads)
    acts = sae.sparsity.train_acts(sae.pre_acts(x)).detach()
    assert float(found.stats.l0) == float(loss.l0(acts))
    assert torch.equal(found.fired, (acts != 0).any(0))
    torch.testing.assert_close(found.stats.min_active, acts[acts > 0].min())
    torch.testing.assert_close(found.fvu, loss.fvu(x, sae.decode(acts)).detach())


@pytest.mark.parametrize("kernels", KERNELS)
def test_nothing_active_is_no_accident(kernels):
    for architecture in ("relu", "topk", "batch_topk", "jumprelu"):
        sae, x = make(architecture)
        with torch.no_grad():
            sae.b_enc.fill_(-1e3)
        found = loss_and_gradients(sae, x, 0, torch.ones(40, dtype=torch.bool), kernels=pick("cpu", kernels))
        assert torch.isfinite(found.total)
        assert float(found.stats.l0) == 0
        sae.sparsity.update(found.stats)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in sae.state_dict().values())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("ratio", [0, 24])
@pytest.mark.parametrize("k_aux", [2, None])
def test_dead_latents_alone_get_the_auxiliary_gradient(kernels, ratio, k_aux, monkeypatch):
    monkeypatch.setattr("sae.autoencoder.gradients.AUXK_DENSE_RATIO", ratio)  # 0: by sparse sums
    sae, x = make("topk")
    dead = torch.zeros(40, dtype=torch.bool)
    dead[-7:] = True
    with torch.no_grad():
        sae.W_enc[:, dead] *= 1e-3  # they exist but never win
    reference = loss_and_gradients(sae, x, 0, dead, kernels=pick("cpu", "reference"), auxk=AuxK(1.0, k_aux))
    expected = gradients(sae)
    found = loss_and_gradients(sae, x, 0, dead, kernels=pick("cpu", kernels), auxk=AuxK(1.0, k_aux))
    assert 0 < float(found.auxk) < 2
    torch.testing.assert_close(found.auxk, reference.auxk, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.total, reference.total, rtol=1e-5, atol=0)
    assert_equal_gradients(sae, expected)
    assert not found.fired[dead].any()
    assert (sae.W_enc.grad[:, dead] != 0).any()
    with_aux = gradients(sae)
    loss_and_gradients(sae, x, 0, dead, kernels=pick("cpu", kernels), auxk=AuxK(0.0))
    assert (sae.W_enc.grad[:, dead] == 0).all()
    # The residual is a target, not a path: living latents and b_dec do not feel the auxiliary loss.
    torch.testing.assert_close(with_aux["W_enc"][:, ~dead], sae.W_enc.grad[:, ~dead], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(with_aux["W_dec"][~dead], sae.W_dec.grad[~dead], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(with_aux["b_dec"], sae.b_dec.grad, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("kernels", KERNELS[1:])
@pytest.mark.parametrize("precision", [Precision.bfloat16, Precision.bfloat16_rescored])
def test_lower_precision_stays_close(architecture, kernels, precision, monkeypatch):
    """The loss hardly moves, and gradients keep their direction; rescored, it is that of fp32."""
    monkeypatch.setattr(type(pick("cpu", kernels)), "max_density", lambda *arguments: 1.0)  # no dense fallback
    sae, x = make(architecture, d_in=64, d_sae=512, l0=12.0)
    expected = loss_and_gradients(sae, x, 0, None, kernels=pick("cpu", "reference"))
    grads = gradients(sae)
    found = loss_and_gradients(sae, x, 0, None, kernels=pick("cpu", kernels), precision=precision)
    tolerance = 1e-2 if precision is Precision.bfloat16 else 1e-5
    torch.testing.assert_close(found.total, expected.total, rtol=tolerance, atol=0)
    for name, gradient in gradients(sae).items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), grads[name].flatten(), dim=0)
        assert cosine > 0.99, (name, cosine)


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
