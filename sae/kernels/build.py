"""Compile kernels.cpp once for this machine and keep the library in the user's cache.

There is nothing to install: where there is no C++ compiler, or it fails, `library()` says why and returns None, and
the pure-torch kernels are used.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")
TIMEOUT_SECONDS = 120


class Library(NamedTuple):
    """The compiled kernels, or why there are none."""

    handle: ctypes.CDLL | None
    reason: str
    """Empty when there is a library."""


@functools.cache
def library() -> Library:
    """Load the compiled kernels, compiling them first (about 2 s) where they are not in the cache."""
    compiler = next((found for name in _candidates() if (found := shutil.which(name))), None)
    if compiler is None:
        return Library(None, "no C++ compiler was found (install g++, or set CXX)")
    try:
        path = cache_folder() / f"kernels-{_key(compiler)}.so"
        if not path.is_file():
            _compile(compiler, path)
        return Library(ctypes.CDLL(str(path)), "")
    except subprocess.SubprocessError as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Library(None, f"{compiler} failed: {detail[-1] if detail else error}")
    except OSError as error:
        return Library(None, f"the compiled kernels cannot be used: {error}")


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/sae`, by default `~/.cache/sae`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sae"


def _candidates() -> list[str]:
    named = os.environ.get("CXX")
    return [named] if named else list(COMPILERS)


def _key(compiler: str) -> str:
    """All that the machine code depends on: source, flags, compiler, and what this processor can do."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    parts = [SOURCE.read_text(), *FLAGS, compiler, version, platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = ("flags", "Features", "cpu family", "model\t")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS)
        built.replace(path)  # another process may have been quicker: the same bytes either way
