"""Which device to compute on, asked for by name, and how much memory it has."""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

from sae.errors import UserError, unknown

KNOWN = ["auto", "cpu", "cuda", "cuda:0"]


def pick_device(name: str) -> str:
    """Check a device's name; "auto" is CUDA if there is one, else the CPU.

    Raises:
        UserError: an unknown name, or a device this machine does not have. Apple's "mps" is refused: it has no
            float64, which the statistics are kept in.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, KNOWN) from None
    if device.type not in ("cpu", "cuda"):
        raise unknown("device", name, KNOWN)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} is not there ({torch.cuda.device_count()} CUDA devices found): use 'cpu' or 'auto'."
        )
    return name


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on a device; on the CPU within the container's limit, where there is one.

    What the system keeps of files it has read counts as free, since it gives that up when memory is wanted. On
    systems that do not say, half of the machine's memory.
    """
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([free, *_container_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _container_free(membership: Path, root: Path) -> list[int]:
    """Bytes left under each memory limit that holds for this process (cgroups of version 2 and 1)."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, name in lines:
        if controllers not in ("", "memory"):
            continue
        old = controllers == "memory"
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        top = root / "memory" if old else root
        folder = top / name.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(top):
                break
            try:
                limit, used = (int((place / file).read_text()) for file in files)
                cached = _statistic(place / "memory.stat", "total_cache" if old else "file")
            except (OSError, ValueError):  # not there, or "max": no limit at this level
                continue
            found.append(max(0, limit - used + cached))
    return found


def _statistic(path: Path, name: str) -> int:
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def resident_memory() -> int:
    """Bytes of memory this process holds now; 0 on systems that do not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc); elsewhere nothing.

    It keeps what lies between pieces still in use, which after many large tensors of different ages can be several
    times what is in use.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(ctypes.c_size_t(0))


@functools.cache
def _malloc_trim() -> Callable[[ctypes.c_size_t], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
