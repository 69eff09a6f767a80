"""Two language models through the command line: harvested, crossed, evaluated and compared."""

import json

import pytest
from safetensors.torch import load_file
from tiny_lms import byte_tokenizer, save_checkpoint

from sae.autoencoder.sae import SAE

HOOK = "blocks.0.hook_resid_post"
HOOKS = ["harvest.hook_names=[blocks.0.hook_resid_post]", "sae.d_sae=[32]", "sae.architecture=[batch_topk]"]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """Folder of another tiny random Llama with the same tokenizer."""
    return save_checkpoint(tmp_path_factory.mktemp("other"), "llama", seed=1)


@pytest.mark.parametrize("stream", ["store", "live"])
def test_a_crosscoder_of_two_models_goes_all_the_way(sae, model, other, stream):
    status, out, err = sae("eval", "name=two", f"lm.pair={other}", f"train.stream={stream}", *HOOKS)
    assert status == 0, err
    run = sae.folder / "two"
    (entry,) = read(run / "eval" / "result.json")["saes"]
    assert entry["hook_name"] == f"{HOOK}+pair.{HOOK}"
    assert 0 < entry["fvu"] < 1.5
    first, second = entry["sources"]
    assert [source["hook_name"] for source in (first, second)] == [HOOK, f"pair.{HOOK}"]
    assert [source["lm"] for source in (first, second)] == [str(model), str(other)]
    assert first["fvu"] != second["fvu"]
    assert entry["ce_clean"] == pytest.approx((first["ce_clean"] + second["ce_clean"]) / 2)
    assert "of crosscoders, at each hook point" in out
    assert (run / "harvest").exists() == (stream == "store")
    if stream == "store":
        assert read(run / "harvest" / "store.json")["hook_names"] == [HOOK, f"pair.{HOOK}"]
    assert SAE.load(entry["path"]).config.source_widths == [32, 32]
    status, _, err = sae("report", "name=two", defaults=False)
    assert status == 0, err
    status, out, err = sae("eval", "name=two", "suite=diff", defaults=False)
    assert status == 0, err
    result = read(run / "eval" / "diff" / "result.json")
    assert (result["first"], result["pair"]) == (str(model), str(other))
    assert result["thresholds"]["nu_error"] == 0.2
    (record,) = result["crosscoders"]
    counted = record["shared"] + record["between"] + record["rare"]
    assert counted + record["first_only"]["by_norm"] + record["pair_only"]["by_norm"] == 32
    tensors = load_file(run / "eval" / "diff" / record["tensors"])
    assert tensors["beta_error"].shape == (32, 2)
    assert int(tensors["is_shared"].sum()) == record["shared"]
    assert "relative norm" in out
    status, _, err = sae("report", "name=two", defaults=False)
    assert status == 0, err
    page = (run / "report.html").read_text()
    assert "Models compared" in page
    assert ("Whose the latents are" in page) == (record["rare"] < 32)
    assert read(run / "eval" / "result.json")["saes"] == [entry], "the evaluation beside it is left alone"
    status, out, _ = sae("eval", "name=two", "suite=diff", defaults=False)
    assert status == 0
    assert "done before" in out
    status, out, err = sae("eval", "name=two", "suite=position", defaults=False)
    assert status == 0, err
    (row,) = read(run / "eval" / "position" / "result.json")["saes"]
    assert [curves["lm"] for curves in row["models"]] == [str(model), str(other)]
    for curves, total in zip([row, *row["models"]], [entry, first, second], strict=True):
        mean = sum(n * delta for n, delta in zip(curves["n"], curves["delta_ce"]["mean"], strict=True))
        assert mean / sum(curves["n"]) == pytest.approx(total["delta_ce"], rel=1e-4, abs=1e-6)


def test_a_model_and_itself_share_everything(sae, model):
    status, _, err = sae("eval", "name=same", "suite=diff", f"lm.pair={model}", *HOOKS, "train.total_tokens=40960")
    assert status == 0, err
    (record,) = read(sae.folder / "same" / "eval" / "diff" / "result.json")["crosscoders"]
    for side in ("first_only", "pair_only"):
        assert record[side] == {"by_norm": 0, "confirmed": 0, "shrunk": 0, "decoupled": 0}
    assert record["shared"] >= 8
    assert record["shared"] + record["rare"] == 32


def test_sites_name_what_is_crossed(sae, other):
    later = "blocks.1.hook_resid_post"
    sites = f"sae.sites=[{HOOK}+pair.{later},pair.{later},{HOOK}]"
    given = [f"lm.pair={other}", sites, "harvest.hook_names=[]", "sae.d_sae=[32]"]
    status, _, err = sae("eval", "name=sites", *given)
    assert status == 0, err
    crossed, theirs, own = read(sae.folder / "sites" / "eval" / "result.json")["saes"]
    assert len(crossed["sources"]) == 2
    assert theirs["sources"] == own["sources"] == []
    assert theirs["ce_clean"] == crossed["sources"][1]["ce_clean"]
    assert own["ce_clean"] == crossed["sources"][0]["ce_clean"]
    status, _, err = sae("eval", "name=sites", "suite=diff", defaults=False)
    assert status == 0, err
    assert len(read(sae.folder / "sites" / "eval" / "diff" / "result.json")["crosscoders"]) == 1
    status, out, err = sae("train", "name=planned", "plan=true", *given)
    assert status == 0, err
    assert "16 steps of 3 SAEs" in out


@pytest.mark.parametrize(
    ("stage", "overrides", "named"),
    [
        ("behavior", [], "`sae behavior` is about one"),
        ("demo", [], "`sae demo` is about one"),
        ("organism", [], "`sae organism` is about one"),
        ("steer", [], "`sae steer` is about one"),
        ("train", ["harvest.hook_names=[blocks.9.hook_resid_post]"], "blocks.9.hook_resid_post"),
        ("train", [f"sae.sites=[{HOOK}+pair.blocks.9.hook_mlp_out]", "harvest.hook_names=[]"], "'pair.blocks.9"),
        ("train", ["lm.pair=null", f"sae.sites=[pair.{HOOK}]", "harvest.hook_names=[]"], "name it with lm.pair="),
        ("eval", ["lm.pair=null", "suite=diff"], "name the second one"),
        ("eval", ["suite=diff", f"sae.sites=[{HOOK}]"], "none of the 1 SAEs reads both models"),
    ],
)
def test_what_a_pair_is_not_for_is_refused_in_one_sentence(sae, other, stage, overrides, named):
    status, _, err = sae(stage, "name=refused", f"lm.pair={other}", *HOOKS, *overrides)
    assert status == 2
    assert named in err
    assert "Traceback" not in err
    assert not (sae.folder / "refused").exists(), "what is refused costs nothing"


def test_a_model_with_another_tokenizer_is_refused(sae, tmp_path):
    folder = save_checkpoint(tmp_path / "odd", "llama")
    byte_tokenizer(bos=False).save_pretrained(folder)
    status, _, err = sae("train", "name=refused", f"lm.pair={folder}", *HOOKS)
    assert status == 2
    assert "a pair needs one tokenizer" in err
    assert not (sae.folder / "refused").exists()
