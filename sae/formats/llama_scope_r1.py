"""Llama Scope R1-Distill: `config.json`, and `sae_weights.safetensors` with trained thresholds and activation norms.

    800M-Slimpajama-0-OpenR1-Math-220k/L15R/

The maths, shared with `llama_scope`, are in `sae.formats.lm_saes`.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.formats import lm_saes, settings, tensors
from sae.formats.interface import Format, Given

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
THRESHOLD, NORM = "log_jumprelu_threshold", "dataset_average_activation_norm."
_REPO = re.compile(r"Llama-Scope-R1-Distill")


def parse(path: Path) -> str | None:
    """The language model, where a folder is named as the repository: ``Llama-Scope-R1-Distill``."""
    return None if settings.part(path, _REPO) is None else "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def matches(path: Path) -> bool:
    """Tell by the files' names; the weights have the name of SAELens's, whose config is `cfg.json`."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, given: Given) -> SAE:
    """Read one. Where the file has no activation norm, `given.scale` is what activations were multiplied by.

    Raises:
        UserError: something is unsaid, misspelt, missing or damaged.
    """
    settings.only(path, given, "hook_name", "lm_name", "scale")
    file, weights = path / CONFIG, path / WEIGHTS
    config = settings.read(file)
    lm_saes.check(file, config)
    lm_name = given.need("lm_name", parse(path), path, "the language model")
    found = tensors.read(weights)
    stored = lm_saes.stored(weights, found, THRESHOLD, *(name for name in found if name.startswith(NORM)))
    (log_threshold,) = tensors.pick(found, weights, THRESHOLD)
    return lm_saes.build(
        file,
        config,
        stored,
        _scales(weights, config, found, given),
        format="llama_scope_r1",
        hook_name=given.hook_name,
        lm_name=lm_name,
        log_threshold=log_threshold,
    )


def _scales(path: Path, config: dict[str, Any], found: dict[str, Tensor], given: Given) -> lm_saes.Scales:
    if config["norm_activation"] == lm_saes.FOLDED:
        settings.only(path, given, "hook_name", "lm_name")
        return lm_saes.Scales(1.0, 1.0)
    hooks = config["hook_point_in"], config.get("hook_point_out") or config["hook_point_in"]
    norms = [found.get(f"{NORM}{hook}") for hook in hooks]
    if None in norms and any(name.startswith(NORM) for name in found):
        raise UserError(f"{str(path)!r} has activation norms, but not of {' and '.join(hooks)}: download it again.")
    if given.scale is None or None not in norms:
        settings.only(path, given, "hook_name", "lm_name")
        why = "what activations were multiplied by, sqrt(d_model) / their mean norm"
        if None in norms:
            given.need("scale", None, path, why)
        return lm_saes.Scales(
            *(lm_saes.scale(path, config["d_model"], float(norm.mean())) for norm in norms if norm is not None)
        )
    if hooks[0] != hooks[1] or not given.scale > 0:
        raise UserError(
            f"scale = {given.scale} cannot serve {' and '.join(hooks)}: give one number above 0, for an SAE."
        )
    return lm_saes.Scales(given.scale, given.scale)


FORMAT = Format("llama_scope_r1", "Llama Scope R1-Distill: SAEs of DeepSeek-R1-Distill-Llama-8B", matches, read)
