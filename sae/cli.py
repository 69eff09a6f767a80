"""The command line: `sae <stage> key=value ...`.

Options are Hydra overrides: groups choose presets (`lm=gemma-2-2b-it`), keys change single values
(`sae.d_sae=[512,2048]`), `-m` runs every combination of comma-separated values, `--cfg job` prints the composed
configuration, `--config-dir DIR` adds a folder of your own presets.
"""

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sae.errors import UserError, unknown


class Stage(NamedTuple):
    """One entry of the command line."""

    module: str
    summary: str


RECIPE = "recipe.json"  # in a run's folder: the settings it was begun with
# What is said for one command only, and is no part of a run's settings:
ONCE = (
    "force=",
    "steer.",
    "convert.",
    "localize.",
    "wiring.",
    "mitigate.",
    "organism.action=",
    "suite=",
    "bench.",
    "plan=",
    "eval.saes=",
    "eval.force=",
)
# Stages that try values out: a run's own of these keys do not reach them, nor do theirs become the run's. What else
# they are given is remembered only where the run has no value yet.
TRIALS = {"l0": ("sae.l0=",), **dict.fromkeys(("mitigate", "circuit", "wiring"), ("behavior.contrast=",))}

# What a stage may leave out of its keys:
SHORT = {
    "audit": {name: f"behavior.{name}={{}}" for name in ("contrast", "root", "balance")},
    "behavior": {name: f"behavior.{name}=[{{}}]" for name in ("contrast", "saes", "positions")}
    | {name: f"behavior.{name}={{}}" for name in ("root", "balance", "null_runs", "n_random", "lookalikes", "choices")},
    "circuit": {
        "contrast": "behavior.contrast=[{}]",
        **{name: f"circuit.{name}={{}}" for name in ("share", "corrupt", "latents")},
    },
    "l0": {"hook_name": "harvest.hook_names=[{}]", "d_sae": "sae.d_sae=[{}]"},
    "localize": {"contrast": "behavior.contrast=[{}]"}
    | {name: f"localize.{name}=[{{}}]" for name in ("method", "level")}
    | {"reference": "localize.reference={}"},
    "steer": {"recipe": "steer.recipe={}"},
    "mitigate": {
        "contrast": "behavior.contrast=[{}]",
        "method": "mitigate.method=[{}]",
        **{name: f"mitigate.{name}={{}}" for name in ("budget", "scores", "reference")},
    },
    "wiring": {
        "contrast": "behavior.contrast=[{}]",
        "latents": "wiring.latents={}",
    },
    "convert": {name: f"convert.{name}={{}}" for name in ("src", "dst", "format", "hook_name", "lm_name", "k")},
}

STAGES = {
    "demo": Stage("sae.stages.demo", "the whole path on one model, ending in a report"),
    "organism": Stage("sae.stages.organism", "train the model organism anew, or measure the one shipped"),
    "harvest": Stage("sae.stages.harvest", "text -> tokens -> activations -> store on disk"),
    "train": Stage("sae.stages.train", "train a grid of autoencoders from one stream"),
    "l0": Stage("sae.stages.l0", "compare values of L0 and suggest one (hook_name=... d_sae=...)"),
    "eval": Stage(
        "sae.stages.evaluate", "reconstruction and spliced cross-entropy on held-out tokens; suite=... for more"
    ),
    "behavior": Stage("sae.stages.behavior", "find the latents behind a behaviour and test them causally"),
    "audit": Stage("sae.stages.audit", "can a contrast set's classes be told apart by their looks? (contrast=[...])"),
    "circuit": Stage("sae.stages.circuit", "the smallest graph of parts that keeps a behaviour (contrast=...)"),
    "convert": Stage("sae.stages.convert", "write an SAE in another library's format (src=... dst=... format=...)"),
    "localize": Stage("sae.stages.localize", "which weights carry a behaviour (contrast=... method=all level=...)"),
    "wiring": Stage("sae.stages.wiring", "which parts write and read the latents that were found, or wiring.sae=..."),
    "steer": Stage("sae.stages.steer", "generate with a latent clamped, or recipe=..., beside the model's own words"),
    "mitigate": Stage(
        "sae.stages.mitigate",
        "take a behaviour out of the weights, and see how well that holds (contrast=... method=...)",
    ),
    "report": Stage("sae.stages.report", "write the run's self-contained HTML page"),
    "bench": Stage("sae.stages.bench", "time this package beside its peers (suite=train, ..., all)"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage. Exits with 0, 2 for a user's mistake, 130 when interrupted, 1 for anything unforeseen."""
    # Before torch is imported: threads that spin while they wait make small steps 20 times slower on a shared core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    name, overrides = arguments[0], arguments[1:]
    if name in ("--version", "version"):
        from importlib.metadata import version

        print(version("sae"))
        return
    try:
        if name not in STAGES:
            raise unknown("stage", name, list(STAGES), "`sae --help` lists them.")
        if name == "organism" and overrides[:1] == ["train"]:
            overrides = ["organism.action=train", *overrides[1:]]
        if name in SHORT:
            overrides = [_spelled_out(item, SHORT[name]) for item in overrides]
        _run_hydra(name, overrides)
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "stopped; what is finished is kept, and the same command goes on from there.", 130)


def _spelled_out(override: str, short: Mapping[str, str]) -> str:
    """The override in full, where a stage has a short form for its key."""
    key, _, value = override.partition("=")
    if key not in short:
        return override
    full = short[key].replace("[{}]", "{}") if value.startswith("[") else short[key]  # a list, or a list's one item
    return full.format(value)


def _run_hydra(stage: str, given: list[str]) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sae import config, plugins

    config.register()
    # Hydra would print a trace of its own and exit; we want the exception, to say it in one sentence.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra takes flags before or after all overrides, but not among them; people write them anywhere.
    overrides = [item for item in given if "=" in item and not item.startswith("-")]
    flags = [item for item in given if item not in overrides]
    # Keys that no schema knows: Hydra takes them only when told to add them.
    overrides = [f"++{item}" if item.startswith(config.FREE) else item for item in overrides]
    recipe = _recipe(stage, overrides)

    def job(composed: Any) -> None:
        where = ""
        try:
            built = config.build(composed)
            built.job = _job_name()
            if built.plan and stage != "train":
                raise UserError(f"plan=true plans training and does nothing for `sae {stage}`: use `sae train`.")
            where = f"{built.job}: " if built.job else ""
            plugins.load(built.plugins)
            importlib.import_module(STAGES[stage].module).run(built)
            if not built.job and not built.plan:
                _remember(recipe, built.folder)
        except KeyboardInterrupt:
            if (built.folder / "tokens").is_dir() and not built.job and not built.plan:
                _remember(recipe, built.folder)
            raise
        except UserError as error:
            _fail(where + str(error), 2)  # here, since Hydra announces exceptions that leave a job in its own words
        except OSError as error:
            _fail(f"{where}{error.strerror or error}: {error.filename or 'check the disk and its permissions'}.", 2)

    entry = hydra.main(version_base=None, config_path=str(config.configs_folder()), config_name=recipe.config)(job)
    saved, sys.argv = sys.argv, [f"sae {stage}", *flags, *recipe.overrides]
    try:
        entry()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_sentence(error)) from None
    finally:
        sys.argv = saved


def _job_name() -> str:
    """In a multirun each job has its own folder inside the run's; what is harvested for the run is shared."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    found = HydraConfig.get()
    return f"job{found.job.num}" if found.mode == RunMode.MULTIRUN else ""


class Recipe(NamedTuple):
    """How a run's configuration is composed."""

    config: str
    """The config file."""
    overrides: list[str]
    """What comes on top, for this command."""
    kept: list[str]
    """What the run is to remember of it."""


def _recipe(stage: str, overrides: list[str]) -> Recipe:
    """Go on with the settings a run was begun with; what is given now comes on top.

    So `sae behavior name=demo` works on what `sae demo` made, without repeating its settings.
    """
    from sae.files import read_json

    values = dict(item.split("=", 1) for item in overrides if item.startswith(("name=", "runs=")))
    default = "demo" if stage == "demo" else "run"
    path = Path(values.get("runs", "runs")) / values.get("name", default) / RECIPE
    begun: dict[str, Any] = {"config": stage, "overrides": []}
    if path.is_file() and (stage != "demo" or "name" in values):  # else scratch space, begun anew with other settings
        begun = read_json(path)
    kept = _without(begun["overrides"], ONCE)
    tried = TRIALS.get(stage, ())
    lasting = _without(overrides, (*ONCE, *tried))
    remembered = _merged(lasting, kept) if tried else _merged(kept, lasting)
    return Recipe(begun["config"], _merged(_without(kept, tried), overrides), remembered)


def _without(overrides: list[str], starts: tuple[str, ...]) -> list[str]:
    return [item for item in overrides if not item.lstrip("+").startswith(starts)]


def _merged(first: list[str], then: list[str]) -> list[str]:
    """All overrides, one a key: the last that was given."""
    return list({item.split("=", 1)[0]: item for item in (*first, *then)}.values())


def _remember(recipe: Recipe, folder: Path) -> None:
    """Note the settings of a run that has got somewhere."""
    from sae.files import write_json

    write_json(folder / RECIPE, {"config": recipe.config, "overrides": recipe.kept})


def _one_sentence(error: BaseException) -> str:
    """Say a Hydra or OmegaConf error in one line: what was wrong with which key, and what to do."""
    from sae.config import keys

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].rstrip(".") if lines else type(error).__name__
    cause = str(error.__cause__ or "").splitlines()
    quoting = "quote values with special characters, 'key=\"value\"', and join several values as key=[a,b]."
    if re.search("parsing override|mismatched input|no viable alternative|Lexer", first):
        return f"{first}: {quoting}"
    if "Ambiguous value" in first:
        return f"{first}: {quoting[:-1]}, or add -m to run each value."
    missing = re.match(r"Could not override '([^']+)'", first)
    if missing:
        return str(unknown("configuration key", missing[1], keys(), "`sae <stage> --cfg job` prints every key."))
    if cause:
        first = f"{first}: {cause[0].rstrip('.')}"
    options = " ".join(lines[1:]).replace("\t", " ") if "Could not find" in first else ""
    return f"{first}{'. ' + options.split('Config search path')[0].strip() if options else ''}: " + (
        "`sae <stage> --cfg job` prints every key and its value."
    )


def _usage() -> str:
    from sae.config import configs_folder

    width = max(map(len, STAGES))
    stages = "\n".join(f"  {name:<{width}}  {stage.summary}" for name, stage in STAGES.items())
    return (
        "usage: sae <stage> [key=value ...]\n\n"
        f"stages:\n{stages}\n\n"
        "examples:\n"
        "  sae demo\n"
        "  sae train lm.name=./my-model data.path=./text.jsonl sae.d_sae=[1024,4096] name=mine\n"
        "  sae train -m sae=topk,batch_topk name=sweep\n"
        "  sae eval --cfg job          # print the composed configuration\n"
        f"\npresets: {configs_folder()}"
    )


def _fail(message: str, status: int) -> NoReturn:
    print(f"sae: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
