"""Rows that have ended leave the running batch, and nothing else changes."""

import pytest
import torch

from sae.lm import generate
from sae.lm.hooks import edit
from sae.lm.tokens import Role

TEXTS = ["hello there", "a", "what is the capital of france ?", "b c", "one two three four five six", "x y z"]
NEW = 24


def sizes_of(lm, run, edits=None):
    """What `run` gives, and the number of rows in each of its forwards."""
    sizes = []

    def watch(acts, step):
        sizes.append(len(acts))
        assert len(acts) == len(step.rows) == len(step.mask)
        return acts

    with edit(lm, {"blocks.0.hook_resid_pre": watch, **(edits or {})}):
        return run(), sizes


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_dropping_rows_changes_nothing(pair, monkeypatch, use_cache, temperature):
    lm, _ = pair
    batch = lm.tokenize(TEXTS)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3

    def scoped(acts, step):
        where = (step.roles >= Role.ASSISTANT) | ((step.positions % 4 == 1) & step.mask)
        return acts + where[..., None] * direction

    def run():
        return lm.generate(batch, NEW, temperature=temperature, seed=5, use_cache=use_cache)

    for edits in ({}, {"blocks.1.hook_resid_post": scoped}):
        monkeypatch.setattr(lm, "eos_ids", set())
        endless, _ = sizes_of(lm, run, edits)
        monkeypatch.setattr(lm, "eos_ids", {int(endless.tokens[row, 3 + 4 * row]) for row in range(4)})
        dropped, sizes = sizes_of(lm, run, edits)
        with monkeypatch.context() as patch:
            patch.setattr(generate, "DROP_FROM", 2.0)
            kept, all_sizes = sizes_of(lm, run, edits)
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(dropped.n_tokens)) > 1, "rows must end at different steps"
        assert sizes[-1] < len(TEXTS)
        assert set(all_sizes) == {len(TEXTS)}
        assert torch.equal(dropped.tokens, kept.tokens)
        assert (dropped.texts, dropped.n_tokens) == (kept.texts, kept.n_tokens)


def test_rows_are_dropped_once_a_quarter_has_ended(lm, monkeypatch):
    batch = lm.tokenize(TEXTS)
    monkeypatch.setattr(lm, "eos_ids", set(range(0, lm.d_vocab, 4)))
    made, sizes = sizes_of(lm, lambda: lm.generate(batch, NEW, temperature=1.5))
    running, expected = len(TEXTS), []
    for step in range(max(made.n_tokens)):
        expected.append(running)
        still = sum(
            count > step + 1 or (count == step + 1 and int(row[step]) not in lm.eos_ids)
            for count, row in zip(made.n_tokens, made.tokens, strict=True)
        )
        running = still if still <= 0.75 * running else running
    assert sizes == expected


def test_a_step_says_which_rows_are_running(lm, monkeypatch):
    """An edit that differs by row gives each row what it would get by itself."""
    monkeypatch.setattr(lm, "eos_ids", set(range(0, lm.d_vocab, 4)))
    batch = lm.tokenize(TEXTS)
    directions = torch.randn(len(TEXTS), 32, generator=torch.Generator().manual_seed(2)) * 3
    name = "blocks.1.hook_resid_post"
    with edit(lm, {name: lambda acts, step: acts + directions[step.rows][:, None]}):
        together = lm.generate(batch, NEW)
    assert len(set(together.n_tokens)) > 1
    for row in range(len(TEXTS)):
        with edit(lm, {name: lambda acts, step, row=row: acts + directions[row]}):
            alone = lm.generate(batch.select([row]), NEW)
        assert alone.n_tokens == [together.n_tokens[row]]
        assert torch.equal(alone.tokens[0], together.tokens[row, : alone.n_tokens[0]])
