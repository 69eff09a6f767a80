"""What is decomposed: a model, the text (or other inputs) it is run on, and how far two of its outputs are apart."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae.errors import UserError
from sae.lm.matrices import Matrix
from sae.lm.tokens import TokenBatch


class Target(ABC):
    """A model to be decomposed.

    Attributes:
        root: holds the modules that the matrices belong to.
        matrices: what is decomposed.
        batch_rows: rows of a training batch.
        fingerprint: what identifies the model; "" if nothing does.
    """

    root: nn.Module
    matrices: list[Matrix]
    batch_rows: int
    fingerprint: str = ""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Any:
        """Return a batch of inputs."""

    @abstractmethod
    def outputs(self, batch: Any) -> Float[Tensor, "row out"]:
        """Run the model."""

    @abstractmethod
    def divergence(self, clean: Float[Tensor, "row out"], now: Float[Tensor, "row out"]) -> Float[Tensor, ""]:
        """Return how far outputs are from what they should be."""

    def real(self, batch: Any) -> Bool[Tensor, " token"] | None:
        """Which of the tokens, flattened, are not padding; None: all."""
        return None

    @property
    def device(self) -> torch.device:
        """Where components live: with the matrices."""
        return self.matrices[0].parameter.device


class LanguageTarget(Target):
    """A language model on rows of tokens; outputs are log-probabilities at all real tokens, compared by KL in nats."""

    def __init__(self, lm: Any, matrices: Sequence[Matrix], text: TokenBatch, batch_rows: int = 16) -> None:
        """Take some matrices of a language model.

        Raises:
            UserError: no text.
        """
        if not len(text.tokens):
            raise UserError("there is no text to decompose the model on: give at least one row.")
        self.lm, self.matrices, self.text = lm, list(matrices), text
        self.root = lm.bridge.original_model
        self.batch_rows = min(batch_rows, len(text.tokens))
        self.fingerprint = str(lm.fingerprint)

    def draw(self, generator: torch.Generator) -> TokenBatch:
        """Return rows of the text, each at most once."""
        rows = torch.randperm(len(self.text.tokens), generator=generator, device=generator.device)
        return self.text.select(rows[: self.batch_rows].cpu()).to(self.lm.device)

    def outputs(self, batch: TokenBatch) -> Float[Tensor, "row out"]:
        """Return log-probabilities [token d_vocab] of the next token at every real token."""
        with self.lm.light():
            logits: Tensor = self.lm.forward(batch)
        return logits[batch.mask].float().log_softmax(dim=-1)

    def divergence(self, clean: Float[Tensor, "row out"], now: Float[Tensor, "row out"]) -> Float[Tensor, ""]:
        """Return the mean KL(clean || now)."""
        return (clean.exp() * (clean - now)).sum(dim=-1).mean()

    def real(self, batch: TokenBatch) -> Bool[Tensor, " token"]:
        """Which tokens are not padding."""
        return batch.mask.flatten()
