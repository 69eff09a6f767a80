"""The page of measured figures, docs/benchmarks.md, and the same as JSON: written from result files, never by hand."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from sae.bench import cuda, suites
from sae.files import read_json, write_json, write_text
from sae.report.terminal import DASH, format_cell, markdown_table

PAGE, DATA = "benchmarks.md", "benchmarks.json"
UNMEASURED = "not yet measured"
HEAD = """# Benchmarks

Written by `make bench` from the result files of its suites; the same figures, with every field, are in
[benchmarks.json](benchmarks.json). A time is the median of a step's wall time, in brackets the 10th and 90th
percentile. Times are comparable within a table, whose contestants ran in turns on one machine, and not between
machines.
"""


def write(results: Path, docs: Path) -> Path:
    """Write the page and its data.

    A suite that was not measured in `results` (CUDA, on a machine without a GPU) keeps the figures the page had before.

    Args:
        results: folder of one `<suite>.json` a suite.
        docs: folder of the page.

    Returns:
        The page's path.
    """
    found = collect(results, docs / DATA)
    write_json(docs / DATA, {"schema_version": 1, "suites": found})
    write_text(docs / PAGE, render(found))
    return docs / PAGE


def collect(results: Path, before: Path) -> dict[str, Any]:
    """The newest record of each suite that has rows."""
    old = read_json(before)["suites"] if before.is_file() else {}
    found = {}
    for name in suites.SUITES:
        path = results / f"{name}.json"
        new = read_json(path) if path.is_file() else None
        if new is not None and new["rows"]:
            found[name] = new
        elif name in old:
            found[name] = old[name]
    return found


def render(records: Mapping[str, Any]) -> str:
    """The page as Markdown.

    Args:
        records: by suite: `machine`, `command`, `options`, `date`, `rows`.
    """
    parts = [HEAD]
    for name in suites.SUITES:
        record = records.get(name)
        if record is None and name != "cuda":
            continue
        suite = suites.load(name)
        parts.append(f"## {name}\n")
        parts.append(f"{suites.SUITES[name] if suite is None else _explanation(name)}\n")
        if record is None:
            parts.append(_empty_cuda())
            continue
        parts.append(f"    {record['command']}\n")
        if record["options"]["quick"]:
            parts.append("**Toy sizes: these figures mean nothing.**\n")
        parts.append(f"{_machine(record)}\n")
        columns = suite.columns if suite is not None else list(record["rows"][0])
        show = _SHOWN.get(name)
        rows = [show(row) for row in record["rows"]] if show else record["rows"]
        parts.append(markdown_table(rows, list(rows[0]) if show else columns) + "\n")
        if name == "train":
            parts.append(_options(record["rows"]))
    return "\n".join(parts)


def _explanation(name: str) -> str:
    """A suite's docstring, without "Suite `name`: "."""
    text = inspect.getdoc(importlib.import_module(f"sae.bench.{name}")) or ""
    text = text.removeprefix(f"Suite `{name}`: ")
    return text[:1].upper() + text[1:]


def _machine(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    extras = [word for word, has in (("AMX", "has_amx"), ("AVX-512 bf16", "has_avx512_bf16")) if machine.get(has)]
    words = [
        f"{machine['cpu']} ({machine['cores']} cores{', ' + ', '.join(extras) if extras else ''})",
        *machine["gpus"],
        f"torch {machine['torch']}",
        f"{machine['threads']} threads",
        f"revision {str(machine['git_revision'] or 'unknown')[:8]}",
        record["date"],
    ]
    return "; ".join(words) + "."


def _times(row: Mapping[str, Any], who: str) -> str:
    """A median and its spread in one cell."""
    if row.get(f"{who}_ms") is None:
        return DASH
    median, low, high = (format_cell(float(f"{row[f'{who}_ms{end}']:.3g}")) for end in ("", "_low", "_high"))
    return f"{median} [{low}, {high}]"


def _size(row: Mapping[str, Any]) -> str:
    return f"{row['d_in']} → {row['d_sae']:,}, k {row['k']}, batch {row['batch_tokens']:,}"


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _train_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architecture": row["architecture"],
        "size": _size(row),
        "ours": f"{row['ours_dtype']}, {row['ours_kernels']}",
        "peer": f"{row['peer']} {row['peer_version']}, {row['dtype']}",
        "ours, ms": _times(row, "ours"),
        "peer, ms": _times(row, "peer"),
        "peer / ours": _ratio(row["ratio"]),
        "FVU ours": row["fvu_ours"],
        "FVU peer": row["fvu_peer"],
        "L0 ours": row["l0_ours"],
        "L0 peer": row["l0_peer"],
        "steps": row["n_steps"],
    }


def _fvu(row: Mapping[str, Any], who: str = "") -> str:
    """The mean over the seeds and its extremes in one cell."""
    mean, low, high = (f"{row[f'fvu{end}{who}']:.4f}" for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def _quality_row(row: Mapping[str, Any]) -> dict[str, Any]:
    rate = "default" if row["lr_peer"] is None else format_cell(row["lr_peer"])
    return {
        "data": row["data"],
        "architecture": row["architecture"],
        "size": _size(row),
        "peer": row["peer"] if row["peer"].startswith("control") else f"{row['peer']} {row['version_peer']}",
        "learning rate": rate,
        "FVU ours": _fvu(row, "_ours"),
        "FVU peer": _fvu(row, "_peer"),
        "peer / ours": f"{row['ratio']:.3f}",
        "L0 ours": row["l0_ours"],
        "L0 peer": row["l0_peer"],
        "dead ours": row["dead_ours"],
        "dead peer": row["dead_peer"],
    }


def _rates_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "data": row["data"],
        "architecture": row["architecture"],
        "size": _size(row),
        "steps": row["n_steps"],
        "times the default": str(Fraction(row["multiple"])),
        "learning rate": row["lr"],
        "FVU": _fvu(row),
        "FVU / default's": f"{row['ratio']:.3f}",
        "L0": row["l0"],
        "dead": row["dead"],
    }


def _cuda_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "size": _size(row),
        "": f"{row['peer']} {row['peer_version']}, {row['dtype']}, {row['kernels']}",
        "ms": row["ms"],
        "Mtok/s": row["mtok_s"],
        "MFU": row["mfu"],
        "dense MFU": row["dense_mfu"],
        "peak memory, GiB": row["peak_gib"],
        "ms / ours": _ratio(row["ratio"]),
    }


_SHOWN = {"train": _train_row, "quality": _quality_row, "rates": _rates_row, "cuda": _cuda_row}


def _empty_cuda() -> str:
    """The table that awaits a GPU."""
    blank = dict.fromkeys(("Mtok/s", "MFU", "peak memory, GiB"), UNMEASURED)
    rows = [{"size": _size(asdict(case)), **blank} for case in cuda.CASES]
    return markdown_table(rows, list(rows[0])) + "\n"


def _options(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was switched on, by contestant."""
    seen: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for who, key in (("ours", "ours_options"), (f"{row['peer']} ({row['dtype']})", "options")):
            seen.setdefault((who, row[key]), {})[row["architecture"]] = None
    lines = [f"- {who}, {', '.join(architectures)}: {options}" for (who, options), architectures in seen.items()]
    return "\n".join(["What was switched on:\n", *lines]) + "\n"
