"""Meta-SAEs: rows made of few directions are rebuilt, random rows are not, and both are measured alike."""

import math

import pytest
import torch

from sae import files
from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.evals.meta_sae import explained, meta_sae

D_IN, N, M, K = 64, 400, 40, 4


def directions():
    return torch.linalg.qr(torch.randn(D_IN, M, generator=torch.Generator().manual_seed(0)))[0].t()


def oracle(rows, d_sae, k):
    """Knows the directions, and has no need to train."""
    sae = SAE(SAEConfig("topk", D_IN, d_sae, k, 0, "meta", "toy"))
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_dec[:M] = directions()
        sae.W_enc.copy_(sae.W_dec.t())
    return sae


def base(W_dec):
    sae = SAE(SAEConfig("relu", D_IN, len(W_dec), 0.0, 0, "h", "toy"))
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
    return sae


def combinations(n=N, k=K):
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(M, generator=generator)[:k] for _ in range(n)])
    weights = torch.zeros(n, M).scatter_(1, chosen, torch.rand(n, k, generator=generator) + 0.5)
    return weights @ directions()


def test_combinations_are_explained_and_random_rows_are_not():
    found = meta_sae(base(3 * combinations()), oracle, k=K)
    assert found.fve == pytest.approx(1, abs=1e-5)
    assert 0.1 < found.fve_random < 0.4
    assert found.l0 == K
    assert (found.d_sae, found.k, found.n_rows) == (100, K, N)
    assert found.dead_fraction == pytest.approx(0.6)
    files.to_plain(found)


def test_fewer_meta_latents_explain_less():
    fves = [meta_sae(base(combinations()), oracle, k=k, random=False).fve for k in (1, 2, 3, 4)]
    assert fves == sorted(fves)
    assert fves[0] < 0.5


def test_each_training_sees_unit_rows_of_its_own():
    seen = []

    def train(rows, d_sae, k):
        seen.append((rows, d_sae, k))
        return oracle(rows, d_sae, k)

    keep = torch.arange(N) % 2 == 0
    found = meta_sae(base(5 * combinations()), train, keep=keep, width_ratio=0.5, seed=3)
    (rows, d_sae, k), (random, *_) = seen
    assert (len(rows), d_sae, k, found.n_rows) == (N // 2, 100, 4, N // 2)
    assert torch.allclose(rows.norm(dim=1), torch.ones(N // 2), atol=1e-5)
    assert random.shape == rows.shape
    assert (random @ rows.t()).abs().max() < 0.9
    assert meta_sae(base(5 * combinations()), train, keep=keep, width_ratio=0.5, seed=3) == found
    assert math.isnan(meta_sae(base(combinations()), train, random=False).fve_random)


def test_batches_do_not_matter():
    rows = combinations()
    rows = rows / rows.norm(dim=1, keepdim=True)
    meta = oracle(rows, 50, 2)
    assert explained(rows, meta).fve == pytest.approx(explained(rows, meta, batch_size=7).fve)


@pytest.mark.parametrize("change", [{"k": 101}, {"k": 0}, {"width_ratio": 0.001}, {"keep": torch.arange(1)}])
def test_refusals(change):
    with pytest.raises(UserError, match="cannot be"):
        meta_sae(base(combinations()), oracle, **change)


def principal(rows, d_sae, k):
    """Knows the k dimensions that hold most of the rows, in both directions, and so rebuilds these parts exactly."""
    vectors = torch.linalg.eigh(rows.t() @ rows).eigenvectors[:, -k:].t()
    sae = SAE(SAEConfig("topk", D_IN, d_sae, k, 0, "meta", "toy"))
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_dec[: 2 * k] = torch.cat([vectors, -vectors])
        sae.W_enc.copy_(sae.W_dec.t())
    return sae


def test_rows_that_only_keep_to_few_dimensions_are_explained_no_better_than_random_ones():
    """Random rows in 8 of 64 dimensions share no directions: what explains them is where they lie."""
    flat = torch.randn(N, 8, generator=torch.Generator().manual_seed(2)) @ directions()[:8]
    found = meta_sae(base(flat), principal, k=K)
    assert 0.5 < found.fve < 0.65
    assert found.fve_random == pytest.approx(found.fve, abs=0.03)


def test_the_random_rows_have_a_whole_result_of_their_own():
    found = meta_sae(base(combinations()), oracle, k=K)
    assert found.random is not None
    assert found.random.fve == found.fve_random < found.fve
    assert (found.random.d_sae, found.random.k, found.random.n_rows) == (found.d_sae, K, N)
    assert found.random.random is None
    assert found.random.dead_fraction == found.dead_fraction == pytest.approx(0.6)
    alone = meta_sae(base(combinations()), oracle, k=K, random=False)
    assert alone == found._replace(random=None)
