"""Training finds known features and meets the target L0."""

import math
from statistics import median

import pytest
import torch
from train_toys import HOOK, ToyStream, mcc, orthogonal, unit_rows

from sae.autoencoder.architectures.controller import L0Controller
from sae.autoencoder.sae import SAE
from sae.autoencoder.sparsity import BatchStats, Schedule, trainable_architectures
from sae.evals.reconstruction import ReconstructionMeter
from sae.train.grid import grid
from sae.train.settings import TrainSettings
from sae.train.trainer import train


def held_out(stream, sae, n_batches=4):
    stream.seed += 1
    meter = ReconstructionMeter(sae)
    for _ in range(n_batches):
        meter.update(stream.next_batch().acts[HOOK])
    stream.seed -= 1
    return meter.result()


SEEDS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def t1(tmp_path_factory):
    """16 orthogonal features in 32 dimensions, as the tutorial of SAELens has it, with a mean and an odd scale."""
    folder = tmp_path_factory.mktemp("t1")
    stream = ToyStream({HOOK: orthogonal(16, 32)}, 1024, mean=0.5, scale=7.0)
    settings = TrainSettings(total_tokens=600_000, batch_tokens=1024, lr=1e-2)
    specs = grid([HOOK], [16], ["relu", "batch_topk", "jumprelu"], [4], SEEDS)
    result = train(stream, specs, settings, folder, lm_name="toy")
    return stream, {(item.spec.architecture, item.spec.seed): SAE.load(item.folder) for item in result.saes}


@pytest.mark.parametrize("architecture", ["relu", "batch_topk", "jumprelu"])
def test_recovers_orthogonal_features(t1, architecture):
    """With no latent to spare, one start in four leaves two features to one latent: so in the median of the seeds."""
    stream, saes = t1
    mine = [saes[architecture, seed] for seed in SEEDS]
    found = [held_out(stream, sae) for sae in mine]
    assert median(mcc(sae.W_dec.detach(), stream.directions[HOOK]) for sae in mine) > 0.99
    assert median(one.l0 for one in found) == pytest.approx(4, rel=0.05)
    assert median(one.fvu for one in found) < (0.1 if architecture == "relu" else 0.04)  # L1 shrinks
    assert median(one.dead_fraction for one in found) == 0


def test_topk_recovers_features_when_no_token_has_more_than_k(tmp_path):
    """Where tokens hold more features than k, a fixed k mixes them; where they do not, it finds them."""
    stream = ToyStream({HOOK: orthogonal(16, 32)}, 512, at_most=4, mean=0.5, scale=7.0)
    settings = TrainSettings(total_tokens=400_000, batch_tokens=512, lr=3e-3)
    result = train(stream, grid([HOOK], [32], ["topk"], [4], [0]), settings, tmp_path, lm_name="toy")
    sae = SAE.load(result.saes[0].folder)
    assert mcc(sae.W_dec.detach(), stream.directions[HOOK]) > 0.99
    found = held_out(stream, sae)
    assert found.fvu < 0.02
    assert found.l0 <= 4


EVERY = [(name, {}) for name in trainable_architectures()]
PENALTIES = [("relu", {"p_end": 0.2}), *(("jumprelu", {"penalty": name}) for name in ("quadratic", "step", "tanh"))]


@pytest.mark.parametrize(("architecture", "options"), EVERY + PENALTIES, ids=str)
def test_every_architecture_meets_its_target_in_superposition(tmp_path, architecture, options):
    """256 features of unequal frequency in 64 dimensions; L0 is measured by inference on held-out tokens."""
    frequency = 1 / torch.arange(1, 257).float() ** 0.8
    stream = ToyStream(
        {HOOK: unit_rows(256, 64)}, 512, p=(8 * frequency / frequency.sum()).clamp(max=0.9), spread=0.3, mean=0.3
    )
    settings = TrainSettings(total_tokens=400_000, batch_tokens=512, options=options)
    result = train(stream, grid([HOOK], [256], [architecture], [8], [0]), settings, tmp_path, lm_name="toy")
    found = held_out(stream, SAE.load(result.saes[0].folder))
    assert found.l0 == pytest.approx(8, rel=0.05)
    # An L1 shrinks what it keeps, GroupMax keeps one of each group though it needs two; the other penalties are slow.
    bars = {"relu": 0.55, "groupmax": 0.3} | ({architecture: 0.4} if options else {})
    assert found.fvu < bars.get(architecture, 0.25)


def test_an_l0_that_no_penalty_moves_does_not_throw_up_the_coefficient():
    """Where features are few and clear, L0 comes down to their number and stays there whatever the coefficient is."""
    controller = L0Controller(0.02, 4, Schedule(n_steps=2000, warmup_steps=100))
    for step in range(2000):
        l0 = 4 + 12 * math.exp(-step / 200)
        controller.update(BatchStats(l0=torch.tensor(l0), min_active=torch.tensor(0.0), step=step))
    assert 0.02 < controller.coefficient() < 0.02 * 3


def test_dead_latents_come_back(tmp_path):
    """Half the latents start too weak to be chosen, though all are needed; the auxiliary loss revives them."""
    from sae.train import run as run_module

    stream = ToyStream({HOOK: orthogonal(32, 32)}, 256)
    original = run_module.initialise

    def spoilt(sae, stats):
        original(sae, stats)
        with torch.no_grad():
            sae.W_enc[:, ::2] *= 0.02

    dead = {}
    for alpha in (0.0, 1 / 32):
        settings = TrainSettings(
            total_tokens=100_000, batch_tokens=256, lr=1e-3, dead_after_tokens=2000, auxk_alpha=alpha
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "initialise", spoilt)
            specs = grid([HOOK], [48], ["topk"], [4], [0])
            result = train(stream, specs, settings, tmp_path / str(alpha), lm_name="toy")
        dead[alpha] = result.saes[0].n_dead
    assert dead[0.0] >= 20
    assert dead[1 / 32] <= 4
