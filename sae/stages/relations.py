"""`sae eval suite=relations`: how the SAEs of a run are related, across their sizes and their seeds.

    sae eval suite=relations name=mine

SAEs of one site, architecture and L0 are compared with each other (see `sae.evals.relations`); controls are groups of
their own. Between consecutive sizes of one seed: matches, parents, and what the wider SAE adds on held-out tokens; over
all sizes of one seed: family trees; between the seeds of one size: how well each latent recurs. Similarities stand
beside those of random rows with the second moment of the decoders (null="data").
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from sae.activations.harvest import Passes
from sae.autoencoder.sae import SAE
from sae.config import RunConfig
from sae.evals.relations import (
    Families,
    Match,
    Null,
    Stitching,
    families,
    match,
    null_similarity,
    seed_stability,
    stitching,
)
from sae.files import to_plain
from sae.lm.model import LanguageModel
from sae.lm.tokens import PackedTokens
from sae.report.progress import Progress
from sae.stages import common, measured
from sae.stages.groups import Group, NothingToRelate, find_groups, in_words
from sae.stages.measured import Table, Work

SUITE = "relations"
THRESHOLD = 0.7
"""Similarity from which latents count as shared, and those of a wider SAE as reconstruction latents (2502.04878)."""
FLOOR = 0.5
"""Least cosine of a child with its parent; raised to the null's 99th percentile where random rows reach that."""
HELD_AT_ONCE = 1 << 24
"""Activations of the wider SAE's latents held at once: 64 MiB."""
MATCH = ("shared", "mean", "threshold", "method", "by", "null")
PAIR_COLUMNS = ["hook_name", "architecture", "control", "l0_target", "seed", "small", "large", "mean", "null", "shared",
                "parents", "novel", "fvu_small", "fvu_novel", "fvu_large"]  # fmt: skip
SEED_COLUMNS = ["hook_name", "architecture", "control", "l0_target", "d_sae", "seeds", "mean", "shared", "null",
                "null_high"]  # fmt: skip


def check_enough(config: RunConfig) -> None:
    """Refuse a grid with one SAE a group, before anything is trained for it.

    Raises:
        NothingToRelate: one size and one seed.
    """
    options = config.sae
    if not config.eval.saes and len(set(options.d_sae)) < 2 and len(set(options.seed)) < 2:
        raise NothingToRelate(
            f"sae.d_sae={options.d_sae} with sae.seed={options.seed} leaves no two SAEs to relate: give several sizes, "
            f"sae.d_sae=[{options.d_sae[0]},{2 * options.d_sae[0]}], or several seeds, sae.seed=[0,1]."
        )


def ensure_related(config: RunConfig, lm: LanguageModel) -> None:
    """Relate the run's SAEs, or those of `eval.saes`, where that was not done before.

    Raises:
        NothingToRelate: no two SAEs to compare.
        UserError: two of one group's size and seed, or one that `measured.find` refuses.
    """
    check_enough(config)
    settings = {"threshold": THRESHOLD, "floor": FLOOR}
    work = measured.find(dataclasses.replace(config, suite=SUITE), lm, settings, held_out=True)
    if work is None:
        return
    groups = find_groups(work.configs)
    work.open(hold=False)
    held_out = HeldOut(config, lm, work.held_out)
    result: dict[str, Any] = {"pairs": [], "seeds": [], "families": [], "notes": []}
    with Progress(len(groups), "relate SAEs", unit="group") as bar:
        for group in groups:
            if group.is_related():
                _relate(group, lm, held_out, work, result)
            else:
                result["notes"].append(_alone(group))
            bar.update()
    result = to_plain(result)
    work.finish(result, _tables(result), "\n".join(result["notes"]))


def _alone(group: Group) -> str:
    size, seed = next(iter(group.paths))
    return (
        f"{group.title}: {size:,} latents of seed {seed} have nothing to be compared with; sae.d_sae=[...] gives more "
        "sizes, sae.seed=[...] more seeds."
    )


class HeldOut:
    """Activations of held-out tokens; those of one hook point are kept, so that the model is run once for each."""

    def __init__(self, config: RunConfig, lm: LanguageModel, packed: PackedTokens) -> None:
        self._config, self._lm, self._packed = config, lm, packed
        self._hook = ""
        self._acts: list[Tensor] = []

    def batches(self, hook_name: str, d_sae: int) -> Iterator[Tensor]:
        """Activations [n d_in], few enough at once for an SAE of so many latents."""
        if hook_name != self._hook:
            passes = Passes(
                self._lm,
                self._packed,
                [hook_name],
                batch_tokens=self._config.harvest.batch_tokens,
                include_special=self._config.data.include_special,
            )
            self._acts = [passes(number).acts[hook_name] for number in range(len(passes))]
            self._hook = hook_name
        for acts in self._acts:
            yield from acts.split(max(1, HELD_AT_ONCE // d_sae))


def _relate(group: Group, lm: LanguageModel, held_out: HeldOut, work: Work, result: dict[str, Any]) -> None:
    """Add a group's seeds, pairs and families to the result, and write their tensors."""
    stability: dict[tuple[int, int], Tensor] = {}
    for size, seeds in group.seeds().items():
        if len(seeds) > 1:
            record, found = _compare_seeds(group, lm, size, seeds, work)
            result["seeds"].append(record)
            stability |= found
    for seed, sizes in group.sizes().items():
        if len(sizes) > 1:
            pairs, trees = _compare_sizes(group, lm, held_out, seed, sizes, work)
            for level, size in zip(trees["levels"], sizes, strict=True):
                kept = stability.get((size, seed))
                level["stability"] = None if kept is None else rounded(kept)
            result["pairs"] += pairs
            result["families"].append(trees)


def _compare_seeds(
    group: Group, lm: LanguageModel, size: int, seeds: list[int], work: Work
) -> tuple[dict[str, Any], dict[tuple[int, int], Tensor]]:
    """How well the latents of one size recur: the record, and every latent's stability by size and seed."""
    paths = [group.paths[size, seed] for seed in seeds]
    found = seed_stability([SAE.load(path, lm.device) for path in paths], null="data")
    file = work.write_tensors({f"s{seed}": part for seed, part in zip(seeds, found.stability, strict=True)})
    record = group.record | {
        "d_sae": size,
        "seeds": seeds,
        "mean": found.mean,
        "shared": [float((part >= THRESHOLD).double().mean()) for part in found.stability],
        "threshold": THRESHOLD,
        "by": found.by,
        "null": found.null,
        "paths": paths,
        "latents": file,
    }
    return record, {(size, seed): part for seed, part in zip(seeds, found.stability, strict=True)}


def _compare_sizes(
    group: Group, lm: LanguageModel, held_out: HeldOut, seed: int, sizes: list[int], work: Work
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One seed's sizes: a record for every two that follow each other, and the trees over all of them."""
    saes = [SAE.load(group.paths[size, seed], lm.device) for size in sizes]
    links = list(itertools.pairwise(saes))
    # A child looks for its parent among the narrower one's latents, so chance is measured that way round.
    nulls = [null_similarity(large, small, None, "data") for small, large in links]
    floor = max(FLOOR, *(null.best_high for null in nulls))
    trees = families(saes, floor=floor)
    pairs = []
    for (small, large), level, null in zip(links, trees.levels[1:], nulls, strict=True):
        found = match(small, large, by="decoder", threshold=THRESHOLD, null="data")
        stitched = None
        if small.config.site.kind == "sae":
            stitched = stitching(small, large, held_out.batches(group.hook_name, large.config.d_sae), THRESHOLD)
        has_parent = level.parent >= 0
        pairs.append(
            group.record
            | {"seed": seed, "small": small.config.d_sae, "large": large.config.d_sae}
            | {"small_path": group.paths[small.config.d_sae, seed], "large_path": group.paths[large.config.d_sae, seed]}
            | {name: getattr(found, name) for name in MATCH}
            | {"parents": share(has_parent), "floor": floor, "parent_cosine": float(level.cosine.mean())}
            | {"parent_null": null, "stitching": _summary(stitched)}
            | {"latents": work.write_tensors(_tensors(found, stitched))}
        )
    return pairs, group.record | _trees(trees, seed, [group.paths[size, seed] for size in sizes], nulls)


def share(chosen: Bool[Tensor, " n"]) -> float:
    """Share of entries that are true; NaN where there are none."""
    return float(chosen.double().mean())


def rounded(values: Float[Tensor, " n"]) -> list[float]:
    """Similarities as a table has them: three decimals say all there is to say."""
    return [round(value, 3) for value in values.double().tolist()]


def _tensors(found: Match, stitched: Stitching | None) -> dict[str, Tensor]:
    """What is too long for the result: a number a latent of the narrower SAE (partner), or of the wider one."""
    tensors = {"partner": found.partner, "similarity": found.similarity, "parent_cosine": found.best_back.cosine}
    tensors["nearest"] = found.best_back.row
    if stitched is not None:
        tensors |= {"is_novel": stitched.is_novel, "fired": stitched.fired, "change": stitched.change}
    return tensors


def _summary(stitched: Stitching | None) -> dict[str, Any] | None:
    """The numbers of a stitching; None for transcoders and crosscoders, which cannot be stitched."""
    if stitched is None:
        return None
    names = ("novel", "reconstruction", "fvu_small", "fvu_large", "auroc", "threshold", "n_tokens")
    return {name: getattr(stitched, name) for name in names} | {"silent": int((~stitched.fired).sum())}


def _trees(trees: Families, seed: int, paths: list[Path], nulls: list[Null]) -> dict[str, Any]:
    """Trees as lists, a number for each latent of each size."""
    levels = [
        {"d_sae": level.d_sae, "path": path, "null": null, "parent": level.parent, "cosine": rounded(level.cosine)}
        for level, path, null in zip(trees.levels, paths, [None, *nulls], strict=True)
    ]
    levels[0]["cosine"] = None
    return {"seed": seed, "floor": trees.floor, "by": "decoder", "levels": levels}


def _tables(result: dict[str, Any]) -> list[Table]:
    """A row for every two sizes, and one for the seeds of every size."""
    pairs = []
    for pair in result["pairs"]:
        found = pair["stitching"] or {}
        novel = found.get("novel") or {}
        flat = {"novel": novel.get("n"), "fvu_novel": novel.get("fvu"), "null": pair["null"]["matched_mean"]}
        pairs.append(pair | flat | {name: found.get(name) for name in ("fvu_small", "fvu_large")})
    seeds = []
    for row in result["seeds"]:
        flat = {name: sum(row[name]) / len(row[name]) for name in ("mean", "shared")}
        flat |= {"null": row["null"]["best_mean"], "null_high": row["null"]["best_high"]}
        seeds.append(row | flat | {"seeds": len(row["seeds"])})
    tables = [Table(f"{SUITE}_sizes", PAIR_COLUMNS, pairs), Table(f"{SUITE}_seeds", SEED_COLUMNS, seeds)]
    return [_with_options(table) for table in tables]


def _with_options(table: Table) -> Table:
    """A column of the architectures' options, where the groups differ in them."""
    texts = [in_words(row["skip"], row["options"]) for row in table.rows]
    if len(set(texts)) < 2:
        return table
    rows = [row | {"options": text} for row, text in zip(table.rows, texts, strict=True)]
    return table._replace(columns=[*table.columns, "options"], rows=rows)


def run(config: RunConfig) -> None:
    """Run the suite."""
    check_enough(config)
    ensure_related(config, common.open_lm(config.lm))
