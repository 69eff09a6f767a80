"""Crosscoders of two models: what is lost at each hook point, and by each model."""

import pytest
import torch
from tiny_lms import save_checkpoint

from sae.autoencoder.crosscoder import Crosscoder
from sae.autoencoder.sae import SAE, SAEConfig
from sae.evals.position import METRICS, by_position, by_position_all
from sae.evals.reconstruction import ReconstructionMeter
from sae.evals.splice import splice, splice_all
from sae.lm.load import load_lm
from sae.lm.pair import PairedModel

HOOK = "blocks.1.hook_resid_post"
D = 32


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    folders = [save_checkpoint(tmp_path_factory.mktemp(f"seed{seed}"), "llama", seed) for seed in (0, 1)]
    return PairedModel(*(load_lm(str(folder), device="cpu") for folder in folders))


def exact(first, second):
    """A crosscoder that gives back each part exactly, or as zeros."""
    sae = Crosscoder(SAEConfig("relu", 2 * D, 4 * D, 0.0, 0, f"{HOOK}+pair.{HOOK}", "toy"))
    rows = torch.cat([torch.eye(2 * D), -torch.eye(2 * D)])
    with torch.no_grad():
        sae.W_enc.copy_(rows.t())
        sae.W_dec.copy_(rows)
        for part, kept in zip(sae.split(sae.W_dec), (first, second), strict=True):
            part.mul_(float(kept))
    return sae


@pytest.fixture
def batch(paired):
    return paired.tokenize(["the cat sat on a mat", "and looked at every bird that flew over its house"])


def test_each_model_is_charged_with_its_own_part(paired, batch):
    both, first, neither = splice_all(paired, [exact(1, 1), exact(1, 0), exact(0, 0)], [batch])
    for found in (both, first, neither):
        assert list(found.models) == ["", "pair."]
    for prefix in ("", "pair."):
        assert both.models[prefix].ce_recovered == pytest.approx(1, abs=1e-4)
        assert neither.models[prefix].ce_recovered == pytest.approx(0, abs=1e-5)
    assert first.models[""].ce_recovered == pytest.approx(1, abs=1e-4)
    assert first.models["pair."] == neither.models["pair."]
    clean = [found.ce_clean for found in first.models.values()]
    assert abs(clean[0] - clean[1]) > 0.01, "the models are two"
    assert first.together.n_tokens == 2 * first.models[""].n_tokens
    assert first.together.ce_clean == pytest.approx(sum(clean) / 2)
    assert first.together.delta_ce == pytest.approx(first.models["pair."].delta_ce / 2, abs=1e-5)


def test_an_sae_of_one_model_is_spliced_into_that_one(paired, batch):
    own, theirs = (SAE(SAEConfig("relu", D, 64, 0.0, 0, name, "toy")) for name in (HOOK, f"pair.{HOOK}"))
    found = splice_all(paired, [own, theirs], [batch])
    assert [list(each.models) for each in found] == [[""], ["pair."]]
    alone = SAE(SAEConfig("relu", D, 64, 0.0, 0, HOOK, "toy"))
    alone.load_state_dict(theirs.state_dict())
    assert found[1].together == splice(paired.pair, alone, [batch])
    assert found[0].together == splice(paired, own, [batch]) == splice_all(paired, [own], [batch])[0].together


def test_curves_by_position_add_up_to_what_each_model_loses(paired, batch):
    saes = [exact(1, 0), SAE(SAEConfig("relu", D, 64, 0.0, 0, f"pair.{HOOK}", "toy"))]
    for curves, spliced in zip(by_position_all(paired, saes, [batch]), splice_all(paired, saes, [batch]), strict=True):
        assert list(curves.models) == list(spliced.models)
        parts = [(curves.together, spliced.together)]
        parts += [(curves.models[name], spliced.models[name]) for name in curves.models]
        for curve, total in parts:
            assert int(curve.n.sum()) == total.n_tokens
            for name in METRICS:
                mean = (getattr(curve, name).mean * curve.n).sum() / curve.n.sum()
                assert float(mean) == pytest.approx(getattr(total, name), rel=1e-5, abs=1e-5)


def test_two_models_make_no_more_rows(paired, batch):
    """Of a model and itself the mean and its error are those of one: what both make of a row is not independent."""
    twins = PairedModel(paired._first, paired._first)
    sae = exact(0, 0)
    rows = batch.select([0, 1])
    (found,) = by_position_all(twins, [sae], [rows])
    alone = SAE(SAEConfig("relu", D, 64, 0.0, 0, HOOK, "toy"))
    with torch.no_grad():
        alone.W_dec.zero_()
    own = by_position(twins, alone, [rows])
    assert found.together.n.tolist() == (2 * own.n).tolist()
    assert found.together.n_rows.tolist() == own.n_rows.tolist()
    for name in METRICS:
        for one, other in zip(getattr(found.together, name), getattr(own, name), strict=True):
            assert torch.allclose(one, other, atol=1e-6, equal_nan=True)


def test_fvu_is_given_at_each_hook_point(paired, batch):
    acts = torch.cat(list(paired.activations(batch, [HOOK, f"pair.{HOOK}"]).values()), dim=-1)[batch.mask]
    meter = ReconstructionMeter(exact(1, 0))
    meter.update(acts[:10])
    meter.update(acts[10:])
    found = meter.result()
    first, second = found.source_fvu
    missed, parts = acts[:, D:].double(), acts.double()
    variation = [(part - part.mean(0)).square().sum() for part in (parts[:, :D], parts[:, D:])]
    assert first == pytest.approx(0, abs=1e-10)
    assert second == pytest.approx(float(missed.square().sum() / variation[1]), rel=1e-6)
    assert found.fvu == pytest.approx(float(missed.square().sum() / sum(variation)), rel=1e-6)
    alone = ReconstructionMeter(SAE(SAEConfig("relu", D, 64, 0.0, 0, HOOK, "toy")))
    alone.update(acts[:, :D])
    assert alone.result().source_fvu == ()
