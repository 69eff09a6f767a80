"""Compile, with no GPU, every kernel that a training step of the target size launches, for an H100 or H200.

The interpreter takes programs that the compiler refuses: this catches them. Run by `test_triton.py`.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from sae.kernels import triton as kernels
from sae.kernels.moments import KINDS, Moments
from sae.kernels.operands import ByLatent, Index, Precision, Projection
from sae.kernels.reference import AdamStep

TARGET = (4096, 2304, 65536, 64)
ODD = (5, 77, 1001, 3)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
compiled: dict[str, str] = {}


class Driver:
    """What the compiler asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, grid, *args, **options):
    result = kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)
    compiled[result.hash] = kernel.__name__
    if not CUOBJDUMP.exists():
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    # A few bytes are no harm; rows or tiles that spill are.
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack is not None, usage
    assert int(stack[1]) < 64, f"{kernel.__name__} {options} does not fit in registers: {usage}"


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_all(batch, d_in, d_sae, k):
    found = kernels.TritonKernels()
    whole = torch.int64
    for precision in (Precision.float32, Precision.bfloat16_rescored):
        projection = Projection(empty(batch, d_in), empty(d_sae, d_in).t(), empty(d_sae), precision)
        found.pre_acts(projection)
        found.topk(projection, k)
        # `above` asks for a number that a tensor without data does not have.
        products = empty(16, d_sae, dtype=precision.dtype)
        words = kernels._bits_above(products, empty(d_sae), empty(d_sae))
        counts = kernels._count_bits(words)
        kernels._list_above(products, empty(d_sae), words, counts, empty(counts.numel(), dtype=whole), 0, 10)
    n = batch * k
    index = Index.__new__(Index)
    index.rows, index.cols, index.row_starts = (empty(size, dtype=whole) for size in (n, n, batch + 1))
    index.batch, index.d_sae = batch, d_sae
    groups = ByLatent(empty(n, dtype=whole), empty(n, dtype=whole), empty(d_sae + 1, dtype=whole))
    found.decode(empty(n), index, empty(d_sae, d_in), empty(d_in))
    found.decode_grads(empty(batch, d_in), empty(n), index, groups, empty(d_sae, d_in))
    found.encode_grad(empty(n), index, groups, empty(batch, d_in))
    param = empty(d_sae, d_in)
    found.row_norms(param)
    found.row_norms(param, param)
    for kind in KINDS:
        for along in (None, empty(d_sae)):
            for beta1 in (0.9, 0.0) if kind == "float32" else (0.9,):
                step = AdamStep(1e-3, beta1, 0.999, 1e-8, 3, 7)
                found.adam(param, param, Moments.zeros(kind, param), step, empty(()), along)


triton.runtime.driver.set_active(Driver())
kernels._launch = compile_only
for shape in (TARGET, ODD):
    launch_all(*shape)
print(f"compiled {len(compiled)} variants of {len(set(compiled.values()))} kernels with triton {triton.__version__}")
sys.exit(0 if len(set(compiled.values())) >= 13 else 1)
