"""Latent scaling: equal to least squares done by hand, right in worlds whose truth is known, and no friend of L1."""

import pytest
import torch
from torch.nn.functional import normalize

from sae.autoencoder.crosscoder import Crosscoder
from sae.autoencoder.sae import SAE, SAEConfig
from sae.errors import UserError
from sae.evals import latent_scaling as module
from sae.evals.latent_scaling import LatentScalingMeter, Thresholds, judge, summarise
from sae.evals.world import WorldBatch
from sae.train.grid import SAESpec
from sae.train.settings import TrainSettings
from sae.train.trainer import train


def crosscoder(encoder, decoder, scales=(1.0, 1.0), bias=None, hook_name="a+pair.a"):
    """A ReLU crosscoder with given weights, in the units of training; the scales are folded in."""
    d_in, d_sae = encoder.shape
    metadata = {"training": {"input_scales": list(scales)}}
    sae = Crosscoder(SAEConfig("relu", d_in, d_sae, 0.0, 0, hook_name, "toy", metadata=metadata))
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(decoder)
        if bias is not None:
            sae.b_dec.copy_(bias)
    sae.fold_scales(scales, scales)
    return sae


def measure(sae, *batches):
    meter = LatentScalingMeter(sae)
    for batch in batches:
        meter.update(batch)
    return meter.result()


def random_case(scales=(1.0, 1.0)):
    """Nothing about it is special: weights, data and a bias at random."""
    generator = torch.Generator().manual_seed(0)
    encoder, decoder, bias = (torch.randn(*shape, generator=generator) for shape in ((12, 9), (9, 12), (12,)))
    x = torch.randn(500, 12, generator=generator)
    raw = torch.cat([x[:, :6] / scales[0], x[:, 6:] / scales[1]], dim=1)
    return crosscoder(encoder, decoder, scales, bias), x, raw, bias


def test_betas_are_those_of_least_squares():
    sae, x, raw, bias = random_case()
    found = measure(sae, raw[:200], raw[200:])
    latent_acts, recons = sae.encode(raw).detach(), sae(raw).recons.detach()
    decoder = sae.W_dec.detach()
    for latent in range(9):
        parts = decoder[latent, :6], decoder[latent, 6:]
        home = int(parts[1].norm() > parts[0].norm())
        regressor = torch.outer(latent_acts[:, latent], parts[home]).reshape(-1, 1).double()
        for model, side in enumerate((slice(0, 6), slice(6, 12))):
            own = torch.outer(latent_acts[:, latent], parts[model])
            error = (x[:, side] - recons[:, side] + own).reshape(-1, 1).double()
            said = (recons[:, side] - bias[side]).reshape(-1, 1).double()
            wanted = torch.linalg.lstsq(regressor, torch.cat([error, said], dim=1)).solution.flatten()
            assert float(found.beta_error[latent, model]) == pytest.approx(float(wanted[0]), rel=1e-4, abs=1e-5)
            assert float(found.beta_reconstruction[latent, model]) == pytest.approx(
                float(wanted[1]), rel=1e-4, abs=1e-5
            )
        if found.beta_error[latent, home] > 0:
            ratio = found.beta_error[latent, 1 - home] / found.beta_error[latent, home]
            assert float(found.nu_error[latent]) == pytest.approx(float(ratio))
        else:
            assert bool(found.nu_error[latent].isnan())
    assert torch.equal(found.n_fired, (latent_acts != 0).sum(0))


def test_the_units_of_the_activations_do_not_matter():
    """One model's activations fifty times as long, and the crosscoder's scales with them: nothing changes."""
    plain, scaled = (measure(sae, raw) for sae, _, raw, _ in (random_case(), random_case((0.5, 0.01))))
    for name in ("decoder_norms", "relative_norm", "beta_error", "beta_reconstruction"):
        torch.testing.assert_close(getattr(scaled, name), getattr(plain, name), rtol=1e-3, atol=1e-4)


def test_blocks_do_not_matter(monkeypatch):
    sae, _, raw, _ = random_case()
    whole = measure(sae, raw)
    monkeypatch.setattr(module, "BLOCK", 9 * 7)
    in_blocks = measure(sae, raw.view(5, 100, 12))
    for one, two in zip(whole, in_blocks, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5, equal_nan=True)


#      concept, in the first and in the second model; decoder parts; relative norm; nu_error; nu_reconstruction
TRUTH = [
    ("shared", 1.0, 1.0, (1.0, 1.0), 0.5, 1.0, 1.0),
    ("first", 1.0, 0.0, (1.0, 0.0), 0.0, 0.0, 0.0),
    ("second", 0.0, 1.0, (0.0, 1.0), 1.0, 0.0, 0.0),
    ("shrunk", 1.0, 0.6, (1.0, 0.0), 0.0, 0.6, 0.0),
    ("decoupled", 1.0, 1.0, (1.0, 0.0), 0.0, 0.0, 1.0),
    ("decoupled", 1.0, 1.0, (0.0, 1.0), 1.0, 0.0, 1.0),
    ("between", 1.0, 0.5, (1.0, 0.5), 0.25, 0.5, 0.5),
    ("silent", 0.0, 0.0, (1.0, 0.0), 0.0, torch.nan, torch.nan),
]
CONCEPT = [0, 1, 2, 3, 4, 4, 5, 6]
"""Of each latent: the decoupled pair is one concept."""


def planted():
    """Concepts on the axes of both models; a crosscoder that reads each exactly and writes what the table says."""
    d = 7
    encoder, decoder = torch.zeros(2 * d, len(TRUTH)), torch.zeros(len(TRUTH), 2 * d)
    size = torch.zeros(2, d)
    for latent, (concept, (_, in_first, in_second, parts, *_)) in enumerate(zip(CONCEPT, TRUTH, strict=True)):
        size[:, concept] = torch.tensor([in_first, in_second])
        where = concept if in_first else d + concept
        encoder[where, latent] = 1.0
        decoder[latent, concept], decoder[latent, d + concept] = parts
    generator = torch.Generator().manual_seed(0)
    amounts = torch.rand(4000, d, generator=generator) * (torch.rand(4000, d, generator=generator) < 0.2)
    return crosscoder(encoder, decoder), torch.cat([amounts * size[0], amounts * size[1]], dim=1)


def test_a_planted_world_gives_its_answers():
    sae, x = planted()
    found = measure(sae, x)
    for latent, (kind, *_, relative, nu_error, nu_reconstruction) in enumerate(TRUTH):
        values = (found.relative_norm[latent], found.nu_error[latent], found.nu_reconstruction[latent])
        assert [float(value) for value in values] == pytest.approx(
            [relative, nu_error, nu_reconstruction], abs=1e-5, nan_ok=True
        ), kind
    counts = summarise(found)
    assert (counts.shared, counts.between, counts.rare) == (1, 1, 1)
    assert counts.first_only == (3, 1, 1, 1)
    assert counts.second_only == (2, 1, 0, 1)
    verdicts = judge(found)
    assert verdicts.confirmed(verdicts.first).nonzero().flatten().tolist() == [1]
    assert verdicts.confirmed(verdicts.second).nonzero().flatten().tolist() == [2]
    assert summarise(found, Thresholds(nu_error=0.7, nu_reconstruction=1.1)).first_only == (3, 3, 0, 0)
    assert summarise(found, Thresholds(min_firings=10_000)).rare == len(TRUTH)


def test_what_cannot_be_measured_is_refused():
    wide = SAEConfig("relu", 5, 4, 0.0, 0, "a+pair.a", "toy", source_widths=[2, 3])
    with pytest.raises(UserError, match="one side is 2 wide and the other 3"):
        LatentScalingMeter(Crosscoder(wide))
    meter = LatentScalingMeter(planted()[0])
    with pytest.raises(UserError, match="no tokens"):
        meter.result()
    with pytest.raises(UserError, match="takes d_in = 14"):
        meter.update(torch.zeros(3, 5))


# Two models that share most concepts, of which the second has some more faintly

D, SHARED, FAINT, OWN = 20, 8, 4, 3
N = SHARED + FAINT + 2 * OWN
FAINTNESS = 0.3
D_SAE = N + 4
CONCEPTS = torch.arange(N).split([SHARED, FAINT, OWN, OWN])


class Models:
    """A stream of both models' activations on the same tokens."""

    d_in = {"a": D, "pair.a": D}  # noqa: RUF012
    batch_tokens = 512

    def __init__(self, twins=False):
        self.directions = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)))[0][:N]
        second = torch.ones(N)
        second[SHARED : SHARED + FAINT] = FAINTNESS
        second[SHARED + FAINT : SHARED + FAINT + OWN] = 0
        first = torch.ones(N)
        first[N - OWN :] = 0
        self.sizes = (first, first if twins else second)
        self.n = 0

    def next_batch(self):
        self.n += 1
        generator = torch.Generator().manual_seed(self.n)
        fires = torch.rand(self.batch_tokens, N, generator=generator) < 0.12
        amounts = fires * (1 + 0.2 * torch.randn(self.batch_tokens, N, generator=generator)).clamp(min=0)
        return WorldBatch(
            {name: (amounts * size) @ self.directions for name, size in zip(self.d_in, self.sizes, strict=True)}
        )

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def held_out(models):
    models.n = 1_000_000
    return [torch.cat(list(models.next_batch().acts.values()), dim=1) for _ in range(4)]


def latents_of(sae, models, concepts):
    """The latent whose decoder row, in the model where the concept is, points most along it."""
    parts = sae.split(sae.W_dec.detach())
    found = []
    for concept in concepts:
        side = int(models.sizes[0][concept] == 0)
        found.append(int((parts[side] @ models.directions[concept]).argmax()))
    assert len(set(found)) == len(found), "a latent for each"
    return torch.tensor(found)


def by_batch_topk(models, folder, d_sae=D_SAE):
    settings = TrainSettings(total_tokens=900 * 512, batch_tokens=512, lr=3e-3)
    spec = SAESpec("a+pair.a", "batch_topk", d_sae, 2, 0)
    return SAE.load(train(models, [spec], settings, folder, lm_name="toy").saes[0].folder)


def by_l1(models, penalty=0.3, steps=1000):
    """The usual L1 crosscoder (Lindsey et al. 2024): a latent's penalty is weighted by the SUM of its two norms."""
    generator = torch.Generator().manual_seed(0)
    decoder = normalize(torch.randn(N, 2 * D, generator=generator), dim=1) * 0.3
    weights = [decoder.clone().t().contiguous(), decoder, torch.zeros(N), torch.zeros(2 * D)]
    for weight in weights:
        weight.requires_grad_()
    encoder, decoder, b_enc, b_dec = weights
    optimiser = torch.optim.Adam(weights, lr=5e-3)
    for step in range(steps):
        x = torch.cat(list(models.next_batch().acts.values()), dim=1)
        latent_acts = (x @ encoder + b_enc).relu()
        norms = decoder[:, :D].norm(dim=1) + decoder[:, D:].norm(dim=1)
        missed = (x - latent_acts @ decoder - b_dec).square().sum(1).mean()
        loss = missed + penalty * (latent_acts * norms).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = 5e-3 * min(1.0, 5 * (1 - step / steps))
        optimiser.step()
    sae = crosscoder(encoder.detach(), decoder.detach(), bias=b_dec.detach())
    with torch.no_grad():
        sae.b_enc.copy_(b_enc + b_dec @ encoder)  # an SAE takes b_dec off its input
    return sae


def test_l1_makes_exclusive_latents_up_and_scaling_exposes_them():
    """The faint concepts are in the second model: L1 drops them there, and the error that it leaves tells."""
    models = Models()
    sae = by_l1(models)
    found = measure(sae, *held_out(models))
    verdicts = judge(found)
    shared, faint, first, second = (latents_of(sae, models, concepts) for concepts in CONCEPTS)
    assert bool(verdicts.first[faint].all()), "made up: by its norms, none of them is in the second model"
    assert bool(verdicts.shrunk[faint].all())
    assert found.nu_error[faint].tolist() == pytest.approx([FAINTNESS] * FAINT, abs=0.03)
    assert not bool(verdicts.decoupled[faint].any())
    assert bool(verdicts.shared[shared].all())
    for own, latents in ((verdicts.first, first), (verdicts.second, second)):
        assert verdicts.confirmed(own).nonzero().flatten().tolist() == sorted(latents.tolist()), "these, and no others"
    assert summarise(found).first_only == (OWN + FAINT, OWN, FAINT, 0)


def test_batch_topk_makes_none_up(tmp_path):
    models = Models()
    sae = by_batch_topk(models, tmp_path)
    found = measure(sae, *held_out(models))
    verdicts = judge(found)
    shared, faint, first, second = (latents_of(sae, models, concepts) for concepts in CONCEPTS)
    assert bool(verdicts.between[faint].all()), "fainter in the second model, but there"
    assert bool(verdicts.shared[shared].all())
    for own, latents in ((verdicts.first, first), (verdicts.second, second)):
        assert verdicts.confirmed(own).nonzero().flatten().tolist() == sorted(latents.tolist())


@pytest.mark.parametrize("train_one", [by_batch_topk, by_l1])
def test_a_model_and_itself_have_nothing_of_their_own(train_one, tmp_path):
    models = Models(twins=True)
    sae = train_one(models, tmp_path) if train_one is by_batch_topk else train_one(models)
    counts = summarise(measure(sae, *held_out(models)))
    assert counts.shared >= SHARED + FAINT + OWN
    assert counts.first_only == counts.second_only == (0, 0, 0, 0)
