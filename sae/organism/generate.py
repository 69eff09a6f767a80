"""Batched greedy generation for the organism: prompts of one length go together, so nothing needs padding."""

from typing import Any

import torch
from torch import Tensor

from sae.organism.tokenizer import render, token_ids, vocabulary

MAX_BATCH = 512


def prompt_ids(messages: list[Any]) -> list[int]:
    """Return the token ids of a prompt, up to and including the assistant header."""
    ids = token_ids_cached()
    return [ids[word] for word in render(messages, add_generation_prompt=True).split()]


_IDS: dict[str, int] = {}
_WORDS: list[str] = []


def token_ids_cached() -> dict[str, int]:
    """Return the word-to-id table, built once."""
    if not _IDS:
        _IDS.update(token_ids())
        _WORDS.extend(vocabulary())
    return _IDS


def decode(row: list[int]) -> str:
    """Return the words of a reply, up to <eos>."""
    token_ids_cached()
    words = [_WORDS[token] for token in row]
    return " ".join(words[: words.index("<eos>")] if "<eos>" in words else words)


@torch.no_grad()
def greedy(model: Any, tokens: Tensor, max_new_tokens: int) -> Tensor:
    """Continue unpadded prompts greedily with a key/value cache.

    Args:
        model: the Hugging Face model (hooks on it act on every position, also the generated ones).
        tokens: [batch pos].
        max_new_tokens: the most tokens to add; ends early when every row has ended.

    Returns:
        the new tokens [batch new].
    """
    eos = token_ids_cached()["<eos>"]
    cache, new, step = None, [], tokens
    ended = torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(max_new_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        step = out.logits[:, -1:].argmax(-1)
        new.append(step)
        ended |= step[:, 0] == eos
        if ended.all():
            break
    return torch.cat(new, dim=1)


def generate_replies(model: Any, prompts: list[list[Any]], max_new_tokens: int = 18) -> list[str]:
    """Return the greedy reply to every chat prompt, in order.

    Args:
        model: the Hugging Face model.
        prompts: lists of messages.
        max_new_tokens: the most tokens of a reply.
    """
    encoded = [prompt_ids(messages) for messages in prompts]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    replies = [""] * len(prompts)
    for indices in by_length.values():
        for start in range(0, len(indices), MAX_BATCH):
            chunk = indices[start : start + MAX_BATCH]
            new = greedy(model, torch.tensor([encoded[i] for i in chunk]), max_new_tokens)
            for index, row in zip(chunk, new.tolist(), strict=True):
                replies[index] = decode(row)
    return replies
