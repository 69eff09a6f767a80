"""Train many SAEs from one stream of activations.

Every SAE takes an optimiser step from every batch of its hook point, with its own optimiser, schedule and random
generator, so its result does not depend on which others are trained beside it. A run that was killed continues from
its last checkpoint; on the CPU the result is bit for bit that of an uninterrupted run.

    result = train(stream, grid(["blocks.2.hook_resid_post"], [1024], ["topk"], [16], [0]),
                   TrainSettings(total_tokens=400_000, batch_tokens=1024), "runs/demo/train",
                   lm_name="organism", lm_fingerprint="...")
"""

import dataclasses
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae import files
from sae.autoencoder.gradients import TrainingLoss
from sae.autoencoder.sparsity import check_options
from sae.errors import UserError, unknown
from sae.kernels import pick, pick_precision
from sae.kernels.operands import Workspace
from sae.train import checkpoint
from sae.train.grid import SAESpec, check_specs
from sae.train.initialise import input_stats, sample_rows
from sae.train.interfaces import ActivationBatch, MetricSink, Stream
from sae.train.run import Inputs, SAERun
from sae.train.settings import TrainSettings
from sae.train.signals import StopSignals
from sae.train.start import check_starts, start_hash
from sae.train.watch import Watch

CHECKPOINTS = "checkpoints"
TRAINED_FILE = "trained.json"


class TrainedSAE(NamedTuple):
    """One finished SAE."""

    spec: SAESpec
    folder: Path
    """Where it is saved; read it with `SAE.load`."""
    l0: float
    """Running average over the last steps of training, on training batches."""
    fvu: float
    """Likewise, about the batch mean."""
    n_dead: int
    """Latents silent for `dead_after_tokens` at the end."""


class TrainResult(NamedTuple):
    """A finished run."""

    folder: Path
    n_steps: int
    n_tokens: int
    seconds: float
    """Training time, over all sessions of the run."""
    saes: list[TrainedSAE]


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived: the step was finished and a checkpoint saved. Training again continues from it."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped after step {step}; run the same command again to continue from {str(folder)!r}.")
        self.step = step
        self.folder = folder


def train(
    stream: Stream,
    specs: list[SAESpec],
    settings: TrainSettings,
    folder: Path | str,
    *,
    lm_name: str,
    lm_fingerprint: str = "",
    sink: MetricSink | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> TrainResult:
    """Train every SAE of the grid; save each under `folder/<spec.folder>`.

    Args:
        stream: where activations come from. An optional attribute `fingerprint` (text) is part of the run's identity.
        specs: the SAEs.
        settings: shared settings.
        folder: the run's folder. Checkpoints live here while training; a finished run is returned as it is.
        lm_name: recorded in every SAE's config.
        lm_fingerprint: likewise; empty when unknown.
        sink: receives `<spec.folder>/<metric>` every `log_every` steps.
        device: where to train.
        progress: called with (steps done, all steps) after every step.
        overwrite: discard what another configuration left in the folder instead of refusing.

    Raises:
        UserError: bad settings, activations or loss that are not finite, or a folder that holds another run.
        Interrupted: a signal asked to stop; a checkpoint was saved.
    """
    folder, device = Path(folder), torch.device(device)
    _check(stream, specs, settings)
    kernels = pick(device, settings.kernels)
    precision = pick_precision(device, _begun_with(folder, settings) or settings.encoder_dtype)
    # What "auto" came to is part of the run's identity: another precision would give other weights.
    settings = dataclasses.replace(settings, encoder_dtype=precision.value)
    identity = _identity(stream, specs, settings, lm_name, lm_fingerprint)
    if overwrite:
        _discard_others(folder, identity)
    done = _claim(folder, identity)
    if done is not None:
        return done

    workspace = Workspace()
    runs = [
        SAERun(spec, stream.d_in, settings, lm_name, lm_fingerprint, device, kernels, precision, workspace)
        for spec in specs
    ]
    step, seconds_before = _restore(folder, stream, runs, identity)
    if step is None:
        _initialise(runs, stream, settings)
        step = 0

    sites = list(dict.fromkeys(run.spec.site for run in runs))
    scales = {name: scale for run in runs for name, scale in run.scales.items()}
    start = saved_at = time.monotonic()
    problems = _NonFinite(device)
    watch = Watch({run.spec.folder: float(run.spec.l0) for run in runs}, settings.n_steps)

    def save_checkpoint(step: int) -> Path:
        problems.check()  # never keep a state that is already spoilt
        seconds = seconds_before + time.monotonic() - start
        return _save_checkpoint(folder, step, stream, runs, identity, seconds)

    with StopSignals() as stop:
        while step < settings.n_steps:
            batch = _next_batch(stream, step)
            scaled: dict[str, Tensor] = {}
            for name, scale in scales.items():  # the scale is the hook point's, so all its SAEs share one copy
                acts = batch.acts[name].to(device, torch.float32)
                problems.watch(acts, f"activations at {name!r}", step)
                scaled[name] = acts * scale
            problems.check_now_if_cheap()
            inputs = {site: Inputs.of(scaled, site) for site in sites}

            losses: list[TrainingLoss] = []
            for run in runs:
                loss, grad_norm = run.train_step(inputs[run.spec.site], step)
                problems.watch(loss.total, f"the loss of {run.spec.folder!r}", step)
                problems.watch(grad_norm, f"the gradient of {run.spec.folder!r}", step)
                problems.check_now_if_cheap()
                losses.append(loss)
            step += 1

            if step % settings.log_every == 0 or step == settings.n_steps:
                problems.check()
                metrics = _metrics(runs, losses, step, settings, seconds_before + time.monotonic() - start)
                if sink is not None:
                    sink.log(metrics, step)
                norms = {name: acts.norm(dim=1) for name, acts in scaled.items()}
                for message in (*watch.look(metrics, step), *watch.look_at_inputs(norms, step)):
                    warnings.warn(message, stacklevel=2)
            due_by_step = settings.checkpoint_every and step % settings.checkpoint_every == 0
            due_by_time = settings.checkpoint_seconds and time.monotonic() - saved_at >= settings.checkpoint_seconds
            if stop.requested and step < settings.n_steps:
                raise Interrupted(step, save_checkpoint(step))
            if (due_by_step or due_by_time) and watch.sound:
                save_checkpoint(step)
                saved_at = time.monotonic()
            if progress is not None:
                progress(step, settings.n_steps)

        return _finish(folder, runs, settings, identity, seconds_before + time.monotonic() - start)


def _begun_with(folder: Path, settings: TrainSettings) -> str | None:
    """What "auto" came to when the run in this folder was begun, maybe on another machine; None where none was."""
    if settings.encoder_dtype != "auto":
        return None
    if (folder / TRAINED_FILE).is_file():
        found = files.read_json(folder / TRAINED_FILE)["settings"]
    else:
        newest = checkpoint.latest(folder / CHECKPOINTS)
        found = {} if newest is None else files.read_json(newest / checkpoint.STATE_FILE)
    value = found.get("encoder_dtype")
    return None if value == "auto" else value


def _check(stream: Stream, specs: list[SAESpec], settings: TrainSettings) -> None:
    check_specs(specs)
    check_options(settings.options, list(dict.fromkeys(spec.architecture for spec in specs)))
    for name in (name for spec in specs for name in spec.site.hooks):
        if name not in stream.d_in:
            raise unknown("hook name", name, sorted(stream.d_in), "The stream must carry every hook point.")
    check_starts(settings.start, specs, stream.d_in)
    if stream.batch_tokens != settings.batch_tokens:
        raise UserError(
            f"the stream gives batches of {stream.batch_tokens} tokens, but batch_tokens = {settings.batch_tokens}: "
            "make them equal."
        )


def _identity(stream: Stream, specs: list[SAESpec], settings: TrainSettings, lm_name: str, lm_fingerprint: str) -> str:
    return files.sha256_json(
        {
            "specs": specs,
            # As floats where they are numbers: a learning rate of 1 is one of 1.0.
            "settings": {k: float(v) if isinstance(v, int) else v for k, v in settings.identity().items()},
            "lm_name": lm_name,
            "lm_fingerprint": lm_fingerprint,
            "d_in": dict(stream.d_in),
            "start": [start_hash(settings.start, spec) for spec in specs],
            "stream": getattr(stream, "fingerprint", ""),
        }
    )


def _discard_others(folder: Path, identity: str) -> None:
    """Delete what a run of another identity left behind."""
    trained = folder / TRAINED_FILE
    if trained.is_file() and files.read_json(trained)["identity"] != identity:
        trained.unlink()
    newest = checkpoint.latest(folder / CHECKPOINTS)
    if newest is not None and files.read_json(newest / checkpoint.STATE_FILE)["identity"] != identity:
        checkpoint.remove(folder / CHECKPOINTS)


def _claim(folder: Path, identity: str) -> TrainResult | None:
    """Return the finished run in this folder, if there is one."""
    path = folder / TRAINED_FILE
    if not path.is_file():
        return None
    found = files.read_json(path)
    complete = all((folder / item["spec_folder"] / "config.json").is_file() for item in found["saes"])
    if found["identity"] == identity and complete:
        checkpoint.remove(folder / CHECKPOINTS)  # in case the run was killed between finishing and tidying up
        saes = [
            TrainedSAE(SAESpec(**item["spec"]), folder / item["spec_folder"], item["l0"], item["fvu"], item["n_dead"])
            for item in found["saes"]
        ]
        return TrainResult(folder, found["n_steps"], found["n_tokens"], found["seconds"], saes)
    if found["identity"] != identity:
        raise _another_run(folder, "a finished run")
    path.unlink()  # an SAE was deleted since: train again
    return None


def _another_run(folder: Path, what: str) -> UserError:
    return UserError(
        f"{str(folder)!r} holds {what} with other settings, SAEs or data: give this run another folder, "
        "delete that one, or allow overwriting."
    )


def _restore(folder: Path, stream: Stream, runs: list[SAERun], identity: str) -> tuple[int | None, float]:
    """Continue from the newest intact checkpoint. Return its step (None: start afresh) and the seconds spent so far."""
    found = checkpoint.load_latest(folder / CHECKPOINTS)
    if found is None:
        return None, 0.0
    if found.state["identity"] != identity:
        raise _another_run(folder / CHECKPOINTS, "an unfinished run")
    if found.state["kernels"] != runs[0].kernels.name:
        warnings.warn(
            f"this run was begun with train.kernels={found.state['kernels']} and goes on with {runs[0].kernels.name}: "
            "the result will equal that of an uninterrupted run up to rounding only.",
            stacklevel=3,
        )
    for index, run in enumerate(runs):
        run.load_state(found.tensors[f"sae-{index:04d}"], found.state["scales"][index])
    stream.load_state_dict(found.state["stream"])
    checkpoint.set_rng_state(found.state["python_rng"], found.tensors["rng"])
    return found.step, float(found.state["seconds"])


def _save_checkpoint(
    folder: Path, step: int, stream: Stream, runs: list[SAERun], identity: str, seconds: float
) -> Path:
    python_rng, torch_rng = checkpoint.rng_state()
    state = {
        "identity": identity,
        "seconds": seconds,
        "scales": [run.scales for run in runs],
        "stream": stream.state_dict(),
        "python_rng": python_rng,
        "kernels": runs[0].kernels.name,
        "encoder_dtype": runs[0].precision.value,
    }
    tensors = {f"sae-{index:04d}": run.state_tensors() for index, run in enumerate(runs)}
    return checkpoint.save(folder / CHECKPOINTS, step, state, {**tensors, "rng": torch_rng})


def _initialise(runs: list[SAERun], stream: Stream, settings: TrainSettings) -> None:
    """Measure every hook point on the first batches, then rewind the stream so that training sees them too."""
    position = stream.state_dict()
    batches = [_next_batch(stream, 0).acts for _ in range(settings.init_batches)]
    stream.load_state_dict(position)
    names = dict.fromkeys(name for run in runs for name in run.spec.site.hooks)
    n_sample = max(sample_rows(run.spec.d_sae) for run in runs)
    stats = {
        name: input_stats(torch.cat([batch[name].float().cpu() for batch in batches]), name, settings.centre, n_sample)
        for name in names
    }
    for run in runs:
        run.initialise(stats)


def _next_batch(stream: Stream, step: int) -> ActivationBatch:
    try:
        return stream.next_batch()
    except StopIteration:
        raise UserError(f"the activation stream ended at step {step}: lower total_tokens or harvest more.") from None


class _NonFinite:
    """Watches for NaN and infinities.

    On the CPU every value is read at once; on a GPU, where reading waits for the
    device, values are kept and read together before anything is logged or saved.
    """

    def __init__(self, device: torch.device) -> None:
        self.cheap = device.type == "cpu"
        self.pending: list[tuple[Tensor, str, int]] = []

    def watch(self, values: Tensor, what: str, step: int) -> None:
        self.pending.append((torch.isfinite(values.detach()).all(), what, step))

    def check_now_if_cheap(self) -> None:
        if self.cheap or len(self.pending) >= 4096:
            self.check()

    def check(self) -> None:
        """Raise for the first value that was not finite."""
        pending, self.pending = self.pending, []
        if pending:
            flags = torch.stack([flag for flag, _, _ in pending]).tolist()
            for flag, (_, what, step) in zip(flags, pending, strict=True):
                if not flag:
                    raise UserError(
                        f"{what} is not finite at step {step}: training stopped; check the activations, or lower lr "
                        "and continue in another folder."
                    )


def _metrics(
    runs: list[SAERun], losses: list[TrainingLoss], step: int, settings: TrainSettings, seconds: float
) -> dict[str, float]:
    found = {"tokens": float(step * settings.batch_tokens), "train_seconds": seconds}
    for run, loss in zip(runs, losses, strict=True):
        values = {
            "loss": loss.total.detach(),
            "mse": loss.mse,
            "fvu": loss.fvu,
            "l0": loss.stats.l0,
            "penalty": loss.penalty,
            "auxk": loss.auxk,
            "dead_fraction": run.dead().float().mean(),
        }
        found |= {f"{run.spec.folder}/{name}": float(value) for name, value in values.items()}
        found[f"{run.spec.folder}/lr"] = run.optimiser.current_lr
    return found


def _finish(folder: Path, runs: list[SAERun], settings: TrainSettings, identity: str, seconds: float) -> TrainResult:
    for leftover in folder.glob("**/.*.tmp"):  # of an earlier attempt to save that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    saes = [run.finish(folder / run.spec.folder, identity) for run in runs]
    n_tokens = settings.n_steps * settings.batch_tokens
    trained = [
        TrainedSAE(run.spec, folder / run.spec.folder, item.l0, item.fvu, item.n_dead)
        for run, item in zip(runs, saes, strict=True)
    ]
    files.write_json(
        folder / TRAINED_FILE,
        {
            "schema_version": files.SCHEMA_VERSION,
            "identity": identity,
            "settings": settings,
            "n_steps": settings.n_steps,
            "n_tokens": n_tokens,
            "seconds": seconds,
            "saes": [{**item._asdict(), "folder": None, "spec_folder": item.spec.folder} for item in trained],
        },
    )
    checkpoint.remove(folder / CHECKPOINTS)
    return TrainResult(folder, settings.n_steps, n_tokens, seconds, trained)
