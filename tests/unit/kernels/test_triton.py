"""The Triton kernels without a GPU: interpreted against their definitions, and compiled for Hopper.

Whether Triton interprets is decided when it is imported, once for a process, and by others too (torch imports it):
both happen in processes of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "triton is not installed (it comes with CUDA builds of torch, and with sae[dev])", allow_module_level=True
    )


def run(*args, **variables):
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | variables
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


def test_equal_to_the_definitions_in_the_interpreter():
    cases = str(HERE / "triton_cases.py")
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1")
    assert " passed" in output


@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler for CUDA is built for Linux only")
def test_compile_for_hopper(tmp_path):
    variables = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    assert "compiled" in run(str(HERE / "triton_compile.py"), **variables)
