"""The training step's loss and gradients: every path equals plain autograd, losses have their known values."""

import pytest
import torch

from sae.autoencoder import loss
from sae.autoencoder.gradients import loss_and_gradients
from sae.autoencoder.revive import AuxK
from sae.autoencoder.sae import SAEConfig
from sae.autoencoder.sae import make as make_sae
from sae.autoencoder.sparsity import ARCHITECTURES, BatchStats, Schedule, trainable_architectures
from sae.kernels import pick
from sae.kernels.build import library
from sae.kernels.operands import Precision

KERNELS = ["reference", "torch", *(["cpp"] if library().handle is not None else [])]


ALL = trainable_architectures()
VARIANTS = [
    *((name, {}) for name in ALL),
    ("jumprelu", {"penalty": "quadratic", "ste_to_input": True}),
    ("jumprelu", {"penalty": "step"}),
    ("jumprelu", {"penalty": "tanh", "ste_to_input": True}),
    ("matryoshka_batch_topk", {"n_sampled": 4}),
    ("hierarchical_topk", {"ks": (2, 3)}),
]


def make(architecture, d_in=12, d_sae=40, l0=5.0, options=None, hook_name="h", d_out=0, skip=False):
    config = SAEConfig(
        architecture, d_in, d_sae, l0, 0, hook_name, "toy", d_out=d_out, skip=skip, options=options or {}
    )
    sae = make_sae(config, Schedule(n_steps=100, seed=0))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, d_in, generator=generator)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec, *sae.sparsity.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if sae.W_skip is not None:
            sae.W_skip += 0.1 * torch.randn(sae.W_skip.shape, generator=generator)
        sae.sparsity.initialise(sae.pre_acts(x))
    return sae, x


def plain(sae, x, target=None, step=10**6):
    """Loss by dense autograd throughout, from the definitions, written down once more."""
    target = x if target is None else target
    name, options, l0_target = sae.config.architecture, sae.sparsity.options, sae.config.l0
    pre = (x - sae.b_dec if sae.centres else x) @ sae.W_enc + sae.b_enc
    acts = sae.sparsity.train_acts(pre)

    def mse(acts, w_dec=None, b_dec=None):
        recons = acts @ (sae.W_dec if w_dec is None else w_dec) + (sae.b_dec if b_dec is None else b_dec)
        if sae.W_skip is not None:
            recons = recons + (x @ sae.W_skip if w_dec is None else (x @ sae.W_skip).detach())
        return (target - recons).square().sum(-1).mean() / target.shape[1]

    loss = mse(acts)
    if name.startswith("matryoshka"):
        sizes = sae.sparsity.prefix_sizes(step)
        assert len(sizes) > 2
        assert sizes[-1] == sae.config.d_sae
        loss = torch.stack([mse(acts * (torch.arange(len(sae.W_dec)) < size)) for size in sizes]).mean()
    if name == "hierarchical_topk":
        ks = [*(options.ks or [k for k in (1, 2, 4, 8) if k < l0_target]), int(l0_target)]
        best = [pre.topk(k, dim=1).values[:, -1:] for k in ks]
        loss = torch.stack([mse(pre.relu() * (pre >= smallest)) for smallest in best]).mean()
    if name == "relu":
        return loss + sae.sparsity.controller.coefficient() * acts.sum(-1).mean() / x.shape[1] ** 0.5
    if name == "gated":
        gate = pre.relu()
        own = mse(gate, sae.W_dec.detach(), sae.b_dec.detach())
        return loss + own + sae.sparsity.controller.coefficient() * gate.sum(-1).mean() / x.shape[1] ** 0.5
    if "jumprelu" in name:
        if options.penalty == "tanh":
            size = (options.tanh_scale * acts).tanh().sum(-1).mean()
            return loss + sae.sparsity.controller.coefficient() * size / x.shape[1]
        # A function whose value is L0 and whose slope in the threshold is the straight-through one.
        threshold = sae.sparsity.threshold
        window = ((pre - threshold).abs() < options.bandwidth / 2).detach()
        ste = (threshold.detach() - threshold) / options.bandwidth
        if options.ste_to_input:
            ste = ste + (pre - pre.detach()) / options.bandwidth
        l0 = ((acts.detach() != 0).sum(-1) + (window * ste).sum(-1)).mean()
        if options.penalty == "step":
            return loss + sae.sparsity.controller.coefficient() * l0 / x.shape[1]
        if options.penalty == "quadratic":
            return loss + options.l0_coefficient * 2 / l0_target * (l0 - l0_target) ** 2
        return loss + options.l0_coefficient * (l0 / l0_target - 1) ** 2
    return loss


def gradients(sae):
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


def assert_equal_gradients(sae, expected):
    """Within 1e-4 of the largest element of each gradient."""
    for name, found in gradients(sae).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            found, expected[name], rtol=1e-4, atol=1e-4 * scale + 1e-9, msg=lambda t, n=name: n + t
        )


@pytest.mark.parametrize(("architecture", "options"), VARIANTS)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dense", [False, True])
def test_equals_plain_autograd(architecture, options, kernels, dense, monkeypatch):
    sae, x = make(architecture, options=options)
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
    assert (acts != 0).any()
    assert float(found.stats.l0) == float(loss.l0(acts))
    assert torch.equal(found.fired, (acts != 0).any(0))
    torch.testing.assert_close(found.stats.min_active, acts[acts > 0].min())
    torch.testing.assert_close(found.fvu, loss.fvu(x, sae.decode(acts)).detach())


@pytest.mark.parametrize("architecture", ["topk", "gated", "matryoshka_jumprelu", "hierarchical_topk"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dense", [False, True])
def test_transcoders_equal_plain_autograd(architecture, skip, kernels, dense, monkeypatch):
    sae, x = make(architecture, hook_name="a->b", d_out=9, skip=skip)
    target = torch.randn(64, 9, generator=torch.Generator().manual_seed(2))
    kernels = pick("cpu", kernels)
    if dense:
        monkeypatch.setattr(type(sae.sparsity), "select", lambda *arguments: None)
    else:
        monkeypatch.setattr(type(kernels), "max_density", lambda *arguments: 1.0)
    expected = plain(sae, x, target)
    expected.backward()
    expected_grads = gradients(sae)
    found = loss_and_gradients(sae, x, 10**6, None, target=target, kernels=kernels)
    torch.testing.assert_close(found.total, expected.detach(), rtol=1e-5, atol=0)
    assert_equal_gradients(sae, expected_grads)
    torch.testing.assert_close(
        found.fvu,
        loss.fvu(
            target,
            sae(x).recons if "topk" in architecture else sae.reconstruct(x, sae.sparsity.train_acts(sae.pre_acts(x))),
        ).detach(),
    )


@pytest.mark.parametrize("kernels", KERNELS)
def test_dead_jumprelu_latents_are_pulled_up_to_their_thresholds(kernels):
    sae, x = make("jumprelu", options={"pre_act_coefficient": 0.5})
    dead = torch.zeros(40, dtype=torch.bool)
    dead[-7:] = True
    with torch.no_grad():
        sae.b_enc[dead] -= 30  # far below
    plainly = loss_and_gradients(sae, x, 0, None, kernels=pick("cpu", kernels), auxk=AuxK(0.0))
    before = gradients(sae)
    found = loss_and_gradients(sae, x, 0, dead, kernels=pick("cpu", kernels), auxk=AuxK(0.0))
    below = (sae.sparsity.threshold[dead] - sae.pre_acts(x)[:, dead]).relu().sum(1).mean()
    torch.testing.assert_close(found.total - plainly.total, 0.5 * below.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(sae.b_enc.grad[dead], torch.full((7,), -0.5))
    torch.testing.assert_close(
        sae.sparsity.threshold.grad[dead] - before["sparsity.threshold"][dead], torch.full((7,), 0.5)
    )
    centre = (x - sae.b_dec).mean(0)
    torch.testing.assert_close(sae.W_enc.grad[:, dead], (-0.5 * centre)[:, None].expand(-1, 7), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sae.W_enc.grad[:, ~dead], before["W_enc"][:, ~dead])
    torch.testing.assert_close(sae.b_dec.grad, before["b_dec"])


@pytest.mark.parametrize("kernels", KERNELS)
def test_nothing_active_is_no_accident(kernels):
    for architecture in (name for name in ALL if name != "abs_topk"):  # which knows no inactive token
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
    monkeypatch.setattr("sae.autoencoder.revive.AUXK_DENSE_RATIO", ratio)  # 0: by sparse sums
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


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("kernels", KERNELS[1:])
@pytest.mark.parametrize("precision", [Precision.bfloat16, Precision.bfloat16_rescored])
def test_lower_precision_stays_close(architecture, kernels, precision, monkeypatch):
    """The loss hardly moves, and gradients keep their direction; rescored, it is that of fp32."""
    monkeypatch.setattr(type(pick("cpu", kernels)), "max_density", lambda *arguments: 1.0)  # no dense fallback
    sae, x = make(architecture, d_in=64, d_sae=512, l0=16.0 if architecture == "groupmax" else 12.0)
    if "jumprelu" in architecture:
        with torch.no_grad():
            # Or L0 would be its very target, where the penalty's gradient is nothing but what rounding makes of it.
            sae.sparsity.threshold *= 0.97
    expected = loss_and_gradients(sae, x, 0, None, kernels=pick("cpu", "reference"))
    grads = gradients(sae)
    found = loss_and_gradients(sae, x, 0, None, kernels=pick("cpu", kernels), precision=precision)
    tolerance = 1e-2 if precision is Precision.bfloat16 else 1e-5
    torch.testing.assert_close(found.total, expected.total, rtol=tolerance, atol=0)
    for name, gradient in gradients(sae).items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), grads[name].flatten(), dim=0)
        # Of absolute values twice as many lie near the edge of the selection, where rounding decides; and a threshold's
        # gradient is made of the few entries near it.
        edgy = architecture == "abs_topk" or name == "sparsity.threshold"
        assert cosine > (0.97 if edgy else 0.99), (name, cosine)


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
    """Pitfall: a step below half of bf16's spacing leaves a bf16 threshold where it is, however many are taken."""
    sae, _ = make("jumprelu")
    sae = sae.bfloat16()
    before = sae.sparsity.threshold.detach().clone()
    assert before.dtype == torch.float32
    with torch.no_grad():
        for _ in range(100):
            sae.sparsity.threshold += 1e-5
    torch.testing.assert_close(sae.sparsity.threshold - before, torch.full_like(before, 1e-3), rtol=0.05, atol=0)


def test_batch_topk_threshold_forgets_its_start_and_averages():
    sparsity = ARCHITECTURES["batch_topk"](8, 2.0)
    zero = torch.tensor(2.0)
    sparsity.update(BatchStats(zero, torch.tensor(torch.inf), 0))
    assert float(sparsity.threshold) == 0
    sparsity.update(BatchStats(zero, torch.tensor(9.0), 1))
    assert float(sparsity.threshold) == 9.0
    for step in range(200):
        sparsity.update(BatchStats(zero, torch.tensor(1.0 + step % 2), step))
    assert float(sparsity.threshold) == pytest.approx(1.5, abs=0.05)
