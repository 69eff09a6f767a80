"""`sae localize contrast=refusal method=all level=parameter`: which weights carry a behaviour, and what goes with them.

For each behaviour of `behavior.contrast` the methods of `localize.method` score weights or parts on the find split; on
the model organism the scores are held against the planted truth; then what scored best is cut, how much is chosen on
the select split, and what that does is measured on the report split, beside as large random sets.

Each method's records and scores lie in `localize/<behavior>/<method>-<level>-s<seed>.json` and `.safetensors` as soon
as they are there: a method that is finished is not run again, whatever other methods are asked for later.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.behavior.contrast import ContrastSet
from sae.behavior.cost import own_replies
from sae.behavior.judge import Judge
from sae.behavior.judges.registry import judge_for
from sae.behavior.measure import prepare, prepare_margins
from sae.config import LocalizeConfig, RunConfig
from sae.errors import UserError, unknown
from sae.files import read_json, sha256_file, sha256_json, to_plain, write_json, write_manifest, write_tensors
from sae.lm.load import load_lm
from sae.lm.matrices import Matrix, block_matrices
from sae.lm.model import LanguageModel
from sae.organism.corpus import BEHAVIORS
from sae.organism.truth import Truth, read_planted, stage_one_weights
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.contrast import open_contrast, open_contrasts
from sae.stages.decomposition import Decomposed, write_carriers
from sae.weights.edit import Weights
from sae.weights.findings import (
    MethodRow,
    Scored,
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
from sae.weights.objective import margin_objective, passage_of, reply_objective
from sae.weights.surgery import Watch, Watched, harmless, prepare_watch

STAGE_ONE = "stage_one"
DECOMPOSITION = "decomposition"
DIRECTION = "direction"  # the level of ActSVD's singular directions
SHOWN = ("behavior", "method", "level", "auroc", "auprc", "base_rate", "decoy_share", "evaluations", "seed")
CUT = (
    "behavior", "method", "level", "fraction", "behavior_before", "behavior_after", "other_max_change", "kl_harmless",
    "random_after", "passed",
)  # fmt: skip

REPLY_TOKENS = 8
"""Tokens of the model's own replies that the utility is the cross entropy of."""


@dataclass
class Site:
    """What is the same for all methods of one behaviour; surgery's part is prepared when first asked for."""

    config: RunConfig
    lm: LanguageModel
    contrast: ContrastSet
    others: dict[str, Watched]
    facts: tuple[Any, ...]
    judge: Judge
    matrices: list[Matrix]
    reference: Weights | None
    planted: Truth | None
    folder: Path
    key: str
    decomposed: Decomposed | None = None
    ready: Watch | None = None

    @property
    def options(self) -> LocalizeConfig:
        """The stage's section of the configuration."""
        return self.config.localize

    @property
    def mode(self) -> str:
        """What cut weights become."""
        return self.options.mode or ("zero" if self.reference is None else "restore")

    def key_of(self, method: str) -> str:
        """What a method's record depends on."""
        if method != DECOMPOSITION or self.decomposed is None:
            return self.key
        return sha256_json([self.key, self.decomposed.key])

    def watch(self) -> Watch:
        """What surgery is watched by."""
        if self.ready is None:
            self.ready = prepare_watch(
                self.lm, Watched(self.contrast, self.judge), self.others, self.facts,
                n_quick=self.options.n_prompts, n_prompts=self.options.n_report,
                max_new_tokens=self.config.behavior.max_new_tokens,
            )  # fmt: skip
        return self.ready

    def problem(self, progress: Any) -> Problem:
        """What methods are given."""
        lm, n = self.lm, self.options.n_prompts
        split = self.contrast.split("find")
        calm = harmless(lm, split.negatives, self.judge, n, self.config.behavior.max_new_tokens)
        if not calm:
            raise UserError(f"{lm.name!r} shows {self.contrast.behavior!r} on every negative prompt: add others.")
        due = split.positives[:n]
        shown, other = (passage_of(own_replies(lm, prepare(lm, some), REPLY_TOKENS), lm.pad_id) for some in (due, calm))
        batch = self.options.batch_prompts
        return Problem(
            lm, self.matrices, margin_objective(lm, due, self.matrices, batch),
            reply_objective(lm, other, self.matrices, batch), shown, other,
            prepare_margins(lm, due, batch), self.reference,
            ranks=(self.options.rank, self.options.rank), ig_steps=self.options.ig_steps, progress=progress,
            decomposition=None if self.decomposed is None else functools.partial(self.decomposed.open, progress),
            n_measured=self.options.decomposition.n_measured,
        )  # fmt: skip


class Reference(NamedTuple):
    """Another model's matrices, and what identifies them."""

    weights: Weights | None
    fingerprint: str


def open_reference(name: str, lm: LanguageModel, matrices: list[Matrix], planted: Truth | None) -> Reference:
    """The matrices of a reference: "" for none, "stage_one" for the organism before planting, or a model's name.

    Raises:
        UserError: a model of other matrices, or stage one of a model that has no planted truth.
    """
    if not name:
        return Reference(None, "")
    own = {matrix.name: matrix.parameter.detach() for matrix in matrices}
    if name == STAGE_ONE:
        if planted is None:
            raise UserError(
                f"{lm.name!r} has no planted truth, hence no stage one: name a model as localize.reference."
            )
        parameters = {key: value.clone() for key, value in own.items()}
        return Reference(parameters | stage_one_weights(parameters, planted), STAGE_ONE)
    base = load_lm(name, device=lm.device)
    other = {matrix.name: matrix.parameter.detach() for matrix in block_matrices(base)}
    for key, value in own.items():
        if key not in other or other[key].shape != value.shape:
            raise UserError(
                f"{name!r} has no matrix like {key!r} of {lm.name!r}: give a model of the same architecture."
            )
    return Reference({key: other[key] for key in own}, base.fingerprint)


def run(config: RunConfig) -> None:
    """Run the stage."""
    common.refuse_pair(config.lm, "localize")
    options = config.localize
    levels = _checked_levels(options.level)
    lm = common.open_lm(config.lm)
    matrices = block_matrices(lm)
    planted = _planted(lm)
    methods = chosen_methods(options.method, bool(options.reference))
    if options.mode == "restore" and not options.reference:
        raise UserError("localize.mode=restore needs a model to restore from: name it as localize.reference.")
    clock, folder = common.Clock(), config.folder / "localize"
    sets = {name: item.contrast for name, item in open_contrasts(config, lm).items()}
    for name, contrast in sets.items():
        if contrast.unanswerable:
            raise UserError(f"the contrast set of {name!r} cannot be used here, since {contrast.unanswerable}.")
    reference = open_reference(options.reference, lm, matrices, planted)
    inputs = {"lm": common.model_key(lm)} | {name: sha256_json(contrast.records) for name, contrast in sets.items()}
    inputs |= {"reference": reference.fingerprint}
    if planted is not None and lm.folder is not None:
        inputs |= {"planted": sha256_file(lm.folder / "planted.safetensors")}
    if common.skip(config, folder, options, inputs):
        return
    rows: list[MethodRow] = []
    cuts: list[dict[str, Any]] = []
    decomposed = Decomposed(options.decomposition, lm, matrices, sets, folder) if DECOMPOSITION in methods else None
    for name, contrast in sets.items():
        site = _site(config, lm, contrast, sets, matrices, reference.weights, planted, folder / name, inputs)
        site.decomposed = decomposed
        with Progress(None, f"localize {name}", unit="step") as bar:
            for record in _records(site, methods, levels, bar):
                rows += [MethodRow(**row) for row in record["methods"]]
                cuts += record["surgery"]
    result = {"schema_version": 1, "methods": rows, "surgery": cuts, "seeds": seeds_rows(rows)}
    result |= {"decomposition": None if decomposed is None else decomposed.evaluation()}
    result |= {"settings": options, "n_weights": sum(one.parameter.numel() for one in matrices)}
    write_json(folder / "result.json", result | {"wall_s": clock.seconds()})
    write_manifest(folder, "localize", options, inputs)
    print(summary_table([row._asdict() for row in rows], list(SHOWN)))
    if cuts:
        print(summary_table(cuts, list(CUT)))
    print(f"{folder}: {', '.join(sets)} in {clock.seconds():.1f} s")


def _checked_levels(levels: list[str]) -> list[str]:
    known = [*LEVELS, DIRECTION]
    found: list[str] = []
    for level in levels:
        if level not in (*known, "all"):
            raise unknown("level", level, ["all", *known])
        found += known if level == "all" else [level]
    return list(dict.fromkeys(found))


def _planted(lm: LanguageModel) -> Truth | None:
    """The planted truth beside the model's weights, if there is one that was measured."""
    if lm.folder is None or not (lm.folder / "planted.json").is_file():
        return None
    found = read_planted(lm.folder)
    return found if len(found.margins) else None


def _site(
    config: RunConfig,
    lm: LanguageModel,
    contrast: ContrastSet,
    sets: Mapping[str, ContrastSet],
    matrices: list[Matrix],
    reference: Weights | None,
    planted: Truth | None,
    folder: Path,
    inputs: dict[str, str],
) -> Site:
    # The organism's judges know its grammar; they fit its own contrast sets, not a file that shares a name with one.
    own = {name for name in config.behavior.contrast if name in BEHAVIORS}
    others = dict(sets)
    facts: tuple[Any, ...] = ()
    if common.is_organism(lm):
        others = {name: open_contrast(name, config, lm) for name in BEHAVIORS} | others
        facts = open_contrast("deception", config, lm).split("report").negatives
        own |= set(BEHAVIORS) - set(sets)
    judges = {name: judge_for(name, common.ORGANISM if name in own else "") for name in others}
    behavior = contrast.behavior
    # What a record depends on: everything but which methods and levels are asked for. `key_of` adds a method's own.
    left_out = ("method", "level", DECOMPOSITION)
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
                if (level == DIRECTION and method != "act_svd") or not _reaches(method, level):
                    continue
                path = site.folder / f"{method}-{level}-s{seed}.json"
                if not site.config.force and path.is_file() and read_json(path)["key"] == site.key_of(method):
                    yield read_json(path)
                    continue
                problem = problem or site.problem(progress)
                if method in PARAMETER_METHODS and level != DIRECTION:
                    sides = sides or Sides(method, problem)
                bar.update(1, now=f"{method} {level}")
                yield _made(site, problem, sides, method, level, seed, path)


def _reaches(method: str, level: str) -> bool:
    """Whether a method scores what is at a level: those that edit parts do not score single weights, chance does."""
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
        whole = isinstance(one.scores, dict)
        if whole and options.save_weights:
            tensors |= {f"{one.method}/{name}": values for name, values in one.scores.items()}  # type: ignore[union-attr]
        elif not whole:
            tensors[one.method] = torch.from_numpy(np.asarray(one.scores))
        if options.surgery:
            done = cut_out(
                site.watch(), one, site.matrices, options.fractions, mode=site.mode, reference=site.reference,
                n_random=options.n_random,
            )  # fmt: skip
            cuts.append(surgery_row(done, behavior, one.method, level, seed, site.mode))
    if tensors:
        write_tensors(path.with_suffix(".safetensors"), tensors)
    if method == DECOMPOSITION and site.decomposed is not None:
        write_carriers(site.folder, site.decomposed.folder, problem.carriers)
    record = {"schema_version": 1, "key": site.key_of(method), "methods": rows, "surgery": cuts}
    record["parts"] = [part.label for part in found[0].parts] if found else []
    write_json(path, record)
    plain: dict[str, Any] = read_json(path)
    return plain


def _scored(site: Site, problem: Problem, sides: Sides | None, method: str, level: str, seed: int) -> list[Scored]:
    """A method's scores at a level, with its differences."""
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
