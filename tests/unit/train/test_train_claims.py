"""Claims of the training step that only show in corners: ties, thin batches, dead latents, clipping, plans."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from train_toys import HOOK, ToyStream, unit_rows

from sae.autoencoder.gradients import loss_and_gradients
from sae.autoencoder.revive import AuxK
from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.kernels import build, pick
from sae.kernels.moments import KINDS
from sae.kernels.operands import Precision, Projection
from sae.train.grid import SAESpec
from sae.train.initialise import sample_rows
from sae.train.optim import Optimiser
from sae.train.plan import plan
from sae.train.run import SAERun
from sae.train.settings import TrainSettings
from sae.train.trainer import train

FAST = ["torch", *(["cpp"] if build.library().handle is not None else [])]
SETTINGS = TrainSettings(total_tokens=640, batch_tokens=64)


def make(architecture="topk", d_in=12, d_sae=40, l0=5.0, seed=0):
    return SAE(SAEConfig(architecture, d_in, d_sae, l0, seed, "h", "toy"))


def gradients(sae):
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


# The optimiser


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu"])
def test_every_matrix_of_every_sae_rounds_with_a_seed_of_its_own(architecture, monkeypatch):
    kernels, seen = pick("cpu", "torch"), []
    adam = kernels.adam
    monkeypatch.setattr(kernels, "adam", lambda *given: (seen.append(given[3].seed), adam(*given)))
    for seed in range(3):
        sae = make(architecture, seed=seed)
        optimiser = Optimiser(sae, replace(SETTINGS, moments="bfloat16"), kernels)
        for parameter in sae.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimiser.step(0)
    assert len(set(seen)) == len(seen) == 3 * len(list(sae.parameters()))


@pytest.mark.parametrize("kernels", ["reference", *FAST])
def test_a_gradient_shorter_than_clip_is_left_as_it_is(kernels):
    sae = make("relu")
    optimiser = Optimiser(sae, replace(SETTINGS, clip=1.0), pick("cpu", kernels))
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    given = 0.01 * torch.nn.functional.normalize(torch.randn(40, generator=torch.Generator().manual_seed(0)), dim=0)
    sae.b_enc.grad = given.clone()
    assert float(optimiser.step(0)) == pytest.approx(0.01, rel=1e-4)
    first = optimiser.state_tensors()["b_enc.exp_avg"].flatten()
    torch.testing.assert_close(first, 0.1 * given, rtol=1e-4, atol=1e-9)


# What makes a run the same run


class Stop(Exception):
    pass


def toy_stream():
    return ToyStream({HOOK: unit_rows(20, 16)}, 64)


def begin(folder, settings):
    def progress(step, n_steps):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        train(toy_stream(), [SAESpec(HOOK, "topk", 24, 4, 0)], settings, folder, lm_name="toy", progress=progress)


@pytest.mark.parametrize("moments", [kind for kind in KINDS if kind != "float32"])
def test_a_run_does_not_go_on_with_other_moments(moments, tmp_path):
    settings = replace(SETTINGS, checkpoint_every=2, checkpoint_seconds=0.0)
    begin(tmp_path, settings)
    with pytest.raises(UserError, match="unfinished run with other settings"):
        train(
            toy_stream(),
            [SAESpec(HOOK, "topk", 24, 4, 0)],
            replace(settings, moments=moments),
            tmp_path,
            lm_name="toy",
        )


def test_every_setting_that_can_change_a_weight_is_part_of_a_runs_identity():
    fields = {field.name for field in dataclasses.fields(TrainSettings)}
    # Of start, the hash of the weights is (see test_train_start.py), and not the path.
    assert fields - set(SETTINGS.identity()) == {
        "checkpoint_every", "checkpoint_seconds", "log_every", "kernels", "start",
    }  # fmt: skip


# Dead latents


@pytest.mark.parametrize("kernels", ["reference", *FAST])
@pytest.mark.parametrize("after", [128, 150])
def test_latents_are_revived_as_soon_as_they_have_been_silent_for_dead_after_tokens(kernels, after):
    settings = replace(SETTINGS, dead_after_tokens=after)
    spec = SAESpec("h", "topk", 40, 4, 0)
    run = SAERun(
        spec, {spec.hook_name: 12}, settings, "toy", "", torch.device("cpu"), pick("cpu", kernels), Precision.float32
    )
    with torch.no_grad():
        run.sae.b_enc[-8:] = -1e3
    generator, auxk = torch.Generator().manual_seed(0), []
    for step in range(6):
        inputs = run.inputs({spec.hook_name: torch.randn(64, 12, generator=generator)})
        auxk.append(float(run.train_step(inputs, step).loss.auxk))
    silent_before = [64 * step for step in range(6)]
    assert [value > 0 for value in auxk] == [tokens >= after for tokens in silent_before]


def crowded():
    """Most latents are dead, and their pre-activations lie closer together than 0.05."""
    sae = make(d_in=12, d_sae=48, l0=2.0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 12, generator=generator)
    dead = torch.zeros(48, dtype=torch.bool)
    dead[-40:] = True
    with torch.no_grad():
        sae.W_enc[:, dead] *= 1e-3
        sae.b_enc[dead] = 0.3 + 0.005 * torch.arange(40)
        sae.b_enc[~dead] = 5.0
    return sae, x, dead


@pytest.mark.parametrize("kernels", FAST)
@pytest.mark.parametrize("ratio", [0, 10**6])
@pytest.mark.parametrize(("k_aux", "d_in_half"), [(1, False), (2, False), (5, False), (None, True)])
def test_exactly_k_dead_latents_per_token_take_part_in_auxk(kernels, ratio, k_aux, d_in_half, monkeypatch):
    """By sparse sums (ratio 0) and by matmuls, also where the pre-activations of the next ones are almost equal."""
    monkeypatch.setattr("sae.autoencoder.revive.AUXK_DENSE_RATIO", ratio)
    sae, x, dead = crowded()
    auxk = AuxK(1.0, k_aux)
    expected = loss_and_gradients(sae, x, 0, dead, kernels=pick("cpu", "reference"), auxk=auxk)
    expected_grads = gradients(sae)
    found = loss_and_gradients(sae, x, 0, dead, kernels=pick("cpu", kernels), auxk=auxk)
    torch.testing.assert_close(found.auxk, expected.auxk, rtol=1e-5, atol=0)
    for name, gradient in gradients(sae).items():
        truth = expected_grads[name]
        atol = 1e-4 * float(truth.abs().max()) + 1e-9
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=atol, msg=lambda text, name=name: name + text)
    moved = sae.b_enc.grad[dead] != 0  # biases decide, so the k latents with the largest take part for every token
    k = 6 if d_in_half else k_aux
    assert int(moved.sum()) <= k + 4
    if k_aux == 1:
        assert int(moved.sum()) < 4


@pytest.mark.parametrize("kernels", ["reference", *FAST])
@pytest.mark.parametrize("ratio", [0, 10**6])
@pytest.mark.parametrize("batch", [1, 2])
def test_auxk_of_a_residual_without_variance_is_zero(kernels, ratio, batch, monkeypatch):
    """One token, or the same one twice: there is no variance to divide by."""
    monkeypatch.setattr("sae.autoencoder.revive.AUXK_DENSE_RATIO", ratio)
    sae, x, dead = crowded()
    x = x[:1].repeat(batch, 1)
    plain = loss_and_gradients(sae, x, 0, None, kernels=pick("cpu", kernels))
    plain_grads = gradients(sae)
    found = loss_and_gradients(sae, x, 0, dead, kernels=pick("cpu", kernels), auxk=AuxK(1.0, 3))
    assert float(found.auxk) == 0
    torch.testing.assert_close(found.total, plain.total)
    for name, gradient in gradients(sae).items():
        torch.testing.assert_close(gradient, plain_grads[name], msg=lambda text, name=name: name + text)


# BatchTopK


def chosen(kernels, sae, projection):
    found = sae.sparsity.select(pick("cpu", kernels), projection)
    places = found.rows * projection.w_enc.shape[1] + found.cols
    assert len(places.unique()) == len(places), "an entry was listed twice"
    return found, places.sort().values


@pytest.mark.parametrize("kernels", FAST)
@pytest.mark.parametrize("share", [0.0, 0.55, 0.75, 0.99])
@pytest.mark.parametrize("part", [0.9, 0.5])
def test_batch_topk_keeps_its_number_however_wrong_its_threshold(kernels, share, part):
    """The average threshold is so high that only a share of the wanted entries lie above `part` of it."""
    sae, n_keep = make("batch_topk"), 5 * 32
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(2))
    pre_acts = sae.pre_acts(x).detach()
    wanted = pre_acts.flatten().topk(n_keep)
    assert float(wanted.values.min()) > 0
    place = int(share * n_keep)
    sae.sparsity.threshold.fill_(float(wanted.values[place]) / part if place else 1e6)
    found, places = chosen(kernels, sae, Projection(x - sae.b_dec.detach(), sae.W_enc.detach(), sae.b_enc.detach()))
    assert torch.equal(places, wanted.indices.sort().values)
    torch.testing.assert_close(found.values.sort().values, wanted.values.sort().values)


@pytest.mark.parametrize("kernels", FAST)
@pytest.mark.parametrize("l0", [1.25, 3.0, 5.5, 7.0])
@pytest.mark.parametrize("whole", [True, False])
def test_batch_topk_keeps_exactly_its_number_among_ties_of_a_bfloat16_product(kernels, l0, whole):
    generator = torch.Generator().manual_seed(0)
    x, w_enc = torch.randn(64, 8, generator=generator), torch.randn(256, 8, generator=generator)
    if whole:  # a handful of different products
        x, w_enc = x.sign(), w_enc.sign()
    projection = Projection(x, w_enc.t(), torch.zeros(256), Precision.bfloat16)
    products = (x.bfloat16() @ w_enc.t().bfloat16()).float()
    ordered = products.flatten().sort(descending=True).values
    # The first cut from l0 on that is in the middle of ties.
    n_keep = next(n for n in range(round(l0 * 64), len(ordered)) if ordered[n] == ordered[n - 1])
    smallest = ordered[n_keep - 1]
    assert float(smallest) > 0
    sae = make("batch_topk", 8, 256, n_keep / 64)
    sae.sparsity.threshold.fill_(float(smallest))
    found, places = chosen(kernels, sae, projection)
    assert len(places) == n_keep
    torch.testing.assert_close(found.values.sort(descending=True).values, ordered[:n_keep])
    assert torch.equal(found.rows, found.rows.sort().values)


# Plans


def planned(*specs, d_in=64, batch_tokens=1024, precision=Precision.float32):
    settings = TrainSettings(total_tokens=10**7, batch_tokens=batch_tokens)
    return plan(list(specs), {"h": d_in}, settings, "torch", precision)


def test_the_hungriest_sae_decides_what_a_step_takes_wherever_it_stands():
    small, large = SAESpec("h", "topk", 256, 8, 0), SAESpec("h", "topk", 2**14, 8, 0)
    alone = planned(large)
    for specs in ((small, large), (large, small)):
        found = planned(*specs)
        assert (found.gradients, found.workspace) == (alone.gradients, alone.workspace)
        assert found.weights == planned(small).weights + alone.weights


@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu"])
def test_setting_thresholds_is_planned_for(architecture):
    """At least the pre-activations and a copy; topk has no threshold to set."""
    d_sae = 2**14
    topk, found = (planned(SAESpec("h", name, d_sae, 8, 0), d_in=16, batch_tokens=8) for name in ("topk", architecture))
    needed = 2 * 4 * sample_rows(d_sae) * d_sae
    assert found.gradients + found.workspace >= needed
    assert found.memory - topk.memory >= needed // 2


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu"])
def test_selected_entries_are_planned_for(architecture):
    """Each takes at least its latent, token, value, activation and two gradients."""
    few, many = (planned(SAESpec("h", architecture, 2**16, l0, 0), batch_tokens=4096) for l0 in (8, 1024))
    assert many.workspace - few.workspace >= (8 + 8 + 4 * 4) * (1024 - 8) * 4096
    assert many.memory - few.memory == many.workspace - few.workspace
