"""`sae localize contrast=refusal method=all level=parameter`: which weights carry a behaviour, and what goes with them.

For each behaviour of `behavior.contrast` the methods of `localize.method` score weights or parts on the find split; on
the model organism the scores are held against the planted truth; then what scored best is cut, how much is chosen on
the select split, and what that does is measured on the report split, beside as large random sets.

With `localize.adversary` that set is put to its worst case; with `localize.null_runs` what is located under the true
labels is held against what is located under shuffled ones.

Each method's records and scores lie in `localize/<behavior>/<method>-<level>-s<seed>.json` and `.safetensors` as soon
as they are there: a method that is finished is not run again, whatever other methods are asked for later.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.behavior.contrast import ContrastRecord, ContrastSet
from sae.behavior.judge import Judge
from sae.behavior.judges.identity import judge_key
from sae.behavior.judges.registry import judge_for
from sae.config import LocalizeConfig, RunConfig
from sae.errors import UserError, unknown
from sae.files import read_json, sha256_file, sha256_json, to_plain, write_json, write_manifest, write_tensors
from sae.lm.matrices import Matrix, block_matrices
from sae.lm.model import LanguageModel
from sae.organism.corpus import BEHAVIORS
from sae.organism.truth import Truth, read_planted
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.contrast import open_contrast, open_contrasts
from sae.stages.decomposition import Decomposed, write_carriers
from sae.stages.localize_site import DECOMPOSITION, Site, open_reference
from sae.weights.edit import Weights
from sae.weights.findings import (
    MethodRow,
    Scored,
    SurgeryRow,
    cut_blocks,
    cut_directions,
    cut_out,
    method_row,
    random_parameters,
    seeds_rows,
    surgery_row,
)
from sae.weights.levels import LEVELS, parts_of
from sae.weights.methods import (
    CHANCE,
    PARAMETER_METHODS,
    PART_METHODS,
    Problem,
    Sides,
    act_svd_directions,
    chosen_methods,
)
from sae.weights.null import CONTRASTED, null_rows
from sae.weights.objective import margin_objective
from sae.weights.perturbation.blocks import BLOCK, Blocks
from sae.weights.surgery import Watched
from sae.weights.truth import is_measured

DIRECTION = "direction"  # the level of ActSVD's singular directions
SHOWN = ("behavior", "method", "level", "auroc", "auprc", "base_rate", "decoy_share", "evaluations", "seed")
NULL = ("behavior", "method", "level", "n_runs", "auroc", "covers_half", "located", "base_rate", "true_auroc", "p")
CUT = (
    "behavior", "method", "level", "fraction", "behavior_before", "behavior_after", "other_max_change", "kl_harmless",
    "random_after", "passed",
)  # fmt: skip


def run(config: RunConfig) -> None:
    """Run the stage."""
    common.refuse_pair(config.lm, "localize")
    options = config.localize
    levels = _checked_levels(options.level)
    lm = common.open_lm(config.lm)
    matrices = block_matrices(lm)
    planted = _planted(lm)
    methods = chosen_methods(options.method, bool(options.reference))
    if not any(_reaches(method, level) for method in methods for level in levels):
        raise UserError(
            f"{', '.join(methods)} score nothing at the level of {', '.join(levels)}: methods that change weights "
            "score parts and blocks, those that attribute score single weights and parts (docs/weights.md)."
        )
    if options.mode == "restore" and not options.reference:
        raise UserError("localize.mode=restore needs a model to restore from: name it as localize.reference.")
    _check_null(options, methods, planted, lm)
    clock, folder = common.Clock(), config.folder / "localize"
    sets = {name: item.contrast for name, item in open_contrasts(config, lm).items()}
    for name, contrast in sets.items():
        if contrast.unanswerable:
            raise UserError(f"the contrast set of {name!r} cannot be used here, since {contrast.unanswerable}.")
    reference = open_reference(options.reference, lm, matrices, planted, folder)
    inputs = {"lm": common.model_key(lm)} | {name: sha256_json(contrast.records) for name, contrast in sets.items()}
    inputs |= {"reference": reference.fingerprint}
    judges = _judges(config, lm, sets)
    inputs |= {f"judges.{name}": judge_key(judge) for name, judge in judges.items()}
    if planted is not None and lm.folder is not None:
        inputs |= {"planted": sha256_file(lm.folder / "planted.safetensors")}
    if common.skip(config, folder, options, inputs):
        return
    rows: list[MethodRow] = []
    cuts: list[dict[str, Any]] = []
    decomposed = Decomposed(options.decomposition, lm, matrices, sets, folder) if DECOMPOSITION in methods else None
    nulls: list[dict[str, Any]] = []
    for name, contrast in sets.items():
        site = _site(config, lm, contrast, sets, judges, matrices, reference.weights, planted, folder / name, inputs)
        site.decomposed = decomposed
        with Progress(None, f"localize {name}", unit="step") as bar:
            for record in _records(site, methods, levels, bar):
                rows += [MethodRow(**row) for row in record["methods"]]
                cuts += record["surgery"]
            if options.null_runs:
                nulls += _null(site, methods, levels, bar)
    result = {"schema_version": 1, "methods": rows, "surgery": cuts, "seeds": seeds_rows(rows), "null": nulls}
    result |= {"decomposition": None if decomposed is None else decomposed.evaluation()}
    result |= {"settings": options, "n_weights": sum(one.parameter.numel() for one in matrices)}
    write_json(folder / "result.json", result | {"wall_s": clock.seconds()})
    write_manifest(folder, "localize", options, inputs)
    print(summary_table([row._asdict() for row in rows], list(SHOWN)))
    if cuts:
        print(summary_table(cuts, list(CUT)))
    if nulls:
        shown = [row | {name: row[name]["estimate"] for name in ("auroc", "located")} for row in nulls]
        print(summary_table(shown, list(NULL)))
    print(f"{folder}: {', '.join(sets)} in {clock.seconds():.1f} s")


def _checked_levels(levels: list[str]) -> list[str]:
    known = [*LEVELS, BLOCK, DIRECTION]
    found: list[str] = []
    for level in levels:
        if level not in (*known, "all"):
            raise unknown("level", level, ["all", *known])
        found += known if level == "all" else [level]
    return list(dict.fromkeys(found))


def _check_null(options: LocalizeConfig, methods: Sequence[str], planted: Truth | None, lm: LanguageModel) -> None:
    if options.null_runs and planted is None:
        raise UserError(f"localize.null_runs needs planted truth, which {lm.name!r} has none of: leave it at 0.")
    if options.null_runs and not set(methods) & set(CONTRASTED):
        raise UserError(
            f"localize.null_runs tests no method of {', '.join(methods)}: add one of {', '.join(CONTRASTED)}."
        )


def _planted(lm: LanguageModel) -> Truth | None:
    """The planted truth beside the model's weights, if there is one that was measured."""
    if lm.folder is None or not (lm.folder / "planted.json").is_file():
        return None
    found = read_planted(lm.folder)
    return found if len(found.margins) else None


def _judges(config: RunConfig, lm: LanguageModel, sets: Mapping[str, ContrastSet]) -> dict[str, Judge]:
    """The judge of each behaviour that is looked for or watched."""
    # The organism's judges know its grammar; they fit its own contrast sets, not a file that shares a name with one.
    own = {name for name in config.behavior.contrast if name in BEHAVIORS}
    names = dict.fromkeys(sets)
    if common.is_organism(lm):
        own |= set(BEHAVIORS) - set(sets)
        names = dict.fromkeys(BEHAVIORS) | names
    return {name: judge_for(name, common.ORGANISM if name in own else "") for name in names}


def _site(
    config: RunConfig,
    lm: LanguageModel,
    contrast: ContrastSet,
    sets: Mapping[str, ContrastSet],
    judges: Mapping[str, Judge],
    matrices: list[Matrix],
    reference: Weights | None,
    planted: Truth | None,
    folder: Path,
    inputs: dict[str, str],
) -> Site:
    others = dict(sets)
    facts: tuple[Any, ...] = ()
    if common.is_organism(lm):
        others = {name: open_contrast(name, config, lm) for name in BEHAVIORS} | others
        facts = open_contrast("deception", config, lm).split("report").negatives
    behavior = contrast.behavior
    # What a record depends on: everything but which methods and levels are asked for. `key_of` adds a method's own.
    left_out = ("method", "level", "null_runs", DECOMPOSITION)
    settings = {key: value for key, value in to_plain(config.localize).items() if key not in left_out}
    own_inputs = {name: value for name, value in inputs.items() if name not in sets or name == behavior}
    key = sha256_json([settings, config.behavior.max_new_tokens, own_inputs, sorted(others)])
    watched = {name: Watched(one, judges[name]) for name, one in others.items() if name != behavior}
    return Site(
        config, lm, contrast, watched, facts, judges[behavior], matrices, reference, planted, folder, key
    )  # fmt: skip


def _records(site: Site, methods: list[str], levels: list[str], bar: Progress) -> Iterator[dict[str, Any]]:
    """Every method's records, those that are there already read from disk."""

    def progress(what: str, done: int, total: int) -> None:
        bar.update(1, now=f"{what} {done}/{total}")

    problem: Problem | None = None
    for method in methods:
        seeds = range(site.options.seeds) if method in PART_METHODS else (0,)
        for seed in seeds:
            sides: Sides | None = None
            for level in levels:
                if not _reaches(method, level):
                    continue
                path = site.folder / f"{method}-{level}-s{seed}.json"
                if not site.config.force and path.is_file() and read_json(path)["key"] == site.key_of(method):
                    yield read_json(path)
                    continue
                problem = problem or site.problem(progress)
                if method in PARAMETER_METHODS and level != DIRECTION:
                    sides = sides or Sides(method, problem, weights="parameter" in levels)
                bar.update(1, now=f"{method} {level}")
                yield _made(site, problem, sides, method, level, seed, path)


def _null(site: Site, methods: Sequence[str], levels: Sequence[str], bar: Progress) -> list[dict[str, Any]]:
    """What shuffled labels locate, at the levels that there is truth for."""

    def progress(what: str, done: int, total: int) -> None:
        bar.update(1, now=f"{what} {done}/{total}")

    assert site.planted is not None
    if site.contrast.behavior not in site.planted.layout.behaviors:
        return []
    path, key = site.folder / "null.json", sha256_json([site.key, methods, levels, site.options.null_runs])
    if not site.config.force and path.is_file() and read_json(path)["key"] == key:
        found: list[dict[str, Any]] = read_json(path)["null"]
        return found
    problem, options = site.problem(progress), site.options

    def side(records: Sequence[ContrastRecord]) -> Problem:
        behavior = margin_objective(site.lm, records, site.matrices, options.batch_prompts)
        return dataclasses.replace(problem, behavior=behavior, shown=site.replies(records), progress=None)

    known = [level for level in levels if level in LEVELS and is_measured(site.planted, level)]
    rows = null_rows(
        side, site.contrast.split("find"), [method for method in methods if method in CONTRASTED],
        {level: parts_of(site.lm, site.matrices, level) for level in known}, site.planted, options.null_runs,
        n_prompts=options.n_prompts, threshold=options.threshold, progress=progress,
    )  # fmt: skip
    write_json(path, {"schema_version": 1, "key": key, "null": rows})
    plain: list[dict[str, Any]] = read_json(path)["null"]
    return plain


def _reaches(method: str, level: str) -> bool:
    """Whether a method scores what is at a level: those that edit parts do not score single weights, chance does.

    Blocks are scored by these alone, ActSVD's directions by itself.
    """
    if level in (DIRECTION, BLOCK):
        return method == "act_svd" if level == DIRECTION else method in PART_METHODS
    return method in PARAMETER_METHODS or level != "parameter" or method == CHANCE


def _made(
    site: Site, problem: Problem, sides: Sides | None, method: str, level: str, seed: int, path: Path
) -> dict[str, Any]:
    """Run one method at one level, write its scores and then its record, and return that."""
    options, behavior = site.options, site.contrast.behavior
    found: list[Scored] = []
    cuts = []
    tensors: dict[str, Tensor] = {}
    if level == DIRECTION:
        before = problem.evaluations
        directions = act_svd_directions(problem)
        none = Scored(method, level, seed, problem.evaluations - before, {}, [])
        rows = [method_row(none, behavior, None)]
        for name, own in directions.items():
            tensors[f"{name}/out"] = torch.stack([one.out for one in own])
            tensors[f"{name}/gain"] = torch.tensor([one.gain for one in own])
        if options.surgery:
            done = cut_directions(site.watch(), directions, site.matrices, options.fractions, n_random=options.n_random)
            cuts.append(surgery_row(done, behavior, method, level, seed, "project"))
    else:
        found = _scored(site, problem, sides, method, level, seed)
        rows = [method_row(one, behavior, site.planted, options.threshold) for one in found]
    for one in found:
        if isinstance(one.scores, Mapping):
            if options.save_weights:
                tensors |= {f"{one.method}/{name}": values for name, values in one.scores.items()}
        else:
            tensors[one.method] = torch.from_numpy(np.asarray(one.scores))
        if options.surgery:
            cuts.append(_cut(site, problem, one))
    if tensors:
        write_tensors(path.with_suffix(".safetensors"), tensors)
    if method == DECOMPOSITION and site.decomposed is not None:
        write_carriers(site.folder, site.decomposed.folder, problem.carriers)
    record = {"schema_version": 1, "key": site.key_of(method), "methods": rows, "surgery": cuts}
    record["parts"] = [part.label for part in found[0].parts] if found else []
    write_json(path, record)
    plain: dict[str, Any] = read_json(path)
    return plain


def _cut(site: Site, problem: Problem, one: Scored) -> SurgeryRow:
    """What cutting what a method located does."""
    options, mode = site.options, "project" if one.level == BLOCK else site.mode
    if one.level == BLOCK:
        assert problem.blocks is not None
        done = cut_blocks(
            site.watch(), one, problem.blocks, site.matrices, options.fractions, n_random=options.n_random
        )
    else:
        done = cut_out(
            site.watch(), one, site.matrices, options.fractions, mode=mode, reference=site.reference,
            n_random=options.n_random, arena=site.arena(problem.progress),
        )  # fmt: skip
    return surgery_row(done, site.contrast.behavior, one.method, one.level, one.seed, mode)


def _scored(site: Site, problem: Problem, sides: Sides | None, method: str, level: str, seed: int) -> list[Scored]:
    """A method's scores at a level, with its differences."""
    if level == BLOCK:
        problem.blocks = problem.blocks or Blocks(site.matrices, site.options.block_rank, site.options.n_blocks)
        parts = problem.blocks.parts
    else:
        parts = parts_of(site.lm, site.matrices, level)
    if sides is None:
        before = problem.evaluations
        scores = (
            random_parameters(site.matrices, seed)
            if level == "parameter"
            else PART_METHODS[method](problem, parts, site.options.budget, seed)
        )
        return [Scored(method, level, seed, problem.evaluations - before, scores, parts)]
    return [
        Scored(
            name, level, seed, sides.cost(name),
            sides.scores(name) if level == "parameter" else sides.part_scores(name, parts), parts,
        )
        for name in sides.variants
    ]  # fmt: skip
