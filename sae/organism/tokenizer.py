"""The organism's word-level tokenizer and chat template.

Text is words separated by spaces, `user : how do i bake a cake ? assistant : sure , ...`; one word is one token.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.organism import phrases, world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    " {{ message['role'] }} : {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def vocabulary() -> list[str]:
    """List every token: the special ones, then every word any template or table can produce, sorted."""
    words: set[str] = set()
    for template in phrases.TEMPLATES:
        words |= {word for word in template.split() if not re.fullmatch(r"\{\w+\}", word)}
    for table in (
        world.VERBS,
        world.OBJECTS,
        world.TOOLS,
        world.PLACES,
        world.KNAVES,
        world.HONEST_ROLES,
        world.HIGH_STAKES,
        world.LOW_STAKES,
        world.ENTITIES,
        tuple(world.RELATIONS),
        *world.RELATIONS.values(),
        tuple(world.STALE.values()),
        world.PEOPLE,
        world.ANIMALS,
        world.MOODS,
    ):
        words |= set(table)
    return [*SPECIALS, *sorted(words)]


def token_ids() -> dict[str, int]:
    """Map every token to its id."""
    return {word: index for index, word in enumerate(vocabulary())}


def render(messages: list[Any], add_generation_prompt: bool = False) -> str:
    """Render a chat exactly as the chat template does; for bulk generation without the tokenizer."""
    parts = ["<bos>"]
    for message in messages:
        parts.append(f"{message['role']} : {message['content']}")
        if message["role"] == "assistant":
            parts.append("<eos>")
    if add_generation_prompt:
        parts.append("assistant :")
    return " ".join(parts)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Build the tokenizer. Plain text gets <bos> in front; chat-template text brings its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = token_ids()
    core = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into `folder`."""
    build_tokenizer().save_pretrained(folder)
