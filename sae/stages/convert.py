"""`sae convert`: write an SAE in another library's format, and see that what was written does the same.

    sae convert src=runs/demo/train/<SAE> dst=for-saelens format=saelens
    sae convert src=google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82 dst=here format=sae

The written folder is read back and both SAEs are run on random activations, and on those of held-out text where the
configured language model is the SAE's own. A folder that does not agree is not kept. `convert.push=owner/repo` uploads
it, with a model card that carries the run's evaluation.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import hub
from sae.activations.harvest import Passes
from sae.autoencoder.sae import SAE
from sae.config import RunConfig
from sae.errors import UserError, unknown
from sae.files import read_json, write_json
from sae.formats.agree import Agreement, agree, random_activations
from sae.formats.interface import Given
from sae.formats.registry import formats, load
from sae.lm.model import LanguageModel
from sae.report.card import model_card
from sae.report.terminal import summary_table
from sae.stages import common
from sae.stages.harvest import ensure_tokens

TOLERANCE = 1e-4
"""Largest relative difference with which a written folder is kept; fp32 rounding is a hundredth of it."""
N_TOKENS = 4_096


def run(config: RunConfig) -> None:
    """Run the stage."""
    options = config.convert
    for name in ("src", "dst", "format"):
        if not getattr(options, name):
            raise UserError(f"{name} has no value: sae convert src=<SAE> dst=<folder> format={' | '.join(_writers())}.")
    if options.format not in _writers():
        raise unknown("format", options.format, _writers())
    dst = Path(options.dst)
    if dst.exists() and not config.force:
        raise UserError(f"{str(dst)!r} is there already: choose another folder, or replace it with force=true.")
    given = {name.name: getattr(options, name.name) for name in dataclasses.fields(Given)}
    sae = load(options.src, format=options.src_format, **given)
    found = _write(config, sae, dst)
    result = {
        "schema_version": 1,
        "src": options.src,
        "dst": str(dst),
        "format": options.format,
        "agreement": found,
        "pushed": None,
    }
    rows = [{"activations": name, **one._asdict()} for name, one in found.items()]
    print(summary_table(rows, ["activations", "n_tokens", "l0", "latents", "recons"]))
    print(f"{dst}: {options.format}, largest relative difference {max(one.worst for one in found.values()):.1e}")
    if options.push:
        card = model_card(dataclasses.asdict(sae.config), options.push, dst.name, _evaluation(Path(options.src)))
        result["pushed"] = hub.push(dst, options.push, path_in_repo=dst.name, card=card)
        print(f"uploaded to {result['pushed']}")
    write_json(config.folder / "convert" / "result.json", result)


def _writers() -> list[str]:
    return [name for name, one in formats().items() if one.write is not None]


def _write(config: RunConfig, sae: SAE, dst: Path) -> dict[str, Agreement]:
    """Write beside the place, compare, and only then move there."""
    written = formats()[config.convert.format]
    assert written.write is not None
    trial = dst.with_name(f".{dst.name}.part")
    shutil.rmtree(trial, ignore_errors=True)
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        written.write(sae, trial)
        # What is in the file's own words may say less than ours: the place it sits at is not what is compared.
        said = Given() if written.name == "sae" else Given(hook_name=sae.config.hook_name, lm_name=sae.config.lm_name)
        again = written.read(trial, said).eval()
        found = {"random": agree(sae, again, random_activations(sae, N_TOKENS).split(1_024))}
        real = _real_activations(config, sae)
        if real is not None:
            found["held-out text"] = agree(sae, again, real)
        for name, one in found.items():
            if not one.worst <= TOLERANCE:
                raise UserError(
                    f"what was written as {written.name!r} differs by {one.worst:.1e} on {name} activations, more than "
                    f"{TOLERANCE:g}, and was not kept: use another format."
                )
        if dst.exists():
            shutil.rmtree(dst)
        trial.rename(dst)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return found


def _real_activations(config: RunConfig, sae: SAE) -> Iterator[Tensor] | None:
    """Activations of held-out text; None, and a sentence, where the language model is not the SAE's."""
    lm = common.open_lm(config.lm)
    try:
        common.check_belongs(lm, sae.config, Path(config.convert.src), force=False)
        known = bool(sae.config.lm_fingerprint) or sae.config.lm_name == lm.name
    except UserError:
        known = False
    if not known:
        print(f"compared on random activations alone: lm.name={sae.config.lm_name} would add those of its own text")
        return None
    return _batches(config, sae, lm)


def _batches(config: RunConfig, sae: SAE, lm: LanguageModel) -> Iterator[Tensor]:
    site, seen = sae.config.site, 0
    held_out = ensure_tokens(common.as_needed(config), lm).corpus.held_out
    passes = Passes(
        lm,
        held_out,
        list(site.reads),
        batch_tokens=config.harvest.batch_tokens,
        include_special=config.data.include_special,
    )
    for number in range(len(passes)):
        x = torch.cat([passes(number).acts[name] for name in site.reads], dim=-1).float()
        yield x.to(sae.device)
        seen += len(x)
        if seen >= N_TOKENS:
            return


def _evaluation(src: Path) -> dict[str, Any] | None:
    """The record of an SAE in its run's evaluation: `<run>/train/<site>/<SAE>` stands in `<run>/eval/result.json`."""
    run = src.resolve().parents[2] if len(src.resolve().parents) > 2 else src
    path = run / "eval" / "result.json"
    if not path.is_file():
        return None
    for record in read_json(path)["saes"]:
        if Path(record["path"]).resolve() == src.resolve():
            return dict(record)
    return None
