"""Absorption: a parent absorbed by its child scores 1, an oracle 0, and the formulas give what they say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import files
from sae.errors import UserError
from sae.evals.absorption import Thresholds, absorption, fit_probes, measurable, word_absorption
from sae.evals.probing import held_out_rows
from sae.probe import Probe

D_IN, PARENT, CHILD, OTHER = 8, 0, 1, 2
AXES = torch.eye(D_IN)


def hierarchy(absorbed, n=600, share=0.25, seed=0):
    """Words with a parent feature (label "p"), some of which have a child feature, too; other words have neither.

    The oracle has a latent for each feature. In the absorbed dictionary the parent's latent is silent where there is
    a child, whose latent writes both directions at once.
    """
    rng = np.random.default_rng(seed)
    parent = rng.random(n) < 0.4
    child = parent & (rng.random(n) < share)
    noise = torch.from_numpy(rng.random(n)).float()
    acts = torch.from_numpy(np.stack([parent, child], 1)).float() @ AXES[:2] * 5 + noise[:, None] * AXES[3]
    W_dec = AXES[[PARENT, CHILD, 3]].clone()
    z = torch.stack([acts[:, 0], acts[:, 1], noise], dim=1)
    if absorbed:
        W_dec[1] = (AXES[PARENT] + AXES[CHILD]) / 2**0.5
        z[:, 0] = torch.where(torch.from_numpy(child), 0, z[:, 0])
        z[:, 1] = torch.from_numpy(child).float() * 5 * 2**0.5
    assert torch.allclose(z @ W_dec, acts, atol=1e-5)
    words = [f"w{i}" for i in range(n)]
    return z, acts, W_dec, words, ["p" if has else "q" for has in parent], parent, child


def test_words_of_the_child_score_one_and_the_oracle_zero():
    for absorbed, expected in ((True, 1.0), (False, 0.0)):
        z, acts, W_dec, _, _, _, child = hierarchy(absorbed)
        found = word_absorption(z[child], acts[child], W_dec, 3 * AXES[PARENT], [0])
        assert found.fraction.tolist() == [expected] * int(child.sum())
        assert found.full.tolist() == [bool(expected)] * int(child.sum())
        if absorbed:
            assert set(found.absorber.tolist()) == {1}


@pytest.mark.parametrize("absorbed", [True, False])
def test_the_whole_measure_finds_the_share_of_absorbed_words(absorbed):
    # The child is rare enough not to count as a split: silence on it costs less than .03 of F1.
    z, acts, W_dec, words, labels, parent, child = hierarchy(absorbed, n=3000, share=0.04)
    # The parent's direction is known here; a fitted one leans towards the child a little.
    probes = {"p": Probe(AXES[PARENT].double().numpy(), -2.5), "q": Probe(-AXES[PARENT].double().numpy(), 2.5)}
    found = absorption(z, acts, W_dec, words, labels, probes)
    (letter,) = found.letters
    test = held_out_rows(words)
    missed = child & test & absorbed
    assert (missed.sum() > 10) == absorbed
    assert (letter.label, letter.main, letter.probe_f1, found.left_out) == ("p", [0], 1, ["q"])
    assert letter.n_words == (parent & test).sum()
    share = missed.sum() / letter.n_words
    assert found.fraction == letter.fraction.estimate == pytest.approx(share)
    assert found.full == letter.full.estimate == pytest.approx(share)
    assert letter.full.low <= share <= letter.full.high
    assert letter.absorbed == [(words[i], 1) for i in np.flatnonzero(missed)]
    streamed = absorption(lambda: z.split(77), acts, W_dec, words, labels, probes)
    assert streamed == found
    files.to_plain(found)


def test_a_child_that_makes_f1_jump_is_a_split_and_no_absorption():
    """With a quarter of the words, the child's latent is worth more than .03 of F1; with a jump of .5 it is not."""
    z, acts, W_dec, words, labels, parent, child = hierarchy(True)
    split = absorption(z, acts, W_dec, words, labels)
    assert split.letters[0].main == [0, 1]
    assert split.n_main == 2
    assert split.full == split.fraction == 0
    strict = absorption(z, acts, W_dec, words, labels, thresholds=Thresholds(f1_jump=0.5))
    test = held_out_rows(words)
    assert strict.letters[0].main == [0]
    assert strict.full == pytest.approx(float((child & test).sum() / (parent & test).sum()))


def test_formulas():
    """One word, latents 0 (main), 1 to 4 (others), by hand."""
    p, W_dec = AXES[0], torch.zeros(5, D_IN)
    W_dec[:, 0] = torch.tensor([1.0, 0.5, 0.5, 0.05, -1])
    W_dec[:, 1] = (1 - W_dec[:, 0] ** 2).sqrt()
    acts = 10 * AXES[:1]

    def score(*z, **thresholds):
        found = word_absorption(torch.tensor([z]).float(), acts, W_dec, p, [0], Thresholds(**thresholds))
        return float(found.fraction), bool(found.full)

    assert score(10, 20, 0, 0, 0) == (0, False)  # the main latent carries all
    assert score(0, 7.9, 0, 0, 0) == (0, False)  # 3.95 of 10 is below the share
    assert score(0, 8, 0, 0, 0) == (1, True)
    assert score(0, 4, 4, 0, 0) == (1, False)  # together enough, none alone
    assert score(4, 8, 0, 0, 0) == (pytest.approx(4 / (4 + 4)), False)
    assert score(4, 20, 0, 0, 0) == (pytest.approx(6 / (6 + 4)), False)  # no more than is missing
    assert score(0, 0, 0, 100, 0) == (0, True)  # cosine .05: enough for full, not for the fraction
    assert score(0, 4, 4, 0, 9) == (1, False)  # negative projections do not count
    assert score(0, 4, 4, 0, 0, max_absorbers=1) == (0, False)
    assert score(-1, 8, 0, 0, 0) == (1, False)  # active, if negative: not silent
    acts = -acts
    assert score(0, 8, 0, 0, 0) == (0, False)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), d_sae=st.integers(2, 12), seed=st.integers(0, 99), scale=st.floats(0.1, 10))
def test_only_contributions_count(n, d_sae, seed, scale):
    """Moving length between activations and decoder rows changes nothing; fractions stay in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(n, d_sae, generator=generator).sub(0.5).relu()
    W_dec, acts, p = (torch.randn(m, 4, generator=generator) for m in (d_sae, n, 1))
    one = word_absorption(z, acts, W_dec, p[0], [0])
    two = word_absorption(z * scale, acts, W_dec / scale, p[0], [0])
    assert torch.allclose(one.fraction, two.fraction, atol=1e-5)
    assert torch.equal(one.full, two.full)
    assert ((one.fraction >= 0) & (one.fraction <= 1)).all()


def test_measurable_labels_are_those_that_are_measured_or_left_out_for_their_test_words():
    words = [letter + first + second for letter in "ab" for first in "abcdef" for second in "abcdef"]
    words += ["c" + first + "x" for first in "abcdefghijk"]  # eleven, of which fewer than ten are to train on
    assert measurable(words, [word[0] for word in words]) == ["a", "b"]
    assert measurable(words[:36], ["a"] * 36) == [], "nothing to tell it from"


def test_too_few_words_are_left_out():
    z, acts, W_dec, words, labels, *_ = hierarchy(True, n=40)
    found = absorption(z, acts, W_dec, words, labels, thresholds=Thresholds(min_words=1000))
    assert found.letters == []
    assert found.left_out == ["p", "q"]
    assert np.isnan(found.fraction)
    with pytest.raises(UserError, match="39 words"):
        absorption(z, acts, W_dec, words[1:], labels)


def test_probe_f1_says_what_the_model_knows():
    """1 where the labels are in the activations; what random guesses give where they are not, with nothing left out.

    With classes weighted equally a probe that knows nothing says yes to about half of the words, so its F1 is about
    p / (p + 1/2) for a label of share p; half of the words have each of two labels here.
    """
    z, acts, W_dec, words, labels, *_ = hierarchy(True)
    assert absorption(z, acts, W_dec, words, labels).probe_f1 == pytest.approx(1)
    rng = np.random.default_rng(0)
    blind = [str(label) for label in rng.choice(list("abcd"), len(words))]
    null = torch.from_numpy(rng.standard_normal(tuple(acts.shape))).float()
    found = absorption(z, null, W_dec, words, blind)
    assert found.probe_f1 == pytest.approx(0.25 / 0.75, abs=0.08)
    given = fit_probes(acts, words, labels)
    assert absorption(z, acts, W_dec, words, labels, given) == absorption(z, acts, W_dec, words, labels)
