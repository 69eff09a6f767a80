"""Llama Scope (He et al. 2410.20526): `hyperparams.json` and `checkpoints/final.safetensors`, weights in bf16.

The maths, shared with `llama_scope_r1`, are in `sae.formats.lm_saes`.
"""

import re
from pathlib import Path

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.formats import lm_saes, settings, tensors
from sae.formats.interface import Format, Given

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_NAME = re.compile(r"Llama3_1-8B-Base-L\d+(?:R|A|M|TC)-\d+x")


def parse(path: Path) -> str | None:
    """The language model, where a folder is named as published: ``Llama3_1-8B-Base-L<layer><R|A|M|TC>-<n>x``."""
    return None if settings.part(path, _NAME) is None else "meta-llama/Llama-3.1-8B"


def matches(path: Path) -> bool:
    """Tell by the files' names."""
    return (path / CONFIG).is_file()


def read(path: Path, given: Given) -> SAE:
    """Read one.

    Raises:
        UserError: something is unsaid, misspelt, missing or damaged.
    """
    settings.only(path, given, "hook_name", "lm_name")
    file = path / CONFIG
    config = settings.read(file)
    lm_saes.check(file, config)
    lm_name = given.need("lm_name", parse(path), path, "the language model")
    scales = lm_saes.Scales(1.0, 1.0)
    if config["norm_activation"] == lm_saes.DATASET_WISE:
        norms = config.get("dataset_average_activation_norm") or {}
        if set(norms) != {"in", "out"}:
            raise UserError(
                f"dataset_average_activation_norm in {str(file)!r} has {sorted(norms)}, not 'in' and 'out': "
                "download it again."
            )
        scales = lm_saes.Scales(*(lm_saes.scale(file, config["d_model"], norms[side]) for side in ("in", "out")))
    stored = lm_saes.stored(path / WEIGHTS, tensors.read(path / WEIGHTS))
    return lm_saes.build(
        file,
        config,
        stored,
        scales,
        format="llama_scope",
        hook_name=given.hook_name,
        lm_name=lm_name,
        log_threshold=None,
    )


FORMAT = Format("llama_scope", "Llama Scope: SAEs and transcoders of Llama 3.1 8B", matches, read)
