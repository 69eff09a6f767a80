"""`sae bench` as a user runs it, on toy sizes."""

import json
from pathlib import Path

import pytest

from sae.bench import learning, rates
from sae.bench.options import PEERS, BenchOptions
from sae.bench.process import OUR_DEFAULT, workers
from sae.cli import main
from sae.report.progress import Progress
from sae.train.optim import default_lr

ROOT = Path(__file__).resolve().parents[3]
SHORT = ["name=b", "bench.quick=true", "bench.repeats=1", "bench.turn_steps=1", "bench.warmup_steps=1"]
FIELDS = {
    "suite", "architecture", "d_in", "d_sae", "k", "batch_tokens", "peer", "peer_version", "ours_ms", "peer_ms",
    "ratio", "fvu_ours", "fvu_peer", "l0_ours", "l0_peer", "dtype", "ours_dtype", "ours_kernels", "threads",
    "n_steps", "options", "ours_ms_low", "ours_ms_high", "peer_ms_low", "peer_ms_high",
}  # fmt: skip


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run `sae bench ...` in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        try:
            main(["bench", *SHORT, *overrides])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def test_suite_train_beside_the_reference(bench, tmp_path):
    status, out, err = bench("suite=train", "bench.peers=[reference]", "bench.docs=true")
    assert status == 0, err
    folder = tmp_path / "runs" / "b" / "bench"
    result = json.loads((folder / "result.json").read_text())
    assert result["schema_version"] == 1
    assert {"cpu", "cores", "has_amx", "has_avx512_bf16", "torch"} <= result["machine"].keys()
    assert len(result["rows"]) == 5
    for row in result["rows"]:
        assert row.keys() >= FIELDS
        assert row["peer"] == "reference"
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
        assert row["fvu_ours"] == pytest.approx(row["fvu_peer"], rel=0.05)
        assert (row["n_steps"], row["dtype"]) == (2, "float32")
    assert not (folder / "data").exists()
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page.count("reference") >= 5
    assert "Toy sizes" in page
    assert "sae bench suite=train name=b bench.peers=[reference] bench.repeats=1" in page
    assert "architecture" in out
    kept = json.loads((tmp_path / "runs" / "b" / "recipe.json").read_text())["overrides"]
    assert kept == ["name=b"], "sizes of one measurement are not those of the next"


def test_suite_quality_beside_the_reference_and_the_controls(bench, tmp_path):
    status, out, err = bench("suite=quality", "bench.peers=[reference]", "bench.docs=true")
    assert status == 0, err
    rows = json.loads((tmp_path / "runs" / "b" / "bench" / "result.json").read_text())["rows"]
    assert len(rows) == 3 * 3
    assert {row["peer"] for row in rows} == {"reference", "control: frozen_decoder", "control: random"}
    for row in rows:
        assert row["fvu_low_ours"] <= row["fvu_ours"] <= row["fvu_high_ours"]
        both = len(row["fvu_by_seed_peer"])
        assert row["ratio"] == pytest.approx(row["fvu_peer"] * both / sum(row["fvu_by_seed_ours"][:both]))
        assert row["n_seeds"] == 3
        if row["peer"] == "reference":
            assert row["ratio"] == pytest.approx(1, abs=0.05)
    of_topk = {row["peer"]: row["fvu_peer"] for row in rows if row["architecture"] == "topk"}
    assert of_topk["reference"] < of_topk["control: random"]
    assert "control: random" in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "fvu_ours" in out


def test_suite_rates_stands_multiples_beside_the_rate_that_training_takes(bench, tmp_path):
    status, out, err = bench("suite=rates", "bench.peers=[]", "bench.seeds=1", "bench.docs=true")
    assert status == 0, err
    folder = tmp_path / "runs" / "b" / "bench"
    rows = json.loads((folder / "result.json").read_text())["rows"]
    found = {(row["architecture"], row["n_steps"], row["multiple"]): row for row in rows}
    architectures, lengths = learning.ARCHITECTURES, (5, 20)
    assert list(found) == [(a, n, m) for a in architectures for n in lengths for m in rates.MULTIPLES]
    assert len(rows) == len(found) == 3 * 2 * 5
    for (architecture, n_steps, multiple), row in found.items():
        assert row["lr"] == pytest.approx(multiple * default_lr(row["d_in"], row["d_sae"], n_steps))
        assert row["ratio"] == pytest.approx(row["fvu"] / found[architecture, n_steps, 1]["fvu"])
    # So few steps at a quarter of the rate get nowhere near.
    assert all(found[architecture, 20, 0.25]["ratio"] > 1.1 for architecture in architectures)
    # What is called the default is what an SAE takes that is told no rate.
    options = BenchOptions(quick=True, seeds=1)
    task = next(learning.tasks("rates", tmp_path / "data", options))
    with workers([OUR_DEFAULT], options) as alive, Progress(20, "test") as bar:
        plain = learning.learn(alive[OUR_DEFAULT], OUR_DEFAULT, task, options, n_steps=20, lr=None, seed=0, bar=bar)
    row = found["topk", 20, 1]
    assert (row["fvu"], row["l0"]) == pytest.approx((plain.fvu, plain.l0), rel=1e-6)
    assert not (folder / "data").exists()
    assert "sae bench suite=rates name=b" in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "multiple" in out


def test_without_peers_or_a_gpu_it_says_so(bench, tmp_path):
    status, _, err = bench("suite=train")
    assert status == 2
    assert "make peers" in err
    assert "bench.peers=[]" in err
    status, _, err = bench("suite=everything")
    assert status == 2
    assert "train, quality, rates, grid, harvest, store, memory, density, profile, cuda, all" in err
    import torch

    if not torch.cuda.is_available():
        status, out, _ = bench("suite=cuda")
        assert status == 0
        assert "no CUDA device" in out
        assert json.loads((tmp_path / "runs" / "b" / "bench" / "result.json").read_text())["rows"] == []


@pytest.mark.skipif(not (ROOT / ".venv-peers" / "installed").is_file(), reason="`make peers` was not run")
def test_suite_train_beside_every_peer(bench, tmp_path):
    status, _, err = bench("suite=train", f"bench.peers_env={ROOT / '.venv-peers'}")
    assert status == 0, err
    rows = json.loads((tmp_path / "runs" / "b" / "bench" / "result.json").read_text())["rows"]
    assert {row["peer"] for row in rows} == set(PEERS)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16-autocast"}
    # What selects by number must come out at that number for everybody.
    for row in rows:
        if row["architecture"] in ("topk", "batch_topk"):
            assert row["l0_peer"] == pytest.approx(row["l0_ours"], rel=0.01)
