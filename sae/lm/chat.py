"""Text and chats to tokens with roles, for any Hugging Face tokenizer.

The chat template is rendered twice: once with the real messages and once with a marker in place of every content.
The second rendering shows exactly where the template puts contents, so that a content which also occurs in the
template's own words (a user who writes "user") is never mistaken for it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from sae.errors import UserError, unknown
from sae.lm.tokens import Role, Tokenized

Message = dict[str, Any]

#: Role of a content by the message's role. Tool results are input the model reads, like the user's.
MESSAGE_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "tool": Role.USER,
    "assistant": Role.ASSISTANT,
    "model": Role.ASSISTANT,
}

# Private-use characters: no template tests for them and no text contains them.
_MARK = re.compile("\ue0f0(\\d+)\ue0f1")


class Span(NamedTuple):
    """Characters `start:stop` of a rendered chat are the content of message number `message`."""

    start: int
    stop: int
    message: int


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that carry no text: BOS, EOS and other special tokens.

    "unk" stands for text, so it only counts when it doubles as BOS or EOS (as in GPT-2).
    """
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    found = {*tokenizer.all_special_ids, *ends} - {None}
    if tokenizer.unk_token_id not in ends:
        found.discard(tokenizer.unk_token_id)
    return found


def lead_id(tokenizer: Any) -> int | None:
    """What a document starts with: BOS, else EOS as a separator, else nothing."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _one_bos(tokenizer: Any, ids: list[int]) -> tuple[list[int], int]:
    """Make `ids` start with exactly one BOS if the tokenizer has one; also return how many tokens were added."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids, 0
    start = 0
    while start < len(ids) and ids[start] == bos:
        start += 1
    return [bos, *ids[start:]], 1 - start


def tokenize_text(tokenizer: Any, text: str, *, prepend_bos: bool = True) -> Tokenized:
    """Tokenize one document."""
    return next(tokenize_texts(tokenizer, [text], prepend_bos=prepend_bos))


def tokenize_texts(tokenizer: Any, texts: Sequence[str], *, prepend_bos: bool = True) -> Iterator[Tokenized]:
    """Tokenize documents together (fast tokenizers do many at once in native code)."""
    special = special_ids(tokenizer)
    for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        if prepend_bos:
            ids, _ = _one_bos(tokenizer, list(ids))
        yield Tokenized(list(ids), [int(Role.SPECIAL if token in special else Role.TEXT) for token in ids])


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """Format messages with the tokenizer's chat template.

    Raises:
        UserError: no template, a malformed message, or a template that refuses the messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
            "give one with load_lm(..., chat_template=<template or file>), or pass plain text."
        )
    if not messages:
        raise UserError("a chat without messages cannot be formatted: give at least one message.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UserError(f"message number {number} is {message!r}: give {{'role': ..., 'content': text}}.")
        if message["role"] not in MESSAGE_ROLES:
            raise unknown("message role", message["role"], list(MESSAGE_ROLES))
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # jinja errors of many kinds, raised by the template's author
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} refuses these messages ({error}): "
            "use the roles and the order that it supports."
        ) from None


def tokenize_chat(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = True, use_offsets: bool | None = None
) -> Tokenized:
    """Tokenize a chat and give each token its role.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: `{"role", "content"}` records.
        add_generation_prompt: end with what precedes an answer.
        use_offsets: take token boundaries from the tokenizer (None: if it can), else from tokenizing prefixes.
    """
    text = render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    spans = content_spans(tokenizer, messages, text, add_generation_prompt=add_generation_prompt)
    if use_offsets is None:
        use_offsets = bool(tokenizer.is_fast)
    if use_offsets:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    else:
        ids, offsets = _prefix_offsets(tokenizer, text, spans)
    roles = _roles(tokenizer, messages, spans, ids, offsets)
    with_bos, added = _one_bos(tokenizer, ids)
    roles = [int(Role.SPECIAL), *roles] if added > 0 else roles[-added:]
    return Tokenized(with_bos, roles)


def _roles(
    tokenizer: Any, messages: Sequence[Message], spans: list[Span], ids: list[int], offsets: list[tuple[int, int]]
) -> list[int]:
    """One role a token: that of the content it overlaps, else SPECIAL or TEMPLATE."""
    # Inside a chat special tokens are the template's (an end-of-turn token is where directions are read); only those
    # that begin or end the whole text are SPECIAL, whichever of them a model also uses between turns.
    ends = special_ids(tokenizer) & {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    roles: list[int] = []
    current, last_message = 0, -1
    for index, (token, (start, stop)) in enumerate(zip(ids, offsets, strict=True)):
        while current < len(spans) and spans[current].stop <= start:
            current += 1
        inside = current < len(spans) and max(start, spans[current].start) < min(stop, spans[current].stop)
        if token in ends and (index in (0, len(ids) - 1) or token == tokenizer.pad_token_id):
            roles.append(int(Role.SPECIAL))
        elif not inside or token in ends:
            roles.append(int(Role.TEMPLATE))
        else:
            message = spans[current].message
            role = MESSAGE_ROLES[messages[message]["role"]]
            if role == Role.ASSISTANT and message != last_message:
                role = Role.FIRST_RESPONSE
            last_message = message
            roles.append(int(role))
    return roles


def content_spans(
    tokenizer: Any, messages: Sequence[Message], text: str, *, add_generation_prompt: bool = True
) -> list[Span]:
    """Find each message's content in the rendered `text`, in order of appearance.

    Raises:
        UserError: a content is not in the text (a template that rewrites contents).
    """
    marked = [{**message, "content": f"\ue0f0{i}\ue0f1"} for i, message in enumerate(messages)]
    spans: list[Span] | None
    try:
        pieces = _MARK.split(render(tokenizer, marked, add_generation_prompt=add_generation_prompt))
        spans = _align(text, pieces, messages)
    except UserError:  # a template that looks into the contents
        spans = None
    return _search(text, messages) if spans is None else spans


def _align(text: str, pieces: list[str], messages: Sequence[Message]) -> list[Span] | None:
    """Walk `text` along template piece, content, template piece, ...; None where they do not fit."""
    cursor = len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    spans: list[Span] = []
    for number, follow in zip(pieces[1::2], pieces[2::2], strict=True):
        content = messages[int(number)]["content"]
        for form in (content, content.strip(), content.lstrip(), content.rstrip()):
            if text.startswith(form + follow, cursor):
                spans.append(Span(cursor, cursor + len(form), int(number)))
                cursor += len(form) + len(follow)
                break
        else:
            return None
    return spans if cursor == len(text) else None


def _search(text: str, messages: Sequence[Message]) -> list[Span]:
    """Find the contents one after the other."""
    spans, cursor = [], 0
    for number, message in enumerate(messages):
        content = message["content"].strip()
        start = text.find(content, cursor)
        if start < 0:
            raise UserError(
                f"the chat template changes the content of message number {number} ({content[:40]!r}): "
                "use a template that keeps contents as they are."
            )
        cursor = start + len(content)
        spans.append(Span(start, cursor, number))
    return spans


def _prefix_offsets(tokenizer: Any, text: str, spans: list[Span]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token boundaries for a tokenizer that reports none: tokenize the text up to each span boundary.

    Offsets are only as fine as the pieces between boundaries, which is all that roles need.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    offsets: list[tuple[int, int]] = []
    cursor = 0
    for edge in [*(edge for span in spans for edge in (span.start, span.stop)), len(text)]:
        prefix = tokenizer(text[:edge], add_special_tokens=False, verbose=False)["input_ids"]
        count = len(ids) if edge == len(text) else min(len(prefix), len(ids))
        offsets += [(cursor, edge)] * (count - len(offsets))
        cursor = edge
    return ids, offsets


def tokenize_documents(
    tokenizer: Any, documents: Iterable[Any], *, prepend_bos: bool = True, chunk: int = 256
) -> Iterator[Tokenized]:
    """Tokenize a stream of `Document`s (text or messages), in order."""
    stream = iter(documents)
    while group := list(islice(stream, chunk)):
        texts = [document.text for document in group if document.text is not None]
        tokenized = tokenize_texts(tokenizer, texts, prepend_bos=prepend_bos) if texts else iter(())
        for document in group:
            if document.text is not None:
                yield next(tokenized)
            else:
                yield tokenize_chat(tokenizer, document.messages, add_generation_prompt=False)
