"""Forwards that start in the middle give what whole ones give, and run the first blocks once."""

import pytest
import torch

from sae.lm import prefix
from sae.lm.hooks import edit, n_hooks
from sae.lm.tokens import TokenBatch

TEXTS = ["hello there", "a", "what is the capital of france ?"]  # longer than the windows of Gemma's attention, too
COPIES = 3


def texts(lm):
    return lm.tokenize(TEXTS, padding_side="left")


def direction(seed=1):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 3


def by_copy(acts, step):
    """Another edit for each copy of the texts."""
    return acts + torch.stack([direction(seed) for seed in range(COPIES)])[step.rows // len(TEXTS)][:, None]


class Calls:
    """Counts how often the MLP of each block is run, and on how many rows."""

    def __init__(self, lm):
        self.rows = [[] for _ in lm.bridge.blocks]
        self.handles = [
            block.original_component.mlp.register_forward_hook(
                lambda module, args, output, index=index: self.rows[index].append(len(args[0]))
            )
            for index, block in enumerate(lm.bridge.blocks)
        ]

    def __enter__(self):
        return self.rows

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("blocks.1.hook_resid_post", 2),
        ("blocks.1.hook_mlp_out", 1),
        ("blocks.2.hook_resid_pre", 2),
        ("blocks.2.hook_out", 3),
    ],
)
def test_shared_equals_whole(pair, name, skipped):
    lm, _ = pair
    batch = texts(lm)
    copies = batch.repeat(COPIES)
    with edit(lm, {name: by_copy}):
        logits, made = lm.logits(copies), lm.generate(copies, 12)
    with lm.sharing(batch, COPIES, [name]):
        assert lm.prefix is not None
        assert len(lm.prefix.blocks) == skipped
        with edit(lm, {name: by_copy}):
            shared, again, generated = lm.logits(copies), lm.logits(copies), lm.generate(copies, 12)
    real = copies.mask
    torch.testing.assert_close(shared[real], logits[real], atol=1e-4, rtol=0)
    assert torch.equal(shared, again)
    assert torch.equal(generated.tokens, made.tokens)
    assert lm.prefix is None
    assert n_hooks(lm) == 0
    assert not any("forward" in vars(module) for module in lm.bridge.original_model.modules())


def test_the_first_blocks_are_run_once(lm):
    batch, name = texts(lm), "blocks.1.hook_resid_post"
    with Calls(lm) as rows, lm.sharing(batch, COPIES, [name]), edit(lm, {name: by_copy}):
        lm.logits(batch.repeat(COPIES))
        lm.logits(batch.repeat(COPIES))
    assert rows == [[3], [3], [9, 9]]


def test_other_tokens_run_whole(lm):
    batch, name = texts(lm), "blocks.1.hook_resid_post"
    other = TokenBatch(batch.tokens.flip(0), batch.mask.flip(0), batch.roles.flip(0))
    expected = lm.logits(other)
    with lm.sharing(batch, 1, [name]):
        assert torch.equal(lm.logits(other), expected)
        assert torch.equal(lm.logits(batch.repeat(2)), lm.logits(batch.repeat(2)))
        assert torch.equal(lm.generate(batch, 8, use_cache=False).tokens, lm.generate(batch, 8).tokens)


def test_a_hook_on_the_way_is_obeyed(lm):
    batch, name, early = texts(lm), "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
    edits = {early: lambda acts, step: acts + direction()}
    with edit(lm, edits):
        expected = lm.logits(batch)
        with lm.sharing(batch, 1, [name]):  # hooked already: nothing is shared
            assert lm.prefix is None
    acts = lm.activations(batch, [early])[early]
    with lm.sharing(batch, 1, [name]):
        with edit(lm, edits):
            assert torch.equal(lm.logits(batch), expected)
        assert torch.equal(lm.activations(batch, [early])[early], acts)
        assert torch.equal(lm.activations(batch, [name])[name], lm.activations(batch, [name])[name])


def test_nothing_to_share(lm):
    batch = texts(lm)
    for names in ([], ["blocks.0.hook_mlp_out"], ["blocks.2.hook_resid_post", "hook_embed"]):
        with lm.sharing(batch, 2, names):
            assert lm.prefix is None


def test_an_error_leaves_nothing_behind(lm):
    batch, name = texts(lm), "blocks.1.hook_resid_post"

    def broken(acts, step):
        raise RuntimeError("broken edit")

    expected = lm.logits(batch)
    with pytest.raises(RuntimeError, match="broken edit"), lm.sharing(batch, 1, [name]), edit(lm, {name: broken}):
        lm.generate(batch, 2)
    assert lm.prefix is None
    assert not any("forward" in vars(module) for module in lm.bridge.original_model.modules())
    assert torch.equal(lm.logits(batch), expected)


def test_a_model_that_cannot_be_resumed_runs_whole(lm, monkeypatch):
    batch, name = texts(lm), "blocks.1.hook_resid_post"
    assert prefix.is_resumable(lm, 1e-4)
    inner = prefix._selected
    monkeypatch.setattr(prefix, "_selected", lambda output, rows: inner(output, rows) * 1.1)
    assert not prefix.is_resumable(lm, 1e-4)
    monkeypatch.setattr(prefix, "_selected", lambda output, rows: {}["no such output"])
    assert not prefix.is_resumable(lm, 1e-4)
    monkeypatch.setitem(vars(lm), "_resumable", False)
    with lm.sharing(batch, 2, [name]):
        assert lm.prefix is None
