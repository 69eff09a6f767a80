"""The suites `harvest` and `store`: they run, and their figures are about what they say."""

import pytest

from sae.activations.layout import record_bytes
from sae.bench import harvest, store
from sae.bench.options import BenchOptions

OPTIONS = BenchOptions(peers=(), quick=True, repeats=1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    rows = store.run(folder, OPTIONS)
    assert list(folder.iterdir()) == [], "nothing is left behind"
    return rows


def value(rows, what, dtype, of=""):
    found = [row["value"] for row in rows if row["what"] == what and row["dtype"] == dtype and row["of"].startswith(of)]
    assert len(found) == 1, (what, dtype, of)
    return found[0]


def test_reading_is_measured_for_every_path(stored):
    reading = [row for row in stored if row["unit"] == "GB/s"]
    assert {row["dtype"] for row in reading} == {"bfloat16", "int8"}
    assert {"files", store.FIRST, store.LATER, f"{store.LATER}, prefetched"} <= {row["what"] for row in reading}
    assert all(row["low"] <= row["value"] <= row["high"] and row["value"] > 0 for row in reading)
    assert all(row["ratio"] == 1 for row in reading if row["what"] == store.FIRST)
    assert all(set(store.COLUMNS) <= set(row) for row in stored)


def test_sizes_are_the_formats(stored):
    for d_in in store.WIDTHS:
        for dtype in ("bfloat16", "int8"):
            expected = record_bytes({"x": d_in}, dtype)
            assert value(stored, "bytes a token, fields included", dtype, f"d_in {d_in}") == expected


def test_eight_bits_cost_next_to_nothing(stored):
    organism = "organism blocks.1"
    assert value(stored, "squared error / variance", "bfloat16", organism) < 1e-5
    assert 1e-5 < value(stored, "squared error / variance", "int8", organism) < 1e-4
    losses = {dtype: value(stored, "cross-entropy, spliced in", dtype) for dtype in ("exact", "bfloat16", "int8")}
    assert abs(losses["int8"] - losses["exact"]) < 1e-3
    for what in {row["what"] for row in stored if "FVU" in row["what"]}:
        ratio = value(stored, what, "int8") / value(stored, what, "bfloat16")
        assert 0.95 < ratio < 1.05


def test_harvest_paths_give_the_same_activations(tmp_path, monkeypatch):
    bare = harvest.Entry("bare truncated forward", "bare", "bfloat16")
    monkeypatch.setattr(harvest, "SHORT", [harvest.OURS, bare, harvest.REFERENCE])
    monkeypatch.setattr(harvest, "LONG", [])
    monkeypatch.setattr(harvest, "QUICK", harvest.QUICK._replace(turn_tokens=1024))
    rows = harvest.run(tmp_path, OPTIONS)
    assert list(tmp_path.iterdir()) == []
    assert [row["path"] for row in rows] == ["ours", "bare truncated forward", "bare truncated forward"]
    assert rows[2]["error"] == 0
    assert rows[0]["error"] == pytest.approx(rows[1]["error"], rel=0.3)
    assert all(row["tokens_per_s"] > 0 and row["error"] < 0.02 for row in rows)
    assert rows[0]["ratio"] == 1
    assert all(set(harvest.COLUMNS) <= set(row) for row in rows)
