"""Steering a real (tiny, random) model: cached equals uncached, composition, exact removal."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.lm.hooks import n_hooks
from sae.lm.load import load_lm
from sae.lm.tokens import Role
from sae.steering.apply import steer
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
