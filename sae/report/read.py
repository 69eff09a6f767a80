"""Read what a report shows from a run's JSON files.

Reading is tolerant on purpose: a report describes whatever a run holds. A stage that did not run, a field
that an older version did not write or a value that is not a number becomes None (or an empty list), never
an error; a file that is there but cannot be read becomes a sentence in `ReportData.problems`, which the
page shows, and so does a result on SAEs that are no longer the run's (`sae.report.current`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.errors import UserError
from sae.files import read_json, read_jsonl
from sae.report.comparison import read_comparison
from sae.report.current import GIVEN, objection
from sae.report.model import (
    GateRow,
    ReportData,
    SaeRow,
    SourceRow,
    StageInfo,
)
from sae.report.read_behavior import read_behavior
from sae.report.read_weights import read_weights
from sae.report.relations import read_relations
from sae.report.values import (
    as_control,
    as_dict,
    as_float,
    as_int,
    as_list,
    as_numbers,
    as_rates,
    as_text,
)

STAGES = (
    "organism",
    "tokens",
    "harvest",
    "train",
    "l0",
    "eval",
    "eval/relations",
    "eval/geometry",
    "eval/diff",
    "eval/given",
    "eval/given/relations",
    "eval/given/geometry",
    "eval/given/diff",
    "behavior",
    "steer",
    "localize",
    "mitigate",
    "circuit",
    "wiring",
)


def _place_of(results: dict[str, dict[str, Any]], suite: str) -> str:
    """Where a suite's result is: on the run's own SAEs; else, if there is one, on others."""
    own, given = f"eval/{suite}", f"{GIVEN}/{suite}"
    return given if results.get(given) and not results.get(own) else own


def lm_name(config: Any) -> str:
    """Find the language model's name in a stage's configuration, however it is nested."""
    config = as_dict(config)
    lm = config.get("lm")
    if isinstance(lm, Mapping):
        lm = lm.get("name") or lm.get("path")
    found = lm or config.get("lm_name") or config.get("model")
    return found if isinstance(found, str) else ""


def read_sae(entry: Any) -> SaeRow:
    """Read one autoencoder of the train or eval stage; training's `final` values fill what is absent."""
    entry = as_dict(entry)
    merged = {**as_dict(entry.get("final")), **{k: v for k, v in entry.items() if v is not None}}
    histogram = as_dict(merged.get("density_histogram"))
    n_dead, d_sae = as_float(merged.get("n_dead")), as_float(merged.get("d_sae"))
    if "dead_fraction" not in merged and n_dead is not None and d_sae:
        merged["dead_fraction"] = n_dead / d_sae
    readers: dict[str, Any] = {"d_sae": as_int, "seed": as_int, "n_tokens": as_int}
    readers |= {"control": as_control, "before_training": lambda value: value is True, "sources": _sources}
    texts = ("hook_name", "architecture", "path")
    values: dict[str, Any] = {}
    for part in dataclasses.fields(SaeRow):
        if part.name in texts:
            values[part.name] = as_text(merged.get(part.name))
        elif not part.name.startswith("density_"):
            values[part.name] = readers.get(part.name, as_float)(merged.get(part.name))
    edges, counts = as_numbers(histogram.get("edges")), as_numbers(histogram.get("counts"))
    if len(edges) == len(counts) + 1:
        values.update(density_edges=edges, density_counts=counts)
    return SaeRow(**values)


def _sources(value: Any) -> list[SourceRow]:
    """Read the hook points of a crosscoder."""
    found = []
    for entry in map(as_dict, as_list(value)):
        numbers = {key: as_float(entry.get(key)) for key in ("fvu", "ce_recovered", "delta_ce", "kl")}
        found.append(SourceRow(as_text(entry.get("hook_name")), as_text(entry.get("lm")), **numbers))
    return found


def _read(path: Path, problems: list[str], *, lines: bool = False) -> Any:
    """Read a file that may be absent; a broken one is noted, not raised."""
    if not path.is_file():
        return [] if lines else {}
    try:
        return read_jsonl(path) if lines else read_json(path)
    except (UserError, OSError, UnicodeDecodeError, RecursionError) as error:
        problems.append(str(error))
        return [] if lines else {}


def _numbers_by_name(value: Any, name: str) -> dict[str, float]:
    """Read one number (which gets the name given), or several by name."""
    single = as_float(value)
    if single is not None:
        return {name: single}
    found = {key: as_float(item) for key, item in as_dict(value).items()}
    return {key: item for key, item in found.items() if item is not None}


def read_run(run_folder: Path | str) -> ReportData:
    """Read a run folder.

    Raises:
        UserError: the folder does not exist.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"no run folder {str(folder)!r}: check the path, or run `sae demo` first.")
    data = ReportData(name=folder.resolve().name)
    results: dict[str, dict[str, Any]] = {}
    hashes: dict[Path, str] = {}
    for stage in STAGES:
        if (folder / stage).is_dir():
            results[stage] = as_dict(_read(folder / stage / "result.json", data.problems))
            manifest = as_dict(_read(folder / stage / "manifest.json", data.problems))
            if results[stage] and stage.startswith("eval"):
                wrong = objection(folder, stage, manifest, results.get("train", {}), hashes)
                if wrong:
                    data.problems.append(wrong)
                    results[stage] = {}
                    continue
            if results[stage] or manifest:
                data.stages.append(StageInfo(stage, manifest, as_float(results[stage].get("wall_s"))))
    data.summary = as_dict(_read(folder / "result.json", data.problems))
    data.lm = find_lm(folder, data, results)
    train, evaluation = results.get("train", {}), results.get("eval", {})
    data.tokens = as_int(train.get("tokens", train.get("n_tokens")))
    if not evaluation and not train:
        evaluation = results.get(GIVEN, {})  # a run that only looks at SAEs from elsewhere
    data.evaluated = bool(as_list(evaluation.get("saes")))
    data.saes = [read_sae(entry) for entry in as_list(evaluation.get("saes")) or as_list(train.get("saes"))]
    behaviors = as_dict(results.get("behavior", {}).get("behaviors"))
    data.behaviors = [read_behavior(name, entry) for name, entry in behaviors.items() if isinstance(entry, Mapping)]
    related, atoms, crossed = (_place_of(results, suite) for suite in ("relations", "geometry", "diff"))
    relations = read_relations(results.get(related, {}), results.get(atoms, {}))
    data.relations = dataclasses.replace(relations, folder=related, atoms_folder=atoms)
    comparison = read_comparison(folder / crossed, results.get(crossed, {}), data.problems)
    data.comparison = dataclasses.replace(comparison, folder=crossed)
    data.weights = read_weights(results, _read(folder / "circuit" / "graph.json", data.problems))
    organism = results.get("organism", {})
    for row in map(as_dict, as_list(organism.get("table"))):
        gates = {key: bool(value) for key, value in as_dict(row.get("gates")).items()}
        data.gates.append(GateRow(gates, as_rates(row.get("cells"))))
    data.probe_auroc = _numbers_by_name(organism.get("probe_auroc"), "probe")
    curves = _read(folder / "train" / "metrics.jsonl", data.problems, lines=True)
    data.curves = [as_dict(record) for record in curves]
    return data


def find_lm(folder: Path, data: ReportData, results: dict[str, dict[str, Any]]) -> str:
    """Find the language model's name: in a result, a configuration, or beside a trained autoencoder."""
    for source in (*results.values(), data.summary, *(stage.manifest.get("config") for stage in data.stages)):
        if name := lm_name(source):
            return name
    for path in sorted((folder / "train").glob("*/*/config.json")):
        if name := lm_name(_read(path, data.problems)):
            return name
    return ""
