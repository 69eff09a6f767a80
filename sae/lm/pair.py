"""Two language models that read the same tokens, as one: the first, with the second's hook points beside its own.

    lm = PairedModel(load_lm("google/gemma-2-2b"), load_lm("google/gemma-2-2b-it"))
    lm.activations(batch, ["blocks.13.hook_resid_post", "pair.blocks.13.hook_resid_post"])

A hook point of the second model has the prefix `pair.`, which no name in TransformerLens has and every file name may
have. Texts become tokens by the first model's tokenizer and chat template. Whatever else a `LanguageModel` does
(logits, generating, editing) is the first model's; the second's own object is `lm.pair`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError
from sae.files import sha256_json
from sae.lm.model import LanguageModel
from sae.lm.tokens import TokenBatch

PREFIX = "pair."
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "  two spaces\n\n\tand a tab; 1234567890, 3.14 and 2024-05-17",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # code",
    "naïve café, Übergröße, привет, 你好, 🙂",
)
SAMPLE_TOKENS = 2048
"""Tokens of the vocabulary that are turned into text and back."""


class PairedModel(LanguageModel):
    """A language model that also gives the activations of another one on the same tokens.

    Attributes:
        pair: the second model.

    Raises:
        UserError: the two do not tokenize alike.
    """

    def __init__(self, first: LanguageModel, pair: LanguageModel) -> None:
        check_tokenizers(first, pair)
        super().__init__(
            first.bridge,
            first.tokenizer,
            name=f"{first.name} and {pair.name}",
            device=first.device,
            dtype=first.dtype,
            config=first._config,
            folder=first._folder,
        )
        self.first_name = first.name
        self.pair = pair
        self._first = first
        self.fast  # noqa: B018 - as in `load_lm`: to be asked while nothing is hooked

    @property
    def ctx_len(self) -> int:
        """Longest sequence that both models were made for."""
        return min(super().ctx_len, self.pair.ctx_len)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that identifies both models and which of them is the first."""
        return sha256_json([self._first.fingerprint, self.pair.fingerprint])

    def hook_names(self) -> list[str]:
        """Names of the first model's hook points, then of the second's."""
        return [*super().hook_names(), *(PREFIX + name for name in self.pair.hook_names())]

    def check_hook(self, name: str) -> None:
        """As in `LanguageModel`, in the model whose hook point the name is."""
        if not is_pairs(name):
            super().check_hook(name)
            return
        try:
            self.pair.check_hook(bare(name))
        except UserError as error:
            raise UserError(f"{name!r} is to be in lm.pair={self.pair.name!r}: {error}") from None

    def hook_point(self, name: str) -> Any:
        """The hook point behind a name of the first model.

        Raises:
            UserError: it is the second model's, which runs apart.
        """
        if is_pairs(name):
            raise UserError(f"{name!r} is a hook point of the second model: edit {bare(name)!r} of `lm.pair` instead.")
        return super().hook_point(name)

    def d_in(self, hook_name: str) -> int:
        """Width of the activations at a hook point of either model, heads flattened."""
        return self.pair.d_in(bare(hook_name)) if is_pairs(hook_name) else super().d_in(hook_name)

    def depth(self, hook_name: str) -> int:
        """Block of a hook point in its own model."""
        return self.pair.depth(bare(hook_name)) if is_pairs(hook_name) else super().depth(hook_name)

    @torch.no_grad()
    def activations(self, batch: TokenBatch, hook_names: Sequence[str]) -> dict[str, Float[Tensor, "batch pos d_in"]]:
        """Activations of both models on the same tokens, each stopped at the last hook point that is asked of it.

        A model that nothing is asked of is not run.
        """
        for name in hook_names:
            self.check_hook(name)
        theirs = [bare(name) for name in hook_names if is_pairs(name)]
        ours = [name for name in hook_names if not is_pairs(name)]
        # Asking for nothing at all is refused by the first.
        found = super().activations(batch, ours) if ours or not theirs else {}
        if theirs:
            found |= {PREFIX + name: acts for name, acts in self.pair.activations(batch, theirs).items()}
        return {name: found[name] for name in hook_names}


def is_pairs(hook_name: str) -> bool:
    """Whether a name is of the second model's hook points."""
    return hook_name.startswith(PREFIX)


def bare(hook_name: str) -> str:
    """The name that a hook point has in its own model."""
    return hook_name.removeprefix(PREFIX)


def models_of(lm: Any) -> dict[str, Any]:
    """The models behind one: by the prefix of their hook points, each with what runs it alone."""
    return {"": lm, PREFIX: lm.pair} if isinstance(lm, PairedModel) else {"": lm}


def names_of(lm: LanguageModel) -> dict[str, str]:
    """The names those models were loaded by."""
    return {"": lm.first_name, PREFIX: lm.pair.name} if isinstance(lm, PairedModel) else {"": lm.name}


def check_tokenizers(first: LanguageModel, pair: LanguageModel) -> None:
    """Refuse a second model that would read the first one's tokens as something else.

    The first's whole vocabulary must have the same numbers in the second's, which may have more, and both must cut
    a sample of texts alike.

    Raises:
        UserError: with the first difference.
    """
    remedy = "a pair needs one tokenizer, such as a model and its fine-tuned version have."
    ours, theirs = first.tokenizer.get_vocab(), pair.tokenizer.get_vocab()
    for token, number in ours.items():
        if theirs.get(token) != number:
            found = theirs.get(token)
            says = "does not know it" if found is None else f"calls it {found}"
            raise UserError(f"{first.name!r} calls the token {token!r} {number} but {pair.name!r} {says}: {remedy}")
    numbers = sorted(ours.values())
    spread = numbers[:: -(-len(numbers) // SAMPLE_TOKENS)]
    for text in (*SAMPLE_TEXTS, first.tokenizer.decode(spread)):
        cut = [lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for lm in (first, pair)]
        if list(cut[0]) != list(cut[1]):
            raise UserError(f"{first.name!r} and {pair.name!r} cut {text[:40]!r} into different tokens: {remedy}")
