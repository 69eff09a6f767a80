"""Capturing without the bridge's wrappers: the same values as with them, edits and weight edits seen, nothing left."""

import pytest
import torch
from tiny_lms import ARCHITECTURES, save_checkpoint

import sae.lm.capture
from sae.lm import hooks
from sae.lm.load import load_lm
from sae.lm.tokens import TokenBatch

TEXTS = ["a short one", "quite a bit longer, to be padded less than the other", "x"]
RESIDUAL = [f"blocks.{layer}.hook_resid_{where}" for layer in range(3) for where in ("pre", "post")]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request, tmp_path_factory):
    return load_lm(str(save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)), device="cpu")


def wrapped(lm, batch, names):
    """The activations through the bridge: a hook anywhere keeps its wrappers where they are."""
    remove = hooks.install(lm.hook_point("blocks.2.hook_resid_post"), lambda acts, *, hook: None)
    try:
        return lm.activations(batch, names)
    finally:
        remove()


def torch_hooks(lm):
    modules = lm.bridge.original_model.modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_every_hook_point_gives_what_it_gives_through_the_bridge(lm, padding_side):
    batch = lm.tokenize(TEXTS, padding_side=padding_side)
    sites = lm._sites
    names = [name for name in lm.hook_names() if id(lm.hook_point(name)) in sites]
    assert set(RESIDUAL) <= set(names), "the residual stream is always among them"
    assert len(names) > len(lm.hook_names()) // 3
    slow = wrapped(lm, batch, names)
    together = lm.activations(batch, names)
    real = batch.mask
    for name in names:
        torch.testing.assert_close(together[name][real], slow[name][real], atol=2e-5, rtol=2e-4)
    for name in RESIDUAL:  # alone, the forward stops there
        alone = lm.activations(batch, [name])[name]
        assert torch.equal(alone, together[name])


def test_the_rest_of_the_model_is_not_run(lm):
    ran = []
    last = lm.bridge.blocks[2].original_component
    with last.register_forward_hook(lambda *_: ran.append(1)):
        lm.activations(lm.tokenize(TEXTS), ["blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"])
    assert ran == []


def test_edits_and_foreign_hooks_are_seen(lm):
    batch = lm.tokenize(TEXTS)
    name = "blocks.1.hook_resid_post"
    before = lm.activations(batch, [name])[name]
    with lm.edit({"blocks.0.hook_resid_post": lambda acts, step: acts + 3}):
        edited = lm.activations(batch, [name])[name]
    assert not torch.allclose(before, edited, atol=1e-2)
    with lm.bridge.blocks[0].register_forward_hook(
        lambda m, a, out: (out[0] + 3, *out[1:]) if isinstance(out, tuple) else out + 3
    ):
        foreign = lm.activations(batch, [name])[name]
    torch.testing.assert_close(foreign, edited, atol=1e-4, rtol=1e-4)
    assert torch.equal(lm.activations(batch, [name])[name], before)


def test_nothing_is_left_installed(lm):
    batch = lm.tokenize(TEXTS)
    lm.activations(batch, RESIDUAL)
    counts = torch_hooks(lm), hooks.n_hooks(lm)
    implementation = lm.bridge.original_model.config._attn_implementation
    lm.activations(batch, RESIDUAL)
    too_long = TokenBatch(*(column.repeat(1, 9) for column in batch))
    with pytest.raises(Exception, match="exceeds the context"):
        lm.activations(too_long, RESIDUAL)
    assert (torch_hooks(lm), hooks.n_hooks(lm)) == counts
    assert lm.bridge.original_model.config._attn_implementation == implementation


def test_long_rows_use_fused_attention_where_it_is_the_same(lm, monkeypatch):
    batch = lm.tokenize(["z" * 60, "y" * 60])
    plain = lm.activations(batch, RESIDUAL)
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(sae.lm.capture, "FUSED_FROM", 50)
    assert lm._fusable == (lm.bridge.original_model.config.model_type != "gemma2"), "it knows no cap on scores"
    calls.clear()
    fused = lm.activations(batch, RESIDUAL)
    assert bool(calls) == lm._fusable
    for name in RESIDUAL:
        torch.testing.assert_close(fused[name], plain[name], atol=1e-4, rtol=1e-3)
    calls.clear()
    lm.activations(lm.tokenize(["z" * 60, "y" * 20], padding_side="left"), RESIDUAL)
    wrapped(lm, batch, RESIDUAL)
    assert not calls, "padding in front and hooked blocks keep to the plain one"


def test_weights_put_in_place_of_the_bridges_are_seen(tmp_path):
    """GPT-2's bridge splits the attention weights: views of the model's own, until someone replaces them."""
    lm = load_lm(str(save_checkpoint(tmp_path, "gpt2")), device="cpu")
    batch = lm.tokenize(TEXTS[:1])
    name = "blocks.1.hook_resid_post"
    before, logits = lm.activations(batch, [name])[name], lm.logits(batch)
    q = lm.bridge.blocks[1].attn.q.original_component
    q.weight = torch.nn.Parameter(-2 * q.weight.detach())
    after = lm.activations(batch, [name])[name]
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, wrapped(lm, batch, [name])[name], atol=2e-5, rtol=2e-4)
    changed = lm.bridge.original_model(batch.tokens).logits
    torch.testing.assert_close(lm.logits(batch), changed, atol=1e-4, rtol=0)
    assert not torch.allclose(changed, logits, atol=1e-3)


def test_half_precision(tmp_path):
    folder = str(save_checkpoint(tmp_path, "gpt2"))
    exact, half = load_lm(folder, device="cpu"), load_lm(folder, device="cpu", dtype="bfloat16")
    batch = exact.tokenize(TEXTS)
    name = "blocks.1.hook_resid_post"
    acts = half.activations(batch, [name])[name]
    assert acts.dtype == torch.bfloat16
    assert set(RESIDUAL) <= {n for n in half.hook_names() if id(half.hook_point(n)) in half._sites}
    want = exact.activations(batch, [name])[name][batch.mask]
    error = (acts[batch.mask].float() - want).norm() / want.norm()
    assert error < 0.02


def test_processed_weights_are_seen(tmp_path):
    """In compatibility mode the bridge computes from weights of its own: nothing is captured behind its back."""
    lm = load_lm(str(save_checkpoint(tmp_path, "gpt2")), device="cpu")
    batch = lm.tokenize(["the cat sat"])
    names = ["blocks.1.hook_resid_post"]
    lm.activations(batch, names)  # whether wrappers may go has been looked up by now
    lm.bridge.enable_compatibility_mode()
    found, seen = lm.activations(batch, names), {}
    point = lm.hook_point(names[0])
    remove = hooks.install(point, lambda acts, *, hook: seen.setdefault("acts", acts))
    try:
        lm.logits(batch)
    finally:
        remove()
    torch.testing.assert_close(found[names[0]], seen["acts"])
