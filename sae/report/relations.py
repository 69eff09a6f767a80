"""Read how the SAEs of a run are related, as `sae eval suite=relations` and `suite=geometry` wrote it."""

from typing import Any

from sae.report.model import Added, AtomRow, Family, Level, Relations, SeedRow, SizePair
from sae.report.values import as_control, as_dict, as_float, as_int, as_ints, as_list, as_numbers, as_text


def read_relations(result: dict[str, Any], geometry: dict[str, Any]) -> Relations:
    """Read both results; what is missing or malformed is left out."""
    pairs = [as_dict(entry) for entry in as_list(result.get("pairs"))]
    thresholds = [as_float(entry.get("threshold")) for entry in (*pairs, *map(as_dict, as_list(result.get("seeds"))))]
    families = [read_family(as_dict(entry)) for entry in as_list(result.get("families"))]
    return Relations(
        families=[family for family in families if len(family.levels) > 1],
        pairs=[read_pair(entry) for entry in pairs],
        seeds=[read_seeds(as_dict(entry)) for entry in as_list(result.get("seeds"))],
        atoms=[row for row in map(read_atoms, map(as_dict, as_list(geometry.get("saes")))) if row is not None],
        notes=[as_text(note) for note in as_list(result.get("notes"))],
        threshold=next((value for value in thresholds if value is not None), None),
    )


def _group(entry: dict[str, Any]) -> dict[str, Any]:
    """Read what names a group of SAEs."""
    return {
        "hook_name": as_text(entry.get("hook_name")),
        "architecture": as_text(entry.get("architecture")),
        "l0_target": as_float(entry.get("l0_target")),
        "control": as_control(entry.get("control")),
    }


def read_family(entry: dict[str, Any]) -> Family:
    """Read one family of sizes; it ends before a size whose parents do not fit the size before it."""
    levels: list[Level] = []
    for found in map(as_dict, as_list(entry.get("levels"))):
        level = _level(found, levels[-1].d_sae if levels else None)
        if level is None:
            break
        levels.append(level)
    return Family(**_group(entry), seed=as_int(entry.get("seed")), floor=as_float(entry.get("floor")), levels=levels)


def _level(entry: dict[str, Any], narrower: int | None) -> Level | None:
    """Read one size: None where it is no whole picture of its latents."""
    d_sae, null = as_int(entry.get("d_sae")), as_dict(entry.get("null"))
    parents = [as_int(item) for item in as_list(entry.get("parent"))]
    parent = [item for item in parents if item is not None]
    if d_sae is None or len(parent) != d_sae or not all(-1 <= item < (narrower or 0) for item in parent):
        return None
    lists = {name: [as_float(item) for item in as_list(entry.get(name))] for name in ("cosine", "stability")}
    return Level(
        d_sae=d_sae,
        path=as_text(entry.get("path")),
        parent=[] if narrower is None else parent,
        null_mean=as_float(null.get("best_mean")),
        null_high=as_float(null.get("best_high")),
        **{name: values if len(values) == d_sae else [] for name, values in lists.items()},
    )


def read_pair(entry: dict[str, Any]) -> SizePair:
    """Read the comparison of two sizes."""
    stitched = as_dict(entry.get("stitching"))
    values: dict[str, Any] = {name: as_int(entry.get(name)) for name in ("seed", "small", "large")}
    values |= {name: as_float(entry.get(name)) for name in ("shared", "mean", "parents")}
    values |= {name: as_float(stitched.get(name)) for name in ("fvu_small", "fvu_large", "auroc")}
    return SizePair(
        **_group(entry),
        **values,
        null_mean=as_float(as_dict(entry.get("null")).get("matched_mean")),
        novel=_added(stitched.get("novel")),
        known=_added(stitched.get("reconstruction")),
        silent=as_int(stitched.get("silent")),
    )


def _added(entry: Any) -> Added:
    entry = as_dict(entry)
    return Added(as_int(entry.get("n")), as_float(entry.get("fvu")), as_float(entry.get("improving")))


def read_seeds(entry: dict[str, Any]) -> SeedRow:
    """Read how well one size's latents recur."""
    null = as_dict(entry.get("null"))
    return SeedRow(
        **_group(entry),
        d_sae=as_int(entry.get("d_sae")),
        seeds=as_ints(entry.get("seeds")),
        mean=as_numbers(entry.get("mean")),
        shared=as_numbers(entry.get("shared")),
        null_mean=as_float(null.get("best_mean")),
        null_high=as_float(null.get("best_high")),
    )


def read_atoms(entry: dict[str, Any]) -> AtomRow | None:
    """Read what a meta-SAE explains; None where it was not trained, and of random SAEs made to stand beside others."""
    fve = as_float(entry.get("meta_fve"))
    if fve is None or not as_text(entry.get("path")):
        return None
    return AtomRow(
        **_group(entry),
        d_sae=as_int(entry.get("d_sae")),
        seed=as_int(entry.get("seed")),
        fve=fve,
        fve_random=as_float(entry.get("meta_fve_random")),
    )
