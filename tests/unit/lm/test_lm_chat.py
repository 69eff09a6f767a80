"""Roles of chat tokens, and exactly one BOS."""

import pytest
from tiny_lms import TEMPLATE, byte_tokenizer

from sae.errors import UserError
from sae.lm.chat import content_spans, render, tokenize_chat, tokenize_documents, tokenize_text
from sae.lm.documents import Document
from sae.lm.tokens import Role

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": " user\n"},  # trimmed by the template, and also one of its own words
    {"role": "assistant", "content": "assistant hé"},
    {"role": "user", "content": "user"},
]


def text_of(tokenizer, chat, *roles):
    """The text of the tokens that have one of some roles."""
    return tokenizer.decode([t for t, r in zip(*chat, strict=True) if r in roles])


@pytest.mark.parametrize("offsets", [True, False])
def test_roles(offsets):
    tokenizer = byte_tokenizer()
    chat = tokenize_chat(tokenizer, CHAT, use_offsets=offsets)
    assert tokenizer.decode(chat.tokens) == render(tokenizer, CHAT)
    assert text_of(tokenizer, chat, Role.SYSTEM) == "be kind"
    assert text_of(tokenizer, chat, Role.USER) == "useruser"
    assert text_of(tokenizer, chat, Role.FIRST_RESPONSE) == "a"
    assert text_of(tokenizer, chat, Role.ASSISTANT) == "ssistant hé"
    assert text_of(tokenizer, chat, Role.SPECIAL) == "<bos>"
    assert text_of(tokenizer, chat, Role.TEMPLATE).endswith("<|turn|>assistant\n")
    assert Role.TEXT not in chat.roles
    assert Role.PAD not in chat.roles


def test_a_word_level_template_with_spaces():
    """As in `user : hi . assistant : no .`, where a BPE token swallows the space before a content."""
    template = "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}"
    tokenizer = byte_tokenizer(template=template)
    spans = content_spans(tokenizer, CHAT, render(tokenizer, CHAT))
    text = render(tokenizer, CHAT)
    assert [text[s.start : s.stop] for s in spans] == [message["content"] for message in CHAT]


def test_a_template_that_looks_into_contents_is_searched():
    template = (
        "{% for m in messages %}{% if m.content == 'be kind' %}[{{ m.content }}]"
        "{% else %}<{{ m.content }}>{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template=template)
    text = render(tokenizer, CHAT)
    found = [text[s.start : s.stop] for s in content_spans(tokenizer, CHAT, text)]
    assert found == [message["content"].strip() for message in CHAT]
    shouting = byte_tokenizer(template="{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(UserError, match="changes the content"):
        tokenize_chat(shouting, CHAT)


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
def test_exactly_one_bos(template):
    tokenizer = byte_tokenizer(template=template)
    bos = tokenizer.bos_token_id
    chat = tokenize_chat(tokenizer, CHAT)
    assert chat.tokens[0] == bos
    assert chat.tokens.count(bos) == 1
    assert len(chat.tokens) == len(chat.roles)
    assert text_of(tokenizer, chat, Role.USER) == "useruser"
    for text in ("hi", "<bos>hi", "<bos><bos>hi"):
        tokenized = tokenize_text(tokenizer, text)
        assert tokenized.tokens.count(bos) == 1
        assert tokenized.roles == [Role.SPECIAL, Role.TEXT, Role.TEXT]
    assert tokenize_text(tokenizer, "hi", prepend_bos=False).roles == [Role.TEXT] * 2


def test_a_tokenizer_without_bos_gets_none():
    tokenizer = byte_tokenizer(bos=False, template=TEMPLATE.replace("{{ bos_token }}", ""))
    assert tokenize_text(tokenizer, "hi").roles == [Role.TEXT] * 2
    assert Role.SPECIAL not in tokenize_chat(tokenizer, CHAT).roles


def test_documents_keep_their_order():
    tokenizer = byte_tokenizer()
    stream = [Document(text="a"), Document(messages=CHAT), Document(text="b"), Document(text="")] * 3
    found = list(tokenize_documents(tokenizer, stream, chunk=5))
    singles = [next(tokenize_documents(tokenizer, [document])) for document in stream]
    assert found == singles
    assert found[1] == tokenize_chat(tokenizer, CHAT, add_generation_prompt=False)


def test_batches_of_chats(lm):
    batch = lm.tokenize_chats([CHAT, CHAT[:2]])
    assert batch.mask[:, -1].all()
    assert not batch.mask[1, 0]
    assert (batch.roles == Role.PAD).equal(~batch.mask)
    assert lm.format_chat(CHAT[:1]) == "<bos><|turn|>system\nbe kind<|end|>\n<|turn|>assistant\n"


def test_bad_chats():
    tokenizer = byte_tokenizer()
    refusing = byte_tokenizer(template="{{ raise_exception('no system role') }}")
    for call, words in (
        (lambda: render(byte_tokenizer(template=None), CHAT), "no chat template.*chat_template="),
        (lambda: render(refusing, CHAT), "no system role"),
        (lambda: render(tokenizer, []), "without messages"),
        (lambda: render(tokenizer, [{"role": "usr", "content": "x"}]), "unknown message role 'usr'"),
        (lambda: render(tokenizer, [{"role": "user"}]), "message number 0"),
    ):
        with pytest.raises(UserError, match=words):
            call()
