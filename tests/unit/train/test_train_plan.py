"""What training will take: the estimate is checked against the measured peak of a process that trains."""

import json
import subprocess
import sys

import pytest

from sae.config import TRAIN_NAMES
from sae.device import _container_free, free_memory
from sae.errors import UserError
from sae.kernels import NAMES as KERNELS
from sae.kernels.moments import KINDS as MOMENTS
from sae.kernels.operands import Precision
from sae.train.grid import SAESpec
from sae.train.plan import check_memory, plan
from sae.train.settings import CENTRES, ENCODER_DTYPES, TrainSettings

MEASURE = """
import json, sys, tempfile
import torch
from sae.device import resident_memory
from sae.kernels import pick, pick_precision
from sae.train.grid import SAESpec
from sae.train.plan import plan
from sae.train.settings import TrainSettings
from sae.train.trainer import train

torch.set_num_threads(1)
architecture, d_in, d_sae, batch, kernels, moments = json.loads(sys.argv[1])

class Batch:
    acts = {"h": torch.randn(batch, d_in)}

class Stream:
    d_in, batch_tokens = {"h": d_in}, batch
    def next_batch(self): return Batch()
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

settings = TrainSettings(total_tokens=4 * batch, batch_tokens=batch, kernels=kernels, moments=moments, init_batches=1)
specs = [SAESpec("h", architecture, d_sae, 32, seed) for seed in range(2)]
stream = Stream()
torch.mm(torch.ones(64, 64).bfloat16(), torch.ones(64, 64).bfloat16())
before = resident_memory()
found = plan(specs, {"h": d_in}, settings, pick("cpu", kernels).name, pick_precision("cpu"))
with tempfile.TemporaryDirectory() as folder:
    train(stream, specs, settings, folder, lm_name="toy")
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([before + found.memory, peak]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "case",
    [
        ("topk", 512, 16384, 1024, "auto", "float32"),
        ("topk", 512, 16384, 1024, "auto", "float8"),
        ("batch_topk", 256, 16384, 1024, "torch", "float32"),
        ("jumprelu", 512, 16384, 1024, "auto", "float32"),
        ("relu", 256, 4096, 4096, "torch", "float32"),
        ("topk", 256, 8192, 1024, "reference", "float32"),
        ("topk", 512, 16384, 1024, "torch", "float8"),
    ],
)
def test_estimate_is_within_15_percent_of_the_peak(case):
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(case)], capture_output=True, text=True, check=True)
    estimate, peak = json.loads(done.stdout)
    assert estimate == pytest.approx(peak, rel=0.15)


def planned(**changes):
    settings = TrainSettings(total_tokens=10**7, batch_tokens=changes.pop("batch_tokens", 1024), **changes)
    return plan([SAESpec("h", "topk", 2**15, 32, 0)], {"h": 1024}, settings, "torch", Precision.float32)


def test_weights_moments_and_gradients_are_counted_exactly():
    n_parameters = 2 * 2**15 * 1024
    found = planned()
    assert (found.weights, found.moments, found.gradients) == (4 * n_parameters, 8 * n_parameters, 4 * n_parameters)
    assert planned(moments="float8").moments == 2 * n_parameters
    assert found.disk >= 2 * (found.weights + found.moments)


def test_what_cannot_fit_is_refused_with_what_would_help():
    found = planned()
    check_memory(found, found.memory, "this machine")
    with pytest.raises(UserError, match=r"train.moments=float8"):
        check_memory(found, found.memory - found.moments // 2, "this machine")
    with pytest.raises(UserError, match=r"fewer or narrower"):
        check_memory(found, found.memory // 10, "this machine")
    wide = planned(batch_tokens=2**20, moments="float8")
    with pytest.raises(UserError, match=r"train.batch_tokens"):
        check_memory(wide, wide.memory - wide.batch // 2, "this machine")


def test_configuration_and_settings_know_the_same_names():
    assert TRAIN_NAMES == {"encoder_dtype": ENCODER_DTYPES, "moments": MOMENTS, "kernels": KERNELS, "centre": CENTRES}


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_sees_the_containers_limit_and_not_the_file_cache(tmp_path, version):
    gigabyte = 2**30
    old = version == 1
    (tmp_path / "cgroup").write_text("7:memory:/job/1\n3:cpu:/job\n" if old else "0::/job/1\n")
    top = tmp_path / "fs" / ("memory" if old else "")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    for folder, limit, used, cached in (("job", 8, 5, 4), ("job/1", None, 3, 0)):
        (top / folder).mkdir(parents=True, exist_ok=True)
        (top / folder / names[0]).write_text("max" if limit is None else str(limit * gigabyte))
        (top / folder / names[1]).write_text(str(used * gigabyte))
        (top / folder / "memory.stat").write_text(
            f"anon 1\nfile {cached * gigabyte}\ntotal_cache {cached * gigabyte}\n"
        )
    assert _container_free(tmp_path / "cgroup", tmp_path / "fs") == [7 * gigabyte]
    assert _container_free(tmp_path / "missing", tmp_path / "fs") == []
    assert free_memory("cpu") > 0
