"""Going on from a trained SAE: where it begins, and how soon it is as good as one trained from the start."""

from dataclasses import replace

import pytest
import torch
from train_toys import HOOK, ToyStream, unit_rows

from sae.autoencoder.sae import SAE, make
from sae.errors import UserError
from sae.evals.reconstruction import ReconstructionMeter
from sae.train.controls import FROZEN, TRAINED
from sae.train.grid import SAESpec, grid
from sae.train.settings import TrainSettings
from sae.train.start import check_starts
from sae.train.trainer import train

pytestmark = pytest.mark.filterwarnings("ignore:.* of the latents of")  # toys are small and short
LONG = TrainSettings(total_tokens=1000 * 256, batch_tokens=256, lr=3e-3)
SHORT = replace(LONG, total_tokens=100 * 256)
ALL = ["relu", "gated", "topk", "abs_topk", "batch_topk", "hierarchical_topk", "jumprelu", "matryoshka_batch_topk"]


def world(shift=0.0, scale=1.0, seed=0):
    """64 features in 32 dimensions; shifted, some of them have turned, the mean has moved and the unit has changed."""
    rows = unit_rows(64, 32)
    rows[:16] = torch.nn.functional.normalize(rows[:16] + shift * unit_rows(16, 32, seed=7), dim=1)
    return ToyStream({HOOK: rows}, 256, p=0.05, mean=shift, scale=scale, seed=seed)


def fve(sae, stream):
    meter = ReconstructionMeter(sae)
    for _ in range(8):
        meter.update(stream.next_batch().acts[HOOK])
    return meter.result().fve


@pytest.mark.parametrize("architecture", ALL)
def test_it_begins_where_the_other_ended(architecture, tmp_path):
    """With a learning rate of 0 what is saved is what was started from, though its input scale is another."""
    spec = SAESpec(HOOK, architecture, 48, 4, 0)
    train(world(), [spec], SHORT, tmp_path / "a", lm_name="toy")
    still = replace(SHORT, total_tokens=256, lr=0.0, start=str(tmp_path / "a"))
    train(world(scale=50.0), [spec], still, tmp_path / "b", lm_name="toy")
    before, after = (SAE.load(tmp_path / run / spec.folder) for run in "ab")
    for name, tensor in before.named_parameters():
        torch.testing.assert_close(dict(after.named_parameters())[name], tensor, rtol=1e-5, atol=1e-6)
    assert after.config.metadata["training"]["start"].endswith(spec.folder)


def test_a_tenth_of_the_tokens_is_enough_after_a_shift(tmp_path):
    specs = grid([HOOK], [96], ["batch_topk", "topk", "jumprelu"], [4], [0])
    train(world(), specs, LONG, tmp_path / "base", lm_name="toy")
    moved = {"shift": 0.3, "scale": 3.0}
    train(world(**moved), specs, LONG, tmp_path / "scratch", lm_name="toy")
    train(world(**moved), specs, replace(SHORT, start=str(tmp_path / "base")), tmp_path / "tuned", lm_name="toy")
    train(world(**moved), specs, SHORT, tmp_path / "short", lm_name="toy")
    for spec in specs:
        base, scratch, tuned, short = (
            fve(SAE.load(tmp_path / run / spec.folder), world(**moved, seed=9))
            for run in ("base", "scratch", "tuned", "short")
        )
        assert tuned >= 0.9 * scratch, (spec.architecture, tuned, scratch)
        assert tuned > max(base, short), (spec.architecture, base, short)


def test_bad_starts_are_refused_and_leave_nothing(tmp_path):
    spec = SAESpec(HOOK, "topk", 48, 4, 0)
    train(world(), [spec], SHORT, tmp_path / "a", lm_name="toy")
    wrong = [
        (SAESpec(HOOK, "topk", 32, 4, 0), str(tmp_path / "a" / spec.folder), "d_sae = 48"),
        (SAESpec(HOOK, "jumprelu", 48, 4, 0), str(tmp_path / "a" / spec.folder), "architecture = 'topk'"),
        (spec, str(tmp_path / "nowhere"), "nowhere"),
    ]
    for number, (other, start, message) in enumerate(wrong):
        folder = tmp_path / f"b{number}"
        with pytest.raises(UserError, match=message):
            train(world(), [other], replace(SHORT, start=start), folder, lm_name="toy")
        assert not list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("control", [name for name in FROZEN if name != TRAINED])
def test_a_control_does_not_begin_with_a_trained_dictionary(control, tmp_path):
    """Else what it keeps would be learned: its figures would be no control's."""
    spec = SAESpec(HOOK, "topk", 48, 4, 0)
    start = tmp_path / "a" / spec.folder
    make(spec.config({HOOK: 32}, {})).save(start)
    check_starts(str(start), [spec], {HOOK: 32})
    beside = [spec, replace(spec, control=control)]
    with pytest.raises(UserError, match=rf"the control '{control}' keeps .* leave out sae\.control"):
        train(world(), beside, replace(SHORT, start=str(start)), tmp_path / "b", lm_name="toy")
    assert not list((tmp_path / "b").rglob("*.*"))
    check_starts("", beside, {HOOK: 32})


def test_another_start_is_another_run(tmp_path):
    spec = SAESpec(HOOK, "topk", 48, 4, 0)
    for name, seed in (("a", 0), ("b", 1)):
        train(world(seed=seed), [spec], SHORT, tmp_path / name, lm_name="toy")
    train(world(), [spec], replace(SHORT, start=str(tmp_path / "a")), tmp_path / "c", lm_name="toy")
    with pytest.raises(UserError, match="other settings"):
        train(world(), [spec], replace(SHORT, start=str(tmp_path / "b")), tmp_path / "c", lm_name="toy")


def test_a_start_that_has_moved_is_the_same_start(tmp_path):
    spec = SAESpec(HOOK, "topk", 48, 4, 0)
    for name, seed in (("a", 0), ("b", 1)):
        train(world(seed=seed), [spec], SHORT, tmp_path / name, lm_name="toy")
    train(world(), [spec], replace(SHORT, start=str(tmp_path / "a")), tmp_path / "c", lm_name="toy")
    before = (tmp_path / "c" / "trained.json").read_bytes()
    (tmp_path / "a").rename(tmp_path / "moved")
    train(world(), [spec], replace(SHORT, start=str(tmp_path / "moved")), tmp_path / "c", lm_name="toy")
    assert (tmp_path / "c" / "trained.json").read_bytes() == before
    (tmp_path / "moved").rename(tmp_path / "gone")
    (tmp_path / "b").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="other settings"):
        train(world(), [spec], replace(SHORT, start=str(tmp_path / "moved")), tmp_path / "c", lm_name="toy")


def test_a_crosscoder_goes_on_only_from_one_of_sources_as_wide(tmp_path):
    """Only the sum of the widths is equal, and the scale of one source would be folded into part of the other."""
    spec, widths = SAESpec("a+b", "topk", 8, 2, 0), {"a": 5, "b": 3}
    make(spec.config(widths, {})).save(tmp_path / "a")
    check_starts(str(tmp_path / "a"), [spec], widths)
    with pytest.raises(UserError, match=r"hook points \[5, 3\] wide, but the one to train reads \[3, 5\]"):
        check_starts(str(tmp_path / "a"), [spec], {"a": 3, "b": 5})
