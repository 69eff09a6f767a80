"""`sae train`: a grid of autoencoders from one stream of activations.

The grid is every combination of `harvest.hook_names`, `sae.d_sae`, `sae.architecture`, `sae.l0` and `sae.seed`.
Activations come from the store (harvested first when it is not there) or live from the language model
(`train.stream=live`). A run that was stopped or killed goes on from its last checkpoint.
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae import plugins
from sae.activations.prefetch import Prefetch
from sae.activations.reader import StoreReader
from sae.activations.stream import ActivationStream, LiveStream, StoreStream
from sae.autoencoder.sae import CONFIG_FILE, WEIGHTS_FILE
from sae.autoencoder.sparsity import check_options
from sae.config import RunConfig, Stream
from sae.device import pick_device
from sae.errors import UserError
from sae.files import is_done, lock, read_json, sha256_json, write_json, write_manifest
from sae.lm.model import LanguageModel
from sae.report.log import Sink
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common, plan
from sae.stages.harvest import ensure_store, ensure_tokens, make_passes, store_settings
from sae.train.checkpoint import latest
from sae.train.controls import NO_CONTROL, TRAINED
from sae.train.grid import SAESpec, grid
from sae.train.settings import TrainSettings
from sae.train.start import check_starts, start_folder, start_hash
from sae.train.trainer import CHECKPOINTS, Interrupted, TrainResult, train

START = "train.start"
"""What the manifest calls the place where the SAEs to start from lay."""


def open_stream(config: RunConfig, lm: LanguageModel) -> ActivationStream:
    """The configured stream of training activations."""
    if config.train.stream is Stream.store:
        return StoreStream(
            StoreReader(ensure_store(common.as_needed(config), lm)),
            batch_tokens=config.train.batch_tokens,
            seed=config.train.seed,
        )
    tokens = ensure_tokens(common.as_needed(config), lm)
    passes = make_passes(config, lm, tokens)
    mean_tokens = max(1, passes.n_tokens // len(passes))
    return LiveStream(
        passes,
        n_passes=len(passes),
        passes_per_window=max(1, config.train.live_buffer_tokens // mean_tokens),
        d_in=passes.d_in,
        batch_tokens=config.train.batch_tokens,
        seed=config.train.seed,
        fingerprint=sha256_json([common.model_key(lm), tokens.fingerprint, store_settings(config, passes.hook_names)]),
    )


def _ahead(
    config: RunConfig, stream: ActivationStream, lm: LanguageModel, device: str
) -> contextlib.AbstractContextManager[ActivationStream]:
    """The stream, with batches prepared ahead where that takes nothing from training.

    A language model that runs on the device that trains would only get in its way.
    """
    if config.train.stream is Stream.live and torch.device(lm.device).type == torch.device(device).type:
        return contextlib.nullcontext(stream)
    return Prefetch(stream, pin=torch.device(device).type == "cuda")


def make_settings(config: RunConfig) -> TrainSettings:
    """The trainer's settings."""
    options = config.train
    return TrainSettings(
        total_tokens=options.total_tokens,
        batch_tokens=options.batch_tokens,
        lr=options.lr,
        lr_warmup_steps=options.lr_warmup_steps,
        lr_decay_fraction=options.lr_decay_fraction,
        sparsity_warmup_steps=options.sparsity_warmup_steps,
        options=dict(config.sae.options),
        adam_betas=None if options.adam_betas is None else (options.adam_betas[0], options.adam_betas[1]),
        centre=options.centre,
        start=options.start,
        k_aux=options.k_aux,
        clip=options.clip,
        auxk_alpha=options.auxk_alpha,
        dead_after_tokens=options.dead_after_tokens,
        encoder_dtype=options.encoder_dtype,
        moments=options.moments,
        kernels=options.kernels,
        checkpoint_seconds=options.checkpoint_seconds,
        log_every=options.log_every,
    )


def make_grid(config: RunConfig, lm: LanguageModel) -> list[SAESpec]:
    """The configured grid, checked before anything is harvested for it."""
    options = config.sae
    check_options(options.options, options.architecture)
    sites = common.pick_sites(config, lm)
    controls = [TRAINED if name == NO_CONTROL else name for name in options.control]
    return grid(
        sites, options.d_sae, options.architecture, options.l0, options.seed, controls=controls, skip=options.skip
    )


def ensure_trained(config: RunConfig, lm: LanguageModel) -> list[Path]:
    """Train the grid, or find it trained already. Return the SAEs' folders, in the order of the grid."""
    hook_names = common.pick_hooks(config, lm)
    specs = make_grid(config, lm)
    settings = make_settings(config)
    device = pick_device(config.train.device)
    folder = config.folder / "train"
    paths = [folder / spec.folder for spec in specs]
    if config.force or not _complete(folder, paths):
        _check_starts(config, lm, specs, settings.start)
    else:
        _check_gone(folder, specs, settings.start)
    tokens = ensure_tokens(common.as_needed(config), lm)
    # The store itself is not among the inputs: it may be deleted once the SAEs are trained.
    depends = {
        "specs": specs,
        "settings": settings.identity(),
        "stream": config.train.stream,
        "stream_seed": config.train.seed,
        "store": store_settings(config, hook_names),
    }
    if config.plugins:
        depends["plugins"] = plugins.load(config.plugins)
    inputs = {"lm": common.model_key(lm), "tokens": tokens.fingerprint} | start_inputs(folder, specs, settings.start)
    with lock(folder, common.say_waiting):
        if is_done(folder, depends, inputs) and not _complete(folder, paths):
            (folder / common.MANIFEST).unlink()  # an SAE was deleted since: train again
        if common.skip(config, folder, depends, inputs, replace=False):
            _note_start(folder, specs, settings.start)
            return paths
        if config.force:
            shutil.rmtree(folder, ignore_errors=True)
        plan.check(config, lm, specs, settings)
        with _ahead(config, open_stream(config, lm), lm, device) as stream:
            result = _train(config, lm, stream, specs, settings, folder, device)
        _write_result(folder, result)
        write_manifest(folder, "train", depends, inputs, {START: settings.start} if settings.start else None)
    return paths


def _check_starts(config: RunConfig, lm: LanguageModel, specs: list[SAESpec], start: str) -> None:
    """Refuse SAEs that training cannot go on from, before any text is read."""
    check_starts(start, specs, {name: lm.d_in(name) for name in common.pick_hooks(config, lm)})
    folder = config.folder / "train"
    if config.force and start and Path(start).resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"train.start={start!r} lies in {str(folder)!r}, which force=true deletes first: choose another name=."
        )


def _complete(folder: Path, paths: list[Path]) -> bool:
    """Tell whether training was finished here, and no SAE was deleted since."""
    return (folder / common.MANIFEST).is_file() and all((path / CONFIG_FILE).is_file() for path in paths)


def start_inputs(folder: Path, specs: list[SAESpec], start: str) -> dict[str, str]:
    """The weights that training starts from, as inputs of a stage that works in `folder`.

    Named after the SAEs to train: those to start from may move, and once a stage is finished they may go.
    """
    inputs = {}
    for spec in specs:
        place = start_folder(start, spec)
        if place is not None:
            name = f"start of {spec.folder}"
            inputs[name] = common.noted_hash(place / WEIGHTS_FILE, folder, name)
    return inputs


def _check_gone(folder: Path, specs: list[SAESpec], start: str) -> None:
    """Refuse a start that is not there, unless this finished run began with it: a slip of the pen is no deletion."""
    noted = read_json(folder / common.MANIFEST).get("notes", {}).get(START)
    if not start or noted is None or Path(noted) == Path(start) or all(start_hash(start, spec) for spec in specs):
        return
    raise UserError(
        f"train.start={start!r} has no SAEs, and {str(folder)!r} was trained from {noted!r}: leave it out, or name the "
        "folder where those lie now."
    )


def _note_start(folder: Path, specs: list[SAESpec], start: str) -> None:
    """Keep in the manifest of a finished run where its start lies now, or say that it is gone."""
    if not start:
        return
    path = folder / common.MANIFEST
    if not all(start_hash(start, spec) for spec in specs):
        print(f"train.start={start} is no longer there; {path} notes which weights it had")
        return
    manifest = read_json(path)
    notes = manifest.get("notes", {})
    if Path(notes.get(START, "")) != Path(start):
        write_json(path, manifest | {"notes": notes | {START: start}})


class _LazySink:
    """Opens the metric sink when the first metrics come: by then the trainer has claimed the folder."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._sink: Sink | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics; what an interrupted run logged at or after its last checkpoint is dropped first."""
        if self._sink is None:
            checkpoint = latest(self._folder / CHECKPOINTS)
            config = self._config
            self._sink = common.open_sink(
                config,
                self._folder,
                "train",
                resume_step=None if checkpoint is None else int(checkpoint.name.split("-")[1]) + 1,
            )
        self._sink.log(metrics, step)

    def close(self) -> None:
        """Close the sink if it was opened."""
        if self._sink is not None:
            self._sink.close()


def _train(
    config: RunConfig,
    lm: LanguageModel,
    stream: ActivationStream,
    specs: list[SAESpec],
    settings: TrainSettings,
    folder: Path,
    device: str,
) -> TrainResult:
    sink = _LazySink(config, folder)
    with contextlib.closing(sink), Progress(settings.n_steps, f"train {len(specs)} SAEs", unit="step") as bar:
        try:
            return train(
                stream,
                specs,
                settings,
                folder,
                lm_name=lm.name,
                lm_fingerprint=lm.fingerprint,
                sink=sink,
                device=device,
                progress=common.counter(bar),
            )
        except Interrupted as stop:
            raise KeyboardInterrupt(str(stop)) from None


def _write_result(folder: Path, result: TrainResult) -> None:
    saes: list[dict[str, Any]] = [
        {
            "hook_name": item.spec.hook_name,
            "d_sae": item.spec.d_sae,
            "architecture": item.spec.architecture,
            "l0_target": item.spec.l0,
            "seed": item.spec.seed,
            "control": item.spec.control or NO_CONTROL,
            "path": str(item.folder),
            "final": {"l0": item.l0, "fvu": item.fvu, "n_dead": item.n_dead},
        }
        for item in result.saes
    ]
    write_json(
        folder / "result.json",
        {
            "schema_version": 1,
            "saes": saes,
            "n_steps": result.n_steps,
            "n_tokens": result.n_tokens,
            "wall_s": round(result.seconds, 2),
        },
    )
    rows = [record | record["final"] for record in saes]
    columns = ["hook_name", "architecture", "d_sae", "l0", "fvu", "n_dead"]
    columns += ["control"] if any(item.spec.control for item in result.saes) else []
    print(summary_table(rows, columns))
    print(f"{folder}: {len(rows)} SAEs on {result.n_tokens:,} tokens in {result.seconds:.1f} s")


def run(config: RunConfig) -> None:
    """Run the stage; with `plan=true` only say what it would take."""
    lm = common.open_lm(config.lm)
    if config.plan:
        specs, settings = make_grid(config, lm), make_settings(config)
        _check_starts(config, lm, specs, settings.start)
        plan.run(config, lm, specs, settings)
    else:
        ensure_trained(config, lm)
