"""dictionary_learning's folders: the maths of each class written down once more, and what is refused."""

import json

import pytest
import torch

import sae
from sae.autoencoder.sae import SAEConfig, make
from sae.formats import registry
from sae.formats.dictionary_learning import FORMAT, hook_of

D_IN, D_SAE, K = 6, 12, 3
HOOK = "blocks.4.hook_resid_post"
LINEAR = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE)}
PLAIN = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
TOPK = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.4)}
TRAINER = {
    "layer": 4,
    "lm_name": "toy/lm",
    "submodule_name": "resid_post_layer_4",
    "activation_dim": D_IN,
    "dict_size": D_SAE,
}


def drawn(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def tensors_of(name):
    if name == "AutoEncoder":
        return drawn(**LINEAR, bias=(D_IN,))
    if name == "AutoEncoderNew":
        return drawn(**LINEAR, **{"decoder.bias": (D_IN,)})
    if name == "GatedAutoEncoder":
        own = {"r_mag": (D_SAE,), "gate_bias": (D_SAE,), "mag_bias": (D_SAE,), "decoder_bias": (D_IN,)}
        return drawn(**{key: LINEAR[key] for key in ("encoder.weight", "decoder.weight")}, **own)
    if name == "JumpReluAutoEncoder":
        return drawn(**PLAIN, threshold=(D_SAE,))
    if name == "MatryoshkaBatchTopKSAE":
        return drawn(**PLAIN) | TOPK | {"group_sizes": torch.tensor([2, 3, 7])}
    return drawn(**LINEAR, b_dec=(D_IN,)) | TOPK


def written(folder, name="BatchTopKSAE", change=None, buffer=None, **trainer):
    """A folder as their training leaves it; a value of None takes a tensor or field out."""
    folder.mkdir(parents=True)
    held = {key: value for key, value in (tensors_of(name) | (change or {})).items() if value is not None}
    torch.save(held, folder / "ae.pt")
    said = {"dict_class": name, **TRAINER, **({"k": K} if "TopK" in name else {}), **trainer}
    said = {key: value for key, value in said.items() if value is not None}
    (folder / "config.json").write_text(json.dumps({"trainer": said, "buffer": buffer or {"ctx_len": 128}}))
    return held


def x(n=30):
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1))


def acts_of(name, held):
    """Latents, and decoder rows, by the definitions."""
    encoder = held["encoder.weight"].T if "encoder.weight" in held else held["W_enc"]
    decoder = held["decoder.weight"].T if "decoder.weight" in held else held["W_dec"]
    if name == "AutoEncoder":
        norms = decoder.norm(dim=1)
        return norms * ((x() - held["bias"]) @ encoder + held["encoder.bias"]).relu(), decoder / norms[:, None]
    if name == "AutoEncoderNew":
        return (x() @ encoder + held["encoder.bias"]).relu(), decoder
    if name == "GatedAutoEncoder":
        pre = (x() - held["decoder_bias"]) @ encoder
        return (pre + held["gate_bias"] > 0) * (held["r_mag"].exp() * pre + held["mag_bias"]).relu(), decoder
    if name == "JumpReluAutoEncoder":
        pre = x() @ encoder + held["b_enc"]
        return (pre * (pre > held["threshold"])).relu(), decoder
    pre = ((x() - held["b_dec"]) @ encoder + held.get("encoder.bias", held.get("b_enc"))).relu()
    kept = pre >= pre.topk(K, dim=1).values[:, -1:] if name == "AutoEncoderTopK" else pre > held["threshold"]
    return pre * kept, decoder


@pytest.mark.parametrize(
    ("name", "architecture", "b_dec"),
    [
        ("AutoEncoder", "relu", "bias"),
        ("AutoEncoderNew", "relu", "decoder.bias"),
        ("GatedAutoEncoder", "gated", "decoder_bias"),
        ("JumpReluAutoEncoder", "jumprelu", "b_dec"),
        ("AutoEncoderTopK", "topk", "b_dec"),
        ("BatchTopKSAE", "batch_topk", "b_dec"),
        ("MatryoshkaBatchTopKSAE", "matryoshka_batch_topk", "b_dec"),
    ],
)
def test_every_class_computes_what_it_says(tmp_path, name, architecture, b_dec):
    held = written(tmp_path / "trainer_0", name)
    one = sae.load(tmp_path / "trainer_0")
    acts, decoder = acts_of(name, held)
    found = one(x())
    torch.testing.assert_close(found.latent_acts, acts, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.recons, acts @ decoder + held[b_dec], atol=2e-5, rtol=1e-5)
    assert torch.equal(found.latent_acts != 0, acts != 0)
    config = one.config
    assert (config.architecture, config.hook_name, config.lm_name) == (architecture, HOOK, "toy/lm")
    assert config.l0 == (K if "TopK" in name else 0)
    assert config.metadata["source"]["said"]["trainer"]["dict_class"] == name
    one.save(tmp_path / "native")
    assert sae.load(tmp_path / "native").config == config


def test_groups_become_prefixes(tmp_path):
    written(tmp_path / "a", "MatryoshkaBatchTopKSAE")
    assert sae.load(tmp_path / "a").sparsity.prefix_sizes(0) == [2, 5, 12]
    written(tmp_path / "b", "MatryoshkaBatchTopKSAE", change={"group_sizes": torch.tensor([2, 3])})
    with pytest.raises(sae.UserError, match="group_sizes add up to 5"):
        sae.load(tmp_path / "b")


def test_a_dead_latent_without_a_decoder_row_stays_finite(tmp_path):
    held = tensors_of("AutoEncoder")
    held["decoder.weight"][:, 3] = 0
    written(tmp_path / "a", "AutoEncoder", change=held)
    one = sae.load(tmp_path / "a")
    assert bool(torch.isfinite(one(x()).recons).all())
    assert one.W_dec[3].norm() == 0


def test_old_files_say_k_in_the_configuration_only(tmp_path):
    written(tmp_path / "a", "AutoEncoderTopK", change={"k": None, "threshold": None})
    assert sae.load(tmp_path / "a").config.l0 == K
    written(tmp_path / "b", "AutoEncoderTopK", change={"k": None}, k=None)
    with pytest.raises(sae.UserError, match=r"k=\.\.\."):
        sae.load(tmp_path / "b")
    assert sae.load(tmp_path / "b", k=5).config.l0 == 5
    with pytest.raises(sae.UserError, match="says k = 3, not 5"):
        sae.load(tmp_path / "a", k=5)
    written(tmp_path / "c", "AutoEncoderTopK", k=4)
    with pytest.raises(sae.UserError, match="3 in its weights, but 4"):
        sae.load(tmp_path / "c")


def test_where_it_reads_is_one_rule():
    assert hook_of("resid_post_layer_4", 4) == HOOK
    assert hook_of("resid_post_layer_x", 4) == hook_of("mlp", 4) == hook_of("", 4) == ""
    with pytest.raises(sae.UserError, match="contradicts layer 5"):
        hook_of("resid_post_layer_4", 5)


@pytest.mark.parametrize(
    "said",
    [
        {"submodule_name": None},
        {"submodule_name": "mlp_out"},
        {"buffer": {"io": "in"}},
        {"buffer": {"io": "in_and_out"}},
    ],
    ids=str,
)
def test_where_it_is_not_said_it_is_asked_for(tmp_path, said):
    written(tmp_path / "a", **said)
    with pytest.raises(sae.UserError, match=r"hook_name=\.\.\."):
        sae.load(tmp_path / "a")
    assert sae.load(tmp_path / "a", hook_name="a->b").kind == "transcoder"


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"dict_class": None}, "has no 'dict_class'"),
        ({"dict_class": "BatchTopkSAE"}, "did you mean BatchTopKSAE"),
        ({"dict_class": "AutoEncoder"}, "which nothing is known of"),
        ({"submodule_name": None, "submodule_names": "x"}, "did you mean submodule_name"),
        ({"dict_size": 24}, "dict_size"),
        ({"activation_dim": 12}, "activation_dim"),
        ({"lm_name": None}, r"lm_name=\.\.\."),
        ({"layer": "4"}, "must be a whole number"),
        ({"change": {"threshold": None}}, "'threshold' is missing"),
        ({"change": {"W_skip": torch.zeros(2)}}, "W_skip"),
        ({"change": {"encoder.bias": torch.full((D_SAE,), torch.inf)}}, "not finite"),
        ({"change": {"b_dec": torch.zeros(5)}}, "is the format right"),
    ],
    ids=str,
)
def test_files_that_do_not_fit_are_refused(tmp_path, said, says):
    written(tmp_path / "a", **said)
    with pytest.raises(sae.UserError, match=says):
        sae.load(tmp_path / "a")


def test_weights_without_a_configuration_are_refused(tmp_path):
    written(tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(sae.UserError, match=r"config\.json"):
        sae.load(tmp_path / "a", format="dictionary_learning")
    (tmp_path / "a" / "config.json").write_text("[]")
    with pytest.raises(sae.UserError, match="not a mapping"):
        sae.load(tmp_path / "a")


class Hostile:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_code_in_the_weights_is_not_run(tmp_path):
    written(tmp_path / "a")
    torch.save({"b_dec": Hostile(tmp_path / "mark")}, tmp_path / "a" / "ae.pt")
    with pytest.raises(sae.UserError, match="was not opened"):
        sae.load(tmp_path / "a")
    assert not (tmp_path / "mark").exists()
    torch.load(tmp_path / "a" / "ae.pt", weights_only=False)["b_dec"].close()  # it does run where it is let
    assert (tmp_path / "mark").exists()


def make_sae(architecture="topk", hook_name=HOOK, l0=K, **options):
    return make(SAEConfig(architecture, D_IN, D_SAE, l0, 0, hook_name, "toy", **options))


def negative():
    one = make_sae("jumprelu")
    with torch.no_grad():
        one.sparsity.threshold[2] = -0.1
    return one


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (make_sae("abs_topk"), "no abs_topk"),
        (make_sae("groupmax"), "no groupmax"),
        (make_sae("batch_topk", l0=2.5), "whole k"),
        (make_sae(hook_name="a+b"), "no crosscoders"),
        (make_sae(hook_name="a->b", skip=True), "no skip transcoders"),
        (make_sae(hook_name="a->b", d_out=4), "from 6 wide to 4"),
        (make_sae(normalize="rms"), "rms"),
        (negative(), "below 0"),
    ],
    ids=["abs_topk", "groupmax", "l0", "crosscoder", "skip", "widths", "normalised", "negative"],
)
def test_what_it_cannot_hold_is_not_written(tmp_path, one, says):
    with pytest.raises(sae.UserError, match=says):
        FORMAT.write(one, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("one", "name"),
    [
        (make_sae("relu"), "AutoEncoder"),
        (make_sae("relu", "a->b"), "AutoEncoderNew"),
        (make_sae("matryoshka_batch_topk"), "MatryoshkaBatchTopKSAE"),
        (make_sae("matryoshka_batch_topk", options={"n_sampled": 3}), "BatchTopKSAE"),
        (make_sae("matryoshka_jumprelu"), "JumpReluAutoEncoder"),
        (make_sae("hierarchical_topk"), "AutoEncoderTopK"),
    ],
    ids=["relu", "transcoder", "matryoshka", "sampled", "jumprelu", "hierarchical"],
)
def test_what_is_written_is_read_again(tmp_path, one, name):
    with torch.no_grad():
        one.b_enc += 0.3
        one.b_dec -= 0.2
        if hasattr(one.sparsity, "threshold"):
            one.sparsity.threshold += 0.5
    FORMAT.write(one, tmp_path / "out")
    assert registry.find(tmp_path / "out").name == "dictionary_learning"
    said = json.loads((tmp_path / "out" / "config.json").read_text())["trainer"]
    assert (said["dict_class"], said["layer"]) == (name, 4 if one.kind == "sae" else None)
    again = sae.load(tmp_path / "out")
    assert (again.config.hook_name, again.config.lm_name) == (one.config.hook_name, "toy")
    torch.testing.assert_close(again(x()).latent_acts, one(x()).latent_acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again(x()).recons, one(x()).recons, atol=1e-5, rtol=1e-5)
