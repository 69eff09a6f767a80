"""Matching pursuit against its definition and known answers; and what is normalised is undone."""

import math

import pytest
import torch
from random_saes import assert_close, inputs, random_sae

from sae.autoencoder import normalize
from sae.autoencoder.sae import SAE, SAEConfig, make
from sae.errors import UserError
from sae.train.grid import grid

H = "blocks.1.hook_resid_post"


def pursuit(W_dec, threshold=0.0, **options):
    d_sae, d_in = W_dec.shape
    sae = make(SAEConfig("matching_pursuit", d_in, d_sae, 0, 0, H, "toy", options=options))
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
        sae.sparsity.residual_threshold.fill_(threshold)
    return sae


def by_hand(x, W_dec, threshold, max_steps, stop_on_repeat):
    """One token, in plain Python."""
    residual, acts = x.clone(), torch.zeros(len(W_dec))
    for _ in range(max_steps):
        products = [float(residual @ row) for row in W_dec]
        best = max(range(len(products)), key=products.__getitem__)
        if products[best] <= 0:
            break
        repeated = bool(acts[best] != 0)
        acts[best] += products[best]
        residual = residual - products[best] * W_dec[best]
        if float(residual.norm()) < threshold or (stop_on_repeat and repeated):
            break
    return acts


def test_orthogonal_directions_are_found_exactly():
    """Non-negative coefficients come back, negative ones do not, in as many steps as there are."""
    truth = torch.tensor([[3.0, 0, 0.5, 2], [0, 0, 0, 0], [1, -4, 0, 0]])
    sae = pursuit(torch.eye(4), 1e-3)
    with torch.no_grad():
        sae.b_dec.fill_(0.7)
        assert_close(sae.encode(truth + 0.7), truth.relu(), 1e-6)
        assert_close(sae(truth + 0.7).recons, truth.relu() + 0.7, 1e-6)
        limited = pursuit(torch.eye(4), max_steps=2)
        assert limited.encode(truth).tolist() == [[3, 0, 0, 2], [0, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("options", [{}, {"stop_on_repeat": False, "max_steps": 9}, {"max_steps": 3}])
def test_tokens_of_a_batch_are_pursued_as_one_by_one(threshold, options):
    sae = random_sae("matching_pursuit", options=options)
    with torch.no_grad():
        sae.sparsity.residual_threshold.fill_(threshold)
        x = inputs(24)
        found = sae.encode(x.view(2, 3, 4, 16)).view(24, -1)
        settings = (threshold, options.get("max_steps", 16), options.get("stop_on_repeat", True))
        expected = torch.stack([by_hand(row - sae.b_dec, sae.W_dec, *settings) for row in x])
    assert_close(found, expected)
    assert len({int(n) for n in (expected != 0).sum(1)}) > 1 or options == {"max_steps": 3}


def test_the_unit_of_activations_is_only_a_unit(tmp_path):
    """An SAE of activations times 4, folded, does to raw ones what it did to those; saved, too."""
    sae = random_sae("matching_pursuit")
    x = inputs()
    with torch.no_grad():
        sae.sparsity.residual_threshold.fill_(2.0)
        before = sae(4 * x)
        sae.fold_scales([4.0], [4.0])
        after = sae(x)
    assert_close(4 * after.latent_acts, before.latent_acts)
    assert_close(4 * after.recons, before.recons)
    sae.save(tmp_path / "sae")
    with torch.no_grad():
        assert torch.equal(SAE.load(tmp_path / "sae")(x).recons, after.recons)


def test_gradients_pass_through_what_is_picked():
    x = inputs(8).requires_grad_()
    sae = random_sae("matching_pursuit", options={"max_steps": 1})
    acts = sae.encode(x)
    acts.sum().backward()
    with torch.no_grad():
        picked = (acts != 0).float()
        assert_close(x.grad, picked @ sae.W_dec)


def test_it_is_not_trained_here():
    with pytest.raises(UserError, match=r"'matching_pursuit' is for SAEs that were trained elsewhere.* topk"):
        grid([H], [48], ["matching_pursuit"], [5], [0])
    with pytest.raises(UserError, match="max_steps = -1"):
        random_sae("matching_pursuit", options={"max_steps": -1})


def test_layer_norm_is_undone_by_the_standard_deviation_alone():
    """As in the code of OpenAI and of SAELens: the 1e-5 is in the way in only, which shows where tokens are small."""
    x = inputs() * 1e-5
    frame = normalize.frame("layer_norm", x)
    std = x.std(dim=-1, keepdim=True)
    assert_close(frame.into(x), (x - x.mean(dim=-1, keepdim=True)) / (std + 1e-5))
    assert_close(
        frame.back(frame.into(x)), x.mean(-1, keepdim=True) + (x - x.mean(-1, keepdim=True)) * std / (std + 1e-5)
    )
    frame = normalize.frame("rms", x)
    assert_close(frame.into(x).norm(dim=-1), torch.full((len(x),), math.sqrt(16)))
    assert_close(frame.back(frame.into(x)), x)
