"""A killed, interrupted or damaged run ends where an uninterrupted one does, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_toys import HOOK, ToyStream, unit_rows

from sae import files
from sae.autoencoder.architectures.topk import TopK
from sae.autoencoder.sparsity import ARCHITECTURES
from sae.errors import UserError
from sae.train import checkpoint
from sae.train.grid import SAESpec, grid
from sae.train.settings import TrainSettings
from sae.train.trainer import Interrupted, train

OTHER = "blocks.1.hook_mlp_out"
SPECS = [*grid([HOOK], [24], ["relu", "topk", "batch_topk", "jumprelu"], [4], [0]), SAESpec(OTHER, "topk", 24, 4, 0)]
N_STEPS = 24
SETTINGS = TrainSettings(
    total_tokens=64 * N_STEPS,
    batch_tokens=64,
    dead_after_tokens=256,
    checkpoint_every=3,
    checkpoint_seconds=0.0,
    lr=3e-3,
)


def stream():
    return ToyStream({HOOK: unit_rows(20, 16), OTHER: unit_rows(9, 8)}, 64, mean=0.2, scale=3.0)


def run(folder, specs=SPECS, settings=SETTINGS, **more):
    return train(stream(), specs, settings, folder, lm_name="toy", **more)


def weights(folder, specs=SPECS):
    return {spec.folder: files.read_tensors(folder / spec.folder / "weights.safetensors") for spec in specs}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert tensors.keys() == found[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(found[name][key], tensor), f"{name} {key}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return weights(folder)


class Stop(Exception):
    pass


def stop_after(n):
    def progress(step, n_steps):
        if step == n:
            raise Stop

    return progress


@pytest.mark.parametrize("at", [1, 3, 11, 23])
def test_resume_equals_uninterrupted(at, tmp_path, uninterrupted):
    with pytest.raises(Stop):
        run(tmp_path, progress=stop_after(at))
    torch.manual_seed(at)  # whatever else the process has done
    result = run(tmp_path)
    assert_same(weights(tmp_path), uninterrupted)
    assert not (tmp_path / "checkpoints").exists()
    assert result.n_steps == N_STEPS
    assert run(tmp_path).saes == result.saes  # finished work is not done again


class Keep:
    """A sink that remembers."""

    def __init__(self):
        self.found = []

    def log(self, metrics, step):
        self.found.append((step, dict(metrics)))


def test_a_run_goes_on_in_the_precision_it_was_begun_with(tmp_path, monkeypatch):
    """What "auto" means depends on the machine; a run that moves keeps what it meant at first."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    explicit = replace(SETTINGS, encoder_dtype="bfloat16")
    run(whole, settings=explicit)
    with pytest.raises(Stop):
        run(cut, settings=explicit, progress=stop_after(10))
    monkeypatch.setattr("sae.kernels._cpu_multiplies_bfloat16", lambda: False)
    run(cut)
    assert_same(weights(cut), weights(whole))
    assert run(cut).n_steps == N_STEPS, "a finished run is found again, too"


@pytest.mark.parametrize("moments", ["bfloat16", "float8"])
def test_resume_carries_compressed_moments(moments, tmp_path):
    settings = replace(SETTINGS, moments=moments)
    run(tmp_path / "whole", settings=settings)
    with pytest.raises(Stop):
        run(tmp_path / "cut", settings=settings, progress=stop_after(10))
    torch.manual_seed(5)
    run(tmp_path / "cut", settings=settings)
    assert_same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_resume_with_other_kernels_says_so_and_agrees(tmp_path, uninterrupted):
    with pytest.raises(Stop):
        run(tmp_path, settings=replace(SETTINGS, kernels="reference"), progress=stop_after(10))
    with pytest.warns(UserWarning, match=r"train.kernels=reference and goes on with torch"):
        run(tmp_path, settings=replace(SETTINGS, kernels="torch"))
    for spec in SPECS:
        metadata = files.read_json(tmp_path / spec.folder / "config.json")["metadata"]["training"]
        assert metadata["kernels"] == "torch"
        assert metadata["encoder_dtype"] in ("float32", "bfloat16"), "what auto came to is recorded"


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu"])
def test_resume_carries_dead_latents(architecture, tmp_path):
    """With many latents and few active ones AuxK is at work, so losing what is dead would show."""
    specs = grid([HOOK], [96], [architecture], [1], [0])
    settings = replace(SETTINGS, dead_after_tokens=128, log_every=1)
    sink = Keep()
    whole = run(tmp_path / "whole", specs=specs, settings=settings, sink=sink)
    assert max(metrics[f"{specs[0].folder}/auxk"] for _, metrics in sink.found) > 0
    with pytest.raises(Stop):
        run(tmp_path / "broken", specs=specs, settings=settings, progress=stop_after(14))
    resumed = run(tmp_path / "broken", specs=specs, settings=settings)
    assert_same(weights(tmp_path / "broken", specs), weights(tmp_path / "whole", specs))
    for one, two in zip(whole.saes, resumed.saes, strict=True):
        assert (one.l0, one.fvu, one.n_dead) == (two.l0, two.fvu, two.n_dead)


def test_resume_carries_the_random_state(tmp_path, monkeypatch):
    """An architecture that draws noise goes on drawing where it was."""

    class Noisy(TopK):
        name = "noisy"

        def activate(self, pre_acts, cols):
            return super().activate(pre_acts + 0.01 * torch.randn_like(pre_acts), cols)

    monkeypatch.setitem(ARCHITECTURES, "noisy", Noisy)
    specs = grid([HOOK], [24], ["noisy"], [4], [0])
    torch.manual_seed(1)
    run(tmp_path / "whole", specs=specs)
    torch.manual_seed(1)
    with pytest.raises(Stop):
        run(tmp_path / "broken", specs=specs, progress=stop_after(11))
    torch.manual_seed(99)
    run(tmp_path / "broken", specs=specs)
    assert_same(weights(tmp_path / "broken", specs), weights(tmp_path / "whole", specs))


def test_checkpoints_by_time(tmp_path):
    settings = replace(SETTINGS, checkpoint_every=0, checkpoint_seconds=1e-9)
    with pytest.raises(Stop):
        run(tmp_path, settings=settings, progress=stop_after(5))
    assert checkpoint.latest(tmp_path / "checkpoints").name.endswith("5")


def test_a_late_signal_is_not_swallowed(tmp_path, request):
    # A shell starts what it puts into the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def late(step, n_steps):
        if step == n_steps:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=late)
    assert len(weights(tmp_path)) == len(SPECS), "the run was complete and is kept"


def test_a_second_sigterm_does_not_spoil_the_checkpoint(tmp_path, monkeypatch):
    save = checkpoint.save

    def twice(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return save(*args, **kwargs)

    def first(step, n_steps):
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    settings = replace(SETTINGS, checkpoint_every=0)
    monkeypatch.setattr(checkpoint, "save", twice)
    with pytest.raises(Interrupted):
        run(tmp_path, settings=settings, progress=first)
    assert checkpoint.latest(tmp_path / "checkpoints") is not None


def test_logging_and_checkpointing_change_nothing(tmp_path, uninterrupted):
    class Sink:
        def __init__(self):
            self.found = []

        def log(self, metrics, step):
            self.found.append((step, metrics))
            torch.rand(3)

    sink = Sink()
    run(tmp_path, settings=replace(SETTINGS, log_every=7, checkpoint_every=0, checkpoint_seconds=1e9), sink=sink)
    assert_same(weights(tmp_path), uninterrupted)
    assert [step for step, _ in sink.found] == [7, 14, 21, 24]
    assert f"{SPECS[0].folder}/fvu" in sink.found[0][1]
    files.to_plain(sink.found)


def test_result_does_not_depend_on_the_rest_of_the_grid(tmp_path, uninterrupted):
    alone = [SPECS[4], SPECS[2]]
    run(tmp_path, specs=alone)
    assert_same(weights(tmp_path, alone), {spec.folder: uninterrupted[spec.folder] for spec in alone})


def test_signal_finishes_the_step_and_saves(tmp_path, uninterrupted):
    def progress(step, n_steps):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, progress=progress)
    assert signal.getsignal(signal.SIGTERM) is before
    assert caught.value.step == 9
    assert checkpoint.latest(tmp_path / "checkpoints") == caught.value.folder
    run(tmp_path)
    assert_same(weights(tmp_path), uninterrupted)


def test_works_outside_the_main_thread(tmp_path, uninterrupted):
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert_same(weights(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", "flip"),
        ("sae-0003.safetensors", "truncate"),
        ("sae-0000.safetensors", "flip"),
        ("checksums.json", "truncate"),
        ("rng.safetensors", "delete"),
    ],
)
def test_damaged_checkpoint_is_passed_over(name, damage, tmp_path, uninterrupted):
    with pytest.raises(Stop):
        run(tmp_path, progress=stop_after(7))
    steps = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [path.name for path in steps] == ["step-000000003", "step-000000006"]
    victim = steps[-1] / name
    content = victim.read_bytes()
    if damage == "delete":
        victim.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        victim.write_bytes(content[:middle] if damage == "truncate" else flipped)
    assert checkpoint.latest(tmp_path / "checkpoints") == steps[0]
    with pytest.warns(UserWarning, match="damaged"):
        run(tmp_path)
    assert_same(weights(tmp_path), uninterrupted)


def test_other_settings_do_not_continue_a_run(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, progress=stop_after(7))
    other = replace(SETTINGS, lr=1e-3)
    with pytest.raises(UserError, match=r"unfinished run with other settings.*another folder"):
        run(tmp_path, settings=other)
    run(tmp_path, settings=other, overwrite=True)
    with pytest.raises(UserError, match="holds a finished run"):
        run(tmp_path)
    assert json.loads((tmp_path / "trained.json").read_text())["settings"]["lr"] == 1e-3


class Spoilt(ToyStream):
    """A NaN in the 8th training batch (the first 4 batches are read twice)."""

    def next_batch(self):
        batch = super().next_batch()
        if self.n == 8:
            batch.acts[HOOK][5, 3] = torch.nan
        return batch


def test_nan_activations_stop_the_run_and_keep_the_checkpoint(tmp_path):
    bad = Spoilt({HOOK: unit_rows(20, 16)}, 64)
    with pytest.raises(UserError, match=rf"activations at '{HOOK}' is not finite at step 7") as caught:
        train(bad, [SPECS[0]], SETTINGS, tmp_path, lm_name="toy")
    assert "\n" not in str(caught.value)
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-000000006"


def test_diverging_loss_names_the_sae(tmp_path):
    settings = replace(SETTINGS, lr=1e30, clip=0.0, lr_warmup_steps=0)
    with pytest.raises(UserError, match=r"loss of .*topk-24.* is not finite at step"):
        train(stream(), [SPECS[1]], settings, tmp_path, lm_name="toy")


def test_own_architecture_trains_and_resumes(tmp_path):
    from sae.autoencoder.sparsity import Sparsity, register

    try:

        @register
        class Soft(Sparsity):
            name = "soft"

            def activate(self, pre_acts, cols):
                return (pre_acts - 0.5).relu()

            def penalty(self, active, step):
                return 0.01 * active.latent_acts.sum() / active.batch_tokens

        specs = [SAESpec(HOOK, "soft", 24, 4, 0)]
        run(tmp_path / "a", specs=specs)
        with pytest.raises(Stop):
            run(tmp_path / "b", specs=specs, progress=stop_after(20))
        run(tmp_path / "b", specs=specs)
        assert_same(weights(tmp_path / "b", specs), weights(tmp_path / "a", specs))
    finally:
        ARCHITECTURES.pop("soft", None)


KILLER = """
import os, random, shutil, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from dataclasses import replace
from test_train_resume import SETTINGS, run

folder, kills, landed = Path(sys.argv[2]), 0, []
settings = replace(SETTINGS, checkpoint_every=1)
run(folder.parent / 'warm-up', settings=settings)  # imports what torch imports late
rng = random.Random(5)

def child():
    pid = os.fork()
    if pid == 0:
        try:
            run(folder, settings=settings)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(3)
    return pid

while kills < 10:
    pid = child()
    time.sleep(rng.uniform(0.02, 0.3))
    os.kill(pid, 9)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        kills += 1
        landed.append(max((path.name for path in folder.glob("checkpoints/step-*")), default="none"))
    else:
        assert status == 0, status  # it was done before it was killed: once more from the start
        shutil.rmtree(folder)
_, status = os.waitpid(child(), 0)
assert status == 0, status
print(landed)
assert len(set(landed)) > 2, landed
"""


def test_sigkill_at_ten_random_moments(tmp_path, uninterrupted):
    """Children are forked from a process that has torch loaded, so that ten of them take seconds."""
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).parent), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert_same(weights(folder), uninterrupted)
    assert not list(folder.glob("**/.*")), "killed writes leave nothing behind"


def test_checkpoints_hold_no_pickle(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, progress=stop_after(4))
    kinds = {path.suffix for path in (tmp_path / "checkpoints").glob("**/*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_spoilt_gradient_is_not_checkpointed(tmp_path):
    """A finite loss can have a gradient that is not; the weights it leaves must not reach a checkpoint."""
    from sae.autoencoder.sparsity import Sparsity, register

    try:

        @register
        class Cliff(Sparsity):
            name = "cliff"

            def penalty(self, active, step):
                # The value is 0 and the slope infinite.
                return (active.latent_acts * (0.0 if step == 4 else 1.0)).sum().abs().sqrt() * (step == 4)

        settings = replace(SETTINGS, checkpoint_every=1)
        with pytest.raises(UserError, match=r"the gradient of .*cliff.* is not finite at step 4"):
            run(tmp_path, specs=[SAESpec(HOOK, "cliff", 24, 4, 0)], settings=settings)
        assert checkpoint.latest(tmp_path / "checkpoints").name == "step-000000004"
    finally:
        ARCHITECTURES.pop("cliff", None)
