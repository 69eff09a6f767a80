"""What `cfg.json` of SAELens says, in either of its layouts, checked before a tensor is opened.

    from 6.0    {"architecture": ..., "d_in": ..., ..., "metadata": {"model_name": ..., "hook_name": ...}}
    before      the settings of a whole training run in one flat mapping, with defaults for what was added later

A key that is not known is an error in the first, which SAELens fills from a fixed list. The second holds whatever a
version's training had, so there only a key that looks like a misspelt one of those that matter is an error.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.autoencoder import normalize
from sae.errors import UserError, unknown
from sae.files import read_json

CONFIG = "cfg.json"
SCALED, WHITENED = "expected_average_only_in", "covariance_whitening"
NORMALIZE = {
    "none": normalize.NONE,
    "layer_norm": normalize.LAYER_NORM,
    "constant_norm_rescale": normalize.RMS,
    SCALED: normalize.NONE,
    WHITENED: normalize.NONE,
}
"""What SAELens does to tokens, and what is left of it once its constants are folded into the weights."""

_TOPK = ("k", "rescale_acts_by_decoder_norm")
OWN_KEYS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "gated": (),
    "jumprelu": (),
    "topk": _TOPK,
    "abstopk": _TOPK,
    "batchtopk": _TOPK,
    "matryoshka_batchtopk": (*_TOPK, "matryoshka_widths"),
    "matching_pursuit": ("residual_threshold", "max_iterations", "stop_on_duplicate_support"),
    "transcoder": ("d_out",),
    "skip_transcoder": ("d_out",),
    "jumprelu_transcoder": ("d_out",),
    "jumprelu_skip_transcoder": ("d_out",),
}
"""By architecture, the keys that only it has and that decide what it computes."""

# What decides what an SAE of any architecture computes.
_SHARED = ("architecture", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "reshape_activations")
_PASSIVE = {"metadata", "dtype", "device", "sae_lens_version", "sae_lens_training_version"}
# What is left in training checkpoints, and changes nothing in a trained SAE.
_TRAINING = {
    "decoder_init_norm",
    "l1_coefficient",
    "lp_norm",
    "l1_warm_up_steps",
    "l0_coefficient",
    "l0_warm_up_steps",
    "target_l0",
    "jumprelu_init_threshold",
    "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale",
    "jumprelu_ste_to_input",
    "pre_act_loss_coefficient",
    "use_sparse_activations",
    "aux_loss_coefficient",
    "topk_threshold_lr",
    "use_matryoshka_aux_loss",
    "noise_scale",
    "mse_loss_normalization",
    "decoder_heuristic_init",
    "decoder_heuristic_init_norm",
    "init_encoder_as_decoder_transpose",
    "normalize_sae_decoder",
    "scale_sparsity_penalty_by_decoder_norm",
}
_METADATA = ("model_name", "hook_name", "hook_name_out", "hook_head_index", "model_class_name")
_METADATA_ALIKE = {"hf_hook_name", "hf_hook_name_out", "hook_head_index_out"}
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_FLAT = ("activation_fn", "activation_fn_kwargs", "finetuning_scaling_factor", *_RENAMED)
ALIKE = 0.85
"""How alike (difflib's ratio) an unknown key must be to a known one to be taken for a misspelling of it."""


@dataclass(frozen=True)
class Told:
    """What the file says, in its own words."""

    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    takes_off_b_dec: bool
    normalize: str
    """A key of `NORMALIZE`."""
    metadata: dict[str, Any]
    """Of the language model and the training; flat files have it among everything else."""
    raw: dict[str, Any]
    """The whole file."""
    k: float | int | None = None
    rescales: bool = False
    """Whether pre-activations are multiplied by the norms of the decoder rows, and activations divided by them."""
    widths: tuple[int, ...] = ()
    """Of nested dictionaries."""
    residual_threshold: float = 0.0
    max_iterations: int = 0
    stops_on_repeat: bool = True
    finetuned: bool = False
    """Whether a tensor of factors for the activations is to be used."""

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads one hook point and writes another."""
        return "d_out" in OWN_KEYS[self.architecture]

    @property
    def hook_name(self) -> str | None:
        """The hook point or site, as far as it is said."""
        reads, writes = self.metadata.get("hook_name"), self.metadata.get("hook_name_out")
        if not self.is_transcoder:
            return reads
        return f"{reads}->{writes}" if reads and writes else None


def read_config(path: Path) -> Told:
    """Read and check `cfg.json`.

    Raises:
        UserError: something that matters is missing, misspelt or not supported.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{str(path)!r} is not a mapping: it is not the cfg.json of a SAELens SAE.")
    nested = isinstance(raw.get("metadata"), dict)
    keys = _Keys(raw if nested else _modernised(raw, path), path)
    architecture = keys.text("architecture")
    if architecture == "temporal":
        raise UserError(
            f"{str(path)!r} is of a temporal SAE, which attends to earlier tokens: this package encodes each token "
            "alone, so use SAELens for it."
        )
    if architecture not in OWN_KEYS:
        raise unknown(f"architecture in {str(path)!r}", architecture, list(OWN_KEYS))
    if nested:
        known = {*_SHARED, *_PASSIVE, *OWN_KEYS[architecture]}
        for key in raw:
            if key not in known | _TRAINING:
                remedy = "If it does not change what the SAE computes, take it out of the file."
                raise unknown(f"key in {str(path)!r}, of architecture {architecture!r}", key, sorted(known), remedy)
        refuse_misspelt(raw["metadata"], _METADATA, _METADATA_ALIKE, f"{str(path)!r}, metadata")
    told = _told(keys, architecture, raw["metadata"] if nested else dict(keys.raw), raw)
    if told.metadata.get("hook_head_index") is not None:
        raise UserError(
            f"{str(path)!r} is for attention head {told.metadata['hook_head_index']} alone (hook_head_index), but "
            "activations here are those of all heads together: use SAELens for it."
        )
    return told


def _told(keys: "_Keys", architecture: str, metadata: dict[str, Any], raw: dict[str, Any]) -> Told:
    own = OWN_KEYS[architecture]
    d_in = keys.count("d_in")
    normalize = keys.text("normalize_activations")
    if normalize not in NORMALIZE:
        raise unknown(f"normalize_activations in {str(keys.path)!r}", normalize, list(NORMALIZE))
    takes_off_b_dec = keys.flag("apply_b_dec_to_input")
    if "d_out" in own and (takes_off_b_dec or normalize != "none"):
        raise UserError(
            f"{str(keys.path)!r} is of a {architecture} with apply_b_dec_to_input = {takes_off_b_dec} and "
            f"normalize_activations = {normalize!r}, which no transcoder has: set them to false and 'none', or mend "
            "the architecture."
        )
    if keys.text("reshape_activations", "none") not in ("none", "hook_z"):
        raise unknown(f"reshape_activations in {str(keys.path)!r}", keys.raw["reshape_activations"], ["none", "hook_z"])
    pursues = architecture == "matching_pursuit"
    limit = keys.raw.get("max_iterations")
    return Told(
        architecture=architecture,
        d_in=d_in,
        d_sae=keys.count("d_sae"),
        d_out=keys.count("d_out") if "d_out" in own else d_in,
        takes_off_b_dec=takes_off_b_dec,
        normalize=normalize,
        metadata=metadata,
        raw=raw,
        k=keys.number("k") if "k" in own and keys.raw.get("k") is not None else None,
        # Files from before there was such a choice do not have it.
        rescales=keys.flag("rescale_acts_by_decoder_norm", False) if "rescale_acts_by_decoder_norm" in own else False,
        widths=keys.counts("matryoshka_widths") if "matryoshka_widths" in own else (),
        residual_threshold=keys.number("residual_threshold") if pursues else 0.0,
        max_iterations=keys.count("max_iterations") if pursues and limit is not None else 0,
        stops_on_repeat=keys.flag("stop_on_duplicate_support") if pursues else True,
        finetuned=keys.flag("finetuning_scaling_factor", False),
    )


def _modernised(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A flat file in the words of today, with the defaults that SAELens gives to what such files may lack."""
    meant = (*_SHARED, *_METADATA, *_FLAT, "metadata", *(key for keys in OWN_KEYS.values() for key in keys))
    refuse_misspelt(raw, meant, _METADATA_ALIKE, repr(str(path)))
    flat = {_RENAMED.get(key, key): value for key, value in raw.items()}
    flat.setdefault("architecture", "standard")
    flat.setdefault("apply_b_dec_to_input", True)
    scaled = flat.get("normalize_activations")
    if scaled is None or isinstance(scaled, bool):
        flat["normalize_activations"] = SCALED if scaled else "none"
    activation, arguments = flat.get("activation_fn") or "relu", flat.get("activation_fn_kwargs") or {}
    if activation == "topk" and flat["architecture"] in ("standard", "topk"):
        flat["architecture"] = "topk"
    elif activation not in ("relu", flat["architecture"]):
        raise UserError(f"{str(path)!r} has activation_fn = {activation!r}, which is not known: use 'relu' or 'topk'.")
    if flat["architecture"] == "topk":
        if not isinstance(arguments, dict) or set(arguments) - {"k"}:
            raise UserError(f"{str(path)!r} has activation_fn_kwargs = {arguments!r}: only k is known, mend the file.")
        flat.setdefault("k", arguments.get("k"))
    return flat


def refuse_misspelt(keys: Mapping[str, Any], meant: tuple[str, ...], others: set[str], where: str) -> None:
    """Refuse keys that are almost one of those that matter. Free-form mappings hold others, which pass.

    Args:
        keys: the mapping.
        meant: keys that matter.
        others: keys that are like them, and are not.
        where: for the message.

    Raises:
        UserError: naming the key and the one it is like.
    """
    for key in keys:
        if key not in meant and key not in others:
            near = difflib.get_close_matches(key.lower(), meant, n=1, cutoff=ALIKE)
            if near:
                raise UserError(f"{where} has a key {key!r}: did you mean {near[0]!r}? Mend it, or take it out.")


_MISSING = object()


class _Keys:
    """Values by key, each of the type it must have."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def _get(self, key: str, kinds: tuple[type, ...], words: str, default: Any = _MISSING) -> Any:
        value = self.raw.get(key, default)
        if value is _MISSING:
            near = difflib.get_close_matches(key, [name for name in self.raw if name not in _SHARED], n=1, cutoff=ALIKE)
            hint = f"is {near[0]!r} meant to be it? Mend its name." if near else f"add it, as {words}."
            raise UserError(f"{str(self.path)!r} has no {key!r}: {hint}")
        if not isinstance(value, kinds) or isinstance(value, bool) != (kinds == (bool,)):
            raise UserError(f"{str(self.path)!r} has {key} = {value!r}: give it as {words}.")
        return value

    def text(self, key: str, default: Any = _MISSING) -> str:
        return str(self._get(key, (str,), "text", default))

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        return bool(self._get(key, (bool,), "true or false", default))

    def count(self, key: str) -> int:
        value = self._get(key, (int, float), "a whole number from 1")
        if value < 1 or value % 1:
            raise UserError(f"{str(self.path)!r} has {key} = {value}: give it as a whole number from 1.")
        return int(value)

    def number(self, key: str) -> float | int:
        value: float | int = self._get(key, (int, float), "a number")
        if not 0 <= value < math.inf:
            raise UserError(f"{str(self.path)!r} has {key} = {value}: give it as a number that is not negative.")
        return value

    def counts(self, key: str) -> tuple[int, ...]:
        values = self._get(key, (list,), "a rising list of whole numbers")
        if not all(type(value) is int and value > 0 for value in values) or sorted(set(values)) != values:
            raise UserError(f"{str(self.path)!r} has {key} = {values!r}: give it as a rising list of whole numbers.")
        return tuple(values)
