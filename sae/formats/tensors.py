"""Reading tensors of foreign files without running what is in them.

safetensors and npz hold numbers only. A pickle (.pt, .pth, .bin) can hold code: it is opened with torch's weights-only
reader, which refuses anything but tensors and plain containers, and nothing else in this package opens one.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.errors import UserError
from sae.files import read_tensors

PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def read(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a file, whatever its kind, onto the CPU; nested mappings are flattened with dots.

    Raises:
        UserError: the file is missing, damaged, of no supported kind, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}: check the path, or download the folder again.")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix in PICKLES:
        return {name: value for name, value in flatten(read_pickle(path)).items() if isinstance(value, Tensor)}
    raise UserError(f"{str(path)!r} is not .safetensors, .npz, {', '.join(PICKLES)}: convert it to one of them.")


def read_pickle(path: Path) -> Any:
    """Open a torch file with the weights-only reader: tensors, numbers, text, lists and mappings, no code.

    Raises:
        UserError: it is damaged, or holds something else, which is not run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{str(path)!r} holds more than tensors and was not opened, since opening it could run code "
            f"({_reason(error)}): load it where you trust it, and save its state_dict as safetensors."
        ) from None
    except Exception as error:  # damage shows as whatever the reader happens to fall over
        raise UserError(f"{str(path)!r} is damaged ({_reason(error)}): download it again.") from None


def _reason(error: Exception) -> str:
    """The first line of what an error says, or what it is called."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    except Exception as error:  # likewise
        raise UserError(
            f"{str(path)!r} is damaged or holds more than numbers, and was not opened ({_reason(error)}): download it "
            "again."
        ) from None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    return found


def pick(tensors: Mapping[str, Tensor], path: Path, *names: str) -> list[Tensor]:
    """The named tensors in fp32.

    Raises:
        UserError: one is missing, or not finite.
    """
    found = []
    for name in names:
        if name not in tensors:
            has = ", ".join(sorted(tensors)[:12]) or "nothing"
            raise UserError(f"tensor {name!r} is missing in {str(path)!r}, which has {has}: is it of another format?")
        tensor = tensors[name].float()
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"tensor {name!r} in {str(path)!r} has values that are not finite: download it again.")
        found.append(tensor)
    return found


def only(tensors: Mapping[str, Any], path: Path, *names: str) -> None:
    """Refuse a file that has anything else: it may change what the SAE computes.

    Raises:
        UserError: naming it.
    """
    for name in tensors:
        if name not in names:
            raise UserError(f"{str(path)!r} has {name!r}, which nothing is known of: is it of another format?")
