"""k-sparse probing: planted latents are found, null data give nothing, and topics never leak."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import files
from sae.errors import UserError
from sae.evals.probing import class_difference, columns, held_out_rows, k_sparse_probing

N_TOPICS, PER_TOPIC, D_SAE = 60, 8, 40


def planted(seed=0, strength=3.0, n_planted=2):
    """Latents 7 and 11 carry the label together; the rest are sparse noise. Returns acts, labels and topics."""
    rng = np.random.default_rng(seed)
    n = N_TOPICS * PER_TOPIC
    topics = [f"topic {row // PER_TOPIC}" for row in range(n)]
    labels = rng.random(n) < 0.5
    z = rng.exponential(size=(n, D_SAE)) * (rng.random((n, D_SAE)) < 0.3)
    # Each of the two fires on a half of the positives of its own.
    half = rng.random(n) < 0.5
    z[:, 7] = np.where(labels & half, strength, 0)
    if n_planted > 1:
        z[:, 11] = np.where(labels & ~half, strength, 0)
    return torch.from_numpy(z).float(), labels, topics


def test_planted_latents_are_found():
    z, labels, topics = planted()
    raw = torch.from_numpy(np.where(labels, 1.0, -1.0))[:, None] + 0.1 * torch.randn(len(z), 5)
    found = k_sparse_probing(z, labels, topics, ks=(1, 2), acts=raw, n_controls=10)
    one, two = found.sparse
    assert set(two.latents) == {7, 11}
    assert one.latents == two.latents[:1]
    # One of the two fires on half of the positives and on no negative: AUROC 3/4, F1 2/3.
    assert one.score.auroc.estimate == pytest.approx(0.75, abs=0.05)
    assert one.score.f1.estimate == pytest.approx(2 / 3, abs=0.08)
    assert two.score.auroc.estimate == two.score.accuracy.estimate == two.score.f1.estimate == 1
    assert found.dense.auroc.estimate == pytest.approx(1, abs=1e-3)
    for probe in found.sparse:
        assert probe.random.auroc.high < 0.65 < probe.score.auroc.low
        assert probe.shuffled.auroc.low < 0.5 < probe.shuffled.auroc.high
        assert probe.random.auroc.n_draws == 10
    assert found.n_train + found.n_test == len(z)
    assert found.n_train_groups + found.n_test_groups == N_TOPICS
    assert 0.5 <= found.majority < 0.6
    files.to_plain(found)


def test_null_data_give_nothing():
    """Labels that topics carry but activations do not: the interval covers one half."""
    rng = np.random.default_rng(1)
    z, _, topics = planted(1)
    by_topic = rng.random(N_TOPICS) < 0.5
    labels = np.repeat(by_topic, PER_TOPIC)
    z[:, [7, 11]] = 0
    found = k_sparse_probing(z, labels, topics, ks=(1, 5), acts=z[:, :5], n_controls=10)
    for score in (found.sparse[0].score, found.sparse[1].score, found.dense):
        assert score.auroc.low < 0.5 < score.auroc.high


def test_topics_would_leak_without_the_split():
    """Latents that name the topic tell its label apart among its own rows, and say nothing of other topics."""
    topics = np.repeat(np.arange(30), 10)
    labels = np.random.default_rng(0).permutation(np.arange(30) < 15)[topics]
    z = torch.nn.functional.one_hot(torch.from_numpy(topics), 30).float()
    names = [str(topic) for topic in topics]
    honest = k_sparse_probing(z, labels, names, ks=(10,), n_controls=0).sparse[0].score
    assert honest.auroc.estimate == 0.5
    within = np.arange(len(topics)) % 3 == 0
    with pytest.raises(UserError, match=r"group '0' \(one of 30\) has rows on the train and on the test side"):
        k_sparse_probing(z, labels, names, test=within)
    leaky = k_sparse_probing(z, labels, [str(row) for row in range(300)], ks=(10,), test=within, n_controls=0)
    assert leaky.sparse[0].score.auroc.low > 0.6


def test_latents_are_chosen_on_train_rows_only():
    z, labels, topics = planted(n_planted=1)
    test = held_out_rows(topics)
    z[:, 3] = 0
    z[test, 3] = torch.from_numpy(np.where(labels[test], 50.0, 0.0)).float()
    found = k_sparse_probing(z, labels, topics, ks=(1,), n_controls=0)
    assert found.sparse[0].latents == [7]
    assert np.isnan(found.sparse[0].random.auroc.mean)


def test_streams_and_seeds():
    z, labels, topics = planted()
    whole = k_sparse_probing(z, labels, topics, ks=(1, 3), n_controls=3, n_draws=50)
    streamed = k_sparse_probing(lambda: z.split(37), labels, topics, ks=(1, 3), n_controls=3, n_draws=50)
    again = k_sparse_probing(z, labels, topics, ks=(1, 3), n_controls=3, n_draws=50)
    other = k_sparse_probing(z, labels, topics, ks=(1, 3), n_controls=3, n_draws=50, seed=1)
    assert whole == again == streamed
    assert whole != other


@settings(max_examples=25, deadline=None)
@given(n=st.integers(4, 40), d=st.integers(1, 9), cuts=st.integers(1, 41), seed=st.integers(0, 50))
def test_class_differences_whatever_the_batches(n, d, cuts, seed):
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.normal(size=(n, d)) * (rng.random((n, d)) < 0.5)).float()
    labels = rng.permutation(np.arange(n) % 2 == 0)
    rows = np.ones(n, dtype=bool)
    rows[0] = n < 6
    found = class_difference(lambda: z.split(cuts), [labels, ~labels], rows)
    kept = z.numpy()[rows]
    expected = kept[labels[rows]].mean(0) - kept[~labels[rows]].mean(0)
    np.testing.assert_allclose(found.difference, [expected, -expected], atol=1e-5)
    np.testing.assert_allclose(found.density, (kept != 0).mean(0))
    chosen = rng.permutation(d)
    np.testing.assert_array_equal(columns(lambda: z.split(cuts), chosen), z.numpy()[:, chosen])


def test_refusals():
    z, labels, topics = planted()
    for change, message in [
        ({"labels": labels[1:]}, "labels"),
        ({"labels": labels | True}, "one class only"),
        ({"latent_acts": z[1:]}, "rows of latent activations"),
        ({"latent_acts": torch.cat([z, z])}, "rows of latent activations"),
        ({"latent_acts": z * float("nan")}, "NaN"),
        ({"ks": ()}, "ks = "),
        ({"ks": (21,)}, "k of at most 20"),
        ({"acts": z[1:]}, "raw activations"),
    ]:
        arguments = {"latent_acts": z, "labels": labels, "groups": topics} | change
        with pytest.raises(UserError, match=message):
            k_sparse_probing(**arguments)
