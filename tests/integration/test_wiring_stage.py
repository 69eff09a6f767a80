"""`sae wiring` from the command line: whose parts, beside what, that it is kept, and what it refuses."""

import json

import pytest

from sae.autoencoder.sae import SAE, SAEConfig
from sae.lm.load import load_lm

FAST = ("wiring.n_top=3", "wiring.n_null=50", "wiring.n_prompts=3")


@pytest.fixture
def encoder(model, tmp_path):
    """Folder of an SAE of the tiny model."""
    lm = load_lm(str(model), device="cpu")
    found = SAE(SAEConfig("topk", 32, 48, 8, 0, "blocks.0.hook_resid_post", str(model), lm_fingerprint=lm.fingerprint))
    found.save(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_latents_parts_are_written_beside_what_was_located(sae, greeting, encoder):
    given = ("name=w", f"contrast={greeting}", f"wiring.sae={encoder}", "latents=[3,4]", *FAST)
    status, out, err = sae("wiring", *given)
    assert status == 0, err
    file = sae.folder / "w" / "wiring" / "result.json"
    first, second = json.loads(file.read_text())["latents"]
    assert (first["latent"], second["latent"], first["behavior"]) == (3, 4, "greeting")
    for record in (first, second):
        assert record["gap"] < 1e-4
        assert record["writers"]["located"] == {}
        assert record["writers"]["agreement"]["first_auroc"] is None  # nothing was planted here
        assert all(row["ablated"] is not None for row in record["writers"]["strongest"])
        moved = [abs(row["data"]) for row in record["writers"]["strongest"]]
        assert moved == sorted(moved, reverse=True)
        assert {row["part"][:2] for row in record["writers"]["strongest"]} == {"L0"}
    assert {row["part"][:2] for row in first["readers"]["strongest"]} <= {"L1", "L2"}
    assert "latent 3 at blocks.0.hook_resid_post" in out
    assert "done before" in sae("wiring", *given)[1]

    located = ("method=[taylor]", "level=[head,neuron]", "localize.surgery=false", "localize.n_prompts=3")
    status, _, err = sae("localize", "name=w", f"contrast={greeting}", *located)
    assert status == 0, err
    status, out, err = sae("wiring", *given)
    assert status == 0, err
    assert "done before" not in out, "what was located since belongs into the table"
    beside = json.loads(file.read_text())["latents"][0]["readers"]["located"]
    assert set(beside) >= {"taylor head s0", "taylor neuron s0"}
    assert beside["taylor head s0"]["n"] < beside["taylor neuron s0"]["n"]
    assert "located by taylor neuron s0: Spearman" in out


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((), "run `sae behavior name=bad`"),
        (("latents=[3]",), "go together"),
        (("wiring.sae={encoder}", "latents=[48]"), "latent 48"),
        (("wiring.position=0",), "prompt's end"),
        (("wiring.n_null=0",), "n_null=0"),
        (("wiring.sae={encoder}", "latents=[3]", "wiring.null=zeros"), "zeros"),
    ],
)
def test_mistakes_are_said_in_a_sentence(sae, greeting, encoder, given, named):
    status, _, err = sae(
        "wiring", "name=bad", f"contrast={greeting}", *(item.format(encoder=encoder) for item in given)
    )
    assert status == 2
    assert named in err
    assert not (sae.folder / "bad" / "wiring" / "result.json").exists()
