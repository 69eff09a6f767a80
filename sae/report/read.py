"""Read what a report shows from a run's JSON files.

Reading is tolerant on purpose: a report describes whatever a run holds. A stage that did not run, a field
that an older version did not write or a value that is not a number becomes None (or an empty list), never
an error; a file that is there but cannot be read becomes a sentence in `ReportData.problems`, which the
page shows, and so does a result on SAEs that are no longer the run's (`sae.report.current`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sae.errors import UserError
from sae.files import read_json, read_jsonl
from sae.report.comparison import read_comparison
from sae.report.current import GIVEN, objection
from sae.report.model import (
    Behavior,
    Control,
    Dose,
    Example,
    GateRow,
    PerSize,
    Ranked,
    Rate,
    ReportData,
    SaeRow,
    SourceRow,
    StageInfo,
)
from sae.report.relations import read_relations
from sae.report.values import (
    as_control,
    as_dict,
    as_draws,
    as_float,
    as_int,
    as_ints,
    as_list,
    as_numbers,
    as_rate,
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


def read_ranked(entry: Any) -> Ranked | None:
    """Read one row of the ranking."""
    entry = as_dict(entry)
    latent = as_int(entry.get("latent"))
    if latent is None:
        return None
    numbers = {key: as_float(entry.get(key)) for key in ("auroc", "low", "high", "p", "q", "density", "effect")}
    place = (as_text(entry.get("hook_name")), as_text(entry.get("position")))
    return Ranked(latent, place[0], place[1], d_sae=as_int(entry.get("d_sae")), **numbers)


def read_doses(entries: Any) -> list[Dose]:
    """Read the dose-response points, in order of dose."""
    found = []
    for entry in map(as_dict, as_list(entries)):
        dose, rate = as_float(entry.get("dose", entry.get("value"))), as_rate(entry.get("rate"))
        if dose is not None and rate is not None:
            found.append(Dose(dose, as_float(entry.get("value")), rate))
    return sorted(found, key=lambda point: point.dose)


def _control_row(draw: Any) -> list[float | None]:
    """Read one random draw's rates, one per dose; entries may be numbers, rates or dose records."""
    row: list[float | None] = []
    for item in as_list(draw):
        inner = item.get("rate") if isinstance(item, Mapping) and isinstance(item.get("rate"), Mapping) else item
        rate = as_rate(inner)
        row.append(None if rate is None else rate.rate)
    return row


def _side_effects(value: Any) -> dict[str, dict[str, Rate]]:
    """Read the other behaviours: a rate per name, or several named rates per name (e.g. before and after)."""
    found: dict[str, dict[str, Rate]] = {}
    for name, item in as_dict(value).items():
        if isinstance(item, Mapping) and all(isinstance(part, Rate) for part in item.values()):
            rates = dict(item)
        else:
            single = as_rate(item)
            rates = {"after": single} if single is not None else as_rates(item)
        if rates:
            found[name] = rates
    return found


def _suffixed(entry: dict[str, Any], stem: str, reader: Callable[[Any], Any]) -> dict[str, Any]:
    """Read `stem` (under the ablation, or several by name) with `stem_base`, `stem_clamp` and `stem_direction`."""
    whole = entry.get(stem)
    single = reader(whole)
    parts = {"ablate": single} if single is not None else {k: reader(v) for k, v in as_dict(whole).items()}
    for name in ("base", "clamp", "direction"):
        parts.setdefault(name, reader(entry.get(f"{stem}_{name}")))
    order = {name: place for place, name in enumerate(("base", "ablate", "clamp", "direction"))}
    kept = {name: value for name, value in parts.items() if value is not None}
    return dict(sorted(kept.items(), key=lambda pair: order.get(pair[0], len(order))))


def _controls(value: Any) -> dict[str, Control]:
    """Read how the real intervention stands among each kind of random draw."""
    found = {}
    for name, item in as_dict(value).items():
        item = as_dict(item)
        key = name if name.startswith("random_") else f"random_{name}"
        found[key] = Control(as_float(item.get("observed")), as_float(item.get("p")), as_int(item.get("n_prompts")))
    return found


def read_behavior(name: str, entry: Any) -> Behavior:
    """Read one behaviour's results."""
    entry = as_dict(entry)
    rates = {key.removesuffix("_rate"): as_rate(item) for key, item in entry.items() if key.endswith("_rate")}
    rates |= {key: as_rate(entry.get(key)) for key in ("random_ablate_mean", "random_clamp_mean")}
    kinds = ("random_ablate", "random_clamp", "random_direction_ablate", "random_direction_add")
    per_size = []
    for row in map(as_dict, as_list(entry.get("per_size"))):
        row_rates = {key.removesuffix("_rate"): as_rate(v) for key, v in row.items() if key.endswith("_rate")}
        kept = {key: rate for key, rate in row_rates.items() if rate is not None}
        per_size.append(
            PerSize(as_text(row.get("hook_name")), as_int(row.get("d_sae")), as_ints(row.get("latents")), kept)
        )
    texts = [part.name for part in dataclasses.fields(Example)]
    examples = [
        Example(**{key: as_text(item.get(key)) for key in texts})
        for item in map(as_dict, as_list(entry.get("examples")))
        if item
    ]
    ranking = [row for row in map(read_ranked, as_list(entry.get("ranking"))) if row is not None]
    return Behavior(
        name=name,
        hook_name=as_text(entry.get("hook_name")),
        d_sae=as_int(entry.get("d_sae")),
        path=as_text(entry.get("path")),
        latents=as_ints(entry.get("latents")),
        clamp_latents=as_ints(entry.get("clamp_latents")),
        clamp_value=as_float(entry.get("clamp_value")),
        controls=_controls(entry.get("controls")),
        rates={key: rate for key, rate in rates.items() if rate is not None},
        draws={kind: as_draws(entry.get(kind)) for kind in kinds},
        kl_harmless=_suffixed(entry, "kl_harmless", as_float),
        side_effects=_side_effects({"fact accuracy": _suffixed(entry, "fact_accuracy", as_rate)})
        | _side_effects(entry.get("other_behaviors")),
        dose_response=read_doses(entry.get("dose_response")),
        random_dose_response=[_control_row(draw) for draw in as_list(entry.get("random_dose_response"))],
        ranking=ranking,
        per_size=per_size,
        examples=examples,
        n_random=as_int(entry.get("n_random")),
    )


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
