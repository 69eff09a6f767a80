"""Padding, masks and packing."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.errors import UserError
from sae.lm.tokens import Role, TokenBatch, Tokenized, by_length, iter_packed, pack, pad, sae_mask

document = st.lists(st.tuples(st.integers(2, 50), st.integers(1, 7)), max_size=30).map(
    lambda pairs: Tokenized([token for token, _ in pairs], [role for _, role in pairs])
)
documents = st.lists(document, max_size=12).filter(lambda docs: any(doc.tokens for doc in docs))
LEAD = 1
# Time limits would fail on a busy machine.
calm = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@calm
@given(st.lists(document.filter(lambda d: d.tokens), min_size=1, max_size=6), st.sampled_from(["left", "right"]))
def test_padding_round_trips(rows, side):
    batch = pad(rows, padding_side=side, pad_id=7)
    assert batch.rows() == rows
    other = "left" if side == "right" else "right"
    assert batch.repad(other, 7).rows() == rows
    assert batch.lengths == [len(row.tokens) for row in rows]
    last = batch.tokens[torch.arange(len(rows)), batch.last_positions()].tolist()
    assert last == [row.tokens[-1] for row in rows]
    positions = batch.positions()
    for number, row in enumerate(rows):
        assert positions[number][batch.mask[number]].tolist() == list(range(len(row.tokens)))
    parts = list(batch.split(2))
    assert [row for part in parts for row in part.rows()] == rows
    assert all(part.mask.any(dim=0).all() for part in parts)
    assert batch.select([len(rows) - 1]).rows() == rows[-1:]


@calm
@given(documents, st.integers(2, 9), st.booleans(), st.sampled_from([None, LEAD]))
def test_concat_loses_nothing(docs, ctx_len, each_row, lead):
    each_row = each_row and lead is not None
    packed = pack(docs, ctx_len, lead_id=lead, bos_each_row=each_row)
    assert packed.tokens.dtype == packed.doc.dtype == torch.int32
    assert packed.roles.dtype == torch.uint8
    tokens, roles, doc = (column.flatten().tolist() for column in packed)
    # Take out what packing adds: the lead of each document, of each continued row, and padding.
    found: dict[int, list] = {}
    for at, (token, role, number) in enumerate(zip(tokens, roles, doc, strict=True)):
        starts = number not in found
        added = lead is not None and token == lead and (starts or (each_row and at % ctx_len == 0))
        if number >= 0:
            found.setdefault(number, [])
            if not added:
                found[number].append((token, role))
            else:
                assert role == Role.SPECIAL
    expected = {i: list(zip(*d, strict=True)) for i, d in enumerate(docs) if d.tokens}
    assert found == expected
    real = [number for number in doc if number >= 0]
    assert real == sorted(real), "document ids never go back"
    assert doc[: len(real)] == real, "padding only at the very end"
    assert set(roles[len(real) :]) <= {Role.PAD}
    assert len(tokens) - len(real) < ctx_len
    if each_row:
        assert (packed.tokens[:, 0] == lead).all()


@calm
@given(documents, st.integers(2, 9), st.integers(1, 4))
def test_a_stream_of_parts_equals_one_pack(docs, ctx_len, rows):
    parts = list(iter_packed(docs, ctx_len, lead_id=LEAD, rows_per_part=rows))
    assert all(len(part.tokens) == rows for part in parts[:-1])
    for whole, pieces in zip(pack(docs, ctx_len, lead_id=LEAD), zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))


@calm
@given(documents, st.integers(2, 9))
def test_document_mode(docs, ctx_len):
    packed = pack(docs, ctx_len, "document", lead_id=LEAD)
    kept = [(i, doc) for i, doc in enumerate(docs) if doc.tokens]
    rows = packed.batch(slice(None)).rows()
    assert [row.tokens for row in rows] == [([LEAD, *doc.tokens])[:ctx_len] for _, doc in kept]
    assert [row.roles for row in rows] == [([1, *doc.roles])[:ctx_len] for _, doc in kept]
    assert packed.doc[:, 0].tolist() == [i for i, _ in kept]


@calm
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100))
def test_batches_by_length_hold_every_row_once_and_no_more_than_they_may(lengths, batch_tokens):
    given_lengths = torch.tensor(lengths)
    parts = list(by_length(given_lengths, batch_tokens))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    padded = [len(part) * int(given_lengths[part].max()) for part in parts]
    assert all(size <= batch_tokens or len(part) == 1 for size, part in zip(padded, parts, strict=True))
    # Shortest first, and a batch ends only where its next row would not fit.
    order = given_lengths[torch.cat(parts)].tolist()
    assert order == sorted(order)
    for part, following in pairwise(parts):
        assert (len(part) + 1) * int(given_lengths[following[0]]) > batch_tokens


def test_sae_mask():
    roles = torch.tensor([int(role) for role in Role], dtype=torch.uint8)
    assert sae_mask(roles).tolist() == [False, False] + [True] * 6
    assert sae_mask(roles, include_special=True).tolist() == [False] + [True] * 7


def test_last_positions_with_padding_on_either_side():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.bool)
    batch = TokenBatch(torch.zeros(2, 3, dtype=torch.long), mask, mask.to(torch.uint8))
    assert batch.last_positions().tolist() == [2, 1]


def test_bad_input():
    row = Tokenized([3], [2])
    for call, words in (
        (lambda: pad([]), "empty list"),
        (lambda: pad([row, Tokenized([], [])]), "text number 1 has no tokens"),
        (lambda: pad([row], padding_side="top"), "unknown padding side 'top'"),
        (lambda: list(pad([row]).split(0)), "batch_size=0"),
        (lambda: pack([row], 8, "joined"), "unknown packing mode 'joined'"),
        (lambda: pack([row], 1), "ctx_len=1"),
        (lambda: pack([row], 8, bos_each_row=True), "needs a lead_id"),
        (lambda: pack([], 8), "no tokens"),
    ):
        with pytest.raises(UserError, match=words):
            call()
