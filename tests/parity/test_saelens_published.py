"""SAELens reads published releases from the same files. Its readers download: a stand-in hands them local ones."""

import math

import published
import pytest
import torch
from peers import ask_peer
from published import D_IN, D_SAE, layers_of, weights
from safetensors.torch import load_file, save_file

from sae.formats.registry import load

WORKER = """
import json, sys
from pathlib import Path
import torch
from huggingface_hub.utils import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
import sae_lens.loading.pretrained_sae_loaders as loaders
from sae_lens import SAE

root, x, cases, out = map(Path, sys.argv[1:])
x, cases = load_file(x)["x"], json.loads(cases.read_text())


def local(repo_id, filename, subfolder=None, **_):
    path = root / repo_id / (subfolder or "") / filename
    if not path.is_file():
        raise EntryNotFoundError(str(path))
    return str(path)


def shapes(repo_id, filename):
    with safe_open(root / repo_id / filename, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
tensors, said = {}, {}
for name, (loader, repo, folder, overrides, scale) in cases.items():
    cfg, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](repo, folder, "cpu", False, overrides)
    cfg = loaders.handle_config_defaulting(cfg)
    sae = SAE.from_dict(cfg)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if scale:
        sae.fold_activation_norm_scaling_factor(scale)
    given = x[:, None] if sae.cfg.reshape_activations == "hook_z" else x  # there, [token head d_head]
    with torch.no_grad():
        tensors[name + ".acts"], tensors[name + ".recons"] = sae.encode(given), sae(given).reshape(x.shape)
    said[name] = sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name_out
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
print(json.dumps(said))
"""
SIZES = {"d_in": D_IN, "d_sae": 1024, "dtype": "float32"}
S_LLAMA, S_R1 = math.sqrt(D_IN) / 6, math.sqrt(D_IN) / 8


def one_hot_decoder(w):
    """Rows of norm 1 that bf16 holds exactly."""
    rows = torch.zeros(len(w.b_enc), D_IN)
    rows[torch.arange(len(rows)), torch.arange(len(rows)) % D_IN] = 1
    return w._replace(W_dec=rows)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Ours and theirs by case: an SAE, their activations and reconstructions, where they say it belongs."""
    root = tmp_path_factory.mktemp("published")
    wide, w = weights(d_sae=1024), weights()
    unit = one_hot_decoder(w)
    cases, paths = {}, {}

    def case(name, loader, repo, folder, path, overrides=None, scale=None, **given):
        cases[name], paths[name] = (loader, repo, folder, overrides, scale), (path, given)

    for site in ("res", "mlp", "att", "transcoders"):
        repo, folder = f"google/gemma-scope-2b-pt-{site}", "layer_12/width_1k/average_l0_82"
        loader = "gemma_2_transcoder" if site == "transcoders" else "gemma_2"
        sizes = SIZES | ({"d_out": D_IN} if site == "transcoders" else {})
        case(site, loader, repo, folder, published.gemma_scope(root, wide, f"{repo}/{folder}"), sizes)
    repo, folder = "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"
    path = published.gemma_scope(root, weights(d_sae=4096), f"{repo}/{folder}")
    case("embedding", "gemma_2", repo, folder, path, SIZES | {"d_sae": 4096})
    repo = "google/gemma-scope-2-4b-pt"
    for kind, skip in (
        ("resid_post", False),
        ("attn_out", False),
        ("mlp_out", False),
        ("transcoder", False),
        ("transcoder", True),
    ):
        folder = f"{kind}/layer_17_width_16k_l0_big{'_affine' if skip else ''}"
        hooks = (
            "model.layers.17.pre_feedforward_layernorm.output",
            "model.layers.17.post_feedforward_layernorm.output",
        )
        hooks = hooks if kind == "transcoder" else ("model.layers.17.output",) * 2
        # Without config.json both tell by the folder's name.
        path = published.gemma_scope_2(root, w, f"{repo}/{folder}", *hooks, kind, skip, config=kind == "transcoder")
        case(f"{kind}{'_affine' if skip else ''}", "gemma_3", repo, folder, path)
    repo, folder = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"
    path = published.llama_scope(root, unit, f"{repo}/{folder}", norms=(6.0, 6.0))
    case("llama", "llama_scope", repo, folder, path, {"dtype": "float32"}, S_LLAMA)
    path = published.llama_scope(root, w, f"{repo}/other/{folder}", norms=(6.0, 6.0))
    case("llama_norms", "llama_scope", repo, f"other/{folder}", path, {"dtype": "float32"}, S_LLAMA)
    repo, folder = "fnlp/Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L15R"
    path = published.llama_scope_r1(root, unit, f"{repo}/{folder}", norm=8.0)
    case("r1", "llama_scope_r1_distill", repo, folder, path, None, S_R1)
    repo = "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_5"
    case("qwen", "qwen_scope", repo, "layer5.sae.pt", published.qwen_scope(root, wide, repo), SIZES)
    sizes = SIZES | {"d_sae": D_SAE}
    repo, file = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"
    case("goodfire", "goodfire", repo, file, published.linear_relu(root / repo, w, file), sizes)
    repo = "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19"
    file = "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    path = published.linear_relu(root / repo, w, file, ("encoder", "decoder"))
    case("deepseek", "deepseek_r1", repo, file, path, sizes)
    repo, file = "mwhanna/qwen3-4b-transcoders", "layer_18.safetensors"
    case("mwhanna", "mwhanna_transcoder", repo, file, published.mwhanna(root, w, repo))
    layers, W_dec = layers_of(2, causal=True)
    repo = "mntss/clt-gemma-2-2b-2.5M"
    case("clt", "mntss_clt_layer_transcoder", repo, 0, published.clt(root, layers, W_dec, repo), layer=0)
    x = 3 * torch.randn(300, D_IN, generator=torch.Generator().manual_seed(3))
    save_file({"x": x}, root / "x.safetensors")
    published.write_json(root / "cases.json", cases)
    said = ask_peer(WORKER, root, root, root / "x.safetensors", root / "cases.json", root / "out.safetensors")
    theirs = load_file(root / "out.safetensors")
    return x, {
        name: (load(path, **given), theirs[f"{name}.acts"], theirs[f"{name}.recons"], said[name])
        for name, (path, given) in paths.items()
    }


def near(ours, theirs):
    return bool((ours.detach() - theirs).abs().max() < 1e-5 * theirs.abs().max())


SAME = [
    "res", "mlp", "att", "transcoders", "resid_post", "attn_out", "mlp_out", "transcoder", "transcoder_affine", "qwen",
    "goodfire", "deepseek", "mwhanna",
]  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_latents_and_reconstructions(both, name):
    x, found = both
    sae, acts, recons, _ = found[name]
    ours = sae(x)
    assert 0.004 < (acts != 0).float().mean() < 0.9
    assert near(ours.latent_acts, acts)
    assert near(ours.recons, recons)


@pytest.mark.parametrize(("name", "scale"), [("llama", S_LLAMA), ("r1", S_R1)])
def test_llama_scope_is_the_same_in_other_units(both, name, scale):
    """Their latents stay in normalised units; ours are in those of activations, with decoder rows of norm 1."""
    x, found = both
    sae, acts, recons, _ = found[name]
    ours = sae(x)
    assert 0.02 < (acts != 0).float().mean() < 0.9
    assert near(ours.latent_acts * scale, acts)
    assert near(ours.recons, recons)


def test_they_leave_decoder_norms_out_of_llama_scopes_threshold(both):
    """The config says sparsity_include_decoder_norm, so what is compared is the activation times its row's norm."""
    x, found = both
    sae, acts, _, _ = found["llama_norms"]
    w = weights().rounded()
    pre, raw = S_LLAMA * x @ w.W_enc + w.b_enc, 0.52734375 * S_LLAMA
    assert torch.equal(acts != 0, pre > raw)
    assert torch.equal(sae.encode(x) != 0, pre * w.W_dec.norm(dim=1) > raw)
    assert not torch.equal(acts != 0, sae.encode(x) != 0)


def test_they_leave_b_dec_of_embedding_saes_unscaled(both):
    """Recons are sqrt(d_in) times those of the SAE that was trained, its bias included."""
    x, found = both
    sae, acts, recons, _ = found["embedding"]
    ours = sae(x)
    assert near(ours.latent_acts, acts)
    b_dec = weights(d_sae=4096).b_dec
    assert near(ours.recons, recons + b_dec * (math.sqrt(D_IN) - 1))


def test_they_leave_out_the_thresholds_of_cross_layer_transcoders(both):
    """And add up what is written to all layers, as if to one."""
    x, found = both
    sae, acts, recons, _ = found["clt"]
    (w, _), W_dec = layers_of(2, causal=True)
    w, W_dec = w.rounded(), W_dec[0].bfloat16().float()
    pre = x @ w.W_enc + w.b_enc
    assert near(torch.relu(pre), acts)
    assert near(torch.relu(pre) @ W_dec.sum(1) + w.b_dec, recons)
    assert near(sae.encode(x), pre * (pre > w.threshold))
    assert near(sae(x).recons, pre * (pre > w.threshold) @ W_dec[:, 0] + w.b_dec)


def test_where_they_say_saes_belong(both):
    _, found = both
    for name, (sae, _, _, (hook_in, model, hook_out)) in found.items():
        # Gemma Scope 2's read what the norm before the MLP gives, gain and all, which hook_mlp_in comes before.
        hook_in = hook_in.replace("hook_mlp_in", "mlp.hook_in")
        theirs = hook_in if hook_out is None else f"{hook_in}->{hook_out}"
        assert sae.config.hook_name.replace("mlp.hook_out", "hook_mlp_out") == theirs, name
        if name == "r1":  # their config names the model before distillation
            assert (model, sae.config.lm_name) == (
                "meta-llama/Llama-3.1-8B",
                "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            )
        else:
            assert sae.config.lm_name.removeprefix("google/") == model.removeprefix("google/"), name
