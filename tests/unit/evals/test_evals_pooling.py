"""Rows of texts: the last token or the mean, in the order given, from one text at a time or many."""

import pytest
import torch

from sae.autoencoder.sae import SAE, SAEConfig, make
from sae.errors import UserError
from sae.evals.pooling import pool, read_mask, tokens_read
from sae.lm.tokens import Role, TokenBatch

HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
TEXTS = ["a", "longer than that", "mid size", "the cat sat", "x y"]


def own(real_lm, text):
    """Activations at all tokens of a text but BOS, alone in its batch."""
    return {
        name: acts[0, 1:].float() for name, acts in real_lm.activations(real_lm.tokenize([text]), [HOOK, OTHER]).items()
    }


@pytest.mark.parametrize("position", ["last", "mean"])
def test_rows_are_those_of_each_text_alone(real_lm, position):
    saes = [
        SAE(SAEConfig("topk", 32, 64, 4, 0, HOOK, "toy")),
        make(SAEConfig("relu", 64, 48, 0.0, 1, f"{HOOK}+{OTHER}", "toy")),
    ]
    batches = [real_lm.tokenize(TEXTS[:3]), real_lm.tokenize(TEXTS[3:])]
    found = pool(real_lm, saes, batches, position)
    latents = [torch.cat(list(item.batches())) for item in found.latents]
    n_active = torch.zeros(2)
    n_tokens = 0
    for row, text in enumerate(TEXTS):
        acts = own(real_lm, text)
        if position == "last":
            acts = {name: part[-1:] for name, part in acts.items()}
        n_tokens += len(acts[HOOK])
        for name, part in acts.items():
            assert torch.allclose(found.acts[name][row], part.mean(0), atol=1e-4)
        with torch.no_grad():
            each = [saes[0].encode(acts[HOOK]), saes[1].encode(torch.cat([acts[HOOK], acts[OTHER]], dim=1))]
        for number, active in enumerate(each):
            assert torch.allclose(latents[number][row], active.mean(0), atol=1e-3)
            n_active[number] += (active != 0).sum()
    assert [item.l0 for item in found.latents] == pytest.approx((n_active / n_tokens).tolist(), abs=1e-6)


def test_tokens_read_are_those_that_count(real_lm):
    batches = [real_lm.tokenize(TEXTS)]
    everything = tokens_read(real_lm, batches, [HOOK], "mean")[HOOK]
    assert torch.allclose(everything, torch.cat([own(real_lm, text)[HOOK] for text in TEXTS]), atol=1e-4)
    last = tokens_read(real_lm, batches, [HOOK], "last")[HOOK]
    assert torch.allclose(last, torch.stack([own(real_lm, text)[HOOK][-1] for text in TEXTS]), atol=1e-4)


def test_special_tokens_and_padding_are_neither_last_nor_counted():
    roles = torch.tensor([[1, 2, 2, 1, 0], [0, 0, 1, 2, 2]], dtype=torch.uint8)
    batch = TokenBatch(roles.long(), roles != Role.PAD, roles)
    assert read_mask(batch, "last").nonzero().tolist() == [[0, 2], [1, 4]]
    assert read_mask(batch, "mean").sum(1).tolist() == [2, 2]
    assert read_mask(batch, "last", include_special=True).nonzero().tolist() == [[0, 3], [1, 4]]
    with pytest.raises(UserError, match="unknown position 'first'"):
        read_mask(batch, "first")
    with pytest.raises(UserError, match="no token"):
        read_mask(batch.select([0])._replace(roles=torch.ones(1, 4, dtype=torch.uint8)), "mean")
