"""Logits, activations, generation and edits against the plain Hugging Face model."""

import pytest
import torch

from sae.errors import UserError
from sae.lm.hooks import edit, n_hooks
from sae.lm.tokens import Role, TokenBatch

TEXTS = ["hello there", "a", "what is the capital of france ?"]


def unpadded(lm, text):
    return lm.tokenize([text])


@pytest.fixture
def direction():
    return torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3


@torch.no_grad()
def test_logits_equal_hugging_face(pair):
    lm, plain = pair
    batch = lm.tokenize([TEXTS[2]])
    expected = plain(batch.tokens).logits
    assert lm.fast
    torch.testing.assert_close(lm.logits(batch), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(lm.bridge.original_model(batch.tokens).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pair, side):
    lm, _ = pair
    batch = lm.tokenize(TEXTS, padding_side=side)
    logits = lm.logits(batch)
    acts = lm.activations(batch, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    for row, text in enumerate(TEXTS):
        alone = unpadded(lm, text)
        torch.testing.assert_close(logits[row][batch.mask[row]], lm.logits(alone)[0], atol=1e-4, rtol=0)
        expected = lm.activations(alone, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"][0]
        torch.testing.assert_close(acts[row][batch.mask[row]], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_activations(pair):
    lm, plain = pair
    batch = lm.tokenize([TEXTS[2]])
    hidden = plain(batch.tokens, output_hidden_states=True).hidden_states
    names = ["blocks.1.hook_resid_post", "blocks.1.hook_out", "blocks.2.hook_resid_pre", "blocks.0.attn.hook_z"]
    acts = lm.activations(batch, names)
    for name in names[:3]:
        torch.testing.assert_close(acts[name], hidden[2], atol=1e-4, rtol=1e-4)
    assert acts[names[3]].shape == (1, batch.tokens.shape[1], 32)
    assert {name: value.shape[-1] for name, value in acts.items()} == {name: lm.d_in(name) for name in names}
    assert n_hooks(lm) == 0


def test_activations_stop_at_the_last_requested_layer(lm):
    seen = []
    handle = lm.bridge.original_model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    lm.activations(lm.tokenize(TEXTS), ["blocks.1.hook_resid_post"])
    assert not seen
    lm.logits(lm.tokenize(TEXTS))
    handle.remove()
    assert seen


def test_sizes_and_names(lm):
    assert (lm.n_layers, lm.d_model, lm.ctx_len) == (3, 32, 96)
    assert lm.d_in("blocks.0.attn.hook_k") == 16
    assert lm.d_in("blocks.0.mlp.hook_post") == 48
    assert lm.layer_of("blocks.2.attn.hook_z") == 2
    assert (lm.layer_of("hook_embed"), lm.layer_of("ln_final.hook_normalized")) == (0, 3)
    assert "blocks.0.hook_resid_mid" in lm.hook_names()
    assert "blocks.0.attn.hook_pattern" not in lm.hook_names()
    with pytest.raises(UserError, match=r"did you mean blocks\.1\.hook_resid_post"):
        lm.check_hook("blocks.1.hook_resid_pots")
    with pytest.raises(UserError, match="no vector per token"):
        lm.check_hook("blocks.0.attn.hook_pattern")


def test_position_embeddings_are_a_hook(loaded):
    """GPT-2 computes them once for all rows; a hook sees them for each."""
    lm, plain = loaded("gpt2")
    batch = lm.tokenize(TEXTS)
    acts = lm.activations(batch, ["hook_pos_embed"])["hook_pos_embed"]
    torch.testing.assert_close(acts[2], plain.transformer.wpe.weight[: batch.tokens.shape[1]].detach())
    assert lm.layer_of("hook_pos_embed") == lm.layer_of("pos_embed.hook_out") == 0


def test_generate_cached_uncached_and_hugging_face_agree(pair):
    lm, plain = pair
    batch = lm.tokenize(TEXTS, padding_side="left")
    ours = lm.generate(batch, 24)
    theirs = plain.generate(
        batch.tokens, attention_mask=batch.mask.long(), max_new_tokens=24, do_sample=False,
        pad_token_id=lm.pad_id, eos_token_id=sorted(lm.eos_ids),
    )[:, batch.tokens.shape[1] :]  # fmt: skip
    assert torch.equal(ours.tokens, theirs)
    assert torch.equal(lm.generate(batch, 24, use_cache=False).tokens, ours.tokens)
    right = lm.generate(lm.tokenize(TEXTS, padding_side="right"), 24)
    assert torch.equal(right.tokens, ours.tokens)
    assert lm.step is None


def test_edit_while_generating_equals_a_hugging_face_hook(pair, direction):
    lm, plain = pair
    batch = lm.tokenize(TEXTS, padding_side="left")
    blocks = plain.transformer.h if hasattr(plain, "transformer") else plain.model.layers

    def theirs(module, args, output):
        return (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction

    handle = blocks[1].register_forward_hook(theirs)
    expected = plain.generate(
        batch.tokens, attention_mask=batch.mask.long(), max_new_tokens=12, do_sample=False,
        pad_token_id=lm.pad_id, eos_token_id=sorted(lm.eos_ids),
    )[:, batch.tokens.shape[1] :]  # fmt: skip
    handle.remove()
    for name in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"):
        with edit(lm, {name: lambda acts, step: acts + direction}):
            assert torch.equal(lm.generate(batch, 12).tokens, expected)
            assert torch.equal(lm.generate(batch, 12, use_cache=False).tokens, expected)
    assert not torch.equal(lm.generate(batch, 12).tokens, expected), "the edit must matter"


@torch.no_grad()
def test_every_editable_residual_hook_reaches_the_logits(pair):
    lm, _ = pair
    batch = lm.tokenize([TEXTS[0]])
    clean = lm.logits(batch)
    for name in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z"):
        with edit(lm, {f"blocks.1.{name}": lambda acts, step: torch.zeros_like(acts)}):
            assert not torch.allclose(lm.logits(batch), clean, atol=1e-3), name
        torch.testing.assert_close(lm.logits(batch), clean, atol=0, rtol=0)


def test_edits_see_their_tokens(lm, direction):
    """Scoped to roles and positions, an edit gives the same text with and without the cache."""
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    batch = lm.tokenize_chats(chats)
    steps = []

    def scoped(acts, step):
        steps.append(step)
        where = (step.roles == Role.FIRST_RESPONSE) | ((step.positions == 4) & step.mask)
        return acts + where[..., None] * direction

    with edit(lm, {"blocks.1.hook_resid_post": scoped}):
        cached = lm.generate(batch, 6)
        first = list(steps)
        assert torch.equal(lm.generate(batch, 6, use_cache=False).tokens, cached.tokens)
    assert [step.offset for step in first[:3]] == [0, batch.tokens.shape[1], batch.tokens.shape[1] + 1]
    assert torch.equal(first[0].roles, batch.roles)
    assert torch.equal(first[0].mask, batch.mask)
    assert (first[1].roles == Role.FIRST_RESPONSE).all()
    assert (first[2].roles == Role.ASSISTANT).all()
    assert first[1].positions.flatten().tolist() == batch.lengths


def test_rows_end_at_eos(lm):
    """A row's text does not depend on whether other rows go on, and counts include the EOS."""
    batch = lm.tokenize(TEXTS, padding_side="left")
    plain = lm.generate(batch, 20).tokens
    stop = int(plain[0][5])
    eos, lm.eos_ids = lm.eos_ids, {stop}
    try:
        done = lm.generate(batch, 20)
        again = lm.generate(batch, 20, use_cache=False)
    finally:
        lm.eos_ids = eos
    for row in range(3):
        expected = plain[row].tolist()
        expected = expected[: expected.index(stop) + 1] if stop in expected else expected
        assert done.n_tokens[row] == len(expected)
        assert done.tokens[row][: len(expected)].tolist() == expected
    assert torch.equal(done.tokens, again.tokens)
    assert done.n_tokens[0] <= 6


def test_sampling_is_seeded(lm):
    batch = lm.tokenize(TEXTS)
    first = lm.generate(batch, 10, temperature=1.0, seed=3)
    assert torch.equal(first.tokens, lm.generate(batch, 10, temperature=1.0, seed=3).tokens)
    assert torch.equal(first.tokens, lm.generate(batch, 10, temperature=1.0, seed=3, use_cache=False).tokens)
    assert not torch.equal(first.tokens, lm.generate(batch, 10, temperature=1.0, seed=4).tokens)


def test_hooks_are_always_removed(lm):
    batch = lm.tokenize(TEXTS)

    def broken(acts, step):
        raise RuntimeError("broken edit")

    modules = list(lm.bridge.original_model.modules())
    with pytest.raises(RuntimeError, match="broken edit"), edit(lm, {"blocks.1.hook_resid_post": broken}):
        lm.generate(batch, 2)
    with edit(lm, {"blocks.0.hook_resid_post": lambda acts, step: acts}):
        with pytest.raises(UserError), edit(lm, {"blocks.1.hook_mlp_out": broken, "nonsense": broken}):
            pass
        with edit(lm, {"blocks.0.hook_resid_post": lambda acts, step: acts * 2}):
            assert n_hooks(lm) == 2
        assert n_hooks(lm) == 1
    assert n_hooks(lm) == 0
    assert lm.step is None
    after = list(lm.bridge.original_model.modules())
    assert len(after) == len(modules)
    assert all(a is b for a, b in zip(after, modules, strict=True))


def test_nested_edits_and_capture(lm):
    batch, name = lm.tokenize(TEXTS), "blocks.1.hook_resid_post"
    clean = lm.activations(batch, [name])[name]
    with (
        edit(lm, {name: lambda acts, step: acts + 1}),
        edit(lm, {"blocks.1.hook_out": lambda acts, step: acts * 2}),
    ):
        torch.testing.assert_close(lm.activations(batch, [name])[name], (clean + 1) * 2)


def test_contract_of_edits(lm):
    batch = lm.tokenize(TEXTS)
    with (
        pytest.raises(UserError, match=r"blocks\.0\.hook_attn_out"),
        edit(lm, {"blocks.0.hook_resid_mid": lambda a, s: a}),
    ):
        pass
    with pytest.raises(ValueError, match="in place"), edit(lm, {"blocks.0.hook_out": lambda a, s: a.mul_(2)}):
        lm.logits(batch)
    with pytest.raises(ValueError, match="returns shape"), edit(lm, {"blocks.0.hook_out": lambda a, s: a[..., :3]}):
        lm.logits(batch)


def test_weight_edits_are_seen(pair):
    """Parameters changed in place change the fast path as well."""
    lm, _ = pair
    batch = lm.tokenize([TEXTS[0]])
    before = lm.logits(batch)
    with torch.no_grad():
        for parameter in (lm.bridge.blocks[1].attn.q.weight, lm.bridge.blocks[1].mlp.out.weight):
            saved = parameter.clone()
            parameter.mul_(-2)
            changed = lm.logits(batch)
            torch.testing.assert_close(changed, lm.bridge.original_model(batch.tokens).logits, atol=1e-4, rtol=0)
            parameter.copy_(saved)
            assert not torch.allclose(changed, before, atol=1e-3)


def test_bad_numbers(lm):
    batch = lm.tokenize(TEXTS)
    for call, words in (
        (lambda: lm.generate(batch, 0), "max_new_tokens=0"),
        (lambda: lm.generate(batch, 3, temperature=-1), "temperature=-1"),
        (lambda: lm.generate(batch, 90), "exceeds the context of 96"),
        (lambda: lm.logits(TokenBatch(*(x.repeat(1, 4) for x in batch))), "exceeds the context"),
        (lambda: lm.activations(batch, []), "no hook names"),
        (lambda: lm.tokenize("a text"), r"write \[text\]"),
        (lambda: lm.tokenize([]), "empty list"),
    ):
        with pytest.raises(UserError, match=words):
            call()
