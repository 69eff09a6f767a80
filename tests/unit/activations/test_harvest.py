"""Documents to activations: no leakage, nothing misaligned, live equal to stored."""

import collections

import pytest
import torch
from tiny_lms import save_checkpoint

from sae.activations.harvest import Passes, harvest, is_held_out, load_corpus, prepare, save_corpus
from sae.activations.store import StoreReader
from sae.activations.stream import LiveStream, StoreStream
from sae.errors import UserError
from sae.lm.documents import Document
from sae.lm.load import load_lm
from sae.lm.tokens import Role, TokenBatch

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load_lm(str(save_checkpoint(tmp_path_factory.mktemp("llama"), "llama")), device="cpu")


def texts(n, copies=1):
    return [Document(text=f"{i} says {'abcdefghij'[: 1 + i % 9]} to {i * 7}") for i in range(n) for _ in range(copies)]


def corpus(lm, documents, **changes):
    options = {"ctx_len": 24, "packing": "auto", "n_tokens": 3000, "n_held_out_tokens": 300} | changes
    return prepare(lm, documents, **options)


def test_no_document_nor_a_copy_of_one_is_on_both_sides(lm):
    made = corpus(lm, texts(120, copies=3), packing="document")
    train = {tuple(row[row != lm.pad_id].tolist()) for row in made.train.tokens}
    held_out = {tuple(row[row != lm.pad_id].tolist()) for row in made.held_out.tokens}
    assert len(train) >= 50
    assert len(held_out) > 3
    assert not train & held_out


def test_the_side_depends_on_the_content_alone():
    documents = texts(400)
    sides = [is_held_out(document) for document in documents]
    assert sides == [is_held_out(document) for document in documents]
    assert 0.04 < sum(sides) / 400 < 0.18
    chat = Document(messages=[{"role": "user", "content": "hi"}])
    assert is_held_out(chat) == is_held_out(Document(messages=[{"content": "hi", "role": "user"}]))


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_as_many_tokens_as_asked_for(lm, packing):
    long = [Document(text=f"{i} " * 200) for i in range(150)]
    made = corpus(lm, long, packing=packing, n_tokens=500, n_held_out_tokens=100)
    assert int(made.train.mask.sum()) == 500
    assert int(made.held_out.mask.sum()) == 100


def test_chats_get_a_row_each_and_text_is_joined(lm):
    chats = [Document(messages=[{"role": "user", "content": f"say {i}"}]) for i in range(60)]
    rows = corpus(lm, chats).train
    assert all(len(set(doc[doc >= 0].tolist())) == 1 for doc in rows.doc)
    joined = corpus(lm, texts(60)).train
    assert any(len(set(doc[doc >= 0].tolist())) > 1 for doc in joined.doc)


def test_too_little_text_is_refused(lm):
    train_side = next(document for document in texts(20) if not is_held_out(document))
    with pytest.raises(UserError, match="too short to hold any of it out"):
        corpus(lm, [train_side])


def test_a_corpus_survives_the_disk(lm, tmp_path):
    made = corpus(lm, texts(60))
    save_corpus(tmp_path / "tokens", made)
    for one, two in zip(made, load_corpus(tmp_path / "tokens"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("include_special", [False, True])
def test_every_row_is_the_activation_of_its_token(lm, include_special):
    """Each harvested row equals a pass over its own packed row alone, and no token is lost or doubled."""
    packed = corpus(lm, texts(60), packing="document").train
    passes = Passes(lm, packed, HOOKS, batch_tokens=64, include_special=include_special)
    assert len(passes) > 5
    counted = collections.Counter()
    for number in range(len(passes)):
        shard = passes(number)
        for row in range(0, len(shard.tokens.token), 7):
            doc, pos = int(shard.tokens.doc[row]), int(shard.tokens.pos[row])
            where = int((packed.doc[:, 0] == doc).nonzero()[0])
            alone = lm.activations(packed.batch([where]), HOOKS)
            assert int(packed.tokens[where, pos]) == int(shard.tokens.token[row])
            for hook in HOOKS:
                torch.testing.assert_close(shard.acts[hook][row], alone[hook][0, pos], atol=1e-5, rtol=1e-4)
        counted.update(zip(shard.tokens.doc.tolist(), shard.tokens.pos.tolist(), strict=True))
        assert include_special or int(Role.SPECIAL) not in shard.tokens.role.tolist()
        assert int(Role.PAD) not in shard.tokens.role.tolist()
    assert set(counted.values()) == {1}
    assert sum(counted.values()) == passes.n_tokens


def test_the_store_and_the_live_stream_give_the_same_tokens(lm, tmp_path):
    packed = corpus(lm, texts(60)).train
    passes = Passes(lm, packed, HOOKS, batch_tokens=128)
    harvest(passes, tmp_path, shard_tokens=200, dtype="float32", seed=0)
    stored = StoreStream(StoreReader(tmp_path), batch_tokens=passes.n_tokens)
    live = LiveStream(passes, n_passes=len(passes), passes_per_window=3, d_in=passes.d_in, batch_tokens=passes.n_tokens)
    rows = []
    for stream in (stored, live):
        batch = stream.next_batch()
        keys = batch.tokens.doc.long() * 1000 + batch.tokens.pos.long()
        order = torch.argsort(keys)
        assert not torch.equal(keys, keys[order]), "the stream is shuffled"
        rows.append((keys[order], {hook: batch.acts[hook][order] for hook in HOOKS}))
    assert torch.equal(rows[0][0], rows[1][0])
    for hook in HOOKS:
        torch.testing.assert_close(rows[0][1][hook], rows[1][1][hook])


@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_a_live_stream_resumes_exactly(lm, stop):
    packed = corpus(lm, texts(60)).train

    def stream():
        passes = Passes(lm, packed, HOOKS, batch_tokens=128)
        return LiveStream(passes, n_passes=len(passes), passes_per_window=2, d_in=passes.d_in, batch_tokens=100, seed=5)

    whole = stream()
    for _ in range(stop):
        whole.next_batch()
    again = stream()
    again.load_state_dict(whole.state_dict())
    for _ in range(12):
        one, two = whole.next_batch(), again.next_batch()
        assert torch.equal(one.tokens.doc, two.tokens.doc)
        assert torch.equal(one.tokens.pos, two.tokens.pos)
        assert all(torch.equal(one.acts[hook], two.acts[hook]) for hook in HOOKS)


def test_an_unknown_hook_point_is_refused_before_anything_runs(lm):
    packed = corpus(lm, texts(60)).train
    with pytest.raises(UserError, match=r"blocks\.8"):
        Passes(lm, packed, ["blocks.8.hook_resid_post"], batch_tokens=64)


def test_padding_does_not_move_activations(lm):
    packed = corpus(lm, texts(30), packing="document").train
    row = packed.batch([0])
    length = int(row.mask.sum())
    alone = TokenBatch(row.tokens[:, :length], row.mask[:, :length], row.roles[:, :length])
    padded, bare = lm.activations(row, HOOKS), lm.activations(alone, HOOKS)
    for hook in HOOKS:
        torch.testing.assert_close(padded[hook][:, :length], bare[hook], atol=1e-5, rtol=1e-4)
