"""First letters: the words, prompts and activations on which absorption is measured in a language model.

    found = first_letter(lm, sae)
    found.fraction, found.full, found.probe_f1

Words are those that the tokenizer has as one token, since the model must know the letters of what it sees as one thing.
The measure is in `sae.evals.absorption`; it means something where the model knows letters (`probe_f1`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.evals.absorption import AbsorptionResult, Thresholds, absorption
from sae.probe import Probe


def first_letter(
    lm: Any,
    sae: SAE,
    words: Sequence[str] | None = None,
    *,
    acts: Float[Tensor, "n d_in"] | None = None,
    probes: Mapping[str, Probe] | None = None,
    n_examples: int = 10,
    batch_size: int = 64,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 - immutable
    seed: int = 0,
) -> AbsorptionResult:
    """Measure first-letter absorption of an SAE in its language model.

    Args:
        lm: the `LanguageModel` the SAE belongs to.
        sae: reads and writes one hook point.
        words: by default `vocabulary_words(lm)`.
        acts: what `word_activations` gave for these words, for several SAEs of one hook point.
        probes: what `fit_probes` gave for them.
        n_examples: see `word_activations`.
        batch_size: prompts, and rows to encode, at once.
        thresholds: what counts.
        seed: of the examples, the split and the bootstrap.

    Raises:
        UserError: a transcoder or crosscoder, or no words.
    """
    site = sae.config.site
    if site.kind != "sae":
        raise UserError(
            f"absorption is measured for SAEs of one hook point, not for {str(site)!r}, a {site.kind}: leave it out."
        )
    words = vocabulary_words(lm) if words is None else list(words)
    if not words:
        raise UserError("no words to measure absorption on: this tokenizer has none as one token; give a list.")
    if acts is None:
        hook = site.reads[0]
        acts = word_activations(lm, words, [hook], n_examples=n_examples, batch_size=batch_size, seed=seed)[hook]

    @torch.no_grad()
    def encoded() -> Iterator[Tensor]:
        for part in acts.split(batch_size):
            yield sae.encode(part)

    return absorption(encoded, acts, sae.W_dec, words, first_letters(words), probes, thresholds=thresholds, seed=seed)


def first_letters(words: Sequence[str]) -> list[str]:
    """The label of each word: its first letter, as a capital."""
    return [word[0].upper() for word in words]


def vocabulary_words(lm: Any, min_letters: int = 2) -> list[str]:
    """List the words of a tokenizer: ASCII letters only, one token when they follow a space.

    Args:
        lm: has a Hugging Face `tokenizer`.
        min_letters: single letters would be their own first letter.
    """
    # Tokens that begin a word carry its space as a mark, which is no letter.
    texts = {str(token).lstrip("Ġ▁") for token in lm.tokenizer.get_vocab()}
    words = sorted(text for text in texts if text.isascii() and text.isalpha() and len(text) >= min_letters)
    if not words:
        return []
    unknown = lm.tokenizer.unk_token_id
    ids = lm.tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    return [word for word, found in zip(words, ids, strict=True) if len(found) == 1 and found[0] != unknown]


@torch.no_grad()
def word_activations(
    lm: Any,
    words: Sequence[str],
    hook_names: Sequence[str],
    *,
    n_examples: int = 10,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Float[Tensor, "n d_in"]]:
    """Activations at the last token of every word, in a prompt that asks for first letters; float32, on the CPU.

    The prompt is, a line each, ` {other} has the first letter: {X}` for some other words, and then ` {word}`. What
    SAEBench lets follow, ` has the first letter:`, is left out: a causal model's activation at the word is the same.

    Args:
        lm: has `tokenize(texts)` and `activations(batch, hook_names)`.
        words: without a space before them.
        hook_names: where; all from one pass.
        n_examples: other words in a prompt, drawn anew for each.
        batch_size: prompts at once.
        seed: of the examples.
        progress: called after each batch.
    """
    rng = np.random.default_rng(seed)
    prompts = []
    for word in words:
        drawn = [words[int(i)] for i in rng.permutation(len(words))[: n_examples + 1]] if n_examples else []
        others = [other for other in drawn if other.lower() != word.lower()][:n_examples]
        lines = [f" {other} has the first letter: {other[0].upper()}\n" for other in others]
        prompts.append("".join([*lines, f" {word}"]))
    found: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    for start in range(0, len(prompts), batch_size):
        batch = lm.tokenize(prompts[start : start + batch_size])
        for name, acts in lm.activations(batch, hook_names).items():
            last = batch.last_positions().to(acts.device)
            found[name].append(acts[torch.arange(len(last), device=acts.device), last].float().cpu())
        progress()
    return {name: torch.cat(parts) for name, parts in found.items()}
