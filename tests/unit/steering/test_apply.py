"""Steering a real (tiny, random) model: cached equals uncached, composition, exact removal."""

from contextlib import nullcontext

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.lm.hooks import n_hooks
from sae.lm.load import load_lm
from sae.lm.tokens import Role
from sae.steering.apply import steer, steer_groups
from sae.steering.interventions import Ablate, Add, Clamp, ProjectOut

HOOK, LATER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "user", "content": "what is the capital"}],
    [{"role": "user", "content": "a b c"}],
]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """Load a random two-layer Llama with one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|turn|>", "<|end|>"],
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_lm(str(folder), device="cpu")


def make_sae(lm, hook_name=HOOK, fingerprint=None, d_in=32):
    config = SAEConfig(
        architecture="topk",
        d_in=d_in,
        d_sae=64,
        l0=6.0,
        seed=0,
        hook_name=hook_name,
        lm_name="tiny",
        lm_fingerprint=lm.fingerprint if fingerprint is None else fingerprint,
    )
    return SAE(config)


def edits(lm):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    return [
        Clamp(make_sae(lm), latent=5, value=6.0),
        Clamp(make_sae(lm), latent=5, value=6.0, roles={Role.ASSISTANT, Role.FIRST_RESPONSE}),
        Ablate(make_sae(lm), [1, 2, 3, 4], positions=slice(3, None)),
        Add(direction=direction, scale=2.0, hook_name=LATER, roles={Role.TEMPLATE}),
        ProjectOut(direction, LATER, toward=1.0, positions=[2, 5, 30]),
    ]


@pytest.mark.parametrize("index", range(5))
def test_cached_equals_uncached_and_one_row_equals_a_batch(lm, index):
    batch = lm.tokenize_chats(CHATS)
    with steer(lm, edits(lm)[index]):
        cached = lm.generate(batch, 10)
        uncached = lm.generate(batch, 10, use_cache=False)
        alone = [lm.generate(lm.tokenize_chats([chat]), 10).texts[0] for chat in CHATS]
    assert torch.equal(cached.tokens, uncached.tokens)
    assert cached.texts == alone  # padding is not edited and does not matter


def test_steering_acts_and_leaves_nothing_behind(lm):
    batch = lm.tokenize_chats(CHATS)
    before, hooks = lm.logits(batch), n_hooks(lm)
    with steer(lm, edits(lm)[0]):
        assert not torch.equal(lm.logits(batch)[batch.mask], before[batch.mask])
    assert n_hooks(lm) == hooks
    assert torch.equal(lm.logits(batch), before)
    with pytest.raises(RuntimeError, match="boom"), steer(lm, *edits(lm)):
        raise RuntimeError("boom")
    assert n_hooks(lm) == hooks
    assert torch.equal(lm.logits(batch), before)
    with steer(lm):
        assert n_hooks(lm) == hooks


def test_scope_of_generated_tokens_leaves_the_prompt_alone(lm):
    batch = lm.tokenize_chats(CHATS)
    with steer(lm, edits(lm)[1]):
        prompt_logits = lm.logits(batch)
        steered = lm.generate(batch, 8)
    assert torch.equal(prompt_logits, lm.logits(batch))
    plain = lm.generate(batch, 8)
    assert torch.equal(steered.tokens[:, 0], plain.tokens[:, 0])  # the first token comes from the prompt
    assert not torch.equal(steered.tokens, plain.tokens)


def test_order_composition_and_nesting(lm):
    batch = lm.tokenize_chats(CHATS)
    sae = make_sae(lm)
    add, clamp = Add(encoder=sae, latent=5, scale=3.0), Clamp(sae, latent=5, value=1.0)

    def resid(*items):
        with steer(lm, *items):
            return lm.activations(batch, [HOOK])[HOOK]

    x = lm.activations(batch, [HOOK])[HOOK]
    step_free = [item.apply_to(x, None) for item in (add, clamp)]
    both = clamp.apply_to(step_free[0], None)
    real = batch.mask
    assert torch.allclose(resid(add, clamp)[real], both[real], atol=1e-5)
    assert not torch.allclose(resid(clamp, add)[real], both[real], atol=1e-3)
    with steer(lm, add):
        assert torch.allclose(resid(clamp)[real], both[real], atol=1e-5)  # outer first
    far = Add(direction=torch.ones(32), hook_name=LATER)
    with steer(lm, far, add):
        found = lm.activations(batch, [HOOK, LATER])
    assert torch.allclose(found[HOOK][real], step_free[0][real], atol=1e-5)


def test_a_misfit_is_refused_before_anything_is_hooked(lm):
    hooks = n_hooks(lm)
    stranger = make_sae(lm, fingerprint="0" * 64)
    cases = [
        (Clamp(stranger, latent=1), "trained on 'tiny'"),
        (Add(encoder=stranger, latent=1), "trained on 'tiny'"),
        (Clamp(make_sae(lm, d_in=16), latent=1), "d_in=16"),
        (Add(direction=torch.ones(5), hook_name=HOOK), "d_in=5"),
        (Add(direction=torch.ones(32), hook_name="blocks.0.hook_resid_pots"), "hook_resid_post"),
    ]
    for item, message in cases:
        with pytest.raises(UserError, match=message), steer(lm, edits(lm)[0], item):
            pass
        assert n_hooks(lm) == hooks
    with pytest.raises((UserError, TypeError)), steer(lm, "clamp"):  # TypeError where annotations are checked
        pass
    with steer(lm, Clamp(stranger, latent=1), force=True):
        assert n_hooks(lm) == hooks + 1
    with steer(lm, Clamp(make_sae(lm, fingerprint=""), latent=1)):  # foreign formats know no fingerprint
        pass


def groups_of(lm):
    """Each kind of edit, at two hook points, one by one, together, and none."""
    clamp, scoped, ablate, add, project = edits(lm)
    by_step = Add(direction=torch.ones(32), scale=3.0, hook_name=HOOK, positions=lambda step: step.rows[:, None] == 1)
    return [[clamp], [], [ablate, add], [scoped], [project], [add, clamp, project], [by_step]]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_groups_get_what_each_would_get_alone(lm, monkeypatch, use_cache, shared):
    batch, hooks = lm.tokenize_chats(CHATS), n_hooks(lm)
    monkeypatch.setattr(lm, "eos_ids", set(range(0, lm.d_vocab, 6)))  # rows, and whole groups, end at different steps
    groups = groups_of(lm)
    sharing = lm.sharing(batch, len(groups), [HOOK, LATER]) if shared else nullcontext()
    with sharing, steer_groups(lm, groups, len(CHATS)):
        assert (lm.prefix is not None) == shared
        logits = lm.logits(batch.repeat(len(groups)))
        made = lm.generate(batch.repeat(len(groups)), 16, use_cache=use_cache)
    assert n_hooks(lm) == hooks
    assert len({tuple(row) for row in made.tokens.tolist()}) > len(groups), "the edits must matter"
    for number, items in enumerate(groups):
        rows = slice(number * len(CHATS), (number + 1) * len(CHATS))
        with steer(lm, *items):
            expected = lm.logits(batch)
            alone = lm.generate(batch, 16, use_cache=use_cache)
        assert torch.allclose(logits[rows][batch.mask], expected[batch.mask], atol=1e-4)
        assert made.n_tokens[rows] == alone.n_tokens
        assert made.texts[rows] == alone.texts
    assert len(set(made.n_tokens)) > 2


def test_groups_nest_and_leave_nothing_behind(lm):
    batch, hooks = lm.tokenize_chats(CHATS), n_hooks(lm)
    before = lm.logits(batch)
    clamp, _, _, add, _ = edits(lm)
    with steer(lm, add):
        expected = lm.logits(batch)
        with steer_groups(lm, [[], [clamp]], len(CHATS)):
            assert torch.allclose(lm.logits(batch.repeat(2))[: len(CHATS)], expected, atol=1e-4)
            assert torch.allclose(lm.logits(batch), expected, atol=1e-4)  # only the first group's rows
    with pytest.raises(RuntimeError, match="boom"), steer_groups(lm, groups_of(lm), 1):
        raise RuntimeError("boom")
    with steer_groups(lm, [[], []], len(CHATS)):
        assert n_hooks(lm) == hooks
    assert n_hooks(lm) == hooks
    assert torch.equal(lm.logits(batch), before)


def test_groups_that_do_not_fit_are_refused(lm):
    batch, hooks = lm.tokenize_chats(CHATS), n_hooks(lm)
    clamp = edits(lm)[0]
    with steer_groups(lm, [[clamp], []], 1), pytest.raises(UserError, match="more rows than 2 groups of 1"):
        lm.logits(batch)
    with steer_groups(lm, [[clamp]], 3), pytest.raises(UserError, match="not through its bridge"), torch.no_grad():
        lm.bridge.original_model(batch.tokens)
    with pytest.raises(UserError, match="rows_per_group=0"), steer_groups(lm, [[clamp]], 0):
        pass
    with (
        pytest.raises(UserError, match="d_in=16"),
        steer_groups(lm, [[clamp], [Clamp(make_sae(lm, d_in=16), latent=1)]], 3),
    ):
        pass
    assert n_hooks(lm) == hooks
