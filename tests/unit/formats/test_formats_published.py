"""Published releases do what their own formulas say, each written out here from its source."""

import math

import published
import pytest
import torch
from published import D_IN, D_SAE, layers_of, weights

from sae.formats.registry import find, load

X = 3 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(7))


def jump(pre, threshold):
    return torch.relu(pre) * (pre > threshold)


def keep_top(pre, k):
    values, places = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, places, torch.relu(values))


def agree(sae, acts, recons, x=X):
    found = sae(x)
    assert 0.004 < (acts != 0).float().mean() < 0.9, "nothing to compare where nothing fires"
    for ours, theirs in ((found.latent_acts, acts), (found.recons, recons)):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def place(sae):
    return sae.config.hook_name, sae.config.lm_name, sae.config.l0


@pytest.mark.parametrize(
    ("names", "where"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_1k/average_l0_82", ("blocks.12.hook_resid_post", "google/gemma-2-2b")),
        (
            "gemma-scope-9b-it-res/layer_31/width_1k/average_l0_82",
            ("blocks.31.hook_resid_post", "google/gemma-2-9b-it"),
        ),
        ("gemma-scope-9b-pt-mlp/layer_0/width_1k/average_l0_82", ("blocks.0.hook_mlp_out", "google/gemma-2-9b")),
        ("gemma-scope-27b-pt-att/layer_3/width_1k/average_l0_82", ("blocks.3.attn.hook_z", "google/gemma-2-27b")),
    ],
)
def test_gemma_scope(tmp_path, names, where):
    w = weights(d_sae=1024)
    w.threshold[:5] = -0.3  # relu is sharper there
    sae = load(published.gemma_scope(tmp_path, w, names))
    acts = jump(X @ w.W_enc + w.b_enc, w.threshold)
    agree(sae, acts, acts @ w.W_dec + w.b_dec)
    assert place(sae) == (*where, 82)
    assert sae.config.metadata["source"]["said"]["width"] == "width_1k"


def test_gemma_scope_fires_strictly_above_its_threshold(tmp_path):
    w = weights(d_sae=1024)._replace(
        b_enc=torch.zeros(1024), b_dec=torch.zeros(D_IN), threshold=torch.full((1024,), 0.5)
    )
    w.W_enc.zero_()[0] = 1.0
    sae = load(published.gemma_scope(tmp_path, w) / "params.npz")
    x = torch.zeros(3, D_IN)
    x[:, 0] = torch.tensor([0.5, math.nextafter(0.5, 1) + 1e-7, -1.0])
    assert sae.encode(x).count_nonzero(dim=1).tolist() == [0, 1024, 0]


def test_gemma_scope_of_the_embedding_knows_that_gemma_scales_it(tmp_path):
    """Trained on rows of the embedding matrix; the hook point has them times sqrt(d_in)."""
    w = weights(d_sae=4096)
    sae = load(published.gemma_scope(tmp_path, w, "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"))
    acts = jump(X @ w.W_enc + w.b_enc, w.threshold)
    agree(sae, acts, (acts @ w.W_dec + w.b_dec) * math.sqrt(D_IN), x=X * math.sqrt(D_IN))
    assert place(sae) == ("hook_embed", "google/gemma-2-2b", 6)


def test_gemma_scope_transcoder(tmp_path):
    w = weights(d_sae=1024)
    names = "models--google--gemma-scope-2b-pt-transcoders/snapshots/ab12/layer_4/width_1k/average_l0_8"
    sae = load(published.gemma_scope(tmp_path, w, names, scaling_factor=torch.ones(1)))
    acts = jump(X @ w.W_enc + w.b_enc, w.threshold)
    agree(sae, acts, acts @ w.W_dec + w.b_dec)
    assert sae.kind == "transcoder"
    assert sae.config.hook_name == "blocks.4.ln2.hook_normalized->blocks.4.hook_mlp_out"


HF = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}


@pytest.mark.parametrize("where", HF)
def test_gemma_scope_2(tmp_path, where):
    w, hook = weights(), f"model.layers.17.{where}"
    sae = load(published.gemma_scope_2(tmp_path, w, hook_in=hook, hook_out=hook))
    acts = jump(X @ w.W_enc + w.b_enc, w.threshold)
    agree(sae, acts, acts @ w.W_dec + w.b_dec)
    assert place(sae) == (f"blocks.17.{HF[where]}", "google/gemma-3-4b-pt", 15)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("config", [False, True])
def test_gemma_scope_2_transcoder(tmp_path, skip, config):
    w = weights()
    names = f"gemma-scope-2-4b-pt/transcoder_all/layer_9_width_16k_l0_big{'_affine' if skip else ''}"
    hooks = ("model.layers.9.pre_feedforward_layernorm.output", "model.layers.9.post_feedforward_layernorm.output")
    sae = load(published.gemma_scope_2(tmp_path, w, names, *hooks, "transcoder", skip, config))
    acts = jump(X @ w.W_enc + w.b_enc, w.threshold)
    agree(sae, acts, acts @ w.W_dec + w.b_dec + (X @ w.W_skip if skip else 0))
    assert place(sae)[:2] == ("blocks.9.mlp.hook_in->blocks.9.hook_mlp_out", "google/gemma-3-4b-pt")


def test_gemma_scope_2_crosscoder(tmp_path):
    layers, W_dec = layers_of(3)
    hook = "model.layers.{5,9,12}.output"
    config = published.gemma_scope_2_config(hook, hook, "crosscoder", False, 3 * D_SAE)
    sae = load(published.gemma_scope_2_layers(tmp_path, layers, "crosscoder/layer_5_9_12", W_dec, config))
    x = torch.stack([X, X.flip(0), X.roll(3, 0)], dim=1)
    acts = torch.stack([jump(x[:, i] @ w.W_enc + w.b_enc, w.threshold) for i, w in enumerate(layers)], dim=1)
    recons = torch.einsum("bis,isod->bod", acts, W_dec) + torch.stack([w.b_dec for w in layers])
    agree(sae, acts.flatten(1), recons.flatten(1), x=x.flatten(1))
    assert sae.sources == tuple(f"blocks.{layer}.hook_resid_post" for layer in (5, 9, 12))
    assert sae.config.read_widths == [D_IN] * 3


@pytest.mark.parametrize("skip", [False, True])
def test_layers_of_a_gemma_scope_2_clt_add_up_to_it(tmp_path, skip):
    layers, W_dec = layers_of(3)
    hooks = (f"model.layers.{{all}}.{place}_feedforward_layernorm.output" for place in ("pre", "post"))
    config = published.gemma_scope_2_config(*hooks, "clt", skip, 3 * D_SAE)
    folder = published.gemma_scope_2_layers(tmp_path, layers, "clt/width_262k_l0_big", W_dec, config)
    check_sum(folder, layers, W_dec, "mlp.hook_in", skip, "params_layer_{}.safetensors")


@pytest.mark.parametrize("threshold", [False, True])
def test_layers_of_a_clt_add_up_to_it(tmp_path, threshold):
    layers, W_dec = layers_of(3, causal=True)
    folder = published.clt(tmp_path, layers, W_dec, threshold=threshold)
    full = [[None] * 3 for _ in range(3)]
    for i in range(3):
        for j in range(i, 3):
            full[i][j] = W_dec[i][:, j - i].bfloat16().float()
    rounded = [w.rounded() for w in layers]
    check_sum(folder, rounded, full, "hook_resid_mid", False, "W_enc_{}.safetensors", threshold)


def check_sum(folder, layers, W_dec, reads, skip, file, threshold=True):
    x = [X, X.flip(0), X.roll(3, 0)]
    pre = [x[i] @ w.W_enc + w.b_enc for i, w in enumerate(layers)]
    acts = [pre[i] * (pre[i] > w.threshold) if threshold else torch.relu(pre[i]) for i, w in enumerate(layers)]
    for to in range(3):
        whole, total = layers[to].b_dec + (x[to] @ layers[to].W_skip if skip else 0), 0
        for i in range(to + 1):
            whole = whole + acts[i] @ (W_dec[i][:, to] if torch.is_tensor(W_dec) else W_dec[i][to])
            hook_name = f"blocks.{i}.{reads}->blocks.{to}.hook_mlp_out"
            sae = load(folder, layer=i, hook_name=hook_name)
            torch.testing.assert_close(sae.encode(x[i]), acts[i], rtol=1e-5, atol=1e-5)
            total = total + sae(x[i]).recons
        assert (total - whole).abs().max() < 1e-5 * whole.abs().max()
        own = load(folder / file.format(to))
        assert own.config.hook_name == f"blocks.{to}.{reads}->blocks.{to}.hook_mlp_out"
        torch.testing.assert_close(own(x[to]).recons, sae(x[to]).recons)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("sides", ["same", "other"])
@pytest.mark.parametrize("kind", ["single", "trained"])
def test_llama_scope(tmp_path, include, sides, kind):
    """The library in its inference mode: fold the scales; then, for a single threshold, compare in raw units."""
    w = weights().rounded() if kind == "single" else weights()
    norm_in, norm_out = (6.0, 6.0) if sides == "same" or kind == "trained" else (6.0, 1.5)
    s_in, s_out = math.sqrt(D_IN) / norm_in, math.sqrt(D_IN) / norm_out
    more = {"sparsity_include_decoder_norm": include}
    if sides == "other" and kind == "single":
        more |= {"hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out"}
    if kind == "single":
        sae = load(published.llama_scope(tmp_path, w, norms=(norm_in, norm_out), **more))
        pre, W_dec, threshold = X @ w.W_enc + w.b_enc / s_in, w.W_dec * s_in / s_out, 0.52734375
    else:
        sae = load(published.llama_scope_r1(tmp_path, w, norm=norm_in, **more))
        pre, W_dec, threshold = s_in * X @ w.W_enc + w.b_enc, w.W_dec / s_out, w.threshold
    norms = W_dec.norm(dim=1)
    norms_then = w.W_dec.norm(dim=1) if kind == "trained" else norms
    acts = pre * ((pre * norms_then if include else pre) > threshold)
    agree(sae, acts * norms, acts @ W_dec + w.b_dec / s_out)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert sae.kind == ("transcoder" if sides == "other" and kind == "single" else "sae")
    model = "meta-llama/Llama-3.1-8B" if kind == "single" else "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert place(sae)[1:] == (model, 20)


def test_llama_scope_takes_off_b_dec_in_normalised_units(tmp_path):
    w, s = weights().rounded(), math.sqrt(D_IN) / 6
    sae = load(published.llama_scope(tmp_path, w, norms=(6.0, 6.0), apply_decoder_bias_to_pre_encoder=True))
    pre, norms = (s * X - w.b_dec) @ w.W_enc + w.b_enc, w.W_dec.norm(dim=1)
    acts = pre * (pre * norms / s > 0.52734375)
    agree(sae, acts * norms / s, (acts @ w.W_dec + w.b_dec) / s)


def test_llama_scope_whose_scales_are_folded(tmp_path):
    w = weights().rounded()
    sae = load(published.llama_scope(tmp_path, w, norm_activation="inference", dataset_average_activation_norm=None))
    pre, norms = X @ w.W_enc + w.b_enc, w.W_dec.norm(dim=1)
    acts = pre * (pre * norms > 0.52734375)
    agree(sae, acts * norms, acts @ w.W_dec + w.b_dec)


def test_llama_scope_r1_without_a_norm_takes_the_scale(tmp_path):
    with_norm = load(published.llama_scope_r1(tmp_path / "a", weights(), norm=2.0))
    without = load(published.llama_scope_r1(tmp_path / "b", weights(), norm=None), scale=math.sqrt(D_IN) / 2)
    torch.testing.assert_close(with_norm(X).recons, without(X).recons)


def test_a_dead_decoder_row_of_llama_scope_never_fires(tmp_path):
    w = weights()
    w.W_dec[3] = 0
    sae = load(published.llama_scope(tmp_path, w))
    assert (sae.encode(X)[:, 3] == 0).all()
    assert torch.isfinite(sae(X).recons).all()


@pytest.mark.parametrize("config", [False, True])
def test_qwen_scope(tmp_path, config):
    w = weights(d_sae=1024)
    path = published.qwen_scope(tmp_path, w, "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W1K-L0_5/snapshots/ab", config)
    sae = load(path)
    acts = keep_top(X @ w.W_enc + w.b_enc, 5)
    agree(sae, acts, acts @ w.W_dec + w.b_dec)
    assert (acts != 0).sum(1).min() == 5
    assert place(sae) == ("blocks.5.hook_resid_post", "Qwen/Qwen3-1.7B-Base", 5)
    assert torch.equal(load(path.parent, layer=5).W_enc, sae.W_enc)


def test_openai_topk_normalises_each_token(tmp_path):
    w = weights()
    sae = load(published.openai(tmp_path, w))
    mu = X.mean(-1, keepdim=True)
    std = (X - mu).std(-1, keepdim=True) + 1e-5
    acts = keep_top(((X - mu) / std - w.b_dec) @ w.W_enc + w.b_enc, 5)
    agree(sae, acts, (acts @ w.W_dec + w.b_dec) * std + mu)
    assert place(sae) == ("blocks.6.hook_resid_post", "gpt2", 5)


def test_openai_relu_does_not(tmp_path):
    w = weights()
    sae = load(published.openai(tmp_path, w, "mlp_post_act/autoencoders/0.pt", activation="ReLU"))
    acts = torch.relu((X - w.b_dec) @ w.W_enc + w.b_enc)
    agree(sae, acts, acts @ w.W_dec + w.b_dec)
    assert place(sae) == ("blocks.0.mlp.hook_post", "gpt2", 0)


@pytest.mark.parametrize(
    ("name", "layers", "lm_name"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", ("encoder_linear", "decoder_linear"), "meta-llama/Llama-3.1-8B-Instruct"),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", ("encoder", "decoder"), "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ],
)
def test_two_linear_layers(tmp_path, name, layers, lm_name):
    w = weights()
    path = published.linear_relu(tmp_path, w, name, layers)
    w = w.rounded()
    acts = torch.relu(X @ w.W_enc + w.b_enc)
    for sae in (load(path), load(path.parent)):
        agree(sae, acts, acts @ w.W_dec + w.b_dec)
        assert place(sae) == ("blocks.19.hook_resid_post", lm_name, 0)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
def test_transcoder_set(tmp_path, skip, threshold):
    w = weights()
    path = published.mwhanna(tmp_path, w, skip=skip, threshold=threshold, act_fn="jumprelu" if threshold else "relu")
    w = w.rounded()
    pre = X @ w.W_enc + w.b_enc
    acts = pre * (pre > w.threshold) if threshold else torch.relu(pre)
    sae = load(path)
    agree(sae, acts, acts @ w.W_dec + w.b_dec + (X @ w.W_skip if skip else 0))
    assert place(sae) == ("blocks.18.mlp.hook_in->blocks.18.mlp.hook_out", "Qwen/Qwen3-4B", 0)
    assert torch.equal(load(path.parent, layer=18).W_enc, sae.W_enc)


def test_a_transcoder_set_without_a_config_is_told_by_the_repository(tmp_path):
    path = published.mwhanna(tmp_path, weights(), "models--mwhanna--qwen3-14b-transcoders/snapshots/ab", config=False)
    assert place(load(path))[:2] == ("blocks.18.mlp.hook_in->blocks.18.hook_mlp_out", "Qwen/Qwen3-14B")


def test_every_release_is_told_by_its_files(tmp_path):
    w = weights()
    made = {
        "gemma_scope": published.gemma_scope(tmp_path / "a", weights(d_sae=1024)),
        "gemma_scope_2": published.gemma_scope_2(tmp_path / "b", w),
        "llama_scope": published.llama_scope(tmp_path / "c", w),
        "llama_scope_r1": published.llama_scope_r1(tmp_path / "d", w),
        "qwen_scope": published.qwen_scope(tmp_path / "e", w),
        "openai": published.openai(tmp_path / "f", w),
        "goodfire": published.linear_relu(tmp_path / "g", w),
        "deepseek_r1": published.linear_relu(tmp_path / "h", w, "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"),
        "mwhanna": published.mwhanna(tmp_path / "i", w),
        "clt": published.clt(tmp_path / "j", *layers_of(2, causal=True)),
    }
    for name, path in made.items():
        assert find(path).name == name
        if path.is_file() and name not in ("openai",):
            assert find(path.parent).name == name


def test_what_is_read_can_be_saved_and_opened_again(tmp_path):
    sae = load(published.gemma_scope_2(tmp_path, weights()))
    sae.save(tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours")(X).recons, sae(X).recons)
