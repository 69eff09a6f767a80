"""The command line: `sae <stage> key=value ...`.

Options are Hydra overrides: groups choose presets (`lm=gemma-2-2b-it`), keys change single values
(`sae.d_sae=[512,2048]`), `-m` runs every combination of comma-separated values, `--cfg job` prints the composed
configuration, `--config-dir DIR` adds a folder of your own presets.
"""

import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sae.errors import UserError, unknown


class Stage(NamedTuple):
    """One entry of the command line."""

    module: str
    summary: str


STAGES = {
    "demo": Stage("sae.stages.demo", "the whole path on one model, ending in a report"),
    "organism": Stage("sae.stages.organism", "train the model organism anew, or measure the one shipped"),
    "harvest": Stage("sae.stages.harvest", "text -> tokens -> activations -> store on disk"),
    "train": Stage("sae.stages.train", "train a grid of autoencoders from one stream"),
    "eval": Stage("sae.stages.evaluate", "reconstruction and spliced cross-entropy on held-out tokens"),
    "behavior": Stage("sae.stages.behavior", "find the latents behind a behaviour and test them causally"),
    "steer": Stage("sae.stages.steer", "generate with a latent clamped, beside the model's own words"),
    "report": Stage("sae.stages.report", "write the run's self-contained HTML page"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage. Exits with 0, 2 for a user's mistake, 130 when interrupted, 1 for anything unforeseen."""
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
        _run_hydra(name, overrides)
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "stopped; what is finished is kept, and the same command goes on from there.", 130)


def _run_hydra(stage: str, overrides: list[str]) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from sae import config

    config.register()
    # Hydra would print a trace of its own and exit; we want the exception, to say it in one sentence.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    def job(composed: Any) -> None:
        try:
            _run_stage(stage, composed)
        except UserError as error:
            _fail(str(error), 2)  # here, since Hydra announces exceptions that leave a job in its own words

    entry = hydra.main(version_base=None, config_path=str(config.configs_folder()), config_name=stage)(job)
    # Hydra takes flags before or after all overrides, but not among them; people write them anywhere.
    keys = [item for item in overrides if "=" in item and not item.startswith("-")]
    flags = [item for item in overrides if item not in keys]
    saved, sys.argv = sys.argv, [f"sae {stage}", *flags, *keys]
    try:
        entry()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_sentence(error)) from None
    finally:
        sys.argv = saved


def _run_stage(stage: str, composed: Any) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from sae import config

    built = config.build(composed)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        # Each job of a multirun has its own folder inside the run's; a harvest made for the run is shared.
        built.job = f"job{hydra_config.job.num}"
    module = importlib.import_module(STAGES[stage].module)
    module.run(built)


def _one_sentence(error: BaseException) -> str:
    """Say a Hydra or OmegaConf error in one line: what was wrong with which key, and what to do."""
    from sae.config import keys

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].rstrip(".") if lines else type(error).__name__
    cause = str(error.__cause__ or "").splitlines()
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
        f"\npresets: {Path(__file__).resolve().parent.parent / 'configs'}"
    )


def _fail(message: str, status: int) -> NoReturn:
    print(f"sae: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
