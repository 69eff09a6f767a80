"""Whatever the cache, the compiler and the user's account are like, kernels are built or done without; never a crash.

Compilers here are shell scripts that copy a library with the right names but no contents, and count their calls.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import sae.kernels
from sae.errors import UserError
from sae.kernels import build, pick
from sae.kernels.operands import ByLatent, Index, Precision, Projection

CC = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
needs_cc = pytest.mark.skipif(CC is None, reason="no C compiler on this machine")
needs_cpp = pytest.mark.skipif(build.library().handle is None, reason="no C++ kernels on this machine")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A library that has every name."""
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "all.c").write_text("".join(f"void {name}(void) {{}}\n" for name in build.exported_names()))
    subprocess.run([CC, "-shared", "-fPIC", folder / "all.c", "-o", folder / "all.so"], check=True)
    return folder / "all.so"


class Compiler:
    """A script that stands for a compiler."""

    def __init__(self, folder, body):
        self.script, self.log = folder / "compiler", folder / "calls"
        self.script.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit; fi\n{body}')
        self.script.chmod(0o755)

    @classmethod
    def copying(cls, folder, library):
        """One that writes `library` to where -o says."""
        script = f'echo "$@" >> "{folder}/calls"\nfor word; do out=$word; done\ncp "{library}" "$out"\n'
        return cls(folder, script)

    @property
    def calls(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if not line.endswith("--version")]


@pytest.fixture
def compiler(tmp_path, stand_in, monkeypatch):
    found = Compiler.copying(tmp_path, stand_in)
    monkeypatch.setenv("CXX", str(found.script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def load():
    """What a new process would get."""
    return build.library.__wrapped__()


def stored():
    (path,) = build.cache_folder().glob("*.so")
    return path


def test_names_that_must_be_exported():
    names = build.exported_names()
    assert {"topk_float", "topk_bfloat16", "list_above_float", "by_latent", "decode_grads", "adam"} <= set(names)
    called = re.findall(r'_call\(\s*"(\w+)"', Path(build.__file__).with_name("cpp.py").read_text())
    assert set(called) <= set(names)


@needs_cc
def test_compiled_once_and_kept_with_its_digest(compiler):
    assert load().handle is not None
    assert load().reason == ""
    assert len(compiler.calls) == 1
    path = stored()
    assert sorted(item.name for item in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]
    assert path.parent.stat().st_mode & 0o777 == 0o700


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_the_digest(path):
    path.with_name(f"{path.name}.sha256").unlink()


def damage_the_digest(path):
    path.with_name(f"{path.name}.sha256").write_bytes(b"\xff")


def put_a_link(path):
    path.rename(path.with_suffix(".other"))
    path.symlink_to(path.with_suffix(".other"))


def put_text_with_its_digest(path):
    path.write_bytes(b"not a library")
    path.with_name(f"{path.name}.sha256").write_bytes(build._digest(b"not a library"))


@needs_cc
@pytest.mark.parametrize(
    "damage", [truncate, flip_a_byte, lose_the_digest, damage_the_digest, put_a_link, put_text_with_its_digest]
)
def test_a_damaged_library_is_compiled_again(compiler, stand_in, damage):
    load()
    damage(stored())
    assert load().handle is not None
    assert len(compiler.calls) == 2
    assert stored().read_bytes() == stand_in.read_bytes()
    assert not stored().is_symlink()
    load()
    assert len(compiler.calls) == 2


@needs_cpp
def test_a_truncated_library_does_not_kill_the_process(tmp_path):
    """The real one: the loader maps what is not there, and the process would die of SIGBUS."""
    code = "from sae.kernels import pick; print(pick('cpu').name)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "cpp"
        (path,) = tmp_path.rglob("*.so")
        os.truncate(path, 5000)


@needs_cc
def test_a_library_without_all_names_is_not_used(compiler, tmp_path):
    (tmp_path / "one.c").write_text("void topk_float(void) {}\n")
    subprocess.run([CC, "-shared", "-fPIC", tmp_path / "one.c", "-o", tmp_path / "one.so"], check=True)
    load()
    content = (tmp_path / "one.so").read_bytes()
    stored().write_bytes(content)
    stored().with_name(f"{stored().name}.sha256").write_bytes(build._digest(content))
    assert load().handle is not None
    assert len(compiler.calls) == 2
    Compiler.copying(tmp_path, tmp_path / "one.so")
    stored().unlink()
    found = load()
    assert found.handle is None
    assert "lacks topk_bfloat16" in found.reason


@needs_cc
def test_a_cache_that_cannot_be_written(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    assert load().handle is not None
    assert len(compiler.calls) == 1
    assert not list(tmp_path.glob("sae-kernels-*"))


@needs_cc
def test_a_full_disk_costs_only_the_cache(compiler, monkeypatch):
    def fail(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(build.os, "fsync", fail)
    assert load().handle is not None
    assert not list(build.cache_folder().iterdir())


@needs_cc
def test_without_a_home(compiler, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", fail)
    assert build.cache_folder() is None
    assert load().handle is not None


@needs_cc
def test_what_another_user_owns_is_not_trusted(compiler, monkeypatch):
    load()
    before = stored().read_bytes()
    loaded = []
    real = ctypes.CDLL
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: loaded.append(path) or real(path))
    monkeypatch.setattr(build.os, "geteuid", lambda: os.getuid() + 1)
    assert load().handle is not None
    assert len(compiler.calls) == 2
    assert str(stored()) not in loaded
    assert stored().read_bytes() == before


@needs_cc
def test_a_folder_that_all_may_write_is_not_trusted(compiler):
    load()
    build.cache_folder().chmod(0o777)
    assert load().handle is not None
    assert len(compiler.calls) == 2


@needs_cc
def test_a_library_of_another_user_in_a_folder_of_ours(compiler, monkeypatch):
    load()
    folder = build.cache_folder().stat().st_ino
    monkeypatch.setattr(build, "_is_mine", lambda found: found.st_ino == folder)
    assert load().handle is not None
    assert len(compiler.calls) == 2


@needs_cc
def test_leftovers_are_removed_after_a_day(compiler):
    load()
    cache = build.cache_folder()
    for name, age in (("tmpold", 2), ("tmpnew", 0.5), ("other", 2)):
        (cache / name).mkdir()
        (cache / name / "part.so").write_text("")
        then = time.time() - age * 24 * 3600
        os.utime(cache / name, (then, then))
    load()
    assert not (cache / "tmpold").exists()
    assert (cache / "tmpnew").exists()
    assert (cache / "other").exists()


@needs_cc
def test_arguments_of_the_compiler(compiler, tmp_path, monkeypatch):
    blank = tmp_path / "with blank"
    blank.mkdir()
    shutil.copy(compiler.script, blank / "c++")
    monkeypatch.setenv("CXX", f"{compiler.script} -O2 '-DX=a b'")
    # --version comes after the arguments, so the script would take that call for a compilation.
    monkeypatch.setattr(build, "_key", lambda command: "key")
    assert load().handle is not None
    assert compiler.calls[0].startswith("-O2 -DX=a b -std=c++17")
    monkeypatch.setenv("CXX", f"{blank}/c++")
    assert build._compiler() == [f"{blank}/c++"]
    monkeypatch.setenv("CXX", " ")
    assert len(build._compiler()) == 1


@pytest.mark.parametrize(
    ("command", "reason"), [("'g++", 'CXX="\'g++" is not a command'), ("no-such-compiler -O2", "names none")]
)
def test_commands_that_cannot_be(command, reason, monkeypatch):
    monkeypatch.setenv("CXX", command)
    found = load()
    assert found.handle is None
    assert reason in found.reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("printf 'erreur: caract\\350re\\n' >&2; exit 1", "failed: erreur: caract\ufffdre"),
        ("exit 3", "exit status 3"),
        ("exit 0", "cannot be used"),
        ("exec sleep 20", "did not finish within 1 s"),
    ],
)
def test_compilers_that_fail(tmp_path, monkeypatch, body, reason):
    monkeypatch.setattr(build, "TIMEOUT_SECONDS", 1)
    monkeypatch.setenv("CXX", str(Compiler(tmp_path, body).script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = load()
    assert found.handle is None
    assert reason in found.reason
    assert not list((tmp_path / "cache" / "sae").iterdir())


def test_pick_says_once_that_it_falls_back(monkeypatch):
    monkeypatch.setattr(sae.kernels, "library", lambda: build.Library(None, "no compiler here"))
    sae.kernels._warn_of_torch.cache_clear()
    with pytest.warns(UserWarning, match=r"no compiler here.*train\.kernels=torch"):
        assert pick("cpu").name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick("cpu").name == "torch"
        assert pick("cpu", "torch").name == "torch"
        with pytest.raises(UserError, match="no compiler here"):
            pick("cpu", "cpp")
    sae.kernels._warn_of_torch.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true"])
def test_without_a_working_compiler_torch_takes_over(compiler, tmp_path):
    """`false` is a compiler that fails, `true` one that writes nothing; none leaves a file behind."""
    code = (
        "from sae.kernels import pick, build; from sae.errors import UserError\n"
        "print(pick('cpu').name, build.library().reason)\n"
        "try: pick('cpu', 'cpp')\n"
        "except UserError as error: print(error)"
    )
    environment = {**os.environ, "CXX": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    assert first.startswith("torch ")
    assert "use train.kernels=auto" in second
    assert "UserWarning" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


# What the compiled kernels refuse

BATCH, D_IN, D_SAE = 3, 8, 20


def projection(**changes):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(D_SAE, D_IN, generator=generator)
    given = Projection(torch.randn(BATCH, D_IN, generator=generator), rows.t(), torch.zeros(D_SAE))
    return given._replace(**changes)


def index(dtype=torch.int64, cols=(1, 2, 3)):
    found = Index(torch.arange(BATCH), torch.arange(BATCH), BATCH, D_SAE)
    found.rows, found.cols = found.rows.to(dtype), torch.tensor(cols, dtype=dtype)
    return found


@needs_cpp
@pytest.mark.parametrize("precision", list(Precision))
def test_one_threshold_in_a_vector(precision):
    kernels, given = pick("cpu", "cpp"), projection(precision=precision)
    expected = kernels.above(given, torch.tensor(0.5))
    for shape in ((1,), (1, 1)):
        found = kernels.above(given, torch.full(shape, 0.5))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for wrong in (torch.zeros(2), torch.zeros(D_SAE - 1), torch.zeros(0)):
        with pytest.raises(AssertionError):
            kernels.above(given, wrong)


@needs_cpp
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("k", [-1, 0, D_SAE + 1])
def test_k_out_of_range(precision, k):
    with pytest.raises(AssertionError):
        pick("cpu", "cpp").topk(projection(precision=precision), k)


@needs_cpp
@pytest.mark.parametrize("bias", [torch.zeros(D_SAE, dtype=torch.float64), torch.zeros(D_SAE - 1)])
def test_a_bias_of_another_type_or_size(bias):
    kernels, given = pick("cpu", "cpp"), projection(b_enc=bias)
    with pytest.raises(AssertionError, match="needed"):
        kernels.topk(given, 2)
    with pytest.raises(AssertionError, match="needed"):
        kernels.above(given, torch.tensor(0.0))


@needs_cpp
@pytest.mark.parametrize("wrong", [index(torch.int32), index(torch.float64), index(cols=(1, 2))])
def test_an_index_of_another_type_or_size(wrong):
    kernels, right = pick("cpu", "cpp"), index()
    groups = kernels.by_latent(right)
    acts, vectors, w_dec = torch.ones(BATCH), torch.ones(BATCH, D_IN), torch.ones(D_SAE, D_IN)
    with pytest.raises(AssertionError, match="needed"):
        kernels.by_latent(wrong)
    with pytest.raises(AssertionError, match="needed"):
        kernels.decode(acts, wrong, w_dec, torch.zeros(D_IN))
    wrong_groups = ByLatent(wrong.cols, groups.tokens, groups.starts)
    with pytest.raises(AssertionError, match="needed"):
        kernels.decode_grads(vectors, acts, right, wrong_groups, w_dec)
    with pytest.raises(AssertionError, match="needed"):
        kernels.encode_grad(acts, right, wrong_groups, vectors)


@needs_cpp
def test_numbers_of_another_type_or_size():
    kernels, given = pick("cpu", "cpp"), index()
    groups = kernels.by_latent(given)
    acts, vectors, w_dec = torch.ones(BATCH), torch.ones(BATCH, D_IN), torch.ones(D_SAE, D_IN)
    for bad in (acts.double(), acts.bfloat16(), torch.ones(BATCH - 1)):
        with pytest.raises(AssertionError, match="needed"):
            kernels.decode(bad, given, w_dec, torch.zeros(D_IN))
        with pytest.raises(AssertionError, match="needed"):
            kernels.decode_grads(vectors, bad, given, groups, w_dec)
        with pytest.raises(AssertionError, match="needed"):
            kernels.encode_grad(bad, given, groups, vectors)
    with pytest.raises(AssertionError, match="needed"):
        kernels.decode(acts, given, w_dec[:-1], torch.zeros(D_IN))
    with pytest.raises(AssertionError, match="needed"):
        kernels.row_norms(vectors, vectors[:-1])
    with pytest.raises(AssertionError, match="not among"):
        kernels._call("row_norms", vectors.bfloat16(), None, *vectors.shape, None, acts)
