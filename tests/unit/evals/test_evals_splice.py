"""Splicing: a perfect SAE costs nothing, a silent one costs what zeros cost, and only real predictions count."""

import pytest
import torch
from fake_lm import VOCAB, D, FakeLM, batch, coder

from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.evals.splice import splice
from sae.lm.tokens import Role, TokenBatch


def test_identity_recovers_all_and_silence_nothing():
    found = splice(FakeLM(), coder("identity"), [batch(), batch()])
    assert found.ce_recovered == pytest.approx(1)
    assert found.delta_ce == pytest.approx(0, abs=1e-6)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.kl_zero > 0.1
    assert found.n_tokens == 2 * (7 + 5 + 7)
    silent = splice(FakeLM(), coder("zero"), [batch()])
    assert silent.ce_recovered == 0
    assert silent.delta_ce == silent.ce_zero - silent.ce_clean != 0
    assert silent.kl == silent.kl_zero


def test_known_cross_entropy_and_kl():
    lm, rows = FakeLM(), batch(0)
    logs = lm.logits(rows)[:, :-1].double().log_softmax(-1)
    clean = -logs.gather(-1, rows.tokens[:, 1:, None]).mean()
    uniform = torch.tensor(VOCAB).log()
    found = splice(lm, coder("zero"), [rows], splice_mask=lambda given: given.mask)
    assert found.ce_clean == pytest.approx(float(clean), rel=1e-5)
    assert found.ce_zero == pytest.approx(float(uniform), rel=1e-5)
    assert found.kl == pytest.approx(float((logs.exp() * (logs + uniform)).sum(-1).mean()), rel=1e-5)


def test_special_tokens_are_left_alone_by_default():
    """Zeros at BOS too move the loss: the default leaves its prediction as it is."""
    lm, rows = FakeLM(), batch(0)
    only_bos = splice(lm, coder("zero"), [rows], splice_mask=lambda given: given.roles == Role.SPECIAL)
    rest = splice(lm, coder("zero"), [rows])
    everything = splice(lm, coder("zero"), [rows], splice_mask=lambda given: given.mask)
    assert rest.delta_ce + only_bos.delta_ce == pytest.approx(everything.delta_ce, rel=1e-4)
    assert only_bos.delta_ce != 0


def test_padding_content_does_not_matter():
    rows = batch()
    other = rows._replace(tokens=torch.where(rows.mask, rows.tokens, (rows.tokens + 3) % VOCAB))
    model = SAE(SAEConfig("topk", D, 12, 2.0, 0, "h", "toy"))
    assert splice(FakeLM(), model, [rows]) == splice(FakeLM(), model, [other])


def test_nothing_to_predict_is_refused():
    rows = batch()
    with pytest.raises(UserError, match="no next-token prediction"):
        splice(FakeLM(), coder("identity"), [TokenBatch(rows.tokens[:, :1], rows.mask[:, :1], rows.roles[:, :1])])


def test_real_model(real_lm):
    rows = batch()
    hook_name = "blocks.1.hook_resid_post"
    found = splice(real_lm, coder("identity", 32, hook_name), [rows])
    assert found.ce_recovered == pytest.approx(1, abs=1e-4)
    assert found.kl == pytest.approx(0, abs=1e-5)
    assert found.ce_zero != pytest.approx(found.ce_clean, abs=1e-3)
    silent = splice(real_lm, coder("zero", 32, hook_name), [rows])
    assert silent.ce_recovered == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="wide"):
        splice(real_lm, coder("identity", 31, hook_name), [rows])


def test_real_left_padding_counts_the_same_predictions(real_lm):
    texts = ["hello there", "a much longer text than that", "mid size"]
    encoder = coder("zero", 32, "blocks.1.hook_resid_post")
    right, left = (splice(real_lm, encoder, [real_lm.tokenize(texts, padding_side=side)]) for side in ("right", "left"))
    assert right.n_tokens == left.n_tokens
    for one, two in zip(right, left, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
