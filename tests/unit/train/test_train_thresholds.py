"""Known pitfalls of learned thresholds and of the coefficients that move them."""

from dataclasses import replace

import pytest
import torch
from train_toys import HOOK, ToyStream, unit_rows

from sae.autoencoder.sae import SAE
from sae.autoencoder.sparsity import ARCHITECTURES, Active, Schedule
from sae.evals.reconstruction import ReconstructionMeter
from sae.kernels import pick
from sae.kernels.operands import Precision
from sae.train.grid import SAESpec
from sae.train.run import SAERun
from sae.train.settings import TrainSettings
from sae.train.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore:.* of the latents of", "ignore:L0 of")  # toys are small and short
D_IN, D_SAE, LR, STEPS = 16, 16, 1e-5, 20


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("penalty", ["target", "quadratic", "step"])
def test_a_threshold_moves_as_far_whatever_its_size_and_the_encoders_precision(penalty, precision):
    """Two pitfalls. Under Adam the logarithm of a threshold moves by the learning rate, so a small threshold freezes.
    And a threshold kept in bf16, as the encoder's product is, does not move at all by less than half its spacing.

    All latents fire, so that every threshold is pushed up by the same penalty, from 0.001 to 8.
    """
    options = {"penalty": penalty, "l0_coefficient": 1e6, "penalty_init": 1e6}  # nothing else is felt beside it
    settings = TrainSettings(
        total_tokens=64 * STEPS, batch_tokens=64, lr=LR, lr_warmup_steps=0, lr_decay_fraction=0.0,
        sparsity_warmup_steps=0, auxk_alpha=0.0, options=options,
    )  # fmt: skip
    spec, cpu = SAESpec(HOOK, "jumprelu", D_SAE, 2, 0), torch.device("cpu")
    run = SAERun(spec, {HOOK: D_IN}, settings, "toy", "", cpu, pick("cpu", "torch"), precision)
    threshold = run.sae.sparsity.threshold
    before = torch.logspace(-3, 0, D_SAE) * 8
    with torch.no_grad():
        threshold.copy_(before)
        run.sae.b_enc.copy_(before + 0.2)
        run.sae.W_enc.zero_()
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        run.train_step(run.inputs({HOOK: torch.randn(64, D_IN, generator=generator)}), step)
    assert threshold.dtype == torch.float32
    one = LR * D_IN**0.5
    torch.testing.assert_close(threshold.detach() - before, torch.full((D_SAE,), STEPS * one), rtol=0.03, atol=0)
    assert ((before + one).bfloat16() == before.bfloat16()).sum() >= D_SAE // 2, "bf16 would have lost these steps"


def adam_on_thresholds(penalty, l0, coefficient, n_steps=600):
    """L0 after Adam has moved thresholds by a penalty alone, on pre-activations that stay as they are."""
    options = {"penalty": penalty, "penalty_init": coefficient, "l0_coefficient": coefficient}
    cls = ARCHITECTURES["jumprelu"]
    sparsity = cls(32, l0, cls.make_options(options), Schedule(n_steps))
    pre_acts = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sparsity.threshold.fill_(0.7)
    adam = torch.optim.Adam(sparsity.parameters(), lr=5e-3)
    for step in range(n_steps):
        acts = sparsity.train_acts(pre_acts)
        adam.zero_grad()
        sparsity.penalty(Active(pre_acts, acts.detach(), slice(None), 256, 16), step).backward()
        adam.step()
    return float((sparsity.infer_acts(pre_acts) != 0).sum(1).float().mean())


@pytest.mark.parametrize("penalty", ["target", "quadratic"])
def test_a_target_decides_l0_where_a_coefficient_cancels(penalty):
    """Pitfall: Adam divides a gradient by its size, so where thresholds feel nothing but the penalty, its coefficient
    has no say (SAELens issue 719). A penalty with a target stands still there, whatever the coefficient."""
    plain = [adam_on_thresholds("step", 4, coefficient) for coefficient in (0.01, 100.0)]
    assert plain[0] == pytest.approx(plain[1], rel=0.01)
    for l0 in (3, 10):
        for coefficient in (0.05, 5.0):
            assert adam_on_thresholds(penalty, l0, coefficient) == pytest.approx(l0, rel=0.05)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("jumprelu", {"penalty": "step"}), ("relu", {})],
)
def test_two_targets_give_two_l0s_from_one_start(architecture, options, tmp_path):
    """The same pitfall in training as it is: from one SAE, each run goes to its own target, up or down."""

    def stream(seed=0):
        return ToyStream({HOOK: unit_rows(96, 32)}, 256, p=0.08, spread=0.3, seed=seed)

    settings = TrainSettings(total_tokens=1000 * 256, batch_tokens=256, lr=3e-3, options=options)
    train(stream(), [SAESpec(HOOK, architecture, 64, 6, 0)], settings, tmp_path / "base", lm_name="toy")
    reached = []
    start = str(tmp_path / "base" / SAESpec(HOOK, architecture, 64, 6, 0).folder)
    specs = [SAESpec(HOOK, architecture, 64, l0, 0) for l0 in (3, 12)]
    for item in train(stream(), specs, replace(settings, start=start), tmp_path / "two", lm_name="toy").saes:
        meter = ReconstructionMeter(SAE.load(item.folder))
        held_out = stream(seed=9)
        for _ in range(4):
            meter.update(held_out.next_batch().acts[HOOK])
        reached.append(meter.result().l0)
    assert reached == [pytest.approx(3, rel=0.15), pytest.approx(12, rel=0.15)]
