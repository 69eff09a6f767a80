"""`sae train plan=true`: what a training run will take, said before it starts; nothing is written.

Memory and disk follow from the shapes (`sae.train.plan`, `sae.activations.store`), on top of what the process holds
once the language model is loaded and has made one pass. Time is measured: one pass of the language model, and a few
steps of every kind of SAE in the grid, on real activations. What cannot fit is refused, with the setting to change;
training refuses it in the same words.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from sae.activations.harvest import Passes, prepare
from sae.activations.layout import Shard
from sae.activations.reader import StoreReader
from sae.activations.store import check_disk, disk_bytes, working_bytes
from sae.config import RunConfig, Stream
from sae.device import free_memory, pick_device, resident_memory
from sae.files import read_json, sha256_json
from sae.kernels import pick, pick_precision
from sae.lm.model import LanguageModel
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.harvest import store_settings
from sae.train import plan as training
from sae.train.grid import SAESpec
from sae.train.initialise import input_stats
from sae.train.run import SAERun
from sae.train.settings import TrainSettings

TIMED_STEPS = 3


class Estimate(NamedTuple):
    """What a run will take."""

    memory: int
    """Bytes of the whole process at its peak, on the device that trains."""
    disk: int
    """Bytes to be written at most, besides what is there."""
    harvest_seconds: float
    train_seconds: float


class Pass(NamedTuple):
    """One forward pass of the language model, measured."""

    rows: Shard
    tokens_per_second: float
    peak: int
    """Most bytes the process held during it."""
    after: int
    """Bytes it held when the pass was over."""


class Checked(NamedTuple):
    """What follows from the shapes."""

    training: training.Plan
    store_bytes: int
    """Most on disk while the store is written; 0 when there is none to write."""


def check(config: RunConfig, lm: LanguageModel, specs: list[SAESpec], settings: TrainSettings) -> Checked:
    """Refuse a run that cannot fit into memory or, store and SAEs together, onto the disk.

    Raises:
        UserError: with the setting to change.
    """
    device = pick_device(config.train.device)
    found = _plan(lm, specs, settings, device)
    training.check_memory(found, free_memory(device), _place(device))
    store = config.folder / "harvest"
    if config.train.stream is Stream.live or (store / "store.json").is_file():
        check_disk(config.folder / "train", found.disk, "this training", training.DISK_REMEDY)
        return Checked(found, 0)
    d_in = {name: lm.d_in(name) for name in common.pick_hooks(config, lm)}
    harvest = config.harvest
    store_bytes = disk_bytes(d_in, config.data.n_tokens, harvest.shard_tokens, harvest.dtype)
    if store_bytes > found.disk:  # say what would help most
        check_disk(store, store_bytes + found.disk)
    check_disk(store, store_bytes + found.disk, "this harvest and training", training.DISK_REMEDY)
    return Checked(found, store_bytes)


def run(config: RunConfig, lm: LanguageModel, specs: list[SAESpec], settings: TrainSettings) -> Estimate:
    """Print what the run will take.

    Raises:
        UserError: it cannot fit.
    """
    device = pick_device(config.train.device)
    _check_kept(config, lm)
    planned, store_bytes = check(config, lm, specs, settings)
    hook_names = common.pick_hooks(config, lm)
    d_in = {name: lm.d_in(name) for name in hook_names}
    n_tokens = config.data.n_tokens
    store = config.folder / "harvest"
    stored = (store / "store.json").is_file()
    live = config.train.stream is Stream.live
    shard_tokens, dtype = config.harvest.shard_tokens, config.harvest.dtype
    measured = _measure_pass(config, lm, hook_names)
    if live:
        window = config.train.live_buffer_tokens * sum(d_in.values()) * lm.dtype.itemsize * 2
        train_peak = measured.peak + planned.memory + window
        harvest_peak, harvest_s = 0, 0.0
        lm_s = settings.total_tokens / measured.tokens_per_second
    else:
        n_shards = max(1, round(n_tokens / shard_tokens))
        rows = max(StoreReader(store).info.shard_rows) if stored else -(-n_tokens // n_shards)
        writing, reading = working_bytes(d_in, rows, n_tokens, dtype)
        harvest_peak = 0 if stored else measured.peak + writing
        # The shard that is read and the one opened ahead of it are both mapped, as far as training gets.
        n_mapped = min(2.0, settings.total_tokens / rows)
        train_peak = measured.after + planned.memory + int(n_mapped * reading)
        harvest_s, lm_s = 0.0 if stored else n_tokens / measured.tokens_per_second, 0.0
    memory = max(harvest_peak, train_peak) if device == "cpu" else planned.memory
    train_s = _measure_steps(config, specs, settings, measured.rows, device) + lm_s
    found = Estimate(memory, store_bytes + planned.disk, harvest_s, train_s)
    _print(config, found, planned, device, len(specs), settings, measured.tokens_per_second)
    return found


def _check_kept(config: RunConfig, lm: LanguageModel) -> None:
    """Refuse what the run itself would refuse: tokens or a store of other settings under this name.

    Raises:
        UserError: with the remedy.
    """
    wanted = {"tokens": {"data": config.data}, "harvest": store_settings(config, common.pick_hooks(config, lm))}
    for stage, settings in wanted.items():
        path = config.folder / stage / common.MANIFEST
        if path.is_file() and read_json(path)["config_hash"] != sha256_json(settings):
            raise common.made_otherwise(path.parent)


def _plan(lm: LanguageModel, specs: list[SAESpec], settings: TrainSettings, device: str) -> training.Plan:
    d_in = {name: lm.d_in(name) for spec in specs for name in spec.site.hooks}
    precision = pick_precision(device, settings.encoder_dtype)
    return training.plan(specs, d_in, settings, pick(device, settings.kernels).name, precision)


def _place(device: str) -> str:
    return "this machine" if device == "cpu" else f"device {device!r}"


def _measure_pass(config: RunConfig, lm: LanguageModel, hook_names: list[str]) -> Pass:
    """Tokenise as much text as one pass takes, and run it twice: the first time is not typical."""
    corpus = prepare(
        lm,
        common.open_documents(config.data),
        ctx_len=config.data.ctx_len,
        packing=config.data.packing.value,
        n_tokens=min(config.data.n_tokens, config.harvest.batch_tokens),
        n_held_out_tokens=1,
    )
    passes = Passes(
        lm,
        corpus.train,
        hook_names,
        batch_tokens=config.harvest.batch_tokens,
        include_special=config.data.include_special,
    )
    passes(0)
    start = time.perf_counter()
    rows, peak = _watch(lambda: passes(0))
    seconds = time.perf_counter() - start
    return Pass(rows, len(rows.tokens.token) / seconds, peak, resident_memory())


def _watch(action: Callable[[], Shard]) -> tuple[Shard, int]:
    """Do something while another thread looks at how much memory the process holds."""
    peak, done = resident_memory(), threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_memory())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        return action(), max(peak, resident_memory())
    finally:
        done.set()
        watcher.join()


def _measure_steps(config: RunConfig, specs: list[SAESpec], settings: TrainSettings, rows: Shard, device: str) -> float:
    """Seconds all steps of the grid will take: each kind of SAE takes a few on real activations."""
    kernels, precision = pick(device, settings.kernels), pick_precision(device, settings.encoder_dtype)
    seconds: dict[object, float] = {}
    total = 0.0
    for spec in specs:
        acts = {name: rows.acts[name].float() for name in spec.site.hooks}
        widths = {name: values.shape[1] for name, values in acts.items()}
        kind = (spec.architecture, spec.site.kind, tuple(widths.values()), spec.d_sae, spec.l0)
        if kind not in seconds:
            run = SAERun(spec, widths, settings, "", "", torch.device(device), kernels, precision)
            run.initialise({name: input_stats(values, name) for name, values in acts.items()})
            repeats = -(-settings.batch_tokens // len(rows.tokens.token))
            batch = run.inputs(
                {name: x.repeat(repeats, 1)[: settings.batch_tokens].to(device) for name, x in acts.items()}
            )
            times = []
            for step in range(1 + TIMED_STEPS):
                start = time.perf_counter()
                # Reading the norm waits for the device. A short run has no later step to ask the schedule for.
                float(run.train_step(batch, min(step, settings.n_steps - 1)).grad_norm)
                times.append(time.perf_counter() - start)
            seconds[kind] = sorted(times[1:])[TIMED_STEPS // 2]
        total += seconds[kind] * settings.n_steps
    return total


def _print(
    config: RunConfig,
    found: Estimate,
    planned: training.Plan,
    device: str,
    n_saes: int,
    settings: TrainSettings,
    tokens_per_second: float,
) -> None:
    gb = 1e9
    free_disk = _free_disk(config.folder)
    rows = [
        ["peak memory", f"{found.memory / gb:.2f} GB", f"{free_memory(device) / gb:.1f} GB free on {_place(device)}"],
        ["disk", f"{found.disk / gb:.2f} GB", f"{free_disk / gb:.1f} GB free"],
        ["harvest", _duration(found.harvest_seconds), f"{tokens_per_second:,.0f} tokens/s through the language model"],
        ["training", _duration(found.train_seconds), f"{settings.n_steps:,} steps of {n_saes} SAEs"],
    ]
    print(summary_table(rows, ["plan", "takes", "of"]))
    parts = planned._asdict()
    print(
        "of the memory: "
        + ", ".join(f"{name} {parts[name] / gb:.2f}" for name in ("weights", "moments", "gradients", "workspace"))
        + " GB; nothing was written. The same command without plan=true starts it."
    )


def _free_disk(folder: Path) -> int:
    import shutil

    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
