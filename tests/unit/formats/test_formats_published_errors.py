"""Files of published releases that are incomplete, misspelt or of another kind: one sentence with the remedy."""

import json
import re

import numpy as np
import published
import pytest
import torch
from published import D_SAE, layers_of, weights

from sae.errors import UserError
from sae.formats.registry import load

W = weights()


def refused(match, path, **given):
    with pytest.raises(UserError) as caught:
        load(path, **given)
    text = str(caught.value)
    assert re.search(match, text), text
    assert "\n" not in text
    assert text[-1] in ".?"


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))


def test_gemma_scope_in_renamed_folders_asks(tmp_path):
    path = published.gemma_scope(tmp_path, W, "mine")
    refused("does not say hook_name, where the SAE belongs: give it", path)
    refused("does not say lm_name", path, hook_name="blocks.3.hook_resid_post")
    sae = load(path, hook_name="blocks.3.hook_resid_post", lm_name="gemma-2-2b")
    assert (sae.config.lm_name, sae.config.hook_name) == ("gemma-2-2b", "blocks.3.hook_resid_post")


def test_gemma_scope_tensors(tmp_path):
    refused("48 latents, but its folder is named 'width_1k'", published.gemma_scope(tmp_path / "a", W))
    names = "gemma-scope-2b-pt-res/layer_12/average_l0_8"
    path = published.gemma_scope(tmp_path / "b", W, names, scaling_factor=torch.full((1,), 2.0))
    refused("has 'scaling_factor', which nothing is known of", path)
    np.savez(path / "params.npz", W_enc=W.W_enc, W_dec=W.W_dec, b_enc=W.b_enc, b_dec=W.b_dec)
    refused("tensor 'threshold' is missing", path)
    refused("needs no k: leave that argument", path, k=3)


def test_gemma_scope_2_configs(tmp_path):
    path = published.gemma_scope_2(tmp_path, W)
    file = path / "config.json"
    good = file.read_text()
    for changes, match in (
        ({"afine_connection": True}, "unknown key in .* 'afine_connection': did you mean affine_connection"),
        ({"normalize": "layer_norm"}, "unknown key in .* 'normalize'"),
        ({"hf_hook_point_in": None}, "has no 'hf_hook_point_in'"),
        ({"hf_hook_point_in": "model.layers.3.mlp.output"}, "which is not model.layers.<layers>"),
        ({"hf_hook_point_in": 3}, "hf_hook_point_in in .* must be text, not 3"),
        ({"architecture": "topk"}, "architecture 'topk', where only"),
        ({"type": "lorsa"}, "type 'lorsa'"),
        ({"width": 16384}, "says 16384 latents, but the weights have 48"),
        ({"affine_connection": True}, "no affine_skip_connection, against affine_connection = True"),
        ({"hf_hook_point_in": "model.layers.{all}.output"}, "names several layers for a sae"),
    ):
        edit(file, **changes)
        refused(match, path)
        file.write_text(good)
    refused("needs no layer", path, layer=3)
    file.unlink()
    refused("has no config.json and its folders", path.rename(tmp_path / "moved"))


def test_gemma_scope_2_crosscoders(tmp_path):
    layers, W_dec = layers_of(2)
    hook = "model.layers.{5,9}.output"
    config = published.gemma_scope_2_config(hook, hook, "crosscoder", False, 2 * D_SAE)
    path = published.gemma_scope_2_layers(tmp_path, layers, "crosscoder/x", W_dec, config)
    edit(path / "config.json", hf_hook_point_in="model.layers.{5,9,12}.output")
    refused("no file .*params_layer_2", path)
    edit(path / "config.json", hf_hook_point_in="model.layers.5.output")
    refused("names no list of layers", path)
    edit(path / "config.json", hf_hook_point_in=hook, width=7)
    refused("says 7 latents", path)


def test_cross_layer_transcoders(tmp_path):
    path = published.clt(tmp_path, *layers_of(2, causal=True))
    refused("does not say layer, which of its layers to read: give it", path)
    refused("says layer = 1, not 0: leave layer out", path / "W_enc_1.safetensors", layer=0)
    refused("latents of layer 1 write to layers 1 to 1, not to 0", path, layer=1,
            hook_name="blocks.1.hook_resid_mid->blocks.0.hook_mlp_out")  # fmt: skip
    refused("no file .*W_enc_7", path, layer=7)
    published.write_yaml(path / "config.yaml", {"model_name": "m", "feature_inputhook": "hook_resid_mid"})
    refused("unknown key in .* 'feature_inputhook': did you mean feature_input_hook", path, layer=0)
    (path / "config.yaml").unlink()
    refused("does not say lm_name", path, layer=0)
    refused("does not say hook_name", path, layer=0, lm_name="gemma")
    (path / "config.yaml").write_text("a: [1")
    refused("is not valid YAML", path, layer=0)


def test_llama_scope_configs(tmp_path):
    path = published.llama_scope(tmp_path, W)
    file = path / "hyperparams.json"
    good = file.read_text()
    for changes, match in (
        ({"jump_relu_treshold": 0.3}, "unknown key in .* 'jump_relu_treshold': did you mean jump_relu_threshold"),
        ({"d_model": None}, "has no 'd_model'"),
        ({"d_model": "16"}, "d_model in .* must be a whole number"),
        ({"d_sae": 32768}, "says 16 to 32768, but its tensors map 16 to 48"),
        ({"use_glu_encoder": True}, "use_glu_encoder = True in .* is not supported"),
        ({"act_fn": "topk"}, "act_fn = 'topk' in .* is not supported: only 'jumprelu'"),
        ({"norm_activation": "token-wise"}, "norm_activation = 'token-wise'"),
        ({"dataset_average_activation_norm": {"in": 3.0}}, r"has \['in'\], not 'in' and 'out'"),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, "activation norm 0, which is not above 0"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold = None in"),
        (
            {"apply_decoder_bias_to_pre_encoder": True, "hook_point_out": "blocks.15.hook_mlp_out"},
            "makes sense where it reads what it writes",
        ),
    ):
        edit(file, **changes)
        refused(match, path)
        file.write_text(good)
    (path / "checkpoints" / "final.safetensors").unlink()
    refused("no file .*final.safetensors", path)


def test_llama_scope_r1(tmp_path):
    path = published.llama_scope_r1(tmp_path / "a", W, norm=None)
    refused("does not say scale, what activations were multiplied by", path)
    refused("scale = -1", path, scale=-1.0)
    refused("needs no scale", published.llama_scope_r1(tmp_path / "b", W), scale=3.0)
    moved = published.llama_scope_r1(tmp_path / "c", W, "renamed")
    refused("does not say lm_name", moved)
    edit(moved / "config.json", hook_point_in="blocks.3.hook_resid_post", hook_point_out="blocks.3.hook_resid_post")
    refused("has activation norms, but not of", moved, lm_name="llama")


def test_qwen_scope(tmp_path):
    path = published.qwen_scope(tmp_path / "a", W)
    refused("says k = 5, not 6: leave k out", path, k=6)
    refused("does not say layer", path.parent)
    refused("says layer = 5, not 4", path, layer=4)
    refused("has d_sae = 48, where 32768 is said", published.qwen_scope(tmp_path / "b", W, config=False))
    refused("does not say k, how many latents", published.qwen_scope(tmp_path / "c", W, "renamed", config=False))
    edit(path.parent / "config.json", hook_point="mlp_out")
    refused("hook_point 'mlp_out', where topk_sae at resid_post", path)
    edit(path.parent / "config.json", topk=50)
    refused("unknown key in .* 'topk'", path)


def test_openai(tmp_path):
    refused("activation 'Identity', where", published.openai(tmp_path / "a", W, activation="Identity"))
    refused("k = 5 and postact_fn = 'Identity'", published.openai(tmp_path / "b", W, after="Identity"))
    refused("k = None", published.openai(tmp_path / "c", W, k=None))
    refused("does not say hook_name", published.openai(tmp_path / "d", W, "mine/autoencoders/6.pt"))
    path = published.openai(tmp_path / "e", W)
    torch.save(torch.load(path) | {"scaling": torch.ones(1)}, path)
    refused("has 'scaling', which nothing is known of", path)


def test_two_linear_layers(tmp_path):
    renamed = published.linear_relu(tmp_path / "a", W, "mine.pt")
    refused("does not say hook_name", renamed, format="goodfire")
    other = published.linear_relu(tmp_path / "b", W, layers=("encoder", "decoder"))
    refused("has 'encoder.weight', which nothing is known of", other)
    refused("is no file, nor a folder with one", tmp_path, format="goodfire")


def test_transcoder_sets(tmp_path):
    path = published.mwhanna(tmp_path / "a", W, act_fn="jumprelu")
    refused("names the activation 'jumprelu', but .* has no thresholds", path)
    (path.parent / "wandb-config.yaml").write_text("d_feature:\n  value: 7\n")
    refused("says d_feature = 7, but the weights have 48", path)
    refused("model_kind 'cross_layer_transcoder', not transcoder_set",
            published.mwhanna(tmp_path / "b", W, model_kind="cross_layer_transcoder"))  # fmt: skip
    path = published.mwhanna(tmp_path / "c", W)
    published.write_yaml(
        path.parent / "config.yaml", {"modelname": "Qwen/Qwen3-4B", "feature_input_hook": "mlp.hook_in"}
    )
    refused("unknown key in .* 'modelname': did you mean model_name", path)
    refused("does not say hook_name", published.mwhanna(tmp_path / "d", W, "renamed", config=False))


def test_weights_that_are_not_finite(tmp_path):
    bad = W._replace(b_enc=torch.full((D_SAE,), torch.nan))
    refused("'b_enc' in .* values that are not finite", published.gemma_scope_2(tmp_path, bad))
