"""`sae eval suite=...` through the command line, on tiny models in which what is looked for was put, or was not."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_lms import save_word_checkpoint

from sae.autoencoder.sae import SAE, SAEConfig, unit_rows
from sae.evals.position import Curve, PositionResult
from sae.lm.load import load_lm
from sae.stages.position import _parts

SMALL = ("harvest.hook_names=[blocks.0.hook_resid_post]", "sae.d_sae=[64]", "train.total_tokens=2048")


def read(path):
    return json.loads(path.read_text())


def labelled(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"eval.labels={path}"


@pytest.fixture(scope="module")
def sentences():
    """Texts that end in "b" where the first of their labels is 1, and where the second is, with even chances."""
    rng = np.random.default_rng(0)
    letters = list("cdefghij")
    ends, chances = rng.integers(0, 2, 240), rng.integers(0, 2, 240)
    texts = ["".join(rng.choice(letters, 8)) + " " + "ab"[end] for end in ends]
    return texts, ends.tolist(), chances.tolist()


def test_position_geometry_and_probing_of_one_run(sae, tmp_path, sentences):
    texts, ends, chances = sentences
    assert sae("eval", "name=one", *SMALL)[0] == 0
    run = sae.folder / "one" / "eval"
    table = read(run / "result.json")["saes"]
    assert [row["control"] for row in table] == ["none"]

    status, out, err = sae("eval", "name=one", "suite=position", defaults=False)
    assert status == 0, err
    (row,) = read(run / "position" / "result.json")["saes"]
    assert (row["path"], row["control"], row["seed"]) == (table[0]["path"], "none", 0)
    n, delta, errors = (np.array(values) for values in (row["n"], row["delta_ce"]["mean"], row["delta_ce"]["se"]))
    assert (n * delta).sum() / n.sum() == pytest.approx(table[0]["delta_ce"], rel=1e-4)
    assert len(errors) == len(row["start"]) == 31
    assert "position/result.json: 1 SAEs" in out
    assert "delta_ce 0-7 " in out  # four parts of 31 positions
    first = float((n[:8] * delta[:8]).sum() / n[:8].sum())
    assert float(out.splitlines()[-2].split()[4]) == pytest.approx(first, rel=1e-3, abs=1e-4)

    status, _, err = sae("eval", "name=one", "suite=geometry", "eval.meta_steps=20", defaults=False)
    assert status == 0, err
    trained, random = read(run / "geometry" / "result.json")["saes"]
    assert (random["control"], random["path"], random["beside"]) == ("random", None, trained["path"])
    assert random["enc_dec_cosine"]["low"] == pytest.approx(1)
    assert trained["n_alive"] == round(64 * (1 - table[0]["dead_fraction"]))
    assert random["n_alive"] == trained["n_alive"]
    assert random["meta_fve"] == trained["meta_fve_random"] == random["meta"]["fve"]
    assert trained["meta"]["random"] == random["meta"]
    assert -1 < trained["meta_fve"] < 1
    tensors = load_file(run / "geometry" / trained["latents"])
    cosine = tensors["neighbor_cosine"][tensors["alive"]].abs()
    assert trained["neighbor_cosine"]["median"] == pytest.approx(float(cosine.median()), abs=0.05)

    planted = [{"text": text, "label": label} for text, label in zip(texts, ends, strict=True)]
    status, out, err = sae("eval", "name=one", "suite=probing", labelled(tmp_path / "a.jsonl", planted), defaults=False)
    assert status == 0, err
    found = read(run / "probing" / "result.json")
    assert (found["n_texts"], found["n_groups"], found["position"]) == (240, len(set(texts)), "last")
    trained, random = found["saes"]
    assert random["l0"] == trained["l0"] > 0
    (label,) = trained["labels"]
    assert (label["label"], label["n_positive"]) == ("1", sum(ends))
    assert label["dense"]["auroc"]["estimate"] == 1  # the embedding of the last token is in the residual stream
    assert label["n_train"] + label["n_test"] == 240
    best = label["sparse"][-1]
    assert best["score"]["auroc"]["low"] <= best["score"]["auroc"]["estimate"] <= best["score"]["auroc"]["high"]
    assert best["random"]["auroc"]["n_draws"] == best["shuffled"]["auroc"]["n_draws"] == 20
    assert random["labels"][0]["dense"] == label["dense"]

    null = [{"text": text, "label": label} for text, label in zip(texts, chances, strict=True)]
    given = (labelled(tmp_path / "b.jsonl", null), "eval.position=mean", "eval.ks=[2]")
    status, out, err = sae("eval", "name=one", "suite=probing", *given, defaults=False)
    assert status == 0, err
    for row in read(run / "probing" / "result.json")["saes"]:
        (label,) = row["labels"]
        score = label["sparse"][0]["score"]["auroc"]
        assert score["low"] < 0.6
        assert score["high"] > 0.4
    status, out, _ = sae("eval", "name=one", "suite=probing", *given, defaults=False)
    assert "probing: done before" in out
    # Keys of the suites do not make the run's own table stale.
    status, out, _ = sae("eval", "name=one", defaults=False)
    assert "eval: done before" in out


def test_controls_of_the_run_stand_in_place_of_random_saes(sae):
    status, out, err = sae("train", "name=two", *SMALL, "sae.control=[none,frozen_decoder]")
    assert status == 0, err
    assert "control" in out
    trained = read(sae.folder / "two" / "train" / "result.json")["saes"]
    assert [row["control"] for row in trained] == ["none", "frozen_decoder"]
    status, out, err = sae("eval", "name=two", defaults=False)
    assert status == 0, err
    table = read(sae.folder / "two" / "eval" / "result.json")["saes"]
    assert [row["control"] for row in table] == ["none", "frozen_decoder"]
    assert "control" in out
    status, _, err = sae("eval", "name=two", "suite=geometry", "eval.meta_steps=0", defaults=False)
    assert status == 0, err
    own = read(sae.folder / "two" / "eval" / "geometry" / "result.json")
    assert [row["control"] for row in own["saes"]] == ["none", "frozen_decoder"]
    assert [row["meta_fve"] for row in own["saes"]] == [None, None]
    # One that is named is measured apart, with a random one beside it; the run's own result stays.
    only = ("suite=geometry", "eval.meta_steps=0", f"eval.saes=[{table[0]['path']}]")
    status, _, err = sae("eval", "name=two", *only, defaults=False)
    assert status == 0, err
    given = read(sae.folder / "two" / "eval" / "given" / "geometry" / "result.json")
    assert [row["control"] for row in given["saes"]] == ["none", "random"]
    assert read(sae.folder / "two" / "eval" / "geometry" / "result.json") == own


def test_the_neighbours_of_rows_in_few_dimensions_are_compared_with_those_of_such_rows(sae, model, tmp_path):
    """Rows that are random in two dimensions are near to each other; so then is what stands beside them."""
    hook = "blocks.0.hook_resid_post"
    d_in = load_lm(str(model), device="cpu").d_in(hook)
    one = SAE(SAEConfig("relu", d_in, 40, 4, 0, hook, "toy"))
    with torch.no_grad():
        one.W_dec.zero_()
        one.W_dec[:30, :2] = unit_rows(30, 2, torch.Generator().manual_seed(0))
        one.W_dec[30:] = unit_rows(10, d_in, torch.Generator().manual_seed(1))
        one.W_enc.copy_(one.W_dec.t())
        one.b_enc[:30], one.b_enc[30:] = 1.0, -1e6  # the last ten never fire
    one.save(tmp_path / "flat")
    status, _, err = sae("eval", "name=flat", "suite=geometry", "eval.meta_steps=0", f"eval.saes=[{tmp_path / 'flat'}]")
    assert status == 0, err
    folder = sae.folder / "flat" / "eval" / "given" / "geometry"
    trained, random = read(folder / "result.json")["saes"]
    assert trained["n_alive"] == random["n_alive"] == 30
    assert trained["neighbor_cosine"]["median"] > 0.99
    assert random["neighbor_cosine"]["median"] > 0.99
    first, second = (load_file(folder / row["latents"])["neighbor_cosine"] for row in (trained, random))
    assert not torch.allclose(first[:30], second[:30], atol=1e-3)


def test_the_curve_by_position_is_printed_in_quarters_of_the_predictions():
    """Ten texts of nine tokens and one of thirty-eight: most of what there is to say is about the first eight."""
    n = torch.tensor([11] * 8 + [1] * 29)
    delta = torch.arange(37, dtype=torch.float64)
    curve = Curve(delta, delta)
    found = _parts(PositionResult(torch.arange(37), 1, n, n, curve, curve, curve, curve))
    assert found == {
        "delta_ce 0-2": pytest.approx(1),
        "delta_ce 3-4": pytest.approx(3.5),
        "delta_ce 5-7": pytest.approx(6),
        "delta_ce 8-36": pytest.approx(22),
    }
    # Where one bin has nearly all, it is the only one of its quarter, and others are empty.
    n = torch.tensor([97, 3])
    curve = Curve(delta[:2], delta[:2])
    found = _parts(PositionResult(torch.tensor([0, 8]), 8, n, n, curve, curve, curve, curve))
    assert found == {"delta_ce 0-7": 0, "delta_ce 8-15": 1}


def words_and_embedding(knows):
    """Words of five first letters; embeddings that hold the letter, or nothing but chance."""
    rng = np.random.default_rng(0)
    words = sorted({letter + "".join(rng.choice(list("abcdefgh"), 5)) for letter in "klmns" for _ in range(60)})
    embedding = torch.randn(len(words), 32, generator=torch.Generator().manual_seed(0))
    if knows:
        for row, word in enumerate(words):
            embedding[row, "klmns".index(word[0])] += 6
    return words, embedding


@pytest.mark.parametrize("knows", [True, False])
def test_absorption_says_whether_the_model_knows_letters(sae, tmp_path, knows):
    words, embedding = words_and_embedding(knows)
    model = save_word_checkpoint(tmp_path / "model", words, embedding)
    text = tmp_path / "words.jsonl"
    rng = np.random.default_rng(1)
    text.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 30))}) + "\n" for _ in range(100)))
    status, out, err = sae(
        "eval",
        "name=letters",
        "suite=absorption",
        *SMALL,
        f"lm.name={model}",
        f"data.path={text}",
        "data.n_tokens=2000",
    )
    assert status == 0, err
    found = read(sae.folder / "letters" / "eval" / "absorption" / "result.json")
    assert found["n_words"] == len(words)
    trained, random = found["saes"]
    assert (trained["control"], random["control"]) == ("none", "random")
    assert trained["probe_f1"] == random["probe_f1"]
    if knows:
        assert (found["status"], found["message"]) == ("measured", None)
        assert trained["probe_f1"] > 0.8
        for letter in trained["letters"]:
            assert letter["label"] in "KLMNS"
            assert 0 <= letter["fraction"]["low"] <= letter["fraction"]["estimate"] <= letter["fraction"]["high"] <= 1
    else:
        assert found["status"] == "letters_unknown"
        assert "hardly knows first letters" in out
        assert trained["probe_f1"] < 0.45


def test_absorption_of_a_tokenizer_without_words(sae):
    status, out, err = sae("eval", "name=bytes", "suite=absorption", *SMALL)
    assert status == 0, err
    found = read(sae.folder / "bytes" / "eval" / "absorption" / "result.json")
    assert (found["status"], found["saes"], found["n_words"]) == ("too_few_words", [], 0)
    assert "has 0 words as one token" in found["message"]
    assert found["message"] in out
    assert "(no rows)" not in out
    assert not (sae.folder / "bytes" / "train").exists()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("suite=probing",), "give eval.labels="),
        (("suite=probing", "eval.labels=none.jsonl"), "no file 'none.jsonl'"),
        (("suite=probing", "eval.position=first"), "unknown eval.position 'first'"),
        (("suite=positions",), "did you mean position"),
        (("suite=position", "eval.bin_width=0"), "eval.bin_width=0"),
        (("suite=absorption", "sae.sites=[a+b]"), "not 'a+b', a crosscoder"),
    ],
)
def test_mistakes_are_said_before_anything_is_trained(sae, given, sentence):
    status, _, err = sae("eval", "name=wrong", *SMALL, *given)
    assert status == 2
    assert sentence in err
    assert not (sae.folder / "wrong" / "train").exists()


def test_other_mistakes_that_are_said_at_once(sae, tmp_path, sentences):
    texts, ends, _ = sentences
    rows = [{"text": text, "label": end, "group": end} for text, end in zip(texts, ends, strict=True)]
    status, _, err = sae("eval", "name=wrong", "suite=probing", *SMALL, labelled(tmp_path / "g.jsonl", rows))
    assert status == 2
    assert "cannot be split" in err
    long = [{"text": "a" * 200, "label": end} if i == 7 else {"text": text, "label": end}
            for i, (text, end) in enumerate(zip(texts, ends, strict=True))]  # fmt: skip
    status, _, err = sae("eval", "name=wrong", "suite=probing", *SMALL, labelled(tmp_path / "l.jsonl", long))
    assert status == 2
    assert "record 8 is 201 tokens long" in err
    assert not (sae.folder / "wrong" / "train").exists()
