"""Loading: what is refused, and how it is said."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from sae.errors import UserError
from sae.lm import load
from sae.lm.load import load_lm, resolve_model


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy of a good checkpoint, to be spoiled."""
    return shutil.copytree(checkpoints("llama"), tmp_path / "model")


def refused(source, words, **options):
    with pytest.raises(UserError, match=words) as caught:
        load_lm(str(source), **{"device": "cpu", **options})
    assert "\n" not in str(caught.value)


def set_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_bad_names_and_options(tmp_path, checkpoints):
    refused("nobody/no-such-model", "unknown model 'nobody/no-such-model'")
    refused(tmp_path / "none", "no model folder")
    refused(checkpoints("llama"), "unknown dtype 'fp16'", dtype="fp16")
    refused(checkpoints("llama"), "unknown device 'gpu'", device="gpu")
    refused(checkpoints("llama"), "device 'cuda:99' is not there", device="cuda:99")
    refused(checkpoints("llama"), "neither a Jinja template nor", chat_template="none.jinja")


def test_incomplete_folders(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(folder, "truncated or damaged")
    weights.unlink()
    refused(folder, "no safetensors weights")
    weights.write_bytes(whole)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "no tokenizer files")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer of .* cannot be loaded")


def test_weights_that_do_not_belong_to_the_config(folder):
    set_config(folder, num_hidden_layers=4)
    refused(folder, "do not fill the model")
    set_config(folder, num_hidden_layers=3, hidden_size=64)
    refused(folder, "cannot be loaded")


def test_unsupported_architectures(folder):
    set_config(folder, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    refused(folder, "unsupported architecture")
    set_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused(folder, "encoder-decoder")


def test_fingerprint(checkpoints, folder, loaded):
    """The same model has the same fingerprint under another path; other weights or configuration change it."""
    original = loaded("llama")[0].fingerprint
    assert load_lm(str(folder), device="cpu", dtype="bfloat16").fingerprint == original
    set_config(folder, rope_theta=777.0, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    assert load_lm(str(folder), device="cpu").fingerprint != original
    assert loaded("qwen2")[0].fingerprint != original


def test_dtypes_and_templates(checkpoints, tmp_path):
    low = load_lm(str(checkpoints("llama")), device="cpu", dtype="bfloat16", chat_template="{{ messages[0].content }}!")
    assert low.logits(low.tokenize(["hi"])).dtype == torch.bfloat16
    assert low.fast
    assert low.format_chat([{"role": "user", "content": "hi"}]) == "hi!"
    (tmp_path / "t.jinja").write_text("file template")
    auto = load_lm(str(checkpoints("llama")), dtype="auto", chat_template=str(tmp_path / "t.jinja"))
    assert auto.dtype == torch.float32
    assert auto.format_chat([{"role": "user", "content": "hi"}]) == "file template"


def test_loading_is_quiet(checkpoints, capfd, recwarn):
    folder = str(checkpoints("gemma3"))
    capfd.readouterr()  # saving the checkpoint is not quiet
    load_lm(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_organism_resolves_to_the_shipped_folder(tmp_path, monkeypatch):
    """Beside the package in a checkout, inside it in a wheel."""
    monkeypatch.setattr(load, "__file__", str(tmp_path / "sae" / "lm" / "load.py"))
    with pytest.raises(UserError, match="sae organism"):
        resolve_model("organism")
    for folder in (tmp_path / "sae" / "_data" / "checkpoints" / "organism", tmp_path / "checkpoints" / "organism"):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        assert resolve_model("organism") == str(folder)
    assert resolve_model("gpt2") == "gpt2"


def test_importing_is_light():
    """The command line imports this module; the heavy libraries wait until a model is loaded."""
    code = "import sys, sae.lm.load; print([m for m in ('transformers', 'transformer_lens') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
