"""Grid, settings, schedule, optimiser and data-dependent initialisation."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from train_toys import HOOK, ToyStream, orthogonal, unit_rows

from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.kernels import pick
from sae.train.grid import SAESpec, grid
from sae.train.initialise import geometric_median, initialise, input_stats
from sae.train.optim import Optimiser, default_lr, lr_factor
from sae.train.settings import TrainSettings
from sae.train.trainer import train


def test_grid_order_and_folders():
    specs = grid(["blocks.1.a", "blocks.2.b"], [64, 128], ["topk", "relu"], [8, 16], [0, 1])
    assert len(specs) == 32
    assert specs[0] == SAESpec("blocks.1.a", "topk", 64, 8, 0)
    assert specs[0].folder == "blocks.1.a/topk-64-l0_8-s0"
    assert SAESpec("h", "relu", 64, 2.5, 3).folder == "h/relu-64-l0_2.5-s3"
    assert len({spec.folder for spec in specs}) == 32
    assert repr(SAESpec("h", "topk", 8, 2, 0)) == repr(SAESpec("h", "topk", 8, 2.0, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l0": [65]}, "l0 65 is not between 0 and d_sae = 64"),
        ({"l0": [0]}, "not above 0"),
        ({"l0": [float("nan")]}, "not above 0"),
        ({"l0": [2.5]}, "whole number"),
        ({"d_sae": [0]}, "d_sae = 0"),
        ({"seeds": []}, "no seeds"),
        ({"hook_names": []}, "no hook_names"),
        ({"seeds": [1, 1]}, "2 times"),
        ({"architectures": ["topkk"]}, "did you mean topk"),
        ({"hook_names": ["../x"]}, "cannot name a folder"),
    ],
)
def test_bad_grids(changes, message):
    good = {"hook_names": ["h"], "d_sae": [64], "architectures": ["topk"], "l0": [4], "seeds": [0]}
    with pytest.raises(UserError, match=message):
        grid(**(good | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_tokens": 0},
        {"total_tokens": 9},
        {"lr": -1.0},
        {"lr_decay_fraction": 1.5},
        {"encoder_dtype": "float16"},
        {"centre": "median"},
        {"auxk_alpha": float("nan")},
        {"adam_betas": (0.9, 1.0)},
        {"init_batches": 0},
    ],
)
def test_bad_settings(changes):
    with pytest.raises(UserError):
        TrainSettings(**({"total_tokens": 100, "batch_tokens": 10} | changes))


@given(
    n_steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    decay=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_schedule(n_steps, warmup, decay):
    factors = [lr_factor(step, n_steps, warmup, decay) for step in range(n_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    tail = factors[-int(decay * n_steps) :] if int(decay * n_steps) else []
    if warmup == 0 and tail:
        assert tail == sorted(tail, reverse=True)
        assert tail[-1] == pytest.approx(1 / len(tail))


def test_default_lr():
    """It meets the published law where that was made for, and grows as runs get shorter and SAEs smaller."""
    assert default_lr(2304, 2**14, 244_000) == pytest.approx(2.2e-4, rel=0.05)
    assert default_lr(128, 1024, 2_000) == pytest.approx(6.3e-3, rel=0.05)
    assert default_lr(128, 1024, 16 * 2_000) == pytest.approx(default_lr(128, 1024, 2_000) / 2)
    assert default_lr(100, 4, 1) == pytest.approx(0.015)  # never so large that rows turn around


def test_optimiser_is_adam_on_the_sphere():
    """The fused kernel on strided weights takes the steps of textbook Adam."""
    sae = SAE(SAEConfig("jumprelu", 5, 7, 2.0, 0, "h", "toy"))
    settings = TrainSettings(
        total_tokens=1000, batch_tokens=10, lr=0.01, clip=0.0, lr_warmup_steps=0, adam_betas=(0, 0.999)
    )
    optimiser = Optimiser(sae, settings, pick("cpu"))
    mine = {name: parameter.detach().clone().contiguous().double() for name, parameter in sae.named_parameters()}
    second = {name: torch.zeros_like(value) for name, value in mine.items()}
    for step in range(5):
        for name, parameter in sae.named_parameters():
            gradient = torch.randn(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            gradient = gradient.double()
            if name == "W_dec":
                gradient = gradient - (gradient * mine[name]).sum(1, keepdim=True) * mine[name]
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            unit = 1.0 if name in ("W_enc", "W_dec") else 5**0.5
            corrected = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            mine[name] = mine[name] - 0.01 * unit * gradient / corrected
        mine["W_dec"] /= mine["W_dec"].norm(dim=1, keepdim=True)
        optimiser.step(step)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), mine[name], rtol=1e-4, atol=1e-5)
        assert parameter.grad is None


def test_clipping_bounds_the_norm_of_one_saes_gradient():
    sae = SAE(SAEConfig("relu", 5, 7, 2.0, 0, "h", "toy"))
    optimiser = Optimiser(sae, TrainSettings(total_tokens=1000, batch_tokens=10), pick("cpu"))
    for parameter in sae.parameters():
        parameter.grad = 100 * torch.randn_like(parameter)
    optimiser.step(0)
    first = [value for name, value in optimiser.state_tensors().items() if name.endswith("exp_avg")]
    assert sum(float(value.square().sum()) for value in first) ** 0.5 == pytest.approx(0.1, rel=1e-3)


def test_geometric_median_ignores_outliers():
    points = torch.randn(2000, 6) + 3
    points[:20] = 1e4
    assert (geometric_median(points) - 3).norm() < 0.3
    assert (points.mean(0) - 3).norm() > 100


@pytest.mark.parametrize("scale", [1e-3, 1.0, 500.0])
def test_initialisation_normalises_inputs(scale):
    acts = scale * (torch.randn(3000, 16) + 2)
    stats = input_stats(acts, "h")
    assert float((acts * stats.scale).square().sum(1).mean()) == pytest.approx(16, rel=1e-4)
    sae = SAE(SAEConfig("jumprelu", 16, 64, 5.0, 0, "h", "toy"))
    initialise(sae, {"h": stats})
    assert float((sae.encode(acts * stats.scale) != 0).sum(1).float().mean()) == pytest.approx(5, rel=0.01)


def test_input_problems_are_named():
    with pytest.raises(UserError, match="'h' are all zero"):
        input_stats(torch.zeros(4, 3), "h")
    with pytest.raises(UserError, match="'h' are not finite"):
        input_stats(torch.full((4, 3), torch.inf), "h")


def test_scale_and_dtype_of_activations_do_not_matter(tmp_path):
    """A power of two changes every number exactly, so the folded SAEs agree exactly."""
    settings = TrainSettings(total_tokens=64 * 20, batch_tokens=64)
    specs = grid([HOOK], [24], ["topk", "jumprelu"], [4], [0])
    found = []
    for name, scale in (("a", 1.0), ("b", 256.0)):
        stream = ToyStream({HOOK: orthogonal(8, 16)}, 64, scale=scale)
        result = train(stream, specs, settings, tmp_path / name, lm_name="toy")
        found.append([SAE.load(item.folder) for item in result.saes])
    x = torch.randn(50, 16)
    for small, large in zip(*found, strict=True):
        assert torch.equal(small(x).latent_acts * 256, large(x * 256).latent_acts)
        assert (
            small.config.metadata["training"]["input_scales"][0]
            == 256 * large.config.metadata["training"]["input_scales"][0]
        )


def test_stream_problems_are_named(tmp_path):
    settings = TrainSettings(total_tokens=640, batch_tokens=64)
    stream = ToyStream({HOOK: orthogonal(8, 16)}, 64)
    with pytest.raises(UserError, match=r"unknown hook name 'blocks\.9\.x'"):
        train(stream, [SAESpec("blocks.9.x", "topk", 8, 2, 0)], settings, tmp_path, lm_name="toy")
    specs = [SAESpec(HOOK, "topk", 8, 2, 0)]
    other = dataclasses.replace(settings, batch_tokens=32)
    with pytest.raises(UserError, match="batches of 64 tokens, but batch_tokens = 32"):
        train(stream, specs, other, tmp_path, lm_name="toy")

    class Ending(ToyStream):
        def next_batch(self):
            if self.n == 6:
                raise StopIteration
            return super().next_batch()

    with pytest.raises(UserError, match="ended at step 6"):
        train(Ending({HOOK: orthogonal(8, 16)}, 64), specs, settings, tmp_path, lm_name="toy")


def test_bfloat16_encoder_trains_as_well(tmp_path):
    fvu = {}
    for dtype in ("bfloat16", "float32"):
        settings = TrainSettings(total_tokens=64 * 30, batch_tokens=64, encoder_dtype=dtype)
        stream = ToyStream({HOOK: orthogonal(8, 16)}, 64)
        result = train(stream, [SAESpec(HOOK, "batch_topk", 24, 2, 0)], settings, tmp_path / dtype, lm_name="toy")
        assert SAE.load(result.saes[0].folder).dtype == torch.float32
        fvu[dtype] = result.saes[0].fvu
    assert fvu["bfloat16"] != fvu["float32"]
    assert fvu["bfloat16"] == pytest.approx(fvu["float32"], rel=0.02)


def test_compressed_moments_train_as_well(tmp_path):
    """The same FVU within 2%, from half and a quarter of the memory of Adam's moments."""
    reached = {}
    for moments in ("float32", "bfloat16", "float8"):
        settings = TrainSettings(total_tokens=600 * 64, batch_tokens=64, lr=3e-3, moments=moments)
        stream = ToyStream({HOOK: unit_rows(48, 32)}, 64, p=0.1)
        found = train(stream, [SAESpec(HOOK, "batch_topk", 64, 5, 1)], settings, tmp_path / moments, lm_name="toy")
        reached[moments] = found.saes[0].fvu
    assert reached["bfloat16"] == pytest.approx(reached["float32"], rel=0.02)
    assert reached["float8"] == pytest.approx(reached["float32"], rel=0.02)
