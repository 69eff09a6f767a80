"""`sae convert`: what is written does the same, what does not is not kept, nothing is half written."""

import json

import pytest
import torch

import sae as package
from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.formats import registry, saelens
from sae.formats.agree import agree, random_activations

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def trained(sae):
    status, _, err = sae("train", "name=one", f"harvest.hook_names=[{HOOK}]", "sae.d_sae=[32]")
    assert status == 0, err
    (found,) = (sae.folder / "one" / "train" / HOOK).iterdir()
    return found


@pytest.mark.parametrize("name", ["sae", "saelens", "sparsify", "dictionary_learning"])
def test_it_is_written_read_back_and_compared(sae, trained, tmp_path, name):
    dst = tmp_path / "out" / name
    status, out, err = sae("convert", "name=one", f"src={trained}", f"dst={dst}", f"format={name}", defaults=False)
    assert status == 0, err
    result = json.loads((sae.folder / "one" / "convert" / "result.json").read_text())
    assert set(result["agreement"]) == {"random", "held-out text"}
    for found in result["agreement"].values():
        assert found["l0"] > 0.5, "latents fire, or the comparison shows nothing"
        assert max(found["latents"], found["recons"]) < 1e-5
    assert "largest relative difference" in out
    again = package.load(dst) if name == "sae" else package.load(dst, hook_name=HOOK, lm_name="toy")
    original = SAE.load(trained)
    x = random_activations(original, 64, seed=3)
    assert agree(original, again, [x]).worst < 1e-5
    before = {path: path.read_bytes() for path in dst.iterdir()}
    status, _, err = sae("convert", "name=one", f"src={trained}", f"dst={dst}", f"format={name}", defaults=False)
    assert status == 2
    assert "is there already" in err
    assert {path: path.read_bytes() for path in dst.iterdir()} == before


def test_what_does_not_agree_is_not_kept(sae, trained, tmp_path, monkeypatch):
    def wrong(coder, folder):
        with torch.no_grad():
            coder.W_dec[3] *= 1.01
        saelens.FORMAT.write(coder, folder)
        with torch.no_grad():
            coder.W_dec[3] /= 1.01

    broken = saelens.FORMAT._replace(write=wrong)
    monkeypatch.setattr("sae.stages.convert.formats", lambda: registry.formats() | {"saelens": broken})
    status, _, err = sae(
        "convert", "name=one", f"src={trained}", f"dst={tmp_path / 'out'}", "format=saelens", defaults=False
    )
    assert status == 2
    assert "was not kept" in err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("dst=x", "format=saelens"), "src has no value"),
        (("src={src}", "dst={dst}", "format=saelense"), "did you mean saelens"),
        (("src={src}x", "dst={dst}", "format=saelens"), "no file or folder"),
        (("src={src}", "dst={dst}", "format=openai"), "unknown format"),
        (("src={src}", "dst={dst}", "format=saelens", "k=3"), "says all about itself"),
    ],
)
def test_mistakes_are_said_in_a_sentence(sae, trained, tmp_path, given, sentence):
    places = {"src": trained, "dst": tmp_path / "out"}
    status, _, err = sae("convert", "name=one", *(item.format(**places) for item in given), defaults=False)
    assert status == 2
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_a_name_on_the_hub_is_told_from_a_path(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "layer_12"
    folder.mkdir(parents=True)
    asked = []

    def fetch(place):
        asked.append(place)
        return folder

    monkeypatch.setattr(registry.hub, "fetch", fetch)
    found = registry.locate("google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82")
    assert (found.format, found.lm_name) == ("gemma_scope", "gemma-2-2b")
    assert str(asked[0]) == "google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82"
    with pytest.raises(UserError, match="holds many SAEs: name one"):
        registry.locate("google/gemma-scope-2b-pt-res")
    with pytest.raises(UserError, match="no file or folder"):
        registry.locate("runs/demo/train/nothing")
    assert len(asked) == 1
    assert {one.format for one in registry.releases().values()} <= set(registry.formats())
