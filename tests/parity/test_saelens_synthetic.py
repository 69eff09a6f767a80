"""SAELens agrees: on every metric of an SAE against a known truth, and on the world the benchmark is made of."""

import pytest
import torch
from peers import ask_peer
from safetensors.torch import load_file, save_file

from sae.autoencoder.sae import SAE, SAEConfig
from sae.evals.ground_truth import GroundTruthMeter
from sae.evals.world import HOOK_NAME
from sae.evals.worlds import t4

N = 40_960

WORKER = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from sae_lens.synthetic import *
from sae_lens.synthetic.evals import *

given = load_file(sys.argv[1])
calculators = dict(l0=L0Calculator(), true_l0=L0Calculator(), shrinkage=ShrinkageCalculator())
calculators["fve"] = ExplainedVarianceCalculator()
calculators["l0"].add_batch(given["latent_acts"])
calculators["true_l0"].add_batch(given["feature_acts"])
calculators["shrinkage"].add_batch(given["recons"], given["acts"])
calculators["fve"].add_batch(given["recons"], given["acts"])
found = {name: calculator.compute() for name, calculator in calculators.items()}
found["mcc"] = mean_correlation_coefficient(given["W_dec"], given["directions"])
found["uniqueness"] = feature_uniqueness(given["W_dec"], given["directions"])
detection = compute_classification_metrics(
    given["latent_acts"], given["feature_acts"], given["W_dec"], given["directions"]
)
found |= dict(f1=detection.f1_score, precision=detection.precision, recall=detection.recall)
dead = DeadLatentsCalculator(given["W_dec"].shape[0])
dead.add_batch(given["latent_acts"])
found["dead_fraction"] = dead.compute() / given["W_dec"].shape[0]

hierarchy = HierarchyConfig(
    total_root_nodes=2, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
    compensate_probabilities=True, scale_children_by_parent=True,
)
model = SyntheticModel(SyntheticModelConfig(
    num_features=256, hidden_dim=64, hierarchy=hierarchy, bias=0.5, seed=42,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
))
torch.manual_seed(0)
generator = model.activation_generator
amounts = generator.sample(int(sys.argv[3]))
world = dict(
    directions=model.feature_dict.feature_vectors, bias=model.feature_dict.bias, p=generator.firing_probabilities,
    mean=generator.mean_firing_magnitudes, std=generator.std_firing_magnitudes,
    factor=model.correlation_matrix.correlation_factor, variance=model.correlation_matrix.correlation_diag,
    rate=(amounts > 0).double().mean(0), amount=amounts.double().mean(0), spread=amounts.double().std(0),
)
save_file({name: value.detach().contiguous() for name, value in world.items()}, sys.argv[2])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our metrics of an SAE, theirs of the same activations, our world and theirs."""
    folder = tmp_path_factory.mktemp("saelens")
    world = t4()
    sae = SAE(SAEConfig("topk", 64, 48, 3, 0, HOOK_NAME, "t4"))
    with torch.no_grad():
        sae.b_enc[:3] = -1e9  # some dead latents, and some that find their feature
        sae.W_dec[8:24], sae.W_enc[:, 8:24] = world.directions[:16], world.directions[:16].T
    meter = GroundTruthMeter(sae, world)
    (sample,) = world.held_out(1, 4096)
    meter.update(sample)
    with torch.no_grad():
        recons, latent_acts = sae(sample.acts)
    given = {"acts": sample.acts, "feature_acts": sample.feature_acts, "recons": recons, "latent_acts": latent_acts}
    given |= {"W_dec": sae.W_dec.detach(), "directions": world.directions}
    save_file({name: value.contiguous() for name, value in given.items()}, folder / "given.safetensors")
    theirs = ask_peer(WORKER, folder, folder / "given.safetensors", folder / "world.safetensors", N)
    return meter.result(), theirs, world, load_file(folder / "world.safetensors")


def test_metrics_are_those_of_saelens(both):
    ours, theirs, _, _ = both
    for name, value in theirs.items():
        assert getattr(ours, name) == pytest.approx(value, rel=1e-4), name
    assert 0 < ours.f1 < 1
    assert ours.dead_fraction > 0


def test_the_benchmark_in_small_is_the_world_saelens_builds_from_the_same_seed(both):
    _, _, ours, theirs = both
    for name in ("directions", "bias", "p", "mean", "std"):
        assert torch.allclose(getattr(ours, name), theirs[name], atol=1e-5), name
    assert torch.allclose(ours.copula.factor, theirs["factor"], atol=1e-6)
    assert torch.allclose(ours.copula.own.square(), theirs["variance"], atol=1e-6)


def test_its_features_fire_as_often_and_as_strongly(both):
    _, _, ours, theirs = both
    amounts = torch.cat([sample.feature_acts for sample in ours.held_out(N // 4096, 4096)]).double()
    rate = (amounts > 0).double().mean(0)
    error = ((rate * (1 - rate) + theirs["rate"] * (1 - theirs["rate"])) / N + 1 / N**2).sqrt()
    assert float(((rate - theirs["rate"]) / error).abs().max()) < 5
    error = ((amounts.var(0) + theirs["spread"].square()) / N).sqrt() + 5 / N
    assert float(((amounts.mean(0) - theirs["amount"]) / error).abs().max()) < 5
