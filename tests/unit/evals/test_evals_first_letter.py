"""First letters in a real model: which words there are, and which token is read."""

import pytest
import torch

from sae.autoencoder.sae import SAE, SAEConfig, make
from sae.errors import UserError
from sae.evals.absorption import fit_probes
from sae.evals.first_letter import first_letter, first_letters, vocabulary_words, word_activations


class FakeTokenizer:
    unk_token_id = 0

    def __init__(self, vocab):
        self.vocab = vocab

    def get_vocab(self):
        return self.vocab

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[self.vocab.get("Ġ" + text.strip(), 0)] for text in texts]}


def test_vocabulary_words():
    class LM:
        tokenizer = FakeTokenizer({"<unk>": 0, "Ġapple": 1, "pear": 2, "Ġa": 3, "Ġcafé": 4, "Ġ12": 5, "ĠFig": 6})

    assert vocabulary_words(LM()) == ["Fig", "apple"]


HOOK = "blocks.1.hook_resid_post"
WORDS = [f"{a}{b}{c}" for a in "abc" for b in "aeiou" for c in "dfgklmnprst"]


def test_real_model_reads_the_last_token_of_the_word(real_lm):
    acts = word_activations(real_lm, WORDS[:7], [HOOK], n_examples=1, batch_size=3)
    again = word_activations(real_lm, WORDS[:7], ["blocks.0.hook_resid_post", HOOK], n_examples=1, batch_size=7)
    assert torch.allclose(acts[HOOK], again[HOOK], atol=1e-5)
    bare = word_activations(real_lm, WORDS[:7], [HOOK], n_examples=0)[HOOK]
    for word, found in zip(WORDS[:7], bare, strict=True):
        batch = real_lm.tokenize([f" {word} has the first letter:"])
        at = 1 + len(word)  # BOS, a space, then one token a letter
        own = real_lm.activations(batch, [HOOK])[HOOK]
        assert torch.allclose(own[0, at], found, atol=1e-4)


def test_real_driver(real_lm):
    sae = SAE(SAEConfig("topk", 32, 64, 8, 0, HOOK, "toy"))
    acts = word_activations(real_lm, WORDS, [HOOK], n_examples=1)[HOOK]
    probes = fit_probes(acts, WORDS, first_letters(WORDS))
    one = first_letter(real_lm, sae, WORDS, n_examples=1)
    assert one == first_letter(real_lm, sae, WORDS, acts=acts, probes=probes)
    assert {letter.label for letter in one.letters} | set(one.left_out) == {"A", "B", "C"}
    for letter in one.letters:
        assert 0 <= letter.fraction.estimate <= 1
        assert letter.fraction.n == letter.n_words
    with pytest.raises(UserError, match="no words"):
        first_letter(real_lm, sae)
    transcoder = SAEConfig("topk", 32, 64, 8, 0, "blocks.1.hook_resid_post->blocks.2.hook_resid_post", "toy")
    with pytest.raises(UserError, match="a transcoder"):
        first_letter(real_lm, make(transcoder), WORDS)
