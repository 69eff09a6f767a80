"""Real pretrained models: logits equal Hugging Face's, and generated text reads like language."""

import os
from pathlib import Path

import pytest
import torch

from sae.lm.load import load_lm
from sae.lm.tokens import Role

FOLDER = Path(os.environ.get("SAE_REAL_MODELS") or Path(__file__).resolve().parents[2].parent / "shared" / "models")
PROMPTS = ["Once upon a time, there was a little", "Tom and Lily went to the park to"]


@pytest.fixture(scope="module", params=["tinystories-656k", "stories260K"])
def pair(request):
    folder = FOLDER / request.param
    if not (folder / "config.json").is_file():
        pytest.skip(f"no real model at {folder}: set SAE_REAL_MODELS to a folder that holds {request.param}.")
    from transformers import AutoModelForCausalLM

    return load_lm(str(folder), device="cpu"), AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def test_logits_equal_hugging_face(pair):
    lm, plain = pair
    batch = lm.tokenize(PROMPTS)
    expected = plain(batch.tokens, attention_mask=batch.mask.long()).logits
    torch.testing.assert_close(lm.logits(batch)[batch.mask], expected[batch.mask], atol=1e-4, rtol=1e-5)
    assert (batch.roles[:, 0] == Role.SPECIAL).all()
    assert (batch.roles[:, 1] == Role.TEXT).all()


def test_generated_text_is_readable_and_equals_hugging_face(pair):
    lm, plain = pair
    batch = lm.tokenize(PROMPTS, padding_side="left")
    ours = lm.generate(batch, 40)
    theirs = plain.generate(
        batch.tokens, attention_mask=batch.mask.long(), max_new_tokens=40, do_sample=False, pad_token_id=lm.pad_id
    )
    assert torch.equal(ours.tokens, theirs[:, batch.tokens.shape[1] :])
    common = {"the", "a", "was", "to", "and", "she", "he", "they", "in", "with", "it", "her", "his"}
    for text in ours.texts:
        words = text.lower().split()
        assert len(words) > 15
        assert sum(word.strip(".,!") in common for word in words) > len(words) / 5
        assert "<" not in text
