"""Early warnings: what goes wrong is said once and in time, and what goes well is left alone."""

import warnings
from dataclasses import replace

import pytest
import torch
from train_toys import HOOK, ToyStream, unit_rows

from sae.errors import UserError
from sae.train import checkpoint
from sae.train.grid import SAESpec, grid
from sae.train.settings import TrainSettings
from sae.train.trainer import train
from sae.train.watch import ENOUGH, PATIENCE, Watch


def metrics(fvu=0.1, l0=8.0, dead=0.0):
    return {"s/fvu": fvu, "s/l0": l0, "s/dead_fraction": dead}


def watch(n_steps=1000):
    return Watch({"s": 8.0}, n_steps)


def test_a_sound_run_is_left_alone():
    seen = watch()
    for step in range(10, 1000, 10):
        assert seen.look(metrics(fvu=1 / step**0.5, l0=8 * (1 + 100 / step)), step) == [] or step < 500
        assert seen.sound
    assert seen.look_at_inputs({"h": torch.rand(100) + 1}, 10) == []


def test_next_to_nothing_may_triple():
    seen = watch()
    for step in range(40):
        seen.look(metrics(fvu=1e-4 if step < 20 else 1e-2), step)
        assert seen.sound


def test_each_thing_is_said_once():
    seen = watch()
    assert "40% of the latents of 's' are dead at step 10" in seen.look(metrics(dead=0.4), 10)[0]
    assert seen.look(metrics(dead=0.5), 20) == []
    assert seen.look(metrics(l0=30), 100) == [], "penalties have not had their time"
    assert "30.0 at step 600 for a target of 8" in seen.look(metrics(l0=30), 600)[0]
    assert seen.look(metrics(l0=2), 700) == []
    norms = torch.ones(1000)
    norms[:20] = 50
    assert "2.0% of the activations at 'h'" in seen.look_at_inputs({"h": norms}, 10)[0]
    assert seen.look_at_inputs({"h": norms}, 20) == []
    norms[:400] = 50
    assert seen.look_at_inputs({"other": norms}, 30) == [], "so many are no outliers"


def test_one_spike_passes_and_a_lasting_one_stops_the_run():
    seen = watch()
    for step in range(ENOUGH):
        seen.look(metrics(), step)
    seen.look(metrics(fvu=0.9), 10)
    assert not seen.sound
    seen.look(metrics(), 11)
    assert seen.sound
    for step in range(PATIENCE - 1):
        seen.look(metrics(fvu=0.9), 20 + step)
    with pytest.raises(UserError, match=r"FVU of 's' went from 0.1 to 0.8 by step 30 .* lower train.lr"):
        seen.look(metrics(fvu=0.8), 30)


class Switched(ToyStream):
    """From one batch on, the features are others."""

    def next_batch(self):
        if self.n == 60:
            self.directions = {HOOK: unit_rows(30, 16, seed=5)}
        return super().next_batch()


def test_a_run_that_comes_apart_keeps_its_last_good_checkpoint(tmp_path):
    """The data change under the SAE's feet, and with no learning rate left it cannot follow."""
    settings = TrainSettings(
        total_tokens=200 * 128, batch_tokens=128, log_every=2, checkpoint_every=1, checkpoint_seconds=0, lr=5e-3
    )
    stream = Switched({HOOK: unit_rows(6, 16)}, 128, p=0.2)
    with pytest.raises(UserError, match=r"went from .* and did not come back"):
        train(stream, [SAESpec(HOOK, "topk", 24, 4, 0)], settings, tmp_path, lm_name="toy")
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert int(newest.name.split("-")[1]) <= 62


def test_warnings_do_not_change_what_is_learned(tmp_path):
    """A rate far too high kills latents: that is said, and the weights are those of a run that logs nothing."""
    settings = TrainSettings(
        total_tokens=60 * 128, batch_tokens=128, log_every=5, lr=0.5, dead_after_tokens=1000, auxk_alpha=0.0
    )
    stream = ToyStream({HOOK: unit_rows(20, 16)}, 128)
    specs = grid([HOOK], [64], ["topk"], [2], [0])
    with pytest.warns(UserWarning, match="latents of .* are dead at step"):
        loud = train(stream, specs, settings, tmp_path / "a", lm_name="toy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = ToyStream({HOOK: unit_rows(20, 16)}, 128)
        quiet = train(stream, specs, replace(settings, log_every=10**6), tmp_path / "b", lm_name="toy")
    a, b = ((item.saes[0].folder / "weights.safetensors").read_bytes() for item in (loud, quiet))
    assert a == b
