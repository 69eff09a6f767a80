"""Decoder projections: they are what they say, and are least for a decoder that mixes nothing."""

import pytest
import torch

from sae.autoencoder.sae import SAE, SAEConfig
from sae.autoencoder.sae import make as make_sae
from sae.errors import UserError
from sae.evals.l0 import nth_projections, ranks, suggest


def sae_of(rows, b_dec=0.0):
    sae = SAE(SAEConfig("topk", rows.shape[1], len(rows), 1, 0, "h", "toy"))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.b_dec.fill_(b_dec)
    return sae


def test_known_values():
    """On the axes of a plane, tokens (1, 0), (0, 2), (3, 4) project to 1, 0, 0, 2, 3, 4."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    assert nth_projections(sae_of(torch.eye(2)), [x], [1, 2]) == [2.0, 0.0]
    assert nth_projections(sae_of(torch.eye(2), b_dec=1.0), [x + 1], [1]) == [2.0]
    # Blocks count by their tokens: 1 twice and 7 once.
    parts = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[7.0, 7.0]])]
    assert nth_projections(sae_of(torch.eye(2)), parts, [1]) == [pytest.approx((2 * 1 + 7) / 3)]


def test_a_decoder_that_mixes_features_projects_further():
    features = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(4000, 16, generator=generator) < 0.15).float() @ features
    pure = sae_of(features)
    mixed = sae_of(torch.nn.functional.normalize(features + 0.4 * features.roll(1, 0), dim=1))
    n = ranks(16)
    assert n == [2, 4, 5, 8]
    clean, spread = (nth_projections(one, [x], n) for one in (pure, mixed))
    # The mean of active features is 2.4, and ranks must be above that.
    assert all(a <= b + 1e-6 for a, b in zip(clean[1:], spread[1:], strict=True))
    assert clean[1] < spread[1]
    found = suggest([4.0, 8.0, 16.0], [spread[1:], clean[1:], spread[1:]], n[1:])
    assert found.l0 == 8.0
    assert not found.at_edge
    assert suggest([4.0, 8.0], [clean[1:], spread[1:]], n[1:]).at_edge


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="at least one token"):
        nth_projections(sae_of(torch.eye(2)), [], [1])
    with pytest.raises(UserError, match="rank n = 3"):
        nth_projections(sae_of(torch.eye(2)), [torch.ones(1, 2)], [3])
    with pytest.raises(UserError, match="transcoder"):
        nth_projections(make_sae(SAEConfig("topk", 2, 2, 1, 0, "a->b", "toy")), [torch.ones(1, 2)], [1])
    with pytest.raises(UserError, match="nothing to choose"):
        suggest([4.0], [[1.0]], [1])
