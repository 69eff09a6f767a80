"""The SAE class: shapes, semantics, folding, and files that are refused in one sentence."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import files
from sae.autoencoder.sae import SAE, SAEConfig
from sae.autoencoder.sparsity import ARCHITECTURES, Sparsity, register
from sae.errors import UserError

BUILT_IN = [
    "relu",
    "gated",
    "topk",
    "abs_topk",
    "batch_topk",
    "hierarchical_topk",
    "groupmax",
    "jumprelu",
    "matryoshka_batch_topk",
    "matryoshka_jumprelu",
]


def make(architecture="topk", d_in=6, d_sae=12, l0=3.0, seed=0, noise=0.3):
    sae = SAE(SAEConfig(architecture, d_in, d_sae, l0, seed, "blocks.0.hook_resid_post", "toy"))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.b_enc += noise * torch.randn(d_sae, generator=generator)
        sae.b_dec += noise * torch.randn(d_in, generator=generator)
        if hasattr(sae.sparsity, "threshold"):
            sae.sparsity.threshold += 0.2
        if architecture == "gated":
            sae.sparsity.log_gain += noise * torch.randn(d_sae, generator=generator)
            sae.sparsity.shift += noise * torch.randn(d_sae, generator=generator)
    return sae


@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(BUILT_IN),
    leading=st.lists(st.integers(0, 4), max_size=3),
    d_in=st.integers(1, 7),
    d_sae=st.sampled_from([3, 6, 9]),  # 3 equal groups fit into them
)
def test_any_leading_shape(architecture, leading, d_in, d_sae):
    sae = make(architecture, d_in, d_sae, 3.0)
    x = torch.randn(*leading, d_in)
    out = sae(x)
    assert out.recons.shape == x.shape
    assert out.latent_acts.shape == (*leading, d_sae)
    assert torch.equal(sae.error(x), x - out.recons)
    assert torch.equal(sae.decode(sae.encode(x)), out.recons)
    flat = sae.encode(x.reshape(-1, d_in)) if x.numel() else x.new_zeros(0, d_sae)
    torch.testing.assert_close(flat, out.latent_acts.reshape(-1, d_sae))


def test_pre_acts_are_what_the_docstring_says():
    sae, x = make(), torch.randn(5, 6)
    torch.testing.assert_close(sae.pre_acts(x), x @ sae.W_enc - sae.b_dec @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(12))


def test_same_seed_same_weights():
    assert torch.equal(make(seed=3).W_enc, make(seed=3).W_enc)
    assert not torch.equal(make(seed=3).W_enc, make(seed=4).W_enc)


@pytest.mark.parametrize("architecture", BUILT_IN)
@pytest.mark.parametrize("scale", [0.01, 37.0])
def test_folding_the_input_scale_changes_nothing_but_units(architecture, scale):
    """Pitfall: a threshold that keeps its value while biases and inputs change their unit lets other latents fire."""
    sae, x = make(architecture).double(), 10 * torch.randn(64, 6).double() / scale
    scaled = sae(x * scale)
    sae.fold_scales([scale], [scale])
    folded = sae(x)
    # What architectures keep for themselves is fp32 always.
    torch.testing.assert_close(folded.latent_acts, scaled.latent_acts / scale, rtol=1e-5, atol=1e-5 / scale)
    torch.testing.assert_close(folded.recons, scaled.recons / scale, rtol=1e-5, atol=1e-5 / scale)
    assert scaled.latent_acts.count_nonzero() == folded.latent_acts.count_nonzero() > 0
    torch.testing.assert_close(sae.W_dec.norm(dim=1).float(), torch.ones(12))


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_saved_and_loaded_is_the_same(architecture, tmp_path):
    sae, x = make(architecture), torch.randn(9, 6)
    sae.config = dataclasses.replace(sae.config, metadata={"training": {"lr": 0.1}})
    sae.save(tmp_path / "a")
    again = SAE.load(tmp_path / "a")
    assert again.config == sae.config
    assert torch.equal(again(x).recons, sae(x).recons)
    half = SAE.load(tmp_path / "a", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half(x).recons.dtype == torch.bfloat16
    if hasattr(sae.sparsity, "threshold"):
        assert half.sparsity.threshold.dtype == torch.float32
        assert torch.equal(half.sparsity.threshold, sae.sparsity.threshold)
        assert half.float().sparsity.threshold.dtype == torch.float32


def test_jumprelu_and_batch_topk_are_strict_at_the_threshold():
    threshold = 0.2
    pre = torch.tensor([[threshold - 1e-3, threshold, threshold + 1e-3, -1.0]])
    for architecture in ("jumprelu", "batch_topk"):
        sparsity = ARCHITECTURES[architecture](4, 1.0)
        with torch.no_grad():
            sparsity.threshold += threshold
        assert (sparsity.infer_acts(pre) != 0).tolist() == [[False, False, True, False]]


def test_topk_keeps_k_and_batch_topk_keeps_k_on_average():
    pre = torch.rand(50, 20) + 0.1
    assert (ARCHITECTURES["topk"](20, 3.0).train_acts(pre) != 0).sum(1).tolist() == [3] * 50
    batch = ARCHITECTURES["batch_topk"](20, 2.5)
    for guess in (0.0, 0.9, 5.0):  # the running threshold is only a hint to the selection
        batch.threshold.fill_(guess)
        kept = batch.train_acts(pre)
        assert (kept != 0).sum() == 125
        assert kept[kept != 0].min() >= pre[kept == 0].max()
    few = torch.full((4, 20), -1.0)
    few[0, 0] = 1.0
    assert (batch.train_acts(few) != 0).sum() == 1


def test_wrong_width_names_both():
    with pytest.raises(UserError, match=r"d_in = 6.*7 wide"):
        make()(torch.randn(2, 7))


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topkk"}, "unknown architecture 'topkk': did you mean topk"),
        ({"d_sea": 3}, "unknown key .*'d_sea': did you mean d_sae"),
        ({"d_sae": None}, "has no 'd_sae'"),
        ({"d_sae": 13}, "shape"),
        ({"d_in": "6"}, "d_in must be a whole number"),
        ({"l0": 99}, "l0 99"),
        ({"format_version": 7}, "format_version 7"),
    ],
)
def test_bad_configs_are_refused(changes, message, tmp_path):
    make().save(tmp_path / "a")
    edit_config(tmp_path / "a", **changes)
    with pytest.raises(UserError, match=message) as caught:
        SAE.load(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_bad_weights_are_refused(tmp_path):
    folder = tmp_path / "a"
    make("jumprelu").save(folder)
    weights = folder / "weights.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="truncated"):
        SAE.load(folder)
    tensors = make("jumprelu").state_dict()
    for name, change, message in [
        ("b_enc", lambda t: t * torch.nan, "not finite"),
        ("sparsity.threshold", lambda t: t[:3], "shape"),
    ]:
        files.write_tensors(weights, {**tensors, name: change(tensors[name])})
        with pytest.raises(UserError, match=message):
            SAE.load(folder)
    files.write_tensors(weights, {**tensors, "extra": torch.zeros(1)})
    with pytest.raises(UserError, match="unknown tensor"):
        SAE.load(folder)
    del tensors["b_enc"]
    files.write_tensors(weights, tensors)
    with pytest.raises(UserError, match="'b_enc' is missing"):
        SAE.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="no file"):
        SAE.load(folder)
    with pytest.raises(UserError, match="no file"):
        SAE.load(tmp_path / "nowhere")


def test_spoilt_weights_are_not_saved(tmp_path):
    sae = make()
    with torch.no_grad():
        sae.b_enc[0] = torch.inf
    with pytest.raises(UserError, match=r"b_enc .*not finite"):
        sae.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_own_architecture_in_one_small_class(tmp_path):
    try:

        @register
        class Absolute(Sparsity):
            """|z| where it exceeds 1."""

            name = "absolute"

            def activate(self, pre_acts, cols):
                return pre_acts.abs() * (pre_acts.abs() > 1)

        sae, x = make("absolute"), 3 * torch.randn(8, 6)
        sae.save(tmp_path / "a")
        assert torch.equal(SAE.load(tmp_path / "a")(x).recons, sae(x).recons)
        assert (sae.encode(x) >= 0).all()
    finally:
        ARCHITECTURES.pop("absolute", None)
    with pytest.raises(UserError, match="unknown architecture"):
        SAE.load(tmp_path / "a")
