"""Checkpoints of a training run: complete or absent, checksummed, free of pickle.

A checkpoint is a folder `step-<n>`: `state.json` (step, stream, random generators, configuration hash), one
safetensors file per SAE and one for the generators, and `checksums.json`, which also covers `state.json`.
The newest intact one wins; the one before it is kept as its stand-in.
"""

import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae import files
from sae.errors import UserError

STATE_FILE = "state.json"
CHECKSUMS_FILE = "checksums.json"
KEEP = 2


class Checkpoint(NamedTuple):
    """A checkpoint read back."""

    step: int
    """Optimiser steps completed."""
    state: dict[str, Any]
    """What the trainer stored, plain JSON types."""
    tensors: dict[str, dict[str, Tensor]]
    """File stem -> tensors, on the CPU."""


def save(folder: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write `folder/step-<step>` and delete all but the newest two.

    Args:
        folder: the run's checkpoint folder.
        step: optimiser steps completed.
        state: plain JSON types, everything that is not a tensor.
        tensors: file stem -> named tensors.
    """
    target = folder / f"step-{step:09d}"
    with files.atomic_folder(target) as temporary:
        files.write_json(temporary / STATE_FILE, {"step": step, **state})
        for stem, named in tensors.items():
            files.write_tensors(temporary / f"{stem}.safetensors", named)
        sums = {path.name: files.sha256_file(path) for path in sorted(temporary.iterdir())}
        files.write_json(temporary / CHECKSUMS_FILE, sums)
    for old in _steps(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_latest(folder: Path) -> Checkpoint | None:
    """Read the newest intact checkpoint, or None when there is none. Damaged ones are named in a warning."""
    for leftover in folder.glob(".step-*"):  # a killed save leaves its unfinished folder
        shutil.rmtree(leftover, ignore_errors=True)
    for path in reversed(_steps(folder)):
        damage = _damage(path)
        if damage is None:
            state = files.read_json(path / STATE_FILE)
            stems = [item for item in path.iterdir() if item.suffix == ".safetensors"]
            return Checkpoint(state["step"], state, {item.stem: files.read_tensors(item) for item in stems})
        warnings.warn(f"checkpoint {str(path)!r} is damaged ({damage}): going back to an older one.", stacklevel=3)
        shutil.rmtree(path, ignore_errors=True)
    return None


def latest(folder: Path | str) -> Path | None:
    """Return the newest intact checkpoint's folder without loading it."""
    return next((path for path in reversed(_steps(Path(folder))) if _damage(path) is None), None)


def remove(folder: Path) -> None:
    """Delete every checkpoint of a run."""
    shutil.rmtree(folder, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _damage(path: Path) -> str | None:
    try:
        sums = files.read_json(path / CHECKSUMS_FILE)
    except UserError:
        return f"{CHECKSUMS_FILE} is missing or unreadable"
    if not isinstance(sums, dict) or STATE_FILE not in sums:
        return f"{CHECKSUMS_FILE} is incomplete"
    for name, expected in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if files.sha256_file(path / name) != expected:
            return f"{name} does not match its checksum"
    return None


def rng_state() -> tuple[list[Any], dict[str, Tensor]]:
    """Return the state of Python's generator (JSON) and of torch's (tensors)."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return files.to_plain(random.getstate()), tensors


def set_rng_state(python: list[Any], tensors: Mapping[str, Tensor]) -> None:
    """Restore what `rng_state` gave."""
    version, internal, gauss = python
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
