"""OpenAI's SAEs of GPT-2 small (Gao et al. 2406.04093): `<location><version>/autoencoders/<layer>.pt`.

    resid_post_mlp_v5_32k/autoencoders/6.pt

    latent_acts = activation((x' - pre_bias) @ encoder.weight^T + latent_bias)
    recons'     = latent_acts @ decoder.weight^T + pre_bias

x' is x where the activation is ReLU. Where it is TopK, each token is layer-normalised first, which is undone last.
"""

import re
from pathlib import Path
from typing import Any

import torch

from sae.autoencoder import normalize
from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble
from sae.formats.interface import Format, Given

LM_NAME = "gpt2"
LOCATIONS = {
    "mlp_post_act": "blocks.{layer}.mlp.hook_post",
    "resid_delta_mlp": "blocks.{layer}.hook_mlp_out",
    "resid_delta_attn": "blocks.{layer}.hook_attn_out",
    "resid_post_attn": "blocks.{layer}.hook_resid_mid",
    "resid_post_mlp": "blocks.{layer}.hook_resid_post",
}
_LOCATION = re.compile(rf"(?P<location>{'|'.join(LOCATIONS)})(?:_v\d+(?:_\d+k)?)?")
_FILE = re.compile(r"(?P<layer>\d+)\.pt")
_TENSORS = ("encoder.weight", "decoder.weight", "latent_bias", "pre_bias")
_OTHER = (
    "stats_last_nonzero", "latents_activation_frequency", "latents_mean_square", "activation", "activation_state_dict"
)  # fmt: skip


def parse(path: Path) -> str | None:
    """The hook point, from ``<location>[_v<n>[_<n>k]]/autoencoders/<layer>.pt``; None where a path is not named so."""
    location, layer = settings.part(path, _LOCATION), _FILE.fullmatch(path.name)
    if location is None or layer is None:
        return None
    return LOCATIONS[location["location"]].format(layer=int(layer["layer"]))


def matches(path: Path) -> bool:
    """Tell by the names of the file and its folder: `autoencoders/<layer>.pt`."""
    return path.is_file() and path.parent.name == "autoencoders" and _FILE.fullmatch(path.name) is not None


def read(path: Path, given: Given) -> SAE:
    """Read one file.

    Raises:
        UserError: something is unsaid, missing, damaged, or of a kind that is not read.
    """
    settings.only(path, given, "hook_name", "lm_name")
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}: point at the .pt file of one layer.")
    stored = tensors.read_pickle(path)
    if not isinstance(stored, dict):
        raise UserError(f"{str(path)!r} is not a mapping of names to tensors: is it of another format?")
    tensors.only(stored, path, *_TENSORS, *_OTHER)
    hook_name = given.need("hook_name", parse(path), path, "where the SAE belongs")
    activation, k = _activation(path, stored)
    found = {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}
    W_enc, W_dec, b_enc, b_dec = tensors.pick(found, path, *_TENSORS)
    return assemble(
        Parts(W_enc.T, W_dec.T, b_enc, b_dec, takes_off_b_dec=True),
        architecture=activation,
        hook_name=hook_name,
        lm_name=given.lm_name or LM_NAME,
        l0=k,
        normalize=normalize.LAYER_NORM if activation == "topk" else normalize.NONE,
        metadata=settings.about("openai", path, {"activation": stored.get("activation"), "k": k}),
    )


def _activation(path: Path, stored: dict[str, Any]) -> tuple[str, int]:
    """Our architecture, and k."""
    name, state = stored.get("activation"), stored.get("activation_state_dict") or {}
    if name == "ReLU":
        return "relu", 0
    if name != "TopK":
        raise UserError(
            f"{str(path)!r} has activation {name!r}, where ReLU and TopK are read: is it of another format?"
        )
    k, after = (state.get(key) if isinstance(state, dict) else None for key in ("k", "postact_fn"))
    k = int(k) if isinstance(k, torch.Tensor) and k.numel() == 1 else k
    if not isinstance(k, int) or isinstance(k, bool) or after != "ReLU":
        raise UserError(
            f"{str(path)!r} has k = {k!r} and postact_fn = {after!r} in activation_state_dict, where a whole number "
            "and ReLU are read: download it again."
        )
    return "topk", k


FORMAT = Format("openai", "OpenAI's SAEs of GPT-2 small", matches, read)
