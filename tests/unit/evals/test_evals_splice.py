"""Splicing: a perfect SAE costs nothing, a silent one costs what zeros cost, and only real predictions count."""

import contextlib

import pytest
import torch

from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.evals import splice as module
from sae.evals.splice import splice
from sae.lm.tokens import Role, TokenBatch

VOCAB, D = 11, 6


class FakeLM:
    """Embedding, one hook point, unembedding."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.randn(VOCAB, D, generator=generator)
        self.unembed = torch.randn(D, VOCAB, generator=generator)
        self.edits = {}

    def logits(self, batch):
        acts = self.embed[batch.tokens]
        for fn in self.edits.values():
            acts = fn(acts, None)
        return acts @ self.unembed


@pytest.fixture(autouse=True)
def fake_edit(request, monkeypatch):
    @contextlib.contextmanager
    def edit(lm, edits):
        lm.edits = edits
        yield
        lm.edits = {}

    if "real" not in request.node.name:
        monkeypatch.setattr(module, "edit", edit)


def batch(n_pad=2):
    tokens = torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(1))
    roles = torch.full((3, 8), int(Role.TEXT), dtype=torch.uint8)
    roles[:, 0] = Role.SPECIAL
    mask = torch.ones(3, 8, dtype=torch.bool)
    if n_pad:
        mask[1, -n_pad:] = False
    roles[~mask] = Role.PAD
    return TokenBatch(tokens, mask, roles)


def sae(d=D, kind="identity", hook_name="h"):
    model = SAE(SAEConfig("relu", d, 2 * d, 0.0, 0, hook_name, "toy"))
    with torch.no_grad():
        rows = torch.cat([torch.eye(d), -torch.eye(d)])
        model.W_dec.copy_(rows)
        model.W_enc.copy_(rows.t() if kind == "identity" else 0 * rows.t())
    return model


def test_identity_recovers_all_and_silence_nothing():
    found = splice(FakeLM(), sae(), [batch(), batch()])
    assert found.ce_recovered == pytest.approx(1)
    assert found.delta_ce == pytest.approx(0, abs=1e-6)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.kl_zero > 0.1
    assert found.n_tokens == 2 * (7 + 5 + 7)
    silent = splice(FakeLM(), sae(kind="zero"), [batch()])
    assert silent.ce_recovered == 0
    assert silent.delta_ce == silent.ce_zero - silent.ce_clean != 0
    assert silent.kl == silent.kl_zero


def test_known_cross_entropy_and_kl():
    lm, rows = FakeLM(), batch(0)
    logs = lm.logits(rows)[:, :-1].double().log_softmax(-1)
    clean = -logs.gather(-1, rows.tokens[:, 1:, None]).mean()
    uniform = torch.tensor(VOCAB).log()
    found = splice(lm, sae(kind="zero"), [rows], splice_mask=lambda given: given.mask)
    assert found.ce_clean == pytest.approx(float(clean), rel=1e-5)
    assert found.ce_zero == pytest.approx(float(uniform), rel=1e-5)
    assert found.kl == pytest.approx(float((logs.exp() * (logs + uniform)).sum(-1).mean()), rel=1e-5)


def test_special_tokens_are_left_alone_by_default():
    """Zeros at BOS too move the loss: the default leaves its prediction as it is."""
    lm, rows = FakeLM(), batch(0)
    only_bos = splice(lm, sae(kind="zero"), [rows], splice_mask=lambda given: given.roles == Role.SPECIAL)
    rest = splice(lm, sae(kind="zero"), [rows])
    everything = splice(lm, sae(kind="zero"), [rows], splice_mask=lambda given: given.mask)
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
        splice(FakeLM(), sae(), [TokenBatch(rows.tokens[:, :1], rows.mask[:, :1], rows.roles[:, :1])])


def test_real_model(real_lm):
    rows = batch()
    hook_name = "blocks.1.hook_resid_post"
    found = splice(real_lm, sae(32, hook_name=hook_name), [rows])
    assert found.ce_recovered == pytest.approx(1, abs=1e-4)
    assert found.kl == pytest.approx(0, abs=1e-5)
    assert found.ce_zero != pytest.approx(found.ce_clean, abs=1e-3)
    silent = splice(real_lm, sae(32, "zero", hook_name), [rows])
    assert silent.ce_recovered == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="wide"):
        splice(real_lm, sae(31, hook_name=hook_name), [rows])


def test_real_left_padding_counts_the_same_predictions(real_lm):
    texts = ["hello there", "a much longer text than that", "mid size"]
    encoder = sae(32, "zero", "blocks.1.hook_resid_post")
    right, left = (splice(real_lm, encoder, [real_lm.tokenize(texts, padding_side=side)]) for side in ("right", "left"))
    assert right.n_tokens == left.n_tokens
    for one, two in zip(right, left, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
