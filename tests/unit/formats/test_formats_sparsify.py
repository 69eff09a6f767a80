"""sparsify's folders: where they were trained, what is refused, and the maths written down once more."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lms import ARCHITECTURES, save_checkpoint

import sae
from sae.autoencoder.sae import SAEConfig, make
from sae.formats import registry
from sae.formats.sparsify import FORMAT, site_of

D_IN, D_SAE, K = 6, 12, 3
CFG = {"activation": "topk", "expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": K, "d_in": D_IN}


def written(folder, run=None, tensors=None, **changes):
    """A folder as sparsify writes it; a change to None takes a field out."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    if changes.get("skip_connection"):
        shapes["W_skip"] = (D_IN, D_IN)
    held = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    held = {name: value for name, value in (held | (tensors or {})).items() if value is not None}
    save_file(held, folder / "sae.safetensors")
    cfg = {name: value for name, value in (CFG | changes).items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    if run is not None:
        (folder.parent / "config.json").write_text(json.dumps(run))
    return held


def x(n=30):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sites_are_what_goes_in_and_out_of_the_modules(kind, tmp_path):
    """By hooks on the Hugging Face modules themselves, as sparsify places them."""
    from transformers import AutoModel

    from sae.lm.load import load_lm
    from sae.lm.tokens import Role, TokenBatch

    path = save_checkpoint(tmp_path / "lm", kind)
    tokens = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    layer, attention, embedding = ("h", "attn", "wte") if kind == "gpt2" else ("layers", "self_attn", "embed_tokens")
    modules = [f"{layer}.1", f"{layer}.1.mlp", f"{layer}.1.{attention}", embedding]
    theirs, model = {}, AutoModel.from_pretrained(path).eval()
    for name in modules:

        def keep(module, inputs, outputs, name=name):
            theirs[name] = (inputs[0] if inputs else None, outputs[0] if isinstance(outputs, tuple) else outputs)

        model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        model(tokens)
    sites = {name: (site_of(name, False), site_of(name, True)) for name in modules}
    hooks = sorted({hook for pair in sites.values() for site in pair if site for hook in site.split("->")})
    mask = torch.ones_like(tokens, dtype=torch.bool)
    batch = TokenBatch(tokens, mask, torch.full_like(tokens, int(Role.TEXT)).byte())
    ours = load_lm(str(path), device="cpu").activations(batch, hooks)
    for name, (alone, across) in sites.items():
        read, given = theirs[name]
        torch.testing.assert_close(ours[alone], given, atol=1e-5, rtol=1e-5)
        if across:
            before, after = across.split("->")
            torch.testing.assert_close(ours[before], read, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours[after], given, atol=1e-5, rtol=1e-5)
    assert [bool(across) for _, across in sites.values()] == [True, True, False, False]


@pytest.mark.parametrize("module", ["layer.5", "layers.5.mlp.down_proj", "layers.x", "layers_5", "my-sae", ""])
def test_other_names_have_no_site(module):
    assert site_of(module, False) == site_of(module, True) == ""


def test_b_dec_is_taken_off_unless_it_is_a_transcoder(tmp_path):
    for name, options in {"layers.1": {}, "h.1": {"transcode": True, "skip_connection": True}}.items():
        held = written(tmp_path / name, run={"sae": {}, "model": "toy/lm"}, **options)
        one = sae.load(tmp_path / name)
        given = x() if options else x() - held["b_dec"]
        pre = (given @ held["encoder.weight"].T + held["encoder.bias"]).relu()
        best = pre.topk(K, dim=1)
        acts = torch.zeros_like(pre).scatter(1, best.indices, best.values)
        recons = acts @ held["W_dec"] + held["b_dec"] + (x() @ held["W_skip"].T if options else 0)
        found = one(x())
        torch.testing.assert_close(found.latent_acts, acts, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.recons, recons, atol=1e-5, rtol=1e-5)
        assert (one.kind, one.config.lm_name) == ("transcoder" if options else "sae", "toy/lm")


def test_signed_files_of_old_versions_keep_the_largest_in_size(tmp_path):
    held = written(tmp_path / "layers.1", signed=True, activation=None)
    one = sae.load(tmp_path / "layers.1", lm_name="toy")
    pre = (x() - held["b_dec"]) @ held["encoder.weight"].T + held["encoder.bias"]
    kept = pre.abs() >= pre.abs().topk(K, dim=1).values[:, -1:]
    torch.testing.assert_close(one(x()).latent_acts, pre * kept, atol=1e-5, rtol=1e-5)
    assert bool((one(x()).latent_acts < 0).any())


def test_groupmax_keeps_one_of_each_group(tmp_path):
    held = written(tmp_path / "layers.1", activation="groupmax", multi_topk=True)
    acts = sae.load(tmp_path / "layers.1", lm_name="toy").encode(x())
    pre = (x() - held["b_dec"]) @ held["encoder.weight"].T + held["encoder.bias"]
    best = pre.view(-1, K, D_SAE // K).amax(2)
    torch.testing.assert_close(acts.view(-1, K, D_SAE // K).sum(2), best.relu(), atol=1e-5, rtol=1e-5)
    assert int((acts != 0).view(-1, K, D_SAE // K).sum(2).max()) == 1


def test_seeds_lie_one_level_down_and_half_precision_is_read(tmp_path):
    held = written(tmp_path / "layers.7" / "seed3")
    (tmp_path / "config.json").write_text(json.dumps({"sae": {}, "model": "toy/lm"}))
    save_file({name: value.bfloat16() for name, value in held.items()}, tmp_path / "layers.7/seed3/sae.safetensors")
    one = sae.load(tmp_path / "layers.7" / "seed3")
    assert (one.config.hook_name, one.config.lm_name) == ("blocks.7.hook_resid_post", "toy/lm")
    assert torch.equal(one.W_dec.detach(), held["W_dec"].bfloat16().float())
    source = one.config.metadata["source"]
    assert (source["format"], source["said"]["k"]) == ("sparsify", K)
    one.save(tmp_path / "native")
    assert sae.load(tmp_path / "native").config == one.config


def test_what_the_caller_says_comes_first(tmp_path):
    written(tmp_path / "layers.1", run={"sae": {}, "model": "toy/lm"})
    one = sae.load(tmp_path / "layers.1", hook_name="blocks.1.hook_mlp_out", lm_name="other")
    assert (one.config.hook_name, one.config.lm_name) == ("blocks.1.hook_mlp_out", "other")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": None}, "has no 'k'"),
        ({"k": "3"}, "must be a whole number"),
        ({"d_in": 7}, "where cfg.json says"),
        ({"num_latents": 24}, "where cfg.json says"),
        ({"expansion_factor": None}, "where cfg.json says"),
        ({"skip_conection": True}, "did you mean skip_connection"),
        ({"activation": "batchtopk"}, "unknown activation"),
        ({"activation": "groupmax", "signed": True}, "no version had"),
        ({"activation": "groupmax", "k": 5}, "equal groups"),
        ({"transcode": "yes"}, "must be true or false"),
        ({"gram_lookup": True}, "gram_lookup"),
        ({"embed_skip": True}, "embed_skip"),
        ({"hook_name": "blocks.1.hook_resid_post", "transcode": True}, "'read->write'"),
        ({"skip_connection": True}, "'read->write'"),
    ],
    ids=str,
)
def test_a_cfg_that_does_not_say_what_it_is_is_refused(tmp_path, changes, says):
    written(tmp_path / "layers.1", **changes)
    with pytest.raises(sae.UserError, match=says):
        sae.load(tmp_path / "layers.1", lm_name="toy")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"W_skip": torch.zeros(D_IN, D_IN)}, "W_skip"),
        ({"b_dec": None}, "'b_dec' is missing"),
        ({"W_dec": torch.zeros(D_IN, D_SAE)}, "W_dec is"),
        ({"b_dec": torch.full((D_IN,), torch.nan)}, "not finite"),
    ],
    ids=["extra", "missing", "transposed", "nan"],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, tensors, says):
    written(tmp_path / "layers.1", tensors=tensors)
    with pytest.raises(sae.UserError, match=says):
        sae.load(tmp_path / "layers.1", lm_name="toy")


def test_what_is_not_said_is_asked_for(tmp_path):
    written(tmp_path / "mine", run={"model": "no run of theirs"})
    with pytest.raises(sae.UserError, match=r"hook_name=\.\.\."):
        sae.load(tmp_path / "mine", lm_name="toy")
    with pytest.raises(sae.UserError, match=r"lm_name=\.\.\."):
        sae.load(tmp_path / "mine", hook_name="h")
    with pytest.raises(sae.UserError, match="needs no k"):
        sae.load(tmp_path / "mine", hook_name="h", lm_name="toy", k=4)
    assert sae.load(tmp_path / "mine", hook_name="h", lm_name="toy").config.hook_name == "h"


def make_sae(architecture="topk", hook_name="blocks.1.hook_resid_post", **options):
    return make(SAEConfig(architecture, D_IN, D_SAE, K, 0, hook_name, "toy", **options))


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (make_sae("batch_topk"), "no batch_topk"),
        (make_sae("abs_topk"), "no abs_topk"),
        (make_sae(hook_name="a+b"), "no crosscoders"),
        (make_sae(hook_name="a->b", d_out=4), "from 6 wide to 4"),
        (make_sae(normalize="layer_norm"), "layer_norm"),
    ],
    ids=["batch_topk", "abs_topk", "crosscoder", "widths", "normalised"],
)
def test_what_it_cannot_hold_is_not_written(tmp_path, one, says):
    with pytest.raises(sae.UserError, match=says):
        FORMAT.write(one, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_written(tmp_path):
    one = make_sae("hierarchical_topk")
    one.sparsity.l0 = 2  # used at another k than it was made for
    FORMAT.write(one, tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert (cfg["activation"], cfg["k"], cfg["num_latents"], cfg["normalize_decoder"]) == ("topk", 2, D_SAE, True)
    assert load_file(tmp_path / "out" / "sae.safetensors")["encoder.weight"].shape == (D_SAE, D_IN)
    assert registry.find(tmp_path / "out").name == "sparsify"
    torch.testing.assert_close(sae.load(tmp_path / "out")(x()).recons, one(x()).recons)
    with torch.no_grad():
        one.b_enc[0] = torch.inf
    with pytest.raises(sae.UserError, match="not finite"):
        FORMAT.write(one, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "cfg.json").read_text()) == cfg
