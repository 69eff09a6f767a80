"""The page of figures."""

import json

import pytest

from sae.bench import document

MACHINE = {
    "cpu": "A | Processor", "cores": 2, "has_amx": False, "has_avx512_bf16": True, "gpus": [], "torch": "2.13.0",
    "threads": 2, "git_revision": "0123456789abcdef",
}  # fmt: skip
ROW = {
    "architecture": "topk", "d_in": 512, "d_sae": 8192, "k": 32, "batch_tokens": 2048, "peer": "sae-lens",
    "peer_version": "6.54.12", "ours_ms": 51.234, "peer_ms": 512.34, "ratio": 10.0, "ours_ms_low": 50.1,
    "ours_ms_high": 55.61, "peer_ms_low": 500.0, "peer_ms_high": 612.0, "fvu_ours": 0.5, "fvu_peer": 0.6,
    "l0_ours": 32.0, "l0_peer": 32.0, "dtype": "float32", "ours_dtype": "bfloat16", "ours_kernels": "cpp",
    "n_steps": 55, "options": "its options", "ours_options": "our options",
}  # fmt: skip
CUDA_ROW = {
    "architecture": "topk", "d_in": 2304, "d_sae": 65536, "k": 64, "batch_tokens": 4096, "peer": "ours",
    "peer_version": "0.1", "dtype": "bfloat16", "kernels": "triton", "ms": 4.0, "mtok_s": 1.024, "mfu": 0.4,
    "dense_mfu": 2.4, "peak_gib": 8.0, "ratio": 1.0,
}  # fmt: skip


def record(suite, rows):
    command = f"sae bench suite={suite} name=bench"
    return {"schema_version": 1, "suite": suite, "command": command, "date": "2030-01-02", "machine": MACHINE,
            "options": {"quick": False}, "rows": rows}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()

    def save(suite, rows):
        (folder / f"{suite}.json").write_text(json.dumps(record(suite, rows)))

    save("train", [ROW])
    save("cuda", [])
    return folder, save


def test_the_page_has_the_figures_and_where_they_come_from(results, tmp_path):
    folder, _ = results
    page = document.write(folder, tmp_path / "docs").read_text()
    for part in (
        "## train\n",
        "    sae bench suite=train name=bench\n",
        "51.2 [50.1, 55.6]",
        "512 [500, 612]",
        "| 10.00 |",
        "sae-lens 6.54.12, float32",
        "bfloat16, cpp",
        "AVX-512 bf16",
        "revision 01234567; 2030-01-02",
        "- ours, topk: our options",
        "- sae-lens (float32), topk: its options",
    ):
        assert part in page, part
    assert "## quality" not in page
    cuda = page.split("## cuda")[1]
    assert cuda.count("not yet measured") == 6
    assert "2304 → 65,536, k 64, batch 16,384" in cuda
    table = [line for line in page.split("## cuda")[0].splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


def test_a_rate_is_shown_as_a_multiple_with_the_spread_of_its_fvu(results, tmp_path):
    folder, save = results
    row = {key: ROW[key] for key in ("architecture", "d_in", "d_sae", "k", "batch_tokens")} | {
        "data": "organism", "n_steps": 500, "multiple": 0.25, "lr": 0.001, "fvu": 0.5, "fvu_low": 0.4, "fvu_high": 0.75,
        "ratio": 1.25, "l0": 16.0, "dead": 0.1,
    }  # fmt: skip
    save("rates", [row])
    page = document.write(folder, tmp_path / "docs").read_text()
    assert "| 500 | 1/4 | 0.001 | 0.5000 [0.4000, 0.7500] | 1.250 | 16 | 0.1 |" in page
    assert "Whether the default learning rate is near the best" in page


def test_figures_of_another_machine_stay_until_there_are_new_ones(results, tmp_path):
    folder, save = results
    save("cuda", [CUDA_ROW])
    document.write(folder, tmp_path / "docs")
    save("cuda", [])
    page = document.write(folder, tmp_path / "docs").read_text()
    assert "not yet measured" not in page
    assert "triton" in page
    kept = json.loads((tmp_path / "docs" / "benchmarks.json").read_text())["suites"]
    assert kept["cuda"]["rows"] == [CUDA_ROW]
    assert kept["train"]["rows"] == [ROW]
    save("cuda", [{**CUDA_ROW, "kernels": "other"}])
    assert "other" in document.write(folder, tmp_path / "docs").read_text()
