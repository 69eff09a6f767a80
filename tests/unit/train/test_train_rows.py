"""Training on a matrix: planted directions are found, and the same matrix gives the same SAE."""

import pytest
import torch

from sae.autoencoder.sae import unit_rows
from sae.errors import UserError
from sae.evals.meta_sae import explained
from sae.train.grid import SAESpec
from sae.train.rows import _Order, train_on_rows
from sae.train.settings import TrainSettings

N, M, D, K = 400, 40, 32, 3


def planted(length=1.0):
    """Rows that are sums of K of M directions."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(M, generator=generator)[:K] for _ in range(N)])
    weights = torch.zeros(N, M).scatter_(1, chosen, torch.rand(N, K, generator=generator) + 0.5)
    return length * (weights @ unit_rows(M, D, generator))


def learn(rows, seed=0, n_steps=400, **settings):
    spec = SAESpec("rows", "batch_topk", M + 10, K, seed)
    steps = []
    sae = train_on_rows(
        rows,
        spec,
        TrainSettings(n_steps * 256, 256, encoder_dtype="float32", kernels="reference", **settings),
        lambda: steps.append(1),
    )
    assert len(steps) == n_steps
    return sae


def test_planted_directions_explain_rows_and_nothing_explains_noise():
    found = explained(planted(), learn(planted()))
    noise = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    assert found.fve > 0.95
    assert found.l0 == pytest.approx(K, abs=0.3)
    assert explained(noise, learn(noise)).fve < 0.75


def test_the_sae_acts_on_rows_as_they_are():
    one, ten = explained(planted(), learn(planted())), explained(planted(10), learn(planted(10)))
    assert ten.fve == pytest.approx(one.fve, abs=0.01)


def test_it_is_reproducible():
    one, two, other = learn(planted(), n_steps=5), learn(planted(), n_steps=5), learn(planted(), seed=1, n_steps=5)
    assert torch.equal(one.W_dec, two.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)


def test_every_epoch_has_every_row_once():
    order = _Order(7, 0)
    taken = torch.cat([order.take(count) for count in (3, 5, 13)])
    for epoch in taken.split(7):
        assert epoch.sort().values.tolist() == list(range(7))
    assert not torch.equal(taken[:7], taken[7:14])


def test_what_comes_apart_is_no_sae():
    with pytest.raises(UserError, match="not finite"):
        learn(torch.full((N, D), torch.nan), n_steps=2)
