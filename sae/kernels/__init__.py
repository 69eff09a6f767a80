"""The operations of a sparse training step: one truth, and faster versions of it for each kind of machine.

reference.py  plain torch, fp32, every operation as its definition reads
cpu.py        pure torch that visits only what is selected; the fallback on any device
cpp.py        the same in C++ (kernels.cpp), compiled on first use where there is a compiler
triton.py     CUDA

    kernels = pick("cpu")
    entries = kernels.topk(Projection(centred, w_enc, b_enc), k=32)
"""

import functools
import importlib.util
import warnings

import torch

from sae.errors import UserError, unknown
from sae.kernels.build import library
from sae.kernels.cpu import TorchKernels
from sae.kernels.operands import Precision
from sae.kernels.reference import Kernels

NAMES = ("auto", "reference", "torch", "cpp", "triton")


def pick(device: torch.device | str, name: str = "auto") -> Kernels:
    """Choose the kernels for a device.

    Args:
        device: where the tensors are.
        name: "auto" takes the fastest there are: triton on CUDA, cpp on a CPU with a compiler, else torch.

    Raises:
        UserError: the name is unknown, or these kernels cannot run here.
    """
    kind = torch.device(device).type
    if name not in NAMES:
        raise unknown("train.kernels", name, list(NAMES))
    if name == "reference":
        return Kernels()
    if name == "torch":
        return TorchKernels()
    if name == "triton" or (name == "auto" and kind == "cuda"):
        if importlib.util.find_spec("triton") is None:
            if name == "auto":
                return TorchKernels()
            raise UserError("train.kernels=triton needs the package triton, which is not installed: use auto.")
        if kind != "cuda":
            raise UserError(f"train.kernels=triton runs on CUDA, not on {kind!r}: use auto.")
        from sae.kernels.triton import TritonKernels

        return TritonKernels()
    if kind == "cpu":
        from sae.kernels.cpp import CppKernels

        found = library()
        if found.handle is not None:
            return CppKernels(found.handle)
        if name == "cpp":
            raise UserError(f"train.kernels=cpp cannot be used here: {found.reason}; use train.kernels=auto.")
        _warn_of_torch(found.reason)
    elif name == "cpp":
        raise UserError(f"train.kernels=cpp runs on the CPU, not on {kind!r}: use auto.")
    return TorchKernels()


@functools.cache
def _warn_of_torch(reason: str) -> None:
    """Say, once a process, why training will be slower than it could be."""
    warnings.warn(
        f"the C++ kernels cannot be used ({reason}), so the slower torch kernels take over on this CPU: "
        "see to the compiler, or set train.kernels=torch if that is meant.",
        stacklevel=3,
    )


def pick_precision(device: torch.device | str, name: str = "auto") -> Precision:
    """Choose the encoder's precision; "auto" is bf16 where the machine multiplies it in hardware, else fp32.

    Raises:
        UserError: the name is unknown.
    """
    if name != "auto":
        known = [item.value for item in Precision]
        if name not in known:
            raise unknown("train.encoder_dtype", name, ["auto", *known])
        return Precision(name)
    if torch.device(device).type == "cuda":
        return Precision.bfloat16 if torch.cuda.is_bf16_supported() else Precision.float32
    return Precision.bfloat16 if _cpu_multiplies_bfloat16() else Precision.float32


def _cpu_multiplies_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.9 does not say
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
