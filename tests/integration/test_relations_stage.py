"""`sae eval suite=relations`: planted permutations come back, seeds and sizes are kept apart, one SAE is refused."""

import json

import pytest
import torch

from sae.autoencoder.sae import SAE, SAEConfig, unit_rows
from sae.files import read_tensors
from sae.lm.load import load_lm

HOOK = "blocks.0.hook_resid_post"


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def width(model):
    return load_lm(str(model), device="cpu").d_in(HOOK)


def save(folder, rows, seed=0, control="", hook=HOOK):
    """An SAE with these decoder rows; the folder's name is its own."""
    config = SAEConfig(
        "relu", rows.shape[1], len(rows), 4, seed, hook, "toy", metadata={"training": {"control": control}}
    )
    sae = SAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.t())
    path = folder / f"{hook}-{len(rows)}-{seed}-{control}"
    sae.save(path)
    return str(path)


def orthonormal(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0].t().contiguous()


def relate(sae, paths, name="relations", status=0, *more):
    found, out, err = sae("eval", "suite=relations", f"name={name}", f"eval.saes=[{','.join(paths)}]", *more)
    assert found == status, err
    return out + err


def test_planted_families_are_found(sae, width, tmp_path):
    """A wider dictionary holds the narrower one's rows in another order, two of them twice, and rows of its own."""
    rows = orthonormal(width)
    half = width // 2
    order = torch.randperm(width + 2, generator=torch.Generator().manual_seed(1))
    wide = torch.cat([rows, rows[:2]])[order]
    paths = [save(tmp_path, wide), save(tmp_path, rows[:half])]
    out = relate(sae, paths, "relations")
    run = sae.folder / "relations" / "eval" / "given" / "relations"
    result = read(run / "result.json")
    assert result["schema_version"] == 1
    truth = torch.tensor([*range(width), 0, 1])[order]
    truth[truth >= half] = -1
    (family,) = result["families"]
    assert [level["d_sae"] for level in family["levels"]] == [half, width + 2]
    assert family["levels"][1]["parent"] == truth.tolist()
    cosine = torch.tensor(family["levels"][1]["cosine"])
    assert cosine[truth >= 0].min() == 1
    assert cosine[truth < 0].abs().max() < 1e-3
    assert family["levels"][0]["stability"] is None
    (pair,) = result["pairs"]
    assert (pair["small"], pair["large"]) == (half, width + 2)
    assert pair["shared"] == 1
    assert pair["mean"] == pytest.approx(1, abs=1e-5)
    assert pair["null"]["matched_mean"] < 0.95
    assert pair["parents"] == pytest.approx((half + 2) / (width + 2))
    stitched = pair["stitching"]
    fired = read_tensors(run / pair["latents"])["fired"]
    assert stitched["novel"]["n"] == int(fired[truth < 0].sum())
    assert stitched["reconstruction"]["n"] == int(fired[truth >= 0].sum())
    assert stitched["silent"] == int((~fired).sum())
    assert result["seeds"] == result["notes"] == []
    for word in ("shared", "fvu_novel", str(run / "result.json")):
        assert word in out


def test_the_stitching_is_on_the_held_out_tokens_of_the_evaluation(sae):
    status, _, err = sae("eval", "name=both", f"harvest.hook_names=[{HOOK}]")
    assert status == 0, err
    status, _, err = sae("eval", "name=both", "suite=relations", f"harvest.hook_names=[{HOOK}]")
    assert status == 0, err
    measured = {one["d_sae"]: one for one in read(sae.folder / "both/eval/result.json")["saes"]}
    (pair,) = read(sae.folder / "both/eval/relations/result.json")["pairs"]
    stitched = pair["stitching"]
    assert stitched["n_tokens"] == measured[32]["n_tokens"]
    assert stitched["fvu_small"] == pytest.approx(measured[32]["fvu"], rel=1e-4)
    assert stitched["fvu_large"] == pytest.approx(measured[64]["fvu"], rel=1e-4)
    status, out, err = sae("eval", "name=both", "suite=relations", f"harvest.hook_names=[{HOOK}]")
    assert status == 0, err
    assert "done before" in out
    assert "novel" not in out, "finished work is not done again"
    status, _, err = sae("report", "name=both", defaults=False)
    assert status == 0, err
    assert "Sizes related" in (sae.folder / "both/report.html").read_text()


def test_seeds_are_compared_and_controls_stand_apart(sae, width, tmp_path):
    """Two seeds share all but a quarter of their rows; a control shares none, and is compared with nothing."""
    rows = orthonormal(width)
    quarter = width // 4
    other = torch.cat([rows[quarter:], unit_rows(quarter, width, torch.Generator().manual_seed(3))])
    paths = [save(tmp_path, rows, 0), save(tmp_path, other, 1), save(tmp_path, orthonormal(width, 5), 0, "random")]
    out = relate(sae, paths)
    run = sae.folder / "relations" / "eval" / "given" / "relations"
    result = read(run / "result.json")
    assert result["pairs"] == result["families"] == []
    (row,) = result["seeds"]
    assert (row["d_sae"], row["seeds"], row["control"]) == (width, [0, 1], "none")
    stability = read_tensors(run / row["latents"])["s0"]
    assert stability[quarter:].tolist() == pytest.approx([1.0] * (width - quarter), abs=1e-5)
    assert stability[:quarter].max() < 0.95
    assert row["shared"][0] == pytest.approx(float((stability >= 0.7).double().mean()))
    assert row["null"]["best_mean"] < row["null"]["best_high"]
    assert len(result["notes"]) == 1
    assert "have nothing to be compared with" in result["notes"][0]
    assert "sae.d_sae=[...]" in out


def test_seeds_are_kept_apart_when_sizes_are_compared(sae, width, tmp_path):
    """Of one seed the wider SAE repeats the narrower one; the other seed's have other rows."""
    rows = orthonormal(width)
    half = width // 2
    paths = [save(tmp_path, rows[:half], 0), save(tmp_path, rows, 0)]
    paths += [save(tmp_path, rows[half:], 1), save(tmp_path, rows[half:].repeat(2, 1), 1)]
    relate(sae, paths)
    result = read(sae.folder / "relations/eval/given/relations/result.json")
    zero, one = result["pairs"]
    assert (zero["seed"], one["seed"]) == (0, 1)
    assert zero["shared"] == one["shared"] == 1
    assert (zero["parents"], one["parents"]) == (0.5, 1)
    narrow = result["families"][0]["levels"][0]
    assert narrow["stability"] == pytest.approx([0.0] * half, abs=1e-3)


def test_one_size_and_one_seed_are_refused_before_anything_is_trained(sae):
    status, _, err = sae("eval", "name=one", "suite=relations", "sae.d_sae=[32]")
    assert status == 2
    assert "sae.d_sae=[32,64]" in err
    assert "sae.seed=[0,1]" in err
    assert not (sae.folder / "one" / "train").exists()
    assert not (sae.folder / "one" / "eval").exists()


def test_saes_that_cannot_be_related_are_refused(sae, width, tmp_path):
    rows = orthonormal(width)
    one = save(tmp_path, rows)
    (tmp_path / "again").mkdir()
    twice = save(tmp_path / "again", rows)
    elsewhere = save(tmp_path, rows[:8], hook="blocks.1.hook_resid_post")
    narrow = save(tmp_path, rows[:5, : width // 2].contiguous())
    assert "have the same size and seed" in relate(sae, [one, twice], "twice", 2)
    assert "no two of the 2 SAEs share" in relate(sae, [one, elsewhere], "apart", 2)
    assert f"is for activations {width // 2} wide" in relate(sae, [one, narrow], "narrow", 2)
    assert not list(sae.folder.glob("*/eval"))
