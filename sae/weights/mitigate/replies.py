"""Chats with replies as training rows: the loss is on the reply's tokens alone."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae.behavior.contrast import ContrastRecord
from sae.behavior.measure import Prompts
from sae.lm.tokens import Role, TokenBatch, Tokenized, pad
from sae.weights.objective import Passage

_REPLY = (int(Role.ASSISTANT), int(Role.FIRST_RESPONSE))


class Replies(NamedTuple):
    """Chats that end in a reply."""

    rows: tuple[Tokenized, ...]
    starts: tuple[int, ...]  #: in each row, where the reply begins

    def first(self, n: int) -> "Replies":
        """The first n of them."""
        return Replies(self.rows[:n], self.starts[:n])

    def passage(self, pad_id: int) -> Passage:
        """All of them as rows whose replies are predicted."""
        counts = (len(row.tokens) - start for row, start in zip(self.rows, self.starts, strict=True))
        return Passage(pad(self.rows, padding_side="left", pad_id=pad_id), tuple(counts))

    def batch(self, lm: Any, index: Sequence[int]) -> "Batch":
        """Some of the rows, padded on the right: a prompt's tokens are in the same columns whatever the reply."""
        tokens = pad([self.rows[row] for row in index], padding_side="right", pad_id=lm.pad_id)
        column = torch.arange(tokens.tokens.shape[1])[None]
        starts = torch.tensor([self.starts[row] for row in index])[:, None]
        return Batch(tokens, tokens.mask & (column >= starts))


class Batch(NamedTuple):
    """Rows to learn from."""

    tokens: TokenBatch
    replies: Bool[Tensor, "batch pos"]  #: which tokens are the reply's


def given_replies(lm: Any, records: Sequence[ContrastRecord], texts: Sequence[str]) -> Replies:
    """Records' prompts, each with a text as the reply, up to its last word.

    What ends a reply is left out: the text may be the beginning of one only, and is not to teach the model to stop.
    """
    prompts = lm.tokenize_chats([record.messages for record in records]).rows()
    chats = [
        [*record.messages, {"role": "assistant", "content": text}] for record, text in zip(records, texts, strict=True)
    ]
    wholes = lm.tokenize_chats(chats, add_generation_prompt=False).rows()
    found = [_joined(lm, *one) for one in zip(prompts, wholes, texts, strict=True)]
    return Replies(tuple(found), tuple(len(prompt.tokens) for prompt in prompts))


def _joined(lm: Any, prompt: Tokenized, whole: Tokenized, text: str) -> Tokenized:
    start = len(prompt.tokens)
    if whole.tokens[:start] == prompt.tokens and len(whole.tokens) > start:
        ends = [place + 1 for place in range(start, len(whole.roles)) if whole.roles[place] in _REPLY]
        stop = ends[-1] if ends else len(whole.tokens)
        return Tokenized(list(whole.tokens[:stop]), list(whole.roles[:stop]))
    # A template that writes answered chats differently from open ones: the reply is tokenized by itself.
    return extended(prompt, lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def extended(prompt: Tokenized, reply: Sequence[int]) -> Tokenized:
    """A prompt followed by a reply's tokens."""
    roles = [int(Role.FIRST_RESPONSE), *[int(Role.ASSISTANT)] * (len(reply) - 1)][: len(reply)]
    return Tokenized([*prompt.tokens, *reply], [*prompt.roles, *roles])


def own_replies(lm: Any, prompts: Prompts, max_new_tokens: int) -> Replies:
    """Prompts with the model's own greedy replies, their ends included."""
    rows, starts = [], []
    for batch in prompts.batches:
        made = lm.generate(batch, max_new_tokens)
        for prompt, new, count in zip(batch.rows(), made.tokens.tolist(), made.n_tokens, strict=True):
            rows.append(extended(prompt, new[: max(1, count)]))
            starts.append(len(prompt.tokens))
    return Replies(tuple(rows), tuple(starts))


def reply_loss(lm: Any, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross entropy of the replies' tokens, in nats; differentiable where gradients are on."""
    logits = lm.forward(batch.tokens)[:, :-1]
    where = batch.replies[:, 1:].to(logits.device)
    targets = batch.tokens.tokens[:, 1:].to(logits.device)[where]
    return nn.functional.cross_entropy(logits[where].float(), targets)


def draws(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of `size` of n rows (all, where there are fewer): each row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < min(size, n):
            waiting += torch.randperm(n, generator=generator).tolist()
        yield waiting[: min(size, n)]
        waiting = waiting[min(size, n) :]
