"""Gemma Scope 2 (Google DeepMind 2025): SAEs, transcoders, crosscoders and cross-layer transcoders of Gemma 3.

    gemma-scope-2-4b-pt/resid_post/layer_17_width_16k_l0_big/       config.json, params.safetensors
    gemma-scope-2-4b-pt/transcoder/layer_17_width_16k_l0_big_affine/
    gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_22_width_65k_l0_medium/   config.json, params_layer_<i>.safetensors
    gemma-scope-2-1b-pt/clt/width_262k_l0_big/

    latent_acts = relu(pre_acts) * (pre_acts > threshold),  pre_acts = x @ w_enc + b_enc
    recons      = latent_acts @ w_dec + b_dec [+ x @ affine_skip_connection]

Multi-layer ones have latents for each layer that they read, and a decoder from each to every layer that they write. A
crosscoder is read whole: its encoder is block-diagonal. Of a cross-layer transcoder one layer's latents are read, and
what they write to one layer (see `sae.formats.clt`).
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.autoencoder.site import PLUS
from sae.errors import UserError
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble
from sae.formats.clt import LayerParts, assemble_layer
from sae.formats.gemma_scope import positive
from sae.formats.interface import Format, Given

CONFIG, PARAMS = "config.json", "params.safetensors"
_TYPES = ("sae", "transcoder", "crosscoder", "clt")
_REQUIRED = {"architecture": str, "model_name": str, "hf_hook_point_in": str}
_OPTIONAL = {"hf_hook_point_out": str, "affine_connection": bool, "type": str, "l0": float, "width": int}
_TENSORS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_SKIP = "affine_skip_connection"

# Hugging Face module outputs and inputs by the names that they have here.
HOOKS = {
    "output": "blocks.{layer}.hook_resid_post",
    "self_attn.o_proj.input": "blocks.{layer}.attn.hook_z",
    "pre_feedforward_layernorm.output": "blocks.{layer}.mlp.hook_in",
    "post_feedforward_layernorm.output": "blocks.{layer}.hook_mlp_out",
}
_HF_HOOK = re.compile(r"model\.layers\.(?P<layers>\d+|\{\d+(?:,\d+)*\}|\{all\})\.(?P<where>.+)")
# Where a folder without config.json says what it is in its name: what it reads, and writes.
_FOLDERS = {
    "resid_post": ("output", "output"),
    "attn_out": ("self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp_out": ("post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "crosscoder": ("output", "output"),
    "clt": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
_KIND = re.compile(r"(?P<kind>resid_post|attn_out|mlp_out|transcoder|crosscoder|clt)(?:_all)?")
_NAME = re.compile(r"(?:layer_(?P<layers>\d+(?:_\d+)*)_)?width_[\da-z]+_l0_[a-z]+(?P<affine>_affine)?")
_REPO = re.compile(r"gemma-scope-2-(?P<size>270m|1b|4b|12b|27b)-(?P<kind>pt|it)")
_FILE = re.compile(r"params_layer_(?P<layer>\d+)\.safetensors")


class Points(NamedTuple):
    """Hook points that a config's notation names."""

    layers: tuple[int, ...] | None
    """None: all of the model's."""
    template: str
    """Of a name in `HOOKS`."""

    def name(self, layer: int) -> str:
        """The hook point of one layer."""
        return self.template.format(layer=layer)


def parse_hook(text: str, path: Path) -> Points:
    """Read `model.layers.17.output`, `model.layers.{5,9}.output` or `model.layers.{all}.output`.

    Raises:
        UserError: it is none of these, or no known place.
    """
    found = _HF_HOOK.fullmatch(text)
    if found is None or found["where"] not in HOOKS:
        raise UserError(
            f"{str(path)!r} names the hook point {text!r}, which is not model.layers.<layers>.<{' | '.join(HOOKS)}>: "
            "correct it."
        )
    inside = found["layers"].strip("{}")
    layers = None if inside == "all" else tuple(int(layer) for layer in inside.split(","))
    return Points(layers, HOOKS[found["where"]])


def parse_folder(path: Path) -> dict[str, Any] | None:
    """What config.json would say, from folder names; None where they say too little.

    ``gemma-scope-2-<size>-<pt|it>`` says the model, ``resid_post``, ``attn_out``, ``mlp_out``, ``transcoder``,
    ``crosscoder`` or ``clt`` (or one of these with ``_all``) the kind, and the innermost
    ``layer_<n>[_<n>...]_width_<w>_l0_<l>[_affine]`` the layers; ``clt`` has all.
    """
    repo, kind, name = (settings.part(path, pattern) for pattern in (_REPO, _KIND, _NAME))
    if repo is None or kind is None or name is None:
        return None
    what = kind["kind"]
    layers = (name["layers"] or "").split("_") if name["layers"] else []
    if (what == "clt") != (not layers) or (len(layers) > 1) != (what == "crosscoder"):
        return None
    inside = "{all}" if what == "clt" else layers[0] if len(layers) == 1 else "{" + ",".join(layers) + "}"
    reads, writes = _FOLDERS[what]
    return {
        "architecture": "jump_relu",
        "model_name": f"google/gemma-3-{repo['size']}-{repo['kind']}",
        "hf_hook_point_in": f"model.layers.{inside}.{reads}",
        "hf_hook_point_out": f"model.layers.{inside}.{writes}",
        "affine_connection": name["affine"] is not None,
        "type": what if what in _TYPES else "sae",
    }


def lm_name_of(text: str) -> str:
    """The hub's name of a model: owner google, `-v3` as `-3`; the small base model has no `-pt` there."""
    name = text.removeprefix("google/").replace("-v3-", "-3-")
    return "google/" + ("gemma-3-270m" if name == "gemma-3-270m-pt" else name)


def matches(path: Path) -> bool:
    """Tell by the weights' file names."""
    if path.is_file():
        return path.name == PARAMS or _FILE.fullmatch(path.name) is not None
    return (path / PARAMS).is_file() or any(_FILE.fullmatch(item.name) for item in path.glob("params_layer_*"))


def read(path: Path, given: Given) -> SAE:
    """Read one; of a cross-layer transcoder, the layer given.

    Raises:
        UserError: something is unsaid, misspelt, missing, or of a kind that has no place here.
    """
    settings.only(path, given, "hook_name", "lm_name", "layer")
    folder = path.parent if path.is_file() else path
    config = _config(folder)
    writes_to = config.get("hf_hook_point_out") or config["hf_hook_point_in"]
    what = config.get("type") or ("sae" if writes_to == config["hf_hook_point_in"] else "transcoder")
    if what not in _TYPES or config["architecture"] != "jump_relu":
        raise UserError(
            f"{str(folder / CONFIG)!r} is of type {what!r} and architecture {config['architecture']!r}, where only "
            f"{', '.join(_TYPES)} of jump_relu are known: correct it."
        )
    lm_name = given.need("lm_name", lm_name_of(config["model_name"]), folder, "the language model")
    common = {
        "lm_name": lm_name,
        "l0": config.get("l0") or 0,
        "metadata": settings.about("gemma_scope_2", path, config),
    }
    reads = parse_hook(config["hf_hook_point_in"], folder / CONFIG)
    writes = parse_hook(writes_to, folder / CONFIG)
    if what == "clt":
        return _read_clt(path, given, reads, writes, common)
    if given.layer is not None:
        raise UserError(f"{str(path)!r} needs no layer: leave that argument of load out.")
    if what == "crosscoder":
        return _read_crosscoder(folder, given, reads, config, common)
    if reads.layers is None or writes.layers is None or len(reads.layers) > 1 or len(writes.layers) > 1:
        raise UserError(f"{str(folder / CONFIG)!r} names several layers for a {what}: correct it.")
    found = reads.name(reads.layers[0]), writes.name(writes.layers[0])
    hook_name = given.hook_name or (found[0] if found[0] == found[1] else "->".join(found))
    loaded = _load(folder / PARAMS)
    _check_width(folder, config, len(loaded["b_enc"]))
    skip = loaded.get(_SKIP)
    if config.get("affine_connection") is not None and config["affine_connection"] != (skip is not None):
        raise UserError(
            f"{str(folder / PARAMS)!r} has {'an' if skip is not None else 'no'} {_SKIP}, against affine_connection = "
            f"{config['affine_connection']} in its config: download both again."
        )
    parts = Parts(
        loaded["w_enc"], loaded["w_dec"], loaded["b_enc"], loaded["b_dec"],
        takes_off_b_dec=False, sparsity={"threshold": positive(loaded["threshold"])}, W_skip=skip,
    )  # fmt: skip
    return assemble(parts, architecture="jumprelu", hook_name=hook_name, **common)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if path.is_file():
        config = settings.read(path)
        settings.check(path, config, _REQUIRED, _OPTIONAL, ())
        return config
    named = parse_folder(folder)
    if named is None:
        raise UserError(
            f"{str(folder)!r} has no {CONFIG} and its folders are not named as published: download that file as well."
        )
    return named


def _load(path: Path) -> dict[str, Tensor]:
    found = tensors.read(path)
    tensors.only(found, path, *_TENSORS, _SKIP)
    names = [*_TENSORS, *([_SKIP] if _SKIP in found else [])]
    return dict(zip(names, tensors.pick(found, path, *names), strict=True))


def _check_width(folder: Path, config: dict[str, Any], d_sae: int) -> None:
    width = config.get("width")
    if width is not None and width != d_sae:
        where = repr(str(folder / CONFIG))
        raise UserError(f"{where} says {width} latents, but the weights have {d_sae}: is it another SAE's?")


def _read_crosscoder(folder: Path, given: Given, reads: Points, config: dict[str, Any], common: dict[str, Any]) -> SAE:
    if reads.layers is None or len(reads.layers) < 2:
        raise UserError(f"{str(folder / CONFIG)!r} names no list of layers for a crosscoder: correct it.")
    n_layers = len(reads.layers)
    loaded = [_load(folder / f"params_layer_{i}.safetensors") for i in range(n_layers)]
    for i, one in enumerate(loaded):
        if one["w_dec"].ndim != 3 or one["w_dec"].shape[1] != n_layers or _SKIP in one:
            raise UserError(
                f"params_layer_{i}.safetensors in {str(folder)!r} is not a crosscoder's of {n_layers} layers: is its "
                "config another one's?"
            )
    parts = Parts(
        torch.block_diag(*(one["w_enc"] for one in loaded)),
        torch.cat([one["w_dec"].flatten(1) for one in loaded]),
        torch.cat([one["b_enc"] for one in loaded]),
        torch.cat([one["b_dec"] for one in loaded]),
        takes_off_b_dec=False,
        sparsity={"threshold": positive(torch.cat([one["threshold"] for one in loaded]))},
    )
    _check_width(folder, config, len(parts.b_enc))
    hook_name = given.hook_name or PLUS.join(reads.name(layer) for layer in reads.layers)
    widths = [one["w_enc"].shape[0] for one in loaded]
    return assemble(parts, architecture="jumprelu", hook_name=hook_name, source_widths=widths, **common)


def _read_clt(path: Path, given: Given, reads: Points, writes: Points, common: dict[str, Any]) -> SAE:
    layer = settings.layer_of(path, _FILE, given)
    folder = path.parent if path.is_file() else path
    loaded = _load(folder / f"params_layer_{layer}.safetensors")
    parts = LayerParts(
        loaded["w_enc"],
        loaded["w_dec"][:, layer:],  # decoders to earlier layers are stored, and mean nothing
        loaded["b_enc"],
        loaded["b_dec"],
        positive(loaded["threshold"]),
        loaded.get(_SKIP),
    )
    return assemble_layer(parts, layer, given, reads.template, writes.template, **common)


FORMAT = Format("gemma_scope_2", "Gemma Scope 2: SAEs, transcoders and crosscoders of Gemma 3", matches, read)
