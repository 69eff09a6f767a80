"""What a timing depends on besides the code."""

import os
import platform
from pathlib import Path
from typing import Any

from sae.files import git_revision, versions


def describe(threads: int) -> dict[str, Any]:
    """The machine, the libraries and the threads, as plain JSON.

    Args:
        threads: torch threads of every process.
    """
    import torch

    model, flags = _cpu()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "has_amx": "amx_tile" in flags,
        "has_avx512_bf16": "avx512_bf16" in flags,
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "system": platform.platform(),
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "git_revision": git_revision(),
        "versions": versions(),
    }


def _cpu() -> tuple[str, set[str]]:
    """Name and feature flags of the processor, where Linux tells."""
    path = Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found.get("model name") or platform.processor() or platform.machine(), set(found.get("flags", "").split())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
