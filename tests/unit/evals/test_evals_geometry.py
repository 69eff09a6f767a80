"""Geometry of weights: answers known from construction, and blocks that change nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import files
from sae.autoencoder import sae as autoencoder
from sae.autoencoder.sae import SAE, SAEConfig
from sae.autoencoder.sae import unit_rows as random_rows
from sae.errors import UserError
from sae.evals.geometry import assign, geometry, nearest, nearest_other, null_generator, paired, rows_like, unit
from sae.evals.relations import directions


def rows(n, d, seed=0):
    return random_rows(n, d, torch.Generator().manual_seed(seed))


def make(W_dec, W_enc=None):
    sae = SAE(SAEConfig("relu", W_dec.shape[1], len(W_dec), 0.0, 0, "h", "toy"))
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(W_dec.t() if W_enc is None else W_enc)
    return sae


def test_known_directions():
    """Rows at 0, 60, 180 and 90 degrees, of different lengths; the third encoder is opposite, the last orthogonal."""
    decoder = torch.tensor([[1.0, 0], [0.5, 3**0.5 / 2], [-2, 0], [0, 3]])
    encoder = torch.stack([decoder[0] * 4, decoder[1], -decoder[2], torch.tensor([5.0, 0])], dim=1)
    found = geometry(make(decoder, encoder))
    assert found.enc_dec_cosine.tolist() == pytest.approx([1, 1, -1, 0])
    assert found.neighbor.tolist() == [2, 3, 0, 1]
    assert found.neighbor_cosine.tolist() == pytest.approx([-1, math.sqrt(3) / 2, -1, math.sqrt(3) / 2])
    assert found.decoder_norm.tolist() == pytest.approx([1, 1, 2, 3])
    assert found.encoder_norm.tolist() == pytest.approx([4, 1, 2, 5])
    files.to_plain(found)


def test_one_latent_zero_rows_and_transcoders():
    alone = geometry(make(torch.ones(1, 3)))
    assert alone.neighbor.tolist() == [-1]
    assert alone.neighbor_cosine.isnan().all()
    silent = geometry(make(torch.tensor([[0.0, 0], [1, 0], [1, 0]])))
    assert silent.neighbor_cosine.tolist() == [0, 1, 1]
    assert silent.enc_dec_cosine.tolist() == [0, 1, 1]
    assert geometry(autoencoder.make(SAEConfig("relu", 3, 5, 0.0, 0, "a->b", "t"))).enc_dec_cosine.isnan().all()


def test_orthonormal_rows_have_no_neighbor_worth_the_name():
    found = geometry(make(torch.eye(16)))
    assert found.neighbor_cosine.abs().max() == 0


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 30), m=st.integers(1, 30), d=st.integers(1, 6), block=st.integers(1, 200), seed=st.integers(0, 9)
)
def test_blocks_do_not_matter(n, m, d, block, seed):
    a, b = rows(n, d, seed), rows(m, d, seed + 100)
    products = a @ b.t()
    there, back = nearest(a, b, block)
    assert torch.allclose(there.cosine, products.max(1).values, atol=1e-6)
    assert torch.allclose(back.cosine, products.max(0).values, atol=1e-6)
    assert torch.allclose(products[torch.arange(n), there.row], there.cosine, atol=1e-6)
    other = nearest_other(a * (1 + torch.rand(n, 1)), block)
    sizes = (a @ a.t()).abs().fill_diagonal_(-1)
    assert torch.allclose(other.cosine.abs(), sizes.max(1).values.clamp(max=1), atol=1e-5)
    assert (other.row != torch.arange(n)).all()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 12), m=st.integers(0, 12), seed=st.integers(0, 99), doubles=st.booleans())
def test_assignments_are_one_to_one(n, m, seed, doubles):
    a, b = rows(n, 4, seed), rows(m, 4, seed + 1)
    if doubles:
        a, b = a.sign(), b.sign()
    totals = {}
    for method in ("hungarian", "greedy"):
        partner = assign(unit(a), unit(b), method)
        taken = partner[partner >= 0].tolist()
        assert len(set(taken)) == len(taken) == min(n, m)
        totals[method] = float(paired(unit(a), unit(b), partner).nansum()) if m else 0.0
    assert totals["hungarian"] >= totals["greedy"] - 1e-5


def test_greedy_takes_the_best_pair_first():
    a, b = rows(40, 5, 1), rows(30, 5, 2)
    products, expected = a @ b.t(), torch.full((40,), -1)
    left = products.clone()
    for _ in range(30):
        i, j = divmod(int(left.argmax()), 30)
        expected[i] = j
        left[i], left[:, j] = -9, -9
    assert torch.equal(assign(a, b, "greedy"), expected)


def test_greedy_and_hungarian_differ_where_they_should():
    """Greedy takes .9 and is left with -.5; the best sum is .8 + .8."""
    products = torch.tensor([[0.9, 0.8], [0.8, -0.5]])
    assert assign(products, torch.eye(2), "greedy").tolist() == [0, 1]
    assert assign(products, torch.eye(2), "hungarian").tolist() == [1, 0]
    with pytest.raises(UserError, match="unknown matching method 'best'"):
        assign(products, products, "best")


@pytest.mark.parametrize("scales", [[1.0, 1.0], [300.0, 0.01]])
def test_a_crosscoder_is_measured_in_the_units_of_its_training(scales):
    """Its rows on disk are in those of the activations, where the source with the smallest would hardly count."""
    config = SAEConfig("relu", 12, 40, 0.0, 0, "a+b", "toy", metadata={"training": {"input_scales": scales}})
    sae = autoencoder.make(config)
    known = sae.W_dec.detach().clone()
    sae.fold_scales(scales, scales)
    found = geometry(sae)
    assert found.decoder_norm.tolist() == pytest.approx([1] * 40, rel=1e-5)
    assert found.encoder_norm.tolist() == pytest.approx([1] * 40, rel=1e-5)
    assert found.enc_dec_cosine.tolist() == pytest.approx([1] * 40, rel=1e-5)
    assert torch.equal(found.neighbor, nearest_other(known).row)
    assert torch.allclose(directions(sae, "decoder"), known, atol=1e-5)
    assert torch.allclose(directions(sae, "encoder"), known, atol=1e-5)


@pytest.mark.parametrize(("n", "d"), [(4000, 6), (60, 9), (5, 9)])
def test_random_rows_fill_the_dimensions_that_others_fill(n, d):
    """Rows in four of the dimensions, one above the others; be there few or many."""
    shape = torch.zeros(d, d)
    shape[:4, :4] = torch.diag(torch.tensor([4.0, 1, 1, 1]))
    given = unit(rows(n, d) @ shape)
    drawn = rows_like(given, null_generator(0))
    assert drawn.norm(dim=1).tolist() == pytest.approx([1] * n, rel=1e-5)
    assert drawn[:, 4:].abs().max() < 1e-5
    assert torch.equal(rows_like(given, null_generator(0)), drawn)
    # One has most of the rows' length, and of that of what is drawn, but for what making lengths equal takes from it.
    known, found = (torch.linalg.eigvalsh(found.t() @ found / n) for found in (given, drawn))
    assert float(found[-1]) == pytest.approx(float(known[-1]), abs=0.2)
    assert found[-1] > 1.5 * found[-2]


def test_of_orthonormal_rows_random_ones_are_orthonormal_and_point_anywhere():
    """The second moment is kept itself, not that of what it might be a sample of."""
    drawn = torch.stack([rows_like(torch.eye(6), null_generator(seed)) for seed in range(2000)])
    assert torch.allclose(drawn @ drawn.mT, torch.eye(6).expand_as(drawn), atol=1e-5)
    assert drawn.mean(0).abs().max() < 0.05
    assert torch.allclose(drawn.square().mean(0), torch.full((6, 6), 1 / 6), atol=0.02)


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_random_rows_are_no_nearer_to_each_other_than_rows_that_share_nothing(spread):
    """Rows drawn anew with the covariance of so few would be: .05 nearer here."""
    sizes = torch.linspace(-spread, spread, 64).exp()
    found = []
    for seed in range(6):
        given = unit(torch.randn(128, 64, generator=torch.Generator().manual_seed(seed)) * sizes)
        drawn = rows_like(given, null_generator(seed))
        found.append([nearest_other(one).cosine.abs().mean() for one in (given, drawn)])
    alike, chance = torch.tensor(found).mean(0)
    assert float(alike) == pytest.approx(float(chance), abs=0.015)


def test_random_rows_are_not_those_that_an_sae_of_their_seed_began_with():
    given = rows(4000, 6, seed=0)
    assert (rows_like(given, null_generator(0)).abs() * given.abs()).sum(1).mean() < 0.8
    # With the seed itself, each is the one it stands for, but for signs.
    same = rows_like(given, torch.Generator().manual_seed(0))
    assert (same.abs() * given.abs()).sum(1).mean() > 0.99


def test_no_rows_give_no_rows():
    assert rows_like(torch.zeros(0, 3), torch.Generator()).shape == (0, 3)
