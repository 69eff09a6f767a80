"""SAELens folders without SAELens: known answers, and a sentence for whatever is missing, misspelt or contradictory."""

import json
import math

import pytest
import torch
from random_saes import assert_close, inputs, random_sae
from safetensors.torch import load_file, save_file

import sae
from sae.errors import UserError
from sae.formats.saelens_config import OWN_KEYS
from sae.formats.saelens_write import write

HOOK = "blocks.1.hook_resid_post"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
OLD = {
    "d_in": 16,
    "d_sae": 48,
    "dtype": "torch.float32",
    "model_name": "gpt2-small",
    "hook_point": HOOK,
    "hook_point_layer": 1,
    "hook_point_head_index": None,
    "l1_coefficient": 8e-5,
    "normalize_activations": "none",
}


def folder_of(tmp_path, architecture="relu", change=None, flat=None, **more):
    """A folder as SAELens has them, from an SAE of ours; `change` edits its `cfg.json`, None takes a key out."""
    folder, made = tmp_path / "sae", random_sae(architecture, **more)
    write(made, folder)
    config = json.loads((folder / CONFIG).read_text()) if flat is None else dict(flat)
    for key, value in (change or {}).items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (folder / CONFIG).write_text(json.dumps(config))
    return folder, made


def edit_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    return tensors


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated", "matching_pursuit"])
def test_there_and_back(tmp_path, architecture):
    folder, made = folder_of(tmp_path, architecture)
    found = sae.load(folder)
    x = inputs()
    with torch.no_grad():
        assert_close(found(x).recons, made(x).recons)
    assert found.config.architecture == architecture
    assert found.config.l0 == 5
    assert found.config.metadata["source"]["format"] == "saelens"
    assert json.loads(json.dumps(found.config.metadata)) == found.config.metadata


def test_what_training_multiplied_activations_by_is_folded_in(tmp_path):
    """By a number that the caller knows: the SAE of raw activations is the other one, between x * s and / s."""
    folder, made = folder_of(tmp_path, "relu", {"normalize_activations": "expected_average_only_in"})
    with pytest.raises(UserError, match=r"does not say scale.*sae.load\(\.\.\., scale=\.\.\.\)"):
        sae.load(folder)
    found, x = sae.load(folder, scale=0.25), inputs()
    with torch.no_grad():
        assert_close(found(x).latent_acts, made(0.25 * x).latent_acts)
        assert_close(found(x).recons, made(0.25 * x).recons / 0.25)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25, "has_whitening": false}')
    with torch.no_grad():
        assert torch.equal(sae.load(folder)(x).recons, found(x).recons)
    with pytest.raises(UserError, match=r"scaling_factor = 0.25, not 0.5"):
        sae.load(folder, scale=0.5)
    for wrong in ('{"scaling_facto": 0.25}', '{"scaling_factor": "much"}', '{"scaling_factor": -1}', "[]"):
        (folder / "activation_scaler.json").write_text(wrong)
        with pytest.raises(UserError, match=r"scaling_factor|is no number above 0"):
            sae.load(folder)


@pytest.mark.parametrize("scaler", [True, False])
def test_a_scale_that_nothing_asks_for_is_refused(tmp_path, scaler):
    folder, _ = folder_of(tmp_path)
    given = {} if scaler else {"scale": 2.0}
    if scaler:
        (folder / "activation_scaler.json").write_text('{"scaling_factor": 2.0}')
    with pytest.raises(UserError, match="nothing to scale"):
        sae.load(folder, **given)


@pytest.mark.parametrize("where", ["threshold", "log_threshold"])
def test_thresholds_by_either_name(tmp_path, where):
    folder, made = folder_of(tmp_path, "jumprelu")

    def rename(tensors):
        threshold = tensors.pop("threshold")
        tensors[where] = threshold.log() if where == "log_threshold" else threshold

    edit_tensors(folder, rename)
    assert_close(sae.load(folder).sparsity.threshold.detach(), made.sparsity.threshold.detach())


def test_thresholds_below_zero_let_no_negative_activation_pass(tmp_path):
    folder, _ = folder_of(tmp_path, "jumprelu")
    weights = edit_tensors(folder, lambda tensors: tensors["threshold"].fill_(-3.0))
    x = inputs()
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    with torch.no_grad():
        assert_close(sae.load(folder).encode(x), pre.relu())


def test_flat_files_and_their_defaults(tmp_path):
    folder, made = folder_of(tmp_path, flat=OLD)
    found, x = sae.load(folder), inputs()
    with torch.no_grad():
        assert_close(found(x).recons, made(x).recons)
    assert (found.config.hook_name, found.config.lm_name, found.config.l0) == (HOOK, "gpt2-small", 0)
    assert found.config.metadata["source"]["said"] == OLD


def test_factors_of_finetuning_scale_activations_before_they_are_decoded(tmp_path):
    folder, made = folder_of(tmp_path, flat=OLD | {"finetuning_scaling_factor": True})
    factors = torch.linspace(0.5, 2, 48)
    edit_tensors(folder, lambda tensors: tensors.update(scaling_factor=factors))
    found, x = sae.load(folder), inputs()
    with torch.no_grad():
        acts = made.encode(x)
        assert_close(found(x).recons, (acts * factors) @ made.W_dec + made.b_dec)
        assert_close(found.encode(x), acts)
    (folder / CONFIG).write_text(json.dumps(OLD))
    with pytest.raises(UserError, match="does not say whether it is to be used"):
        sae.load(folder)
    edit_tensors(folder, lambda tensors: tensors.update(scaling_factor=torch.ones(48)))
    with torch.no_grad():
        assert_close(sae.load(folder)(x).recons, made(x).recons)


KEYS = ["architecture", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "reshape_activations"]


@pytest.mark.parametrize("key", [*KEYS, "metadata", "k", "rescale_acts_by_decoder_norm"])
def test_a_misspelt_key_is_an_error_that_names_it(tmp_path, key):
    """SAELens fills in a default, and computes something else."""
    for wrong in (key[:-1] + "_" + key[-1], key.upper(), "x" + key):
        folder, _ = folder_of(tmp_path, "topk")
        config = json.loads((folder / CONFIG).read_text())
        config[wrong] = config.pop(key)
        (folder / CONFIG).write_text(json.dumps(config))
        with pytest.raises(UserError) as found:
            sae.load(folder)
        assert wrong in str(found.value) or repr(key) in str(found.value)


@pytest.mark.parametrize("key", ["normalize_activation", "apply_b_dec_to_inputs", "activation_fn_kwarg", "architectur"])
def test_a_misspelt_key_of_a_flat_file_is_an_error(tmp_path, key):
    folder, _ = folder_of(tmp_path, flat=OLD | {key: False})
    with pytest.raises(UserError, match=rf"has a key '{key}': did you mean"):
        sae.load(folder)


@pytest.mark.parametrize("key", ["hook_nam", "modelname", "hook_head_idx"])
def test_misspelt_metadata_is_an_error(tmp_path, key):
    folder, _ = folder_of(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    config["metadata"][key] = "x"
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"metadata has a key '{key}': did you mean"):
        sae.load(folder)


def test_metadata_that_are_missing_can_be_given(tmp_path):
    folder, _ = folder_of(tmp_path, change={"metadata": {"sae_lens_version": "6.54.12"}})
    with pytest.raises(UserError, match="does not say hook_name"):
        sae.load(folder)
    with pytest.raises(UserError, match="does not say lm_name"):
        sae.load(folder, hook_name=HOOK)
    found = sae.load(folder, hook_name=HOOK, lm_name="gpt2")
    assert (found.config.hook_name, found.config.lm_name) == (HOOK, "gpt2")
    with pytest.raises(UserError, match="one hook point"):
        sae.load(folder, hook_name=f"{HOOK}->blocks.1.hook_mlp_out", lm_name="gpt2")
    for wrong, match in (({"k": 3}, "leave k out"), ({"layer": 3}, "leave out layer"), ({"lmname": "x"}, "lm_name")):
        with pytest.raises(UserError, match=match):
            sae.load(folder, hook_name=HOOK, lm_name="gpt2", **wrong)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architecture": "temporal"}, "attends to earlier tokens"),
        ({"architecture": "jump_relu"}, "did you mean jumprelu"),
        ({"architecture": "standard"}, "unknown key .*'k'"),
        ({"normalize_activations": "layernorm"}, "did you mean layer_norm"),
        ({"normalize_activations": True}, "give it as text"),
        ({"reshape_activations": "hookz"}, "unknown reshape_activations"),
        ({"apply_b_dec_to_input": 1}, "true or false"),
        ({"d_sae": 0}, "whole number from 1"),
        ({"d_sae": 48.5}, "whole number from 1"),
        ({"d_sae": 47}, r"is \[16, 48\], but cfg.json says \[16, 47\]"),
        ({"d_in": "16"}, "whole number"),
        ({"k": 4.5}, "whole number"),
        ({"k": 49}, "not between 0 and d_sae"),
        ({"k": math.nan}, "not negative"),
        ({"k": None}, "does not say k"),
        ({"metadata": {"model_name": "m", "hook_name": HOOK, "hook_head_index": 3}}, "attention head 3 alone"),
        ({"metadata": {"model_name": 3, "hook_name": HOOK}}, "lm_name must be text"),
        ({"normalize_activations": "covariance_whitening"}, r"no file .*activation_whitening.safetensors"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, change, match):
    folder, _ = folder_of(tmp_path, "topk", change)
    with pytest.raises(UserError, match=match):
        sae.load(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn = 'tanh-relu'"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"K": 5}}, "only k is known"),
        ({"activation_fn_str": "topk"}, "does not say k"),
        ({"hook_point_head_index": 0}, "attention head 0 alone"),
        ({"normalize_activations": True}, "does not say scale"),
        ({"model_name": None}, "does not say lm_name"),
    ],
)
def test_what_is_wrong_in_flat_files_is_said(tmp_path, change, match):
    folder, _ = folder_of(tmp_path, change=change, flat=OLD)
    with pytest.raises(UserError, match=match):
        sae.load(folder)


def test_tensors_must_be_those_of_the_architecture(tmp_path):
    folder, _ = folder_of(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update(threshold=torch.ones(48)))
    with pytest.raises(UserError, match=r"unknown tensor .*'standard' 'threshold'"):
        sae.load(folder)
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in ("threshold", "b_enc")])
    with pytest.raises(UserError, match="'b_enc' is missing"):
        sae.load(folder)
    edit_tensors(folder, lambda tensors: tensors.update(b_enc=torch.full((48,), math.inf)))
    with pytest.raises(UserError, match="not finite"):
        sae.load(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(UserError, match="not a mapping"):
        sae.load(folder)


def test_pickles_beside_the_weights_are_not_opened(tmp_path):
    from test_formats_tensors import Bomb

    folder, _ = folder_of(tmp_path)
    torch.save({"optimizer": Bomb(tmp_path / "canary")}, folder / "trainer_state.pt")
    sae.load(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("hook_name", "reshape"), [("blocks.1.attn.hook_z", "hook_z"), (HOOK, "none"), ("blocks.1.attn.hook_z->a", "none")]
)
def test_what_is_written_says_how_activations_come(tmp_path, hook_name, reshape):
    """SAELens is handed the heads apart, which an SAE of hook_z flattens; its transcoders flatten nothing."""
    write(random_sae("relu", hook_name), tmp_path / "sae")
    said = json.loads((tmp_path / "sae" / CONFIG).read_text())
    assert said["reshape_activations"] == reshape
    assert said["apply_b_dec_to_input"] == ("->" not in hook_name)
    assert said["metadata"]["hook_name"] == hook_name.split("->")[0]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"architecture": "relu", "hook_name": "a+b"}, "crosscoder, which SAELens does not have"),
        ({"architecture": "topk", "hook_name": "a->b"}, "a transcoder of architecture 'topk'"),
        ({"architecture": "gated", "hook_name": "a->b"}, "a transcoder of architecture 'gated'"),
        ({"architecture": "relu", "hook_name": "a->b", "normalize": "rms"}, "no transcoder with normalize = 'rms'"),
        ({"architecture": "relu", "hook_name": "pair.a"}, "second of two models"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, more, match):
    with pytest.raises(UserError, match=match):
        write(random_sae(**more), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_would_mean_something_else_are_refused(tmp_path):
    made = random_sae("jumprelu")
    with torch.no_grad():
        made.sparsity.threshold[3] = -0.1
    with pytest.raises(UserError, match="1 thresholds are below 0"):
        write(made, tmp_path / "out")
    with torch.no_grad():
        made.sparsity.threshold[3] = 0.1
        made.W_dec[0, 0] = math.nan
    with pytest.raises(UserError, match=r"W_dec .* not finite"):
        write(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_architecture_that_is_read_says_which_keys_are_its_own():
    from sae.formats.saelens import _ARCHITECTURES

    assert set(_ARCHITECTURES) == set(OWN_KEYS)
