"""`sae demo`: the whole path on one model, from text to a behaviour that is found, proven and clamped.

On the model organism (the default) everything runs. On a real model (`lm.name=... data.path=...`) the behaviour stage
is left out unless `behavior.contrast` names a contrast set for it.

`runs/demo` is scratch space: a demo of other settings replaces it, unless it is given a `name=` of its own.
Writes `<run>/result.json`, whose fields are described in docs/results.md, and `<run>/report.html`.
"""

import shutil
from pathlib import Path
from typing import Any

from sae.config import RunConfig
from sae.files import read_json, sha256_json, write_json
from sae.lm.load import resolve_model
from sae.lm.model import LanguageModel
from sae.organism.corpus import BEHAVIORS
from sae.report.terminal import clean, summary_table
from sae.stages import common, organism, relations, report
from sae.stages.behavior import SUMMARY, ensure_behaviors
from sae.stages.evaluate import ensure_evaluated
from sae.stages.groups import NothingToRelate

SAE_FIELDS = ("hook_name", "d_sae", "architecture", "l0", "fvu", "ce_recovered", "dead_fraction", "path")
BESIDE = ("d_sae", "path", "n_random", "n_records", "unfiltered_base_rate", "unfiltered_clamp_base_rate", "per_size")
EXAMPLES_SHOWN = 2
SCRATCH = "demo"  # the run that `sae demo` uses unless it is given a name
MARKER = "demo.json"
MADE = ("organism", "tokens", "harvest", "train", "eval", "behavior")


def run(config: RunConfig) -> None:
    """Run the stage."""
    common.refuse_pair(config.lm, "demo")
    clock = common.Clock()
    lm = common.open_lm(config.lm)
    _make_room(config)
    config = common.as_needed(config)
    table = _gate_table(config, lm)
    saes = ensure_evaluated(config, lm)
    _relate(config, lm)
    behaviors = _behaviors(config, lm)
    result = {
        "schema_version": 1,
        "lm": lm.name,
        "saes": [{name: sae[name] for name in SAE_FIELDS} for sae in saes],
        "behaviors": {
            name: {key: record.get(key) for key in (*SUMMARY, *BESIDE)} for name, record in behaviors.items()
        },
        "organism": table,
        "wall_s": clock.seconds(),
    }
    path = config.folder / "result.json"
    write_json(path, result)
    page = report.write(config)
    _print(behaviors, config)
    print(f"\n{path}\n{page}\ndone in {clock.seconds():.0f} s")


def _make_room(config: RunConfig) -> None:
    """Clear away what a demo of other settings left in `runs/demo`, which is scratch space; named runs are kept.

    With `force=true` what a demo makes goes first, whatever the name: stages would otherwise find it done.
    """
    marker, identity = config.folder / MARKER, sha256_json(common.as_needed(config))
    if config.name == SCRATCH and marker.is_file() and read_json(marker) != identity:
        shutil.rmtree(config.folder)
    if config.force:
        for stage in MADE:
            shutil.rmtree(config.folder / stage, ignore_errors=True)
    if not marker.is_file():
        write_json(marker, identity)


def _gate_table(config: RunConfig, lm: LanguageModel) -> list[dict[str, Any]] | None:
    """The organism's behaviour under every gate setting; None for a model without gates."""
    folder = Path(resolve_model(lm.name))
    if not common.is_organism(lm) or not (folder / organism.GATED).is_file():
        return None
    print(
        f"{lm.name} is a planted ground truth: it tests methods, and is no evidence about natural models.\n"
        "Its behaviour with each planted block open and closed:"
    )
    table: list[dict[str, Any]] = organism.measure(config, folder)["table"]
    return table


def _relate(config: RunConfig, lm: LanguageModel) -> None:
    """What becomes of latents from size to size; a grid of one size and seed has nothing to relate."""
    try:
        relations.ensure_related(config, lm)
    except NothingToRelate as reason:
        print(f"sizes are not related: {reason}")


def _behaviors(config: RunConfig, lm: LanguageModel) -> dict[str, Any]:
    """The behaviour stage's records; none for a model that has no contrast set."""
    own = [name for name in config.behavior.contrast if name not in BEHAVIORS]
    if not common.is_organism(lm) and not own:
        print(
            f"no contrast set is configured for {lm.name}, so the behaviour stage is left out: "
            "behavior.contrast=[path/to/prompts.jsonl] adds it."
        )
        return {}
    print(f"{config.behavior.n_random} random draws a control; `sae behavior` uses 200 unless told otherwise.")
    behaviors: dict[str, Any] = ensure_behaviors(config, lm)["behaviors"]
    return behaviors


def _print(behaviors: dict[str, Any], config: RunConfig) -> None:
    """The verdict of each behaviour, and what the model says before and after."""
    rows = [
        {
            "behavior": name,
            "latents": record["latents"],
            "base": record["base_rate"],
            "ablated": record["ablate_rate"],
            "random": record["random_ablate_mean"],
            "unclamped": record["clamp_base_rate"],
            "clamped": record["clamp_rate"],
            "random clamp": record["random_clamp_mean"],
        }
        for name, record in behaviors.items()
        if record["latents"] is not None
    ]
    if rows:
        print("\nheld-out prompts, never used for choosing:")
        print(summary_table(rows, list(rows[0])))
    for name, record in behaviors.items():
        for what in ("ablate", "clamp"):
            shown = [example for example in record.get("examples") or [] if example["what"] == what]
            for example in shown[:EXAMPLES_SHOWN]:
                print(f"\n{name}, {what}: {clean(example['prompt'])}")
                print(f"  before  {clean(example['base'])}\n  after   {clean(example['steered'])}")
