"""`sae behavior`: find the latents behind a behaviour, and test causally whether they control it.

`behavior.contrast` lists what to search for: see `sae.stages.contrast`, which also audits the sets before any latent is
ranked.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae.autoencoder.sae import SAE, read_config
from sae.behavior.causal import Beside
from sae.behavior.contrast import ContrastRecord, ContrastSet
from sae.behavior.cost import MultipleChoice, OtherBehavior, choice_task, read_choices
from sae.behavior.decoys import planted_directions
from sae.behavior.find import find_behavior
from sae.behavior.findings import BehaviorReport
from sae.behavior.judges.identity import judge_key
from sae.behavior.judges.registry import judge_for, panel
from sae.behavior.results import CausalReport
from sae.behavior.settings import BehaviorSettings
from sae.config import MISSING, RunConfig
from sae.errors import UserError
from sae.files import sha256_json, to_plain, write_json, write_manifest
from sae.lm.model import LanguageModel
from sae.lm.tokens import TokenBatch
from sae.organism.corpus import BEHAVIORS
from sae.report.outcome import outcome_text
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.contrast import Opened, confounds, open_contrast, open_contrasts, open_lookalikes
from sae.stages.evaluate import padded_batches
from sae.stages.harvest import ensure_tokens
from sae.stages.opened import opened_saes
from sae.stages.report import write as write_page
from sae.stages.train import ensure_trained, make_grid
from sae.train.controls import TRAINED
from sae.train.grid import SAESpec

# The flat fields every behaviour's record has, whatever else stands beside them.
SUMMARY = (
    "hook_name",
    "latents",
    "base_rate",
    "ablate_rate",
    "ablate_restored_rate",
    "ablate_degenerate_rate",
    "clamp_base_rate",
    "clamp_rate",
    "clamp_degenerate_rate",
    "random_ablate_mean",
    "random_clamp_mean",
    "direction_ablate_rate",
    "direction_add_rate",
    "kl_harmless",
    "fact_accuracy",
    "selected",
    "effect",
    "random_latents",
    "random_directions",
    "dose_spearman",
    "decoy_share",
    "null_share",
    "null_share_protocol",
)


class GivenBeside(NamedTuple):
    """What costs are measured on besides the contrast sets and the run's text."""

    lookalikes: list[ContrastRecord]
    choices: list[MultipleChoice]


def make_settings(config: RunConfig) -> BehaviorSettings:
    """The protocol's settings."""
    options = config.behavior
    return BehaviorSettings(
        positions=tuple(options.positions),
        filter=options.filter,
        max_latents=options.max_latents,
        n_random=options.n_random,
        n_random_per_size=min(options.n_random, 20),
        n_prompts=options.n_prompts,
        n_prompts_random=options.n_prompts_random,
        null_runs=options.null_runs,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )


def ensure_behaviors(config: RunConfig, lm: LanguageModel) -> dict[str, Any]:
    """Run the protocol for every configured behaviour, or read its results. Return `result.json`."""
    # What can be refused is read before SAEs are trained for it.
    opened = open_contrasts(config, lm)
    contrasts = {name: item.contrast for name, item in opened.items()}
    _refuse_unanswerable(contrasts)
    folder = config.folder / "behavior"
    settings = make_settings(config)
    beside = read_beside(config, lm)
    paths = _paths(config, lm)
    clock = common.Clock()
    inputs = {"lm": common.model_key(lm)} | common.sae_inputs(paths, folder) | text_inputs(config, opened, beside)
    inputs |= judge_inputs(contrasts, config, lm)
    if common.skip(config, folder, settings, inputs):
        return common.read_result(folder)
    saes = [SAE.load(path, device=lm.device) for path in paths]
    found = {}
    for name, contrast in contrasts.items():
        audited = confounds(name, opened[name], tokenizer=lm.tokenizer, seed=settings.seed)
        report = _find(lm, saes, contrast, contrasts, settings, config, beside)
        found[name] = summarise(report, paths) | {
            "confounds": audited,
            "provenance": to_plain(opened[name].given.provenance),
        }
        _print(name, report, found[name])
    result = {"schema_version": 1, "behaviors": found, "settings": settings, "wall_s": clock.seconds()}
    write_json(folder / "result.json", result)
    _log(config, folder, found)
    write_manifest(folder, "behavior", settings, inputs)
    print(f"{folder}: {', '.join(found)} in {clock.seconds():.1f} s, {settings.n_random} random draws a control")
    return common.read_result(folder)


def _refuse_unanswerable(contrasts: Mapping[str, ContrastSet]) -> None:
    for name, contrast in contrasts.items():
        if contrast.unanswerable:
            raise UserError(
                f"the contrast set of {name!r} cannot be tested by generating, since {contrast.unanswerable}: use it "
                "in Python for directions and probes, and give `sae behavior` another."
            )


def _paths(config: RunConfig, lm: LanguageModel) -> list[Path]:
    """The SAEs to search: those of `behavior.saes`, else the run's own that serve.

    Raises:
        UserError: there are none; one that is named is not an SAE of one of the model's hook points.
    """
    if config.behavior.saes:
        paths = opened_saes(config, config.behavior.saes)
        for path in paths:
            found = read_config(path)
            if found.site.kind != "sae":
                raise UserError(
                    f"{str(path)!r} is a {found.site.kind}: behaviours are looked for in SAEs of one hook point."
                )
            remedy = f"train.start={path} goes on with it here"
            common.check_belongs(lm, found, path, force=False, remedy=remedy)
        return paths
    trained = zip(ensure_trained(common.as_needed(config), lm), make_grid(config, lm), strict=True)
    paths = [path for path, spec in trained if _serves(spec)]
    if not paths:
        raise UserError(
            f"none of the SAEs of {config.name!r} reads and writes one hook point and was trained without a control: "
            "behaviours are looked for in such SAEs; leave sae.sites and sae.control out."
        )
    return paths


def _find(
    lm: LanguageModel,
    saes: list[SAE],
    contrast: ContrastSet,
    contrasts: Mapping[str, ContrastSet],
    settings: BehaviorSettings,
    config: RunConfig,
    given: GivenBeside,
) -> BehaviorReport:
    built_in = _built_in(config)
    others = {
        name: OtherBehavior(other.split("report").records, judge_for(name, judged_as(name, built_in, lm)))
        for name, other in contrasts.items()
    }
    facts = None
    if common.is_organism(lm):
        # The organism's other planted behaviours and its facts are side effects whatever is searched for.
        planted = {name: open_contrast(name, config, lm).split("report") for name in BEHAVIORS}
        facts = planted["deception"].negatives
        others |= {
            name: OtherBehavior(other.records, judge_for(name, common.ORGANISM))
            for name, other in planted.items()
            if name not in contrasts
        }
    with Progress(None, f"behavior {contrast.behavior}", unit="step") as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.update(1, now=f"{what} {done}/{total}")

        return find_behavior(
            lm,
            saes,
            contrast,
            judge_for(contrast.behavior, judged_as(contrast.behavior, built_in, lm)),
            settings,
            beside=Beside(
                facts=facts,
                others={name: other for name, other in others.items() if name != contrast.behavior},
                lookalikes=given.lookalikes,
                text=_text(config, lm),
                choices=given.choices,
                panel=panel(contrast.behavior, judged_as(contrast.behavior, built_in, lm)),
                planted=planted_directions(lm.folder),
            ),
            progress=progress,
        )


def text_inputs(config: RunConfig, opened: Mapping[str, Opened], beside: GivenBeside) -> dict[str, str]:
    """Hashes of all prompts and texts that the stage's results depend on."""
    found = {name: sha256_json(item.contrast.records) for name, item in opened.items()}
    text = [] if config.data.path == MISSING else [config.data, config.eval.batch_tokens]
    # The audit is of the sets as they were before they were balanced, too.
    given = [item.given.records for item in opened.values()]
    return found | {"behavior.beside": sha256_json([beside, text]), "behavior.given": sha256_json(given)}


def judge_inputs(contrasts: Mapping[str, ContrastSet], config: RunConfig, lm: LanguageModel) -> dict[str, str]:
    """Hashes of the judges of every behaviour that is judged: the one that decides, and those beside it."""
    models = {name: judged_as(name, _built_in(config), lm) for name in contrasts}
    if common.is_organism(lm):
        models = dict.fromkeys(BEHAVIORS, common.ORGANISM) | models
    panels = {name: panel(name, model) for name, model in models.items()}
    return {
        f"judges.{name}": sha256_json([[label, judge_key(judge)] for label, judge in judges.items()])
        for name, judges in panels.items()
    }


def _built_in(config: RunConfig) -> set[str]:
    # The organism's judges know its grammar; they fit its own contrast sets, not a file that shares a name with one.
    return {name for name in config.behavior.contrast if name in BEHAVIORS}


def read_beside(config: RunConfig, lm: LanguageModel) -> GivenBeside:
    """Read what is named in the configuration, before anything is run or written."""
    choices = read_choices(config.behavior.choices) if config.behavior.choices else []
    choice_task(lm, choices)  # refuses choices that this model cannot tell apart
    return GivenBeside(open_lookalikes(config, lm), choices)


def _text(config: RunConfig, lm: LanguageModel) -> list[TokenBatch]:
    """A batch of the run's held-out text; nothing where the run has none, or only the organism's, of another world."""
    if config.data.path == MISSING or (config.data.path == common.ORGANISM and not common.is_organism(lm)):
        return []
    held_out = ensure_tokens(common.as_needed(config), lm).corpus.held_out
    return list(itertools.islice(padded_batches(held_out, config.eval.batch_tokens, lm.device), 1))


def judged_as(name: str, built_in: set[str], lm: LanguageModel) -> str:
    """The model name that a behaviour's judge is looked up by: none for a set of one's own read by the organism."""
    return common.ORGANISM if name in built_in else "" if common.is_organism(lm) else lm.name


def _serves(spec: SAESpec) -> bool:
    """Whether behaviours are looked for in an SAE: not in transcoders and crosscoders, nor in what is a control."""
    return spec.site.kind == "sae" and spec.control == TRAINED


def summarise(report: BehaviorReport, paths: list[Path]) -> dict[str, Any]:
    """One behaviour's record in `result.json`."""
    record = to_plain(report)
    causal = record.pop("causal")
    record["n_random"] = 0 if causal is None else causal["n_random"]
    record["path"] = None if report.encoder is None else str(paths[report.encoder])
    record["ranking"] = [{**entry, **_interval(entry)} for entry in record["ranking"]]
    record["side_effects"] = _side_effects(record)
    record["selected"] = [] if causal is None else causal["latents"]
    record["effect"] = (
        None if causal is None or causal["random_latents"] is None else causal["random_latents"]["effect"]
    )
    record["judges"] = None if causal is None else causal.pop("judges")
    return {**dict.fromkeys(SUMMARY), **record, **(causal or {})}


def _side_effects(record: dict[str, Any]) -> dict[str, Any]:
    """What removing and adding cost, by method; `none` is the model by itself."""
    found = {"none": {"remove": record.pop("base_cost"), "add": None}}
    for name, rival in record["rivals"].items():
        found[name] = {"remove": rival["remove_cost"], "add": rival["add_cost"]}
    return found if record["rivals"] else {}


def _interval(entry: dict[str, Any]) -> dict[str, Any]:
    """An AUROC's interval, flattened beside it."""
    interval = entry.get("interval")
    if isinstance(interval, dict):
        return {"low": interval.get("low"), "high": interval.get("high")}
    return {}


def _print(name: str, report: BehaviorReport, record: Mapping[str, Any]) -> None:
    print(f"\n{name}: {report.n_significant:,} of {report.n_tested:,} latents pass on the find split")
    if report.causal is None:
        passed = "none of them fires more where the behaviour is due" if report.n_significant else "none"
        print(f"{passed}: nothing was found that could be ablated, so nothing is claimed")
        return
    print(summary_table([_row(table) for table in report.per_size], list(_row(report.causal))))
    print(f"\n{outcome_text(name, record)}")


def _row(table: CausalReport) -> dict[str, Any]:
    return {
        "hook_name": table.hook_name,
        "d_sae": table.d_sae,
        "latents": table.latents,
        "base": table.base_rate,
        "ablated": table.ablate_rate,
        "restored": table.ablate_restored_rate,
        "random": table.random_ablate_mean,
        "unclamped": table.clamp_base_rate,
        "clamped": table.clamp_rate,
        "random clamp": table.random_clamp_mean,
    }


def _log(config: RunConfig, folder: Path, found: Mapping[str, Any]) -> None:
    """Put the ranked latents into the metric sink as a table a person can sort."""
    with common.open_sink(config, folder, "behavior") as sink:
        for name, record in found.items():
            ranking = record["ranking"]
            if ranking:
                columns = [key for key, value in ranking[0].items() if not isinstance(value, dict)]
                sink.table(f"latents_{name}", columns, [[entry.get(key) for key in columns] for entry in ranking])
            sink.summary({f"{name}/{key}": record[key] for key in SUMMARY if key in record})


def run(config: RunConfig) -> None:
    """Run the stage."""
    common.refuse_pair(config.lm, "behavior")
    ensure_behaviors(config, common.open_lm(config.lm))
    print(write_page(config))
