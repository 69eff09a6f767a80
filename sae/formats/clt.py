"""Cross-layer transcoders (Ameisen et al. 2025) as safety-research/circuit-tracer stores them.

    config.yaml                   model_name, model_kind, feature_input_hook, feature_output_hook
    W_enc_<layer>.safetensors     W_enc_<layer> [d_sae d_in], b_enc_<layer>, b_dec_<layer>, threshold_<layer> if any
    W_dec_<layer>.safetensors     W_dec_<layer> [d_sae n_layers - layer d_in]: to its own layer and each later one

    latent_acts_l = activation(x_l @ W_enc_l^T + b_enc_l)
    recons_m      = b_dec_m + sum over l <= m of latent_acts_l @ W_dec_l[:, m - l]

Our transcoders read one hook point and write one other, so one pair of layers is read at a time: the latents of `layer`
and what they write to the layer that hook_name names, their own if it names none. The bias b_dec_m belongs to the pair
(m, m) alone. Summed over all layers that are read, such transcoders give the whole reconstruction; one alone is a part
of it.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.autoencoder.site import ARROW, Site
from sae.errors import UserError
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble
from sae.formats.interface import Format, Given

CONFIG = "config.yaml"
KIND = "cross_layer_transcoder"
_KEYS = {"model_name": str, "model_kind": str, "feature_input_hook": str, "feature_output_hook": str}
_FILE = re.compile(r"W_(?:enc|dec)_(?P<layer>\d+)\.safetensors")
_HOOK = re.compile(r"blocks\.(?P<layer>\d+)\..+")


class LayerParts(NamedTuple):
    """What reads one layer of a cross-layer transcoder."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae n_writes d_in"]
    """To its own layer, the next, and so on."""
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    """Of its own layer's reconstruction."""
    threshold: Float[Tensor, " d_sae"] | None
    """None: ReLU."""
    W_skip: Float[Tensor, "d_in d_in"] | None = None
    """To its own layer."""


def written_layer(hook_name: str, layer: int) -> int:
    """The layer that a site's right side names.

    Raises:
        UserError: the site is no transcoder's, or reads another layer than `layer`.
    """
    site = Site.parse(hook_name)
    found = [_HOOK.fullmatch(name) for name in (*site.reads, *site.writes)]
    if site.kind != "transcoder" or any(one is None for one in found):
        raise UserError(
            f"hook_name {hook_name!r} is not of the kind blocks.3.hook_resid_mid->blocks.5.hook_mlp_out, which a "
            "cross-layer transcoder needs: leave it out for what the layer writes to itself."
        )
    read, write = (int(one["layer"]) for one in found if one is not None)
    if read != layer:
        raise UserError(f"hook_name {hook_name!r} reads layer {read}, but the latents are those of layer {layer}.")
    return write


def assemble_layer(parts: LayerParts, layer: int, given: Given, reads: str, writes: str, **common: Any) -> SAE:
    """Make the transcoder from `layer` to the layer that `given.hook_name` writes, its own if it is not given.

    Args:
        parts: its tensors.
        layer: whose latents they are.
        given: the caller's arguments.
        reads: name of the hook point that is read, with `{layer}`.
        writes: likewise of the one that is written.
        **common: for `assemble`.

    Raises:
        UserError: it does not write to that layer.
    """
    to = layer if given.hook_name is None else written_layer(given.hook_name, layer)
    if parts.W_dec.ndim != 3 or not 0 <= to - layer < parts.W_dec.shape[1]:
        raise UserError(
            f"the latents of layer {layer} write to layers {layer} to {layer + parts.W_dec.shape[1] - 1}, not to {to}: "
            "name one of these in hook_name."
        )
    own = to == layer
    return assemble(
        Parts(
            parts.W_enc,
            parts.W_dec[:, to - layer],
            parts.b_enc,
            parts.b_dec if own else torch.zeros_like(parts.b_dec),
            takes_off_b_dec=False,
            sparsity={} if parts.threshold is None else {"threshold": parts.threshold},
            W_skip=parts.W_skip if own else None,
        ),
        architecture="relu" if parts.threshold is None else "jumprelu",
        hook_name=given.hook_name or f"{reads.format(layer=layer)}{ARROW}{writes.format(layer=to)}",
        **common,
    )


def matches(path: Path) -> bool:
    """Tell by the weights' file names."""
    return settings.holds(path, _FILE)


def read(path: Path, given: Given) -> SAE:
    """Read one layer's latents, by the file's name or `given.layer`, and what they write to one layer.

    Raises:
        UserError: something is unsaid, misspelt, missing or damaged.
    """
    settings.only(path, given, "hook_name", "lm_name", "layer")
    layer = settings.layer_of(path, _FILE, given)
    folder = path.parent if path.is_file() else path
    config = settings.read(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    settings.check_near(folder / CONFIG, config, _KEYS)
    if config.get("model_kind", KIND) != KIND:
        raise UserError(f"{str(folder / CONFIG)!r} has model_kind {config['model_kind']!r}, not {KIND}: correct it.")
    why = "which config.yaml says"
    lm_name = given.need("lm_name", config.get("model_name"), folder, why)
    hooks = [config.get(key) for key in ("feature_input_hook", "feature_output_hook")]
    if given.hook_name is None and None in hooks:
        given.need("hook_name", None, folder, why)
    file, W_dec_file = (folder / f"{name}_{layer}.safetensors" for name in ("W_enc", "W_dec"))
    found = tensors.read(file)
    names = [f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "threshold")]
    tensors.only(found, file, *names)
    jumps = names[3] in found
    W_enc, b_enc, b_dec, *threshold = tensors.pick(found, file, *(names if jumps else names[:3]))
    (W_dec,) = tensors.pick(tensors.read(W_dec_file), W_dec_file, f"W_dec_{layer}")
    parts = LayerParts(W_enc.T, W_dec, b_enc, b_dec, threshold[0] if threshold else None)
    reads, writes = (f"blocks.{{layer}}.{hook}" for hook in hooks)
    about = settings.about("clt", path, config | {"layer": layer})
    return assemble_layer(parts, layer, given, reads, writes, lm_name=lm_name, metadata=about)


FORMAT = Format("clt", "cross-layer transcoders of circuit-tracer, one layer of them", matches, read)
