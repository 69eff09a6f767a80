"""`sae bench`: time this package beside its peers.

    sae bench suite=train name=bench

Figures are taken anew every time, never kept. `<run>/bench/<suite>.json` holds a suite's newest ones, `result.json`
those of the last command. The foreign peers live in an environment of their own, which `make peers` makes; with
`bench.peers=[]` only our own reference runs beside us.
"""

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from sae.bench import document, suites
from sae.bench.machine import describe
from sae.bench.options import BenchOptions
from sae.config import RunConfig
from sae.files import lock, write_json, write_manifest
from sae.report.terminal import summary_table
from sae.stages import common

DOCS = Path("docs")


def make_options(config: RunConfig) -> BenchOptions:
    """The suites' settings."""
    given = config.bench
    return BenchOptions(
        peers=tuple(given.peers),
        peers_env=given.peers_env,
        models=tuple(given.models),
        text=given.text,
        threads=given.threads,
        repeats=given.repeats,
        turn_steps=given.turn_steps,
        warmup_steps=given.warmup_steps,
        steps=given.steps,
        seeds=given.seeds,
        quick=given.quick,
    )


def run(config: RunConfig) -> None:
    """Run the stage."""
    names = suites.pick(config.suite)
    options = make_options(config)
    folder = config.folder / "bench"
    rows: list[dict[str, Any]] = []
    with lock(folder, common.say_waiting):
        (folder / common.MANIFEST).unlink(missing_ok=True)
        machine = describe(options.threads)
        for name in names:
            about = {"command": _command(name, config.name, options), "machine": machine, "options": options}
            rows += [{"suite": name, **row} for row in _measure(name, folder, options, about)]
        command = _command(config.suite, config.name, options)
        write_json(folder / "result.json", {"schema_version": 1, "command": command, "machine": machine, "rows": rows})
        write_manifest(folder, "bench", {"suite": config.suite, "options": options}, {})
        if config.bench.docs:
            print(document.write(folder, DOCS))


def _command(suite: str, name: str, options: BenchOptions) -> str:
    """The command that measures this suite in this way."""
    words = ["sae", "bench", f"suite={suite}", f"name={name}"]
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            shown = f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)
            words.append(f"bench.{field.name}={shown.lower() if isinstance(value, bool) else shown}")
    return " ".join(words)


def _measure(name: str, folder: Path, options: BenchOptions, about: dict[str, Any]) -> list[dict[str, Any]]:
    suite = suites.load(name)
    if suite is None:
        print(f"bench {name}: this version has no such suite yet, so nothing was measured")
        return []
    clock = common.Clock()
    rows = suite.run(folder, options)
    record = {
        "schema_version": 1,
        "suite": name,
        "date": time.strftime("%Y-%m-%d"),
        **about,
        "rows": rows,
        "wall_s": clock.seconds(),
    }
    write_json(folder / f"{name}.json", record)
    if rows:
        print(summary_table(rows, suite.columns))
        print(f"{folder / f'{name}.json'}: {len(rows)} rows in {clock.seconds():.1f} s")
    return rows
