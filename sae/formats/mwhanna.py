"""Transcoder sets as circuit-tracer stores them (Hanna et al., safety-research/circuit-tracer): a file a layer.

    qwen3-4b-transcoders/layer_18.safetensors    W_enc [d_sae d_in], W_dec [d_sae d_in], b_enc, b_dec, and where there
                                                 are: W_skip [d_in d_in], activation_function.threshold
                         config.yaml             model_name, model_kind, feature_input_hook, feature_output_hook
                         wandb-config.yaml       act_fn and how it was trained

    recons = activation(x @ W_enc^T + b_enc) @ W_dec + b_dec [+ x @ W_skip^T]

The activation is a jump at the thresholds where there are any, else ReLU.
"""

import re
from pathlib import Path
from typing import Any

from sae.autoencoder.sae import SAE
from sae.autoencoder.site import ARROW
from sae.errors import UserError
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble
from sae.formats.interface import Format, Given

CONFIG = "config.yaml"
TRAINING = ("wandb-config.yaml", "wanb-config.yaml")  # some repositories have the second spelling
KIND = "transcoder_set"
_KEYS = {"model_name": str, "model_kind": str, "feature_input_hook": str, "feature_output_hook": str, "activation": str}
_TRAINED = {"act_fn": dict, "d_model": dict, "d_feature": dict}
_FILE = re.compile(r"layer_(?P<layer>\d+)\.safetensors")
_REPO = re.compile(r"qwen3-(?P<size>\d+(?:\.\d+)?)b-transcoders(?:-lowl0)?")
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
_THRESHOLDS = ("activation_function.threshold", "threshold")


def parse(path: Path) -> dict[str, str]:
    """What config.yaml would say, from ``qwen3-<size>b-transcoders[-lowl0]``; empty where no folder is named so."""
    repo = settings.part(path, _REPO)
    if repo is None:
        return {}
    return {
        "model_name": f"Qwen/Qwen3-{repo['size']}B",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }


def matches(path: Path) -> bool:
    """Tell by the files' names."""
    return settings.holds(path, _FILE)


def read(path: Path, given: Given) -> SAE:
    """Read one layer, by the file's name or `given.layer`; config.yaml comes before the repository's name.

    Raises:
        UserError: something is unsaid, misspelt, missing or damaged.
    """
    settings.only(path, given, "hook_name", "lm_name", "layer")
    layer = settings.layer_of(path, _FILE, given)
    folder = path.parent if path.is_file() else path
    file = path if path.is_file() else folder / f"layer_{layer}.safetensors"
    said = _config(folder)
    reads, writes = said.get("feature_input_hook"), said.get("feature_output_hook")
    site = f"blocks.{layer}.{reads}{ARROW}blocks.{layer}.{writes}" if reads and writes else None
    hook_name = given.need("hook_name", site, folder, "the hook points that it reads and writes")
    lm_name = given.need("lm_name", said.get("model_name"), folder, "the language model")
    found = tensors.read(file)
    threshold = next((name for name in _THRESHOLDS if name in found), None)
    wanted = [*_TENSORS, *([threshold] if threshold else []), *(["W_skip"] if "W_skip" in found else [])]
    tensors.only(found, file, *wanted)
    parts = dict(zip(wanted, tensors.pick(found, file, *wanted), strict=True))
    trained = _trained(folder, parts["W_enc"].shape[1], parts["W_enc"].shape[0])
    activation = (said.get("activation") or trained or "").lower().replace("_", "")
    if activation and activation != ("jumprelu" if threshold else "relu"):
        raise UserError(
            f"{str(folder)!r} names the activation {activation!r}, but {str(file)!r} has "
            f"{'thresholds' if threshold else 'no thresholds'}, and nothing else is read: is it another SAE's file?"
        )
    return assemble(
        Parts(
            parts["W_enc"].T,
            parts["W_dec"],
            parts["b_enc"],
            parts["b_dec"],
            takes_off_b_dec=False,
            sparsity={"threshold": parts[threshold]} if threshold else {},
            W_skip=parts["W_skip"].T if "W_skip" in parts else None,
        ),
        architecture="jumprelu" if threshold else "relu",
        hook_name=hook_name,
        lm_name=lm_name,
        metadata=settings.about("mwhanna", path, said | {"layer": layer}),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return dict(parse(folder))
    said = settings.read(path)
    settings.check_near(path, said, _KEYS)
    if said.get("model_kind", KIND) != KIND:
        raise UserError(f"{str(path)!r} has model_kind {said['model_kind']!r}, not {KIND}: correct it.")
    return said


def _trained(folder: Path, d_in: int, d_sae: int) -> str | None:
    """The activation that the training's config names, whose sizes are checked."""
    path = next((folder / name for name in TRAINING if (folder / name).is_file()), None)
    if path is None:
        return None
    said = settings.read(path)
    settings.check_near(path, said, _TRAINED)
    for name, size in (("d_model", d_in), ("d_feature", d_sae)):
        value = said.get(name, {}).get("value")
        if value is not None and value != size:
            raise UserError(f"{str(path)!r} says {name} = {value}, but the weights have {size}: is it another's?")
    activation = said.get("act_fn", {}).get("value")
    return activation if isinstance(activation, str) else None


FORMAT = Format("mwhanna", "transcoder sets of circuit-tracer", matches, read)
