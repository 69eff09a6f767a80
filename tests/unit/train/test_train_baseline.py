"""Random SAEs beside trained ones: they fire as often, whatever the architecture, and know nothing."""

import dataclasses

import pytest
import torch

from sae.autoencoder.sae import SAEConfig, make
from sae.autoencoder.sparsity import ARCHITECTURES
from sae.train.baseline import random_like
from sae.train.controls import NO_CONTROL, TRAINED, control_of
from sae.train.initialise import initialise, input_stats

D_IN, D_SAE, L0 = 24, 160, 5


def activations(names, n=3000):
    """Anisotropic, off-centre, and of another scale at every hook point."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(0.2, 3, D_IN)
    return {
        name: 10.0**place * (torch.randn(n, D_IN, generator=generator) * sizes + 2) for place, name in enumerate(names)
    }


def trained(architecture, hook_name, acts, l0=L0):
    """An SAE as training begins, in raw units, with an encoder that is no transpose."""
    width = D_IN * len(SAEConfig(architecture, 2 * D_IN, D_SAE, l0, 3, hook_name, "toy").site.reads)
    d_out = D_IN if "->" in hook_name else 0
    sae = make(SAEConfig(architecture, width, D_SAE, l0, 3, hook_name, "toy", d_out=d_out))
    stats = {name: input_stats(found, name) for name, found in acts.items()}
    initialise(sae, stats)
    with torch.no_grad():
        sae.W_enc.mul_(1.3)
    site = sae.config.site
    sae.fold_scales(*([stats[name].scale for name in names] for names in (site.reads, site.writes)))
    return sae


def mean_l0(sae, acts):
    x = torch.cat([acts[name] for name in sae.config.site.reads], dim=-1)
    return float((sae.encode(x) != 0).sum(1).float().mean())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_l0_is_that_of_the_sae(architecture):
    acts = activations(["h"])
    sae = trained(architecture, "h", acts)
    random = random_like(sae, acts)
    assert mean_l0(random, acts) == pytest.approx(mean_l0(sae, acts), abs=1 / 3000)
    assert mean_l0(sae, acts) > 1
    assert (random.config.d_sae, random.config.hook_name) == (D_SAE, "h")
    assert control_of(random.config) == "random"


@pytest.mark.parametrize("hook_name", ["a->b", "a+b"])
def test_transcoders_and_crosscoders(hook_name):
    acts = activations(["a", "b"])
    sae = trained("batch_topk", hook_name, acts)
    random = random_like(sae, acts)
    assert mean_l0(random, acts) == pytest.approx(mean_l0(sae, acts), abs=1 / 3000)
    if hook_name == "a+b":  # the smaller source counts as much as the larger one
        norms = random.decoder_norms().median(0).values
        assert float((norms[0] / norms[1]).detach()) == pytest.approx(1, rel=0.1)


def test_nothing_is_taken_over():
    acts = activations(["h"])
    sae = trained("batch_topk", "h", acts)
    random = random_like(sae, acts)
    largest = (random.W_dec @ sae.W_dec.T).abs().amax()
    assert largest < 0.95
    assert torch.allclose(random.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
    again = random_like(sae, acts)
    assert all(torch.equal(one, two) for one, two in zip(random.parameters(), again.parameters(), strict=True))
    assert torch.equal(random_like(sae).W_dec, random.W_dec)


def test_what_a_saved_sae_was_trained_as():
    config = trained("topk", "h", activations(["h"])).config
    assert control_of(config) == TRAINED
    for training, expected in (({"control": "frozen_decoder"}, "frozen_decoder"), ({"control": ""}, ""), ({}, "")):
        assert control_of(dataclasses.replace(config, metadata={"training": training})) == expected
    assert control_of(dataclasses.replace(config, metadata={"training": "by hand"})) == TRAINED
    assert control_of(dataclasses.replace(config, metadata={"training": {"control": ["x"]}})) == TRAINED
    assert NO_CONTROL != TRAINED


@pytest.mark.parametrize("architecture", ["topk", "hierarchical_topk"])
def test_a_topk_sae_that_does_not_fill_its_k_has_a_random_one_that_fires_as_little(architecture):
    acts = activations(["h"])
    sae = trained(architecture, "h", acts)
    with torch.no_grad():
        # Most pre-activations are not positive any more, and top-k keeps only those that are.
        sae.b_enc.sub_(sae.pre_acts(acts["h"]).quantile(0.99))
    l0 = mean_l0(sae, acts)
    assert 0.5 < l0 < 0.8 * L0
    assert mean_l0(random_like(sae, acts), acts) == pytest.approx(l0, abs=1 / 3000)


def test_a_silent_topk_sae_has_a_silent_random_one():
    acts = activations(["h"])
    sae = trained("topk", "h", acts)
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
    assert mean_l0(random_like(sae, acts), acts) == 0
