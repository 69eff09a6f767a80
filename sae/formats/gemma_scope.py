"""Gemma Scope (Lieberum et al. 2408.05147): `params.npz` in folders whose names say the rest.

    gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz

    pre_acts    = x @ W_enc + b_enc                     b_dec is not taken off the input
    latent_acts = relu(pre_acts) * (pre_acts > threshold)
    recons      = latent_acts @ W_dec + b_dec

SAEs of the embedding were trained on the embedding matrix's rows, while a hook point sees them times sqrt(d_in) (Gemma
scales them): that factor is folded in. Transcoders read the MLP's input normalised, before the norm's gain.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble
from sae.formats.interface import Format, Given

PARAMS = "params.npz"
SITES = {
    "res": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "att": "blocks.{layer}.attn.hook_z",
    "transcoders": "blocks.{layer}.ln2.hook_normalized->blocks.{layer}.hook_mlp_out",
}
EMBEDDING = "hook_embed"
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_REPO = re.compile(r"gemma-scope-(?P<size>2b|9b|27b)-(?P<kind>pt|it)-(?P<site>res|mlp|att|transcoders)")
_LAYER = re.compile(r"layer_(?P<layer>\d+)|embedding")
_WIDTH = re.compile(r"width_(?P<count>\d+)(?P<unit>k|m)")
_L0 = re.compile(r"average_l0_(?P<l0>\d+)")


class Names(NamedTuple):
    """What the folders on a path say; empty, 0 or None where they do not."""

    lm_name: str | None
    hook_name: str | None
    width: str
    l0: int


def parse(path: Path) -> Names:
    """Read folder names: one part of the path each, anywhere on it, the innermost if there are several.

    ``gemma-scope-<2b|9b|27b>-<pt|it>-<res|mlp|att|transcoders>`` says model and site, ``layer_<n>`` or ``embedding``
    where, ``width_<n><k|m>`` how many latents, ``average_l0_<n>`` how many are active.
    """
    repo, layer, width, l0 = (settings.part(path, pattern) for pattern in (_REPO, _LAYER, _WIDTH, _L0))
    lm_name = hook_name = None
    if repo is not None:
        lm_name = f"google/gemma-2-{repo['size']}{'-it' if repo['kind'] == 'it' else ''}"
        if layer is not None and layer["layer"] is not None:
            hook_name = SITES[repo["site"]].format(layer=int(layer["layer"]))
        elif layer is not None and repo["site"] == "res":
            hook_name = EMBEDDING
    return Names(lm_name, hook_name, width[0] if width else "", int(l0["l0"]) if l0 else 0)


def check_width(path: Path, width: str, d_sae: int) -> None:
    """Refuse a folder whose name counts other latents than its file has: width_16k means 16,000 to 16,999.

    Raises:
        UserError: naming both numbers.
    """
    found = _WIDTH.fullmatch(width)
    if found is not None and d_sae // {"k": 1_000, "m": 1_000_000}[found["unit"]] != int(found["count"]):
        raise UserError(
            f"{str(path)!r} has {d_sae} latents, but its folder is named {width!r}: it is another SAE's file, or "
            "rename the folder."
        )


def matches(path: Path) -> bool:
    """Tell by the file's name."""
    return path.name == PARAMS or (path / PARAMS).is_file()


def read(path: Path, given: Given) -> SAE:
    """Read one; folder names say where it belongs, unless `given` does.

    Raises:
        UserError: something is unsaid; a tensor is missing or does not fit; the file scales activations.
    """
    settings.only(path, given, "hook_name", "lm_name")
    file = path if path.is_file() else path / PARAMS
    names = parse(file)
    hook_name = given.need("hook_name", names.hook_name, file, "where the SAE belongs")
    lm_name = given.need("lm_name", names.lm_name, file, "the language model")
    found = {name.replace("w_", "W_", 1): tensor for name, tensor in tensors.read(file).items()}
    W_enc, W_dec, b_enc, b_dec, threshold = tensors.pick(found, file, *_TENSORS)
    if "scaling_factor" in found and bool((found["scaling_factor"] == 1).all()):
        del found["scaling_factor"]  # a factor of 1 is none; any other is unheard of
    tensors.only(found, file, *_TENSORS)
    check_width(file, names.width, b_enc.numel())
    if hook_name == EMBEDDING:
        scale = math.sqrt(len(W_enc))
        W_enc, W_dec, b_dec = W_enc / scale, W_dec * scale, b_dec * scale
    return assemble(
        Parts(W_enc, W_dec, b_enc, b_dec, takes_off_b_dec=False, sparsity={"threshold": positive(threshold)}),
        architecture="jumprelu",
        hook_name=hook_name,
        lm_name=lm_name,
        l0=names.l0,
        metadata=settings.about("gemma_scope", path, names._asdict()),
    )


def positive(threshold: Tensor) -> Tensor:
    """The threshold of ours that does what relu(z) * (z > threshold) does: where negative, relu is the sharper one."""
    return torch.clamp(threshold, min=0)


FORMAT = Format("gemma_scope", "Gemma Scope: SAEs and transcoders of Gemma 2", matches, read)
