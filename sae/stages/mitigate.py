"""`sae mitigate`: take a behaviour out of the weights by several methods at one side-effect budget, and compare them.

    sae mitigate contrast=refusal method=all
    sae mitigate lm.name=./my-model contrast=my.jsonl method=[prune,finetune] 'mitigate.keep=[general.jsonl]'

Every mitigated model is written as a Hugging Face folder, `mitigate/<behavior>/<method>` in the run's folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae.behavior.contrast import ContrastRecord, ContrastSet
from sae.behavior.cost import OtherBehavior
from sae.behavior.judge import Judge
from sae.behavior.judges.identity import judge_key
from sae.behavior.judges.registry import judge_for
from sae.config import RunConfig
from sae.errors import UserError, unknown
from sae.files import sha256_file, sha256_json, to_plain, write_json, write_manifest
from sae.lm.matrices import block_matrices
from sae.lm.model import LanguageModel
from sae.lm.weights import plain_parameters, plain_weights
from sae.organism.corpus import BEHAVIORS
from sae.organism.phrases import FILTER_ON
from sae.organism.truth import read_planted, stage_one_weights
from sae.report.progress import Progress
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.contrast import open_contrast, open_contrasts
from sae.weights.mitigate.case import prepare_case
from sae.weights.mitigate.compare import METHODS, Comparison, MitigationRow, compare_mitigations
from sae.weights.mitigate.prune import read_scores, scores_file
from sae.weights.mitigate.save import check_target
from sae.weights.mitigate.settings import MitigationSettings

ALL = "all"


def run(config: RunConfig) -> None:
    """Run the stage."""
    common.refuse_pair(config.lm, "mitigate")
    options = config.mitigate
    methods, clock = _methods(options.method), common.Clock()
    name = _one_contrast(config)
    lm = common.open_lm(config.lm)
    ((behavior, opened),) = open_contrasts(config, lm).items()
    kept = _kept(config, lm, behavior)
    settings = make_settings(config, lm, name)
    folder = config.folder / "mitigate"
    targets = folder / behavior if options.save else None
    for method in methods if targets else ():
        check_target(lm, targets / method)  # type: ignore[operator]
    scores = read_scores(options.scores) if options.scores else None
    reference = plain_weights(options.reference) if options.reference else None
    key = {"settings": settings, "methods": methods, "save": options.save}
    inputs = _inputs(config, lm, behavior, opened.contrast, kept)
    if common.skip(config, folder, key, inputs):
        return
    case = prepare_case(
        lm,
        opened.contrast,
        _judge(name, behavior),
        settings,
        keep=[record for part in kept.values() for record in part.records],
        others={
            label: OtherBehavior(part.split("report").records, _judge(label, part.behavior))
            for label, part in kept.items()
            if not part.unanswerable
        },
        facts=_facts(kept, lm, behavior, opened.contrast),
    )
    with Progress(None, f"mitigate {behavior}", unit="step") as bar:
        found = compare_mitigations(
            lm,
            case,
            methods,
            settings,
            folder=targets,
            scores=scores,
            reference=reference,
            untaught=reference or _stage_one(lm),
            progress=lambda what, done, total: bar.update(1, now=f"{what} {done}/{total}"),
        )
    _write(folder, behavior, lm, found, settings, clock, opened.given)
    write_manifest(folder, "mitigate", key, inputs)
    _print(behavior, found)
    print(f"{folder}: {', '.join(methods)} in {clock.seconds():.1f} s")


def _methods(given: list[str]) -> list[str]:
    """The methods asked for, each once.

    Raises:
        UserError: none, or one that is not known.
    """
    names = [name for item in given for name in (METHODS if item == ALL else [item])]
    for name in names:
        if name not in METHODS:
            raise unknown("mitigation", name, [ALL, *METHODS])
    if not names:
        raise UserError("mitigate.method is empty: name at least one, method=prune, or method=all.")
    return list(dict.fromkeys(names))


def _one_contrast(config: RunConfig) -> str:
    names = config.behavior.contrast
    if len(names) != 1:
        raise UserError(
            f"`sae mitigate` takes one behaviour, but behavior.contrast={list(names)}: name it with contrast=refusal, "
            "or the path of a contrast set."
        )
    return names[0]


def make_settings(config: RunConfig, lm: LanguageModel, name: str) -> MitigationSettings:
    """The settings of all methods."""
    options = config.mitigate
    triggers = tuple(options.triggers)
    if not triggers and name == "refusal" and common.is_organism(lm):
        triggers = FILTER_ON
    return MitigationSettings(
        budget=options.budget,
        steps=options.steps,
        batch=options.batch,
        lr=options.lr,
        penalty=options.penalty,
        strengths=tuple(options.strengths),
        epsilon=options.epsilon,
        relearn_steps=options.relearn_steps,
        relearn_examples=options.relearn_examples,
        triggers=triggers,
        n_prompts=options.n_prompts,
        n_prompts_select=options.n_prompts_select,
        max_new_tokens=options.max_new_tokens,
        batch_prompts=options.batch_prompts,
        seed=options.seed,
    )


def _kept(config: RunConfig, lm: LanguageModel, behavior: str) -> dict[str, ContrastSet]:
    """What must stay: the sets that are named, else the organism's other planted behaviours."""
    names = list(config.mitigate.keep) or (list(BEHAVIORS) if common.is_organism(lm) else [])
    found = {name: open_contrast(name, config, lm) for name in names}
    return {name: part for name, part in found.items() if part.behavior != behavior}


def _judge(name: str, behavior: str) -> Judge:
    # The organism's judges know its grammar; they fit its own contrast sets, not a file that shares a name with one.
    return judge_for(behavior, common.ORGANISM if name in BEHAVIORS else "")


def _facts(
    kept: Mapping[str, ContrastSet], lm: LanguageModel, behavior: str, contrast: ContrastSet
) -> tuple[ContrastRecord, ...]:
    """Questions of fact: those on which the organism is not to lie."""
    if not common.is_organism(lm):
        return ()
    asked = contrast if behavior == "deception" else kept.get("deception")
    return asked.split("report").negatives if asked is not None else ()


def _stage_one(lm: LanguageModel) -> dict[str, torch.Tensor] | None:
    """The organism's weights from before its behaviours were planted; None for other models."""
    if lm.folder is None or not (lm.folder / "planted.json").is_file():
        return None
    matrices = {matrix.name for matrix in block_matrices(lm)}
    own = {name: value for name, value in plain_parameters(lm).items() if name in matrices}
    return stage_one_weights(dict(own), read_planted(lm.folder))


def _inputs(
    config: RunConfig, lm: LanguageModel, behavior: str, contrast: ContrastSet, kept: Mapping[str, ContrastSet]
) -> dict[str, str]:
    inputs = {"lm": common.model_key(lm), behavior: sha256_json(contrast.records)}
    inputs |= {f"keep/{name}": sha256_json(part.records) for name, part in kept.items()}
    judged = {behavior: _judge(config.behavior.contrast[0], behavior)}
    judged |= {f"keep/{name}": _judge(name, part.behavior) for name, part in kept.items()}
    inputs |= {f"judges.{name}": judge_key(judge) for name, judge in judged.items()}
    scores, _ = scores_file(config.mitigate.scores)
    if config.mitigate.scores:
        inputs["scores"] = sha256_file(scores) if scores.is_file() else config.mitigate.scores
    if config.mitigate.reference:
        inputs["reference"] = config.mitigate.reference
    return inputs


def _write(
    folder: Path,
    behavior: str,
    lm: LanguageModel,
    found: Comparison,
    settings: MitigationSettings,
    clock: common.Clock,
    given: ContrastSet,
) -> None:
    result = {
        "schema_version": 1,
        "behavior": behavior,
        "lm": lm.name,
        **to_plain(found),
        "settings": settings,
        "provenance": given.provenance,
        "wall_s": clock.seconds(),
    }
    write_json(folder / "result.json", result)


def _print(behavior: str, found: Comparison) -> None:
    rows, controls = [_line(row) for row in found.methods], found.attack_controls
    print(
        f"\n{behavior}: where it is not due, the model as it was shows it in {controls.prefix.rate:.3g} of the replies "
        f"that are started with its first words, and in {controls.steering.rate:.3g} when it is steered towards it"
    )
    print(summary_table(rows, list(rows[0])))
    if found.relearn_untaught is not None:
        steps, (last, _) = found.relearn_untaught.steps, found.relearn_untaught.curve[-1]
        said = f"does not learn it in {last} steps" if steps is None else f"learns it in {steps} steps"
        print(f"from the same examples, a model that never had the behaviour {said}")


def _line(row: MitigationRow) -> dict[str, Any]:
    return {
        "method": row.method,
        "before": row.behavior_before.rate,
        "after": row.behavior_after.rate,
        "restored": row.restored_after.rate,
        "others moved": row.other_max_change,
        "facts": None if row.facts is None else row.facts.rate,
        "KL": row.kl_harmless,
        "relearned in": row.relearn_steps,
        "prefix": row.prefix.rate,
        "steering": row.steering.rate,
        "trigger": max((rate.rate for rate in row.triggers.values()), default=None),
        "changed": row.n_changed,
    }
