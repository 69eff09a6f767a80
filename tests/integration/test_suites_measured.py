"""What the suites of `sae eval` share: what they depend on, what they refuse and when, what older results outlive."""

import dataclasses
import json

import pytest
import torch
from tiny_lms import save_word_checkpoint

from sae.autoencoder.sae import SAEConfig, make
from sae.evals.position import Curve, PositionResult
from sae.stages.measured import identity
from sae.stages.position import _parts

HOOK = "blocks.0.hook_resid_post"
SMALL = (f"harvest.hook_names=[{HOOK}]", "sae.d_sae=[64]", "train.total_tokens=2048")
GEOMETRY = ("suite=geometry", "eval.meta_steps=0")
WIDTH = 32  # of the tiny model


def read(path):
    return json.loads(path.read_text())


def save(folder, **changes):
    """A fresh SAE of the tiny model, in a folder of its own."""
    config = SAEConfig("topk", WIDTH, 64, 4, 0, HOOK, "toy")
    sae = make(dataclasses.replace(config, **changes))
    sae.save(folder)
    return folder


def measure(sae, *given, status=0):
    found, out, err = sae("eval", "name=x", *given)
    assert found == status, err
    assert "Traceback" not in err
    return out + err


def labelled(path, texts):
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"eval.labels={path}"


@pytest.mark.parametrize("suite", ["geometry", "relations", "train"])
def test_a_config_that_changed_makes_the_result_stale(sae, tmp_path, suite):
    """k of a top-k SAE is in no other file than its config."""
    one, two = save(tmp_path / "one"), save(tmp_path / "two", d_sae=32)
    given = (f"suite={suite}", "eval.meta_steps=0", f"eval.saes=[{one},{two}]")
    measure(sae, *given)
    assert "done before" in measure(sae, *given)
    for folder in (one, two):
        config = read(folder / "config.json")
        (folder / "config.json").write_text(json.dumps(config | {"l0": 5}))
    assert "done before" not in measure(sae, *given)


@pytest.mark.parametrize("suite", ["geometry", "relations"])
def test_what_was_done_is_kept_without_the_weights_and_lost_to_nothing_that_is_refused(sae, tmp_path, suite):
    one, two = save(tmp_path / "one"), save(tmp_path / "two", d_sae=32)
    given = (f"suite={suite}", "eval.meta_steps=0", f"eval.saes=[{one},{two}]")
    measure(sae, *given)
    folder = sae.folder / "x" / "eval" / "given" / suite
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {"manifest.json", "result.json", "0000.safetensors"}
    weights = two / "weights.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    assert "done before" in measure(sae, *given)
    weights.write_bytes(whole[:100])
    assert "is truncated" in measure(sae, *given, status=2)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_tensors_of_more_saes_than_there_are_now_are_cleared_away(sae, tmp_path):
    one, two = save(tmp_path / "one"), save(tmp_path / "two", seed=1)
    for saes, n_files in ([one, two], 4), ([one], 2):
        measure(sae, *GEOMETRY, f"eval.saes=[{','.join(map(str, saes))}]")
        run = sae.folder / "x" / "eval" / "given" / "geometry"
        rows = read(run / "result.json")["saes"]
        names = [f"latents/{number:04d}.safetensors" for number in range(n_files)]
        assert [row["latents"] for row in rows] == names
        assert sorted(path.name for path in (run / "latents").iterdir()) == [name.split("/")[1] for name in names]


def test_the_same_sae_twice_is_measured_once_and_a_wrong_folder_is_named(sae, tmp_path):
    one = save(tmp_path / "one")
    measure(sae, *GEOMETRY, f"eval.saes=[{one},{one}]")
    rows = read(sae.folder / "x" / "eval" / "given" / "geometry" / "result.json")["saes"]
    assert [row["control"] for row in rows] == ["none", "random"]
    for suite in ("geometry", "relations", "position"):
        assert "no file 'nowhere/config.json'" in measure(sae, f"suite={suite}", "eval.saes=[nowhere]", status=2)


def test_probing_refuses_before_it_trains(sae, tmp_path):
    texts = [f"text {number}" for number in range(40)]
    assert "give a k of at most 32" in measure(
        sae, *SMALL, "suite=probing", "eval.ks=[1,40]", labelled(tmp_path / "a.jsonl", texts), status=2
    )
    texts[6] = "<eos>"
    assert "record 7 has no token that an SAE sees" in measure(
        sae, *SMALL, "suite=probing", labelled(tmp_path / "b.jsonl", texts), status=2
    )
    (tmp_path / "c.jsonl").write_bytes('{"text": "café", "label": 1}\n'.encode("latin-1"))
    assert "c.jsonl' is not UTF-8" in measure(
        sae, *SMALL, "suite=probing", f"eval.labels={tmp_path / 'c.jsonl'}", status=2
    )
    assert not (sae.folder / "x").exists()


def test_a_k_that_does_not_fit_leaves_the_older_result(sae, tmp_path):
    given = (f"eval.saes=[{save(tmp_path / 'one')}]", "suite=probing")
    given += (labelled(tmp_path / "a.jsonl", [f"text {number}" for number in range(40)]),)
    measure(sae, *given, "eval.ks=[1]")
    folder = sae.folder / "x" / "eval" / "given" / "probing"
    measure(sae, *given, "eval.ks=[40]", status=2)
    assert (folder / "manifest.json").is_file()
    assert "done before" in measure(sae, *given, "eval.ks=[1]")


def test_absorption_counts_the_words_it_trains_on(sae, tmp_path):
    """Twelve words a letter, of which about eight are to train on: no letter has the ten that it takes."""
    words = [letter + "abcdefghijkl"[i] + "xy" for letter in "mns" for i in range(12)]
    model = save_word_checkpoint(tmp_path / "model", words, torch.randn(len(words), WIDTH))
    out = measure(sae, *SMALL, "suite=absorption", f"lm.name={model}")
    found = read(sae.folder / "x" / "eval" / "absorption" / "result.json")
    assert (found["status"], found["n_words"], found["saes"]) == ("too_few_words", 36, [])
    assert found["message"] in out
    assert "nan" not in out
    assert not (sae.folder / "x" / "train").exists(), "nothing is trained for nothing"


def test_relations_of_long_sites(sae, tmp_path):
    """A crosscoder's site may be as long as a file's name can be."""
    hooks = [
        f"blocks.{layer}.{name}" for layer in range(3) for name in ("hook_resid_mid", "hook_resid_post", "hook_mlp_out")
    ]
    site = "+".join(hooks)
    assert 200 < len(site) < 255
    saes = [save(tmp_path / str(n), hook_name=site, d_in=WIDTH * len(hooks), d_sae=n) for n in (16, 32)]
    measure(sae, "suite=relations", f"eval.saes=[{saes[0]},{saes[1]}]")
    result = read(sae.folder / "x" / "eval" / "given" / "relations" / "result.json")
    assert result["suite"] == "relations"
    assert [pair["latents"] for pair in result["pairs"]] == ["latents/0000.safetensors"]


def test_saes_of_other_options_are_another_group(sae, tmp_path):
    saes = []
    for options in ({}, {"penalty": "tanh"}):
        for d_sae in (16, 32):
            folder = tmp_path / f"{len(saes)}"
            saes.append(str(save(folder, architecture="jumprelu", d_sae=d_sae, options=options)))
    out = measure(sae, "suite=relations", f"eval.saes=[{','.join(saes)}]")
    result = read(sae.folder / "x" / "eval" / "given" / "relations" / "result.json")
    assert [(pair["options"], pair["large_path"]) for pair in result["pairs"]] == [
        ({}, saes[1]),
        ({"penalty": "tanh"}, saes[3]),
    ]
    assert "penalty=tanh" in out


def test_rows_are_told_apart_by_what_the_saes_differ_in():
    row = {"path": "a", "hook_name": HOOK, "architecture": "topk", "d_sae": 64, "control": "none"}
    one, other = row | {"l0_target": 4, "seed": 0}, row | {"l0_target": 8, "seed": 0}
    random = one | {"path": None, "seed": 1_000_003}
    assert identity([]) == identity([one, random]) == ["hook_name", "architecture", "d_sae", "control"]
    assert identity([one, other, random]) == ["hook_name", "architecture", "d_sae", "l0_target", "control"]
    assert identity([one, one | {"seed": 1}]) == ["hook_name", "architecture", "d_sae", "seed", "control"]


def test_seeds_are_in_the_table(sae):
    out = measure(sae, *SMALL, *GEOMETRY, "sae.seed=[0,1]")
    header = [line for line in out.splitlines() if line.startswith("hook_name")][-1]  # training's table comes first
    assert header.split()[:5] == ["hook_name", "architecture", "d_sae", "seed", "control"]


def test_quarters_are_of_predictions():
    """Each of the first three bins holds a quarter of all predictions, and the other five together the last."""
    n = torch.tensor([80, 80, 80, 4, 4, 4, 4, 64])
    values = torch.arange(8, dtype=torch.float64)
    curve = Curve(values, values)
    parts = _parts(PositionResult(torch.arange(8) * 2, 2, n, n, curve, curve, curve, curve))
    assert list(parts) == ["delta_ce 0-1", "delta_ce 2-3", "delta_ce 4-5", "delta_ce 6-15"]
    assert parts["delta_ce 6-15"] == pytest.approx((4 * (3 + 4 + 5 + 6) + 64 * 7) / 80)
    even = _parts(PositionResult(torch.arange(8), 1, n * 0 + 5, n, curve, curve, curve, curve))
    assert list(even.values()) == [0.5, 2.5, 4.5, 6.5]
    lone = _parts(PositionResult(torch.arange(1), 1, n[:1], n[:1], curve, curve, curve, curve))
    assert lone == {"delta_ce 0-0": 0}
