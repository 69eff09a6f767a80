"""Heads in matrices that make all queries, keys and values at once: what is taken for a head's rows makes that head.

Every architecture of `sae.lm.head_layout.ORDERS`, and some that keep queries, keys and values apart, as random models.
"""

import pytest
import torch
import transformers as t
from tiny_lms import byte_tokenizer

import sae
from sae.errors import UserError
from sae.lm.head_layout import ORDERS, Heads, fused_starts
from sae.lm.matrices import _plain_modules, block_matrices, heads

NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **NONE}
LONG = {"intermediate_size": 48, "max_position_embeddings": 96}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, **NONE}
FALCON = {**SIZES, "alibi": False}
CONFIGS = {
    "gpt2": lambda v: t.GPT2Config(vocab_size=v, **OLD),
    "gpt1": lambda v: t.OpenAIGPTConfig(vocab_size=v, **OLD),
    "neox": lambda v: t.GPTNeoXConfig(vocab_size=v, **SIZES, **LONG),
    "neox_japanese": lambda v: t.GPTNeoXJapaneseConfig(vocab_size=v, **SIZES, intermediate_multiple_size=2),
    "bloom": lambda v: t.BloomConfig(vocab_size=v, hidden_size=32, n_layer=2, n_head=4, **NONE),
    "persimmon": lambda v: t.PersimmonConfig(vocab_size=v, **SIZES, **LONG),
    "falcon": lambda v: t.FalconConfig(vocab_size=v, multi_query=False, new_decoder_architecture=False, **FALCON),
    "falcon_shared": lambda v: t.FalconConfig(vocab_size=v, multi_query=True, new_decoder_architecture=False, **FALCON),
    "falcon_groups": lambda v: t.FalconConfig(
        vocab_size=v, num_kv_heads=2, new_decoder_architecture=True, multi_query=False, **FALCON
    ),
    "falcon_alone": lambda v: t.FalconConfig(
        vocab_size=v, num_kv_heads=4, new_decoder_architecture=True, multi_query=False, **FALCON
    ),
    "mpt": lambda v: t.MptConfig(vocab_size=v, d_model=32, n_layers=2, n_heads=4, max_seq_len=96, **NONE),
    "phi3": lambda v: t.Phi3Config(vocab_size=v, num_key_value_heads=4, **SIZES, **LONG),
    "phi3_shared": lambda v: t.Phi3Config(vocab_size=v, num_key_value_heads=2, **SIZES, **LONG),
    "codegen": lambda v: t.CodeGenConfig(vocab_size=v, **{**OLD, "n_head": 8}, rotary_dim=4),
    "bigcode": lambda v: t.GPTBigCodeConfig(vocab_size=v, multi_query=False, **OLD),
    "bigcode_shared": lambda v: t.GPTBigCodeConfig(vocab_size=v, multi_query=True, **OLD),
    "gptj": lambda v: t.GPTJConfig(vocab_size=v, rotary_dim=4, **OLD),
    "opt": lambda v: t.OPTConfig(
        vocab_size=v, ffn_dim=48, max_position_embeddings=96, word_embed_proj_dim=32, **{**SIZES, "pad_token_id": 1}
    ),
    "gptneo": lambda v: t.GPTNeoConfig(
        vocab_size=v, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], **LONG, **NONE
    ),
}  # fmt: skip
SHARED = ("falcon_shared", "falcon_groups", "phi3_shared", "bigcode_shared")
#: Those that TransformerLens loads and computes with the very matrices, or views of them; and those it copies from.
BRIDGED = ("gpt2", "phi3", "phi3_shared", "bigcode_shared", "gptj", "gptneo", "opt")
COPIED = ("neox", "bloom", "falcon", "falcon_shared", "mpt", "codegen")
CASES = [*((name, "transformers") for name in CONFIGS), *((name, "transformer_lens") for name in BRIDGED)]


def load(name, library, folder):
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[name](len(tokenizer)))
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0, which would hide which are whose
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sae.load_lm(str(folder), device="cpu", library=library)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    name, library = request.param
    return name, load(name, library, tmp_path_factory.mktemp(name))


def outputs(lm, zeroed=(), silenced=None):
    """What the heads of layer 1 give (z) and the logits, with slices at zero, or a stretch of z."""
    own = {matrix.name: matrix for matrix in block_matrices(lm)}
    (output,) = (matrix for matrix in own.values() if matrix.layer == 1 and matrix.kind == "o")
    module = dict(_plain_modules(lm.bridge.original_model))[output.name.removesuffix(".weight")]
    seen = []

    def read(module, args):
        z = args[0].clone()
        if silenced is not None:
            z[..., silenced] = 0
        seen.append(z)
        return (z, *args[1:])

    before = {one.name: own[one.name].parameter.detach().clone() for one in zeroed}
    handle = module.register_forward_pre_hook(read)
    try:
        with torch.no_grad():
            for one in zeroed:
                one.of(own[one.name].parameter).zero_()
            logits = lm.logits(lm.tokenize(["hello there", "hello, you!"]))
    finally:
        handle.remove()
        with torch.no_grad():
            for name, values in before.items():
                own[name].parameter.copy_(values)
    return seen[0].reshape(2, -1, seen[0].shape[-1]), logits


def test_a_heads_rows_make_that_head_and_no_other(case):
    name, lm = case
    parts = [part for part in heads(lm) if part.layer == 1]
    z, clean = outputs(lm)
    size = z.shape[-1] // len(parts)
    assert len(parts) == lm.bridge.cfg.n_heads == (8 if name == "codegen" else 4)
    for part in parts:
        own = slice(part.number * size, (part.number + 1) * size)
        found, _ = outputs(lm, part.slices[:-1])
        others = [column for column in range(z.shape[-1]) if column not in range(own.start, own.stop)]
        torch.testing.assert_close(found[..., others], z[..., others])
        assert (found[..., own] - z[..., own]).abs().max() > 1e-3
        if name not in SHARED:
            # Without its values' rows a head gives its values' bias, whatever it attends to.
            constant = found[:1, :1, own].expand_as(found[..., own])
            torch.testing.assert_close(found[..., own], constant, atol=1e-5, rtol=1e-4)
        _, gone = outputs(lm, part.slices)
        _, expected = outputs(lm, silenced=own)
        torch.testing.assert_close(gone, expected, atol=1e-5, rtol=1e-4)
        assert (gone - clean).abs().max() > 1e-3


@pytest.mark.parametrize("name", COPIED)
def test_matrices_that_are_only_copied_from_are_refused(tmp_path, name):
    """Editing them would change nothing, and everything would seem to survive it."""
    with pytest.raises(UserError, match=r"computes with copies .* lm\.library=transformers"):
        block_matrices(load(name, "transformer_lens", tmp_path))


def test_every_order_is_tested():
    kinds = {CONFIGS[name](99).model_type for name in CONFIGS}
    assert {kind for kind, _ in ORDERS} <= kinds


def test_an_unknown_order_is_refused(case, monkeypatch):
    """A matrix of the very same shape and name, of an architecture that nobody has looked at."""
    _, lm = case
    if not any(matrix.kind == "qkv" for matrix in block_matrices(lm)):
        pytest.skip("queries, keys and values are apart here")
    monkeypatch.setattr(lm.bridge.original_model.config, "model_type", "something_else")
    with pytest.raises(UserError, match="in which order its heads lie there is not known"):
        heads(lm)


def test_a_matrix_of_another_length_has_no_known_order():
    config = t.GPTNeoXConfig(**SIZES)
    assert fused_starts(config, "query_key_value", Heads(4, 4, 8), 1, 96) == (24, 32, 40)
    assert fused_starts(config, "query_key_value", Heads(4, 4, 8), 1, 128) is None
    assert fused_starts(config, "qkv_proj", Heads(4, 4, 8), 1, 96) is None
    assert fused_starts(None, "query_key_value", Heads(4, 4, 8), 1, 96) is None
    odd = t.CodeGenConfig(**{**OLD, "n_head": 2})
    assert fused_starts(odd, "qkv_proj", Heads(2, 2, 16), 1, 96) is None, "two heads are not four parts"
