"""Compile kernels.cpp once for this machine and keep the library in the user's cache.

There is nothing to install: where there is no C++ compiler, or it fails, `library()` says why and returns None, and
the pure-torch kernels are used. A cached library is loaded only if it is this user's and still has the digest that was
noted when it was stored: a truncated one would not raise, it would kill the process. Where the cache cannot be used,
the library is compiled again in each process.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")
TIMEOUT_SECONDS = 120
LEFTOVER_SECONDS = 24 * 3600
"""Temporary files in the cache that are older than this belong to a process that was killed."""


class Library(NamedTuple):
    """The compiled kernels, or why there are none."""

    handle: ctypes.CDLL | None
    reason: str
    """Empty when there is a library."""


@functools.cache
def library() -> Library:
    """Load the compiled kernels, compiling them first (about 2 s) where they are not in the cache."""
    try:
        compiler = _compiler()
        name = f"kernels-{_key(compiler)}.so"
        cache = _trusted(cache_folder())
        if cache is not None:
            _remove_leftovers(cache)
            if _is_intact(cache / name):
                try:
                    return Library(_load(cache / name), "")
                except OSError:
                    pass  # built for a system that has changed since: compile it again
        return Library(_build(compiler, name, cache), "")
    except _NoCompiler as error:
        return Library(None, str(error))
    except subprocess.TimeoutExpired as error:
        return Library(None, f"{shlex.join(compiler)} did not finish within {error.timeout:.0f} s")
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        return Library(None, f"{shlex.join(compiler)} failed: {lines[-1] if lines else error}")
    except OSError as error:
        return Library(None, f"the compiled kernels cannot be used: {error}")


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/sae`, by default `~/.cache/sae`; None if there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "sae"
    except RuntimeError:  # neither $HOME nor an entry in the list of users, as in some containers
        return None


def exported_names() -> list[str]:
    """The functions that a library compiled from the source must have."""
    _, _, interface = SOURCE.read_text(encoding="utf-8").partition('extern "C" {')
    return re.findall(r"^\w+ (\w+)\(", interface, re.MULTILINE)


class _NoCompiler(Exception):
    """There is nothing to compile with; the message says why."""


def _compiler() -> list[str]:
    """The command that compiles, arguments that came with it in CXX included."""
    named = os.environ.get("CXX", "").strip()
    if not named:
        found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
        if found is None:
            raise _NoCompiler("no C++ compiler was found (install g++, or set CXX)")
        return [found]
    try:
        # A path with a blank in it is one word if there is such a program.
        words = [named] if shutil.which(named) else shlex.split(named)
    except ValueError as error:
        raise _NoCompiler(f"CXX={named!r} is not a command: {error}") from None
    program = shutil.which(words[0]) if words else None
    if program is None:
        raise _NoCompiler(f"no C++ compiler was found: CXX={named!r} names none (install g++, or correct CXX)")
    return [program, *words[1:]]


def _run(command: list[str], timeout: float) -> str:
    # What compilers print follows the user's locale, or none: it is shown, never parsed, so any bytes will do.
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=True,
        timeout=timeout,
    )
    return done.stdout


def _key(compiler: list[str]) -> str:
    """All that the machine code depends on: source, flags, compiler, and what this processor can do."""
    version = _run([*compiler, "--version"], timeout=30)
    source = SOURCE.read_text(encoding="utf-8")
    parts = [source, *FLAGS, *compiler, version, platform.machine(), _processor()]
    # Paths that are not UTF-8 reach Python as surrogates.
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    kept = ("flags", "Features", "cpu family", "model\t")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))


def _build(compiler: list[str], name: str, cache: Path | None) -> ctypes.CDLL:
    """Compile in a folder that only this user can enter, store the library if there is a cache, and load it."""
    # Removed in the end: a loaded library stays loaded without its file. (Where it does not, on Windows, it is left.)
    with tempfile.TemporaryDirectory(prefix="sae-kernels-", ignore_cleanup_errors=True) as folder:
        built = Path(folder) / name
        _run([*compiler, *FLAGS, str(SOURCE), "-o", str(built)], timeout=TIMEOUT_SECONDS)
        stored = cache is not None and _store(built, cache / name)
        try:
            # Not the stored one, if it can be helped: the loader, asked for a path for the second time, gives the
            # library that it loaded from there before.
            return _load(built)
        except OSError:
            if cache is None or not stored:
                raise
            return _load(cache / name)  # programs may not be run from the temporary folder


def _load(path: Path) -> ctypes.CDLL:
    handle = ctypes.CDLL(str(path.absolute()))
    missing = [name for name in exported_names() if not hasattr(handle, name)]
    if missing:
        raise OSError(f"{path.name} lacks {', '.join(missing)}")
    return handle


def _trusted(folder: Path | None) -> Path | None:
    """The cache folder, made if need be; None where somebody else could have put a library there."""
    if folder is None:
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    return folder if _is_mine(found) and not found.st_mode & stat.S_IWOTH else None


def _is_mine(found: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or found.st_uid == os.geteuid()


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _is_intact(path: Path) -> bool:
    """Whether a stored library is this user's, and what was stored."""
    try:
        for part in (path, _digest_path(path)):
            found = part.lstat()
            if not stat.S_ISREG(found.st_mode) or not _is_mine(found):
                return False
        return _digest_path(path).read_bytes() == _digest(path.read_bytes())
    except OSError:
        return False


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _store(built: Path, path: Path) -> bool:
    """Keep a library and its digest for the next process; False if the cache cannot be written."""
    try:
        content = built.read_bytes()
        # Other processes may do the same now. Should their bytes differ and the digest be of theirs, the library is
        # compiled once more.
        _write(path, content)
        _write(_digest_path(path), _digest(content))
    except OSError:
        return False
    return True


def _write(path: Path, content: bytes) -> None:
    """Replace a file by one that is complete on the disk."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _remove_leftovers(cache: Path) -> None:
    """Remove what killed processes have left in the cache."""
    oldest = time.time() - LEFTOVER_SECONDS
    for path in cache.glob(f"{tempfile.gettempprefix()}*"):
        try:
            found = path.lstat()
            if found.st_mtime > oldest or not _is_mine(found):
                continue
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        except OSError:
            continue  # another process was quicker, or the cache is read-only
