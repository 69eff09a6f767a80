"""SAELens: folders with `cfg.json` and `sae_weights.safetensors`, of trained SAEs and of training checkpoints.

    sae.load("path/to/folder")

A checkpoint comes out as what SAELens would make of it for use: the constants by which training normalised activations
(`activation_scaler.json`, `activation_whitening.safetensors`) and the norms of decoder rows are folded in, and
BatchTopK fires above its threshold. What `cfg.json` means is in `saelens_config`, writing in `saelens_write`.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.autoencoder.site import Site
from sae.errors import UserError, unknown
from sae.files import read_json
from sae.formats import tensors as tensor_files
from sae.formats.assemble import Parts, assemble
from sae.formats.interface import Format, Given
from sae.formats.saelens_config import CONFIG, NORMALIZE, SCALED, WHITENED, Told, read_config
from sae.formats.saelens_write import WEIGHTS, write

SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
SMALLEST_NORM = 1e-8
"""Decoder rows shorter than this are not made longer, as in SAELens."""

# By architecture there: its name here, and the tensors of its file.
_PLAIN = ("W_enc", "W_dec", "b_enc", "b_dec")
_ARCHITECTURES = {
    "standard": ("relu", _PLAIN),
    "topk": ("topk", _PLAIN),
    "abstopk": ("abs_topk", _PLAIN),
    "jumprelu": ("jumprelu", (*_PLAIN, "threshold")),
    "gated": ("gated", ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")),
    "batchtopk": ("batch_topk", (*_PLAIN, "topk_threshold")),
    "matryoshka_batchtopk": ("matryoshka_batch_topk", (*_PLAIN, "topk_threshold")),
    "matching_pursuit": ("matching_pursuit", ("W_dec", "b_dec")),
    "transcoder": ("relu", _PLAIN),
    "skip_transcoder": ("relu", (*_PLAIN, "W_skip")),
    "jumprelu_transcoder": ("jumprelu", (*_PLAIN, "threshold")),
    "jumprelu_skip_transcoder": ("jumprelu", (*_PLAIN, "threshold", "W_skip")),
}


def matches(folder: Path) -> bool:
    """Tell by its files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, given: Given) -> SAE:
    """Read an SAE, or a training checkpoint as one that is ready for use.

    Raises:
        UserError: something is missing, misspelt, damaged or not supported.
    """
    path = folder / CONFIG
    told = read_config(path)
    if given.layer is not None:
        raise UserError(f"{str(folder)!r} holds one SAE: leave out layer = {given.layer}.")
    hook_name = given.need("hook_name", told.hook_name, path, "the place in the language model")
    lm_name = given.need("lm_name", told.metadata.get("model_name"), path, "the language model")
    _check_site(hook_name, told, path)
    k = _k(told, given, path)
    scale = _scale(told, given, folder)
    parts = _parts(told, folder / WEIGHTS)
    if scale is not None:
        parts = _scaled(parts, scale)
        if told.rescales and "threshold" in parts.sparsity:  # in units of pre-activation * norm of a decoder row
            parts = parts._replace(sparsity={"threshold": parts.sparsity["threshold"] / scale})
    if told.rescales:
        parts = _with_unit_rows(parts)
    if told.normalize == WHITENED:
        parts = _whitened(parts, folder / WHITENING)
    return assemble(
        parts,
        architecture=_ARCHITECTURES[told.architecture][0],
        hook_name=hook_name,
        lm_name=lm_name,
        l0=_l0(told) if k is None else k,
        normalize=NORMALIZE[told.normalize],
        options=_options(told),
        metadata={"source": {"format": "saelens", "path": str(folder), "scale": scale, "said": told.raw}},
    )


def _check_site(hook_name: str, told: Told, path: Path) -> None:
    kind, wanted = Site.parse(str(hook_name)).kind, "transcoder" if told.is_transcoder else "sae"
    if kind != wanted:
        raise UserError(
            f"{str(path)!r} is of architecture {told.architecture!r}, but hook_name = {hook_name!r} is that of a "
            f"{kind}: give " + ("'read->write'." if told.is_transcoder else "one hook point.")
        )


def _k(told: Told, given: Given, path: Path) -> float | int | None:
    """Latents active on a token, where the architecture has such a number."""
    if told.architecture not in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk"):
        if given.k is not None:
            raise UserError(f"{str(path)!r} is of architecture {told.architecture!r}, without a k: leave k out.")
        return None
    if None not in (told.k, given.k) and told.k != given.k:
        raise UserError(f"{str(path)!r} says k = {told.k}, not {given.k}: leave k out.")
    k: float | int = given.need("k", told.k, path, "the number of latents active on a token")
    return k


def _l0(told: Told) -> float | int:
    """The L0 that training aimed at, as its metadata have it; 0 where they do not say."""
    details = told.metadata.get("training_architecture_details")
    for name in ("k", "target_l0"):
        value = details.get(name) if isinstance(details, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= told.d_sae:
            return value
    return 0


def _options(told: Told) -> dict[str, Any]:
    if told.architecture == "matryoshka_batchtopk":
        return {"prefixes": [width / told.d_sae for width in told.widths if width < told.d_sae]}
    if told.architecture == "matching_pursuit":
        return {"max_steps": told.max_iterations, "stop_on_repeat": told.stops_on_repeat}
    return {}


def _parts(told: Told, path: Path) -> Parts:
    """The tensors as they are, in fp64, in our layout and by our names."""
    state = _state(told, path)
    pursues, takes_off_b_dec = told.architecture == "matching_pursuit", told.takes_off_b_dec
    W_dec, b_dec = state["W_dec"], state["b_dec"]
    sparsity: dict[str, Tensor] = {}
    b_enc = state.get("b_enc", W_dec.new_zeros(told.d_sae))
    if "threshold" in state:
        # What is below 0 is cut off after the threshold there, and before it here.
        sparsity["threshold"] = state["threshold"].clamp(min=0)
    elif "topk_threshold" in state:
        sparsity["threshold"] = state["topk_threshold"]
    elif "r_mag" in state:
        b_enc = state["b_gate"]
        sparsity = {"log_gain": state["r_mag"], "shift": state["b_mag"] - state["r_mag"].exp() * b_enc}
    elif pursues:
        sparsity["residual_threshold"] = torch.tensor(told.residual_threshold, dtype=torch.float64)
        # It adds b_dec to the output only if it takes it off the input.
        b_dec, takes_off_b_dec = b_dec * takes_off_b_dec, True
    return Parts(
        W_enc=W_dec.t() if pursues else state["W_enc"],
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        takes_off_b_dec=takes_off_b_dec,
        sparsity=sparsity,
        W_skip=state["W_skip"].t() if "W_skip" in state else None,
    )


def _state(told: Told, path: Path) -> dict[str, Float[Tensor, "*shape"]]:
    """The tensors of the file, in fp64: all that its architecture has, and no other, each of its right shape."""
    found = tensor_files.read(path)
    if "log_threshold" in found and "threshold" not in found:
        found["threshold"] = found.pop("log_threshold").double().exp()
    factors = _finetuned(told, found.pop("scaling_factor", None), path)
    names = _ARCHITECTURES[told.architecture][1]
    for name in found:
        if name not in names:
            raise unknown(f"tensor in {str(path)!r}, of architecture {told.architecture!r}", name, list(names))
    shapes = {
        "W_enc": [told.d_in, told.d_sae],
        "W_dec": [told.d_sae, told.d_out],
        "b_dec": [told.d_out],
        "W_skip": [told.d_out, told.d_in],
        "topk_threshold": [],
    }
    state = dict(zip(names, tensor_files.pick(found, path, *names), strict=True))
    for name, tensor in state.items():
        shape = shapes.get(name, [told.d_sae])
        if list(tensor.shape) != shape:
            raise UserError(
                f"tensor {name!r} in {str(path)!r} is {list(tensor.shape)}, but {CONFIG} says {shape}: it is not "
                "the file that belongs to it."
            )
    state = {name: tensor.double() for name, tensor in state.items()}
    if factors is not None:
        state["W_dec"] = factors[:, None] * state["W_dec"]
    return state


def _finetuned(told: Told, factors: Tensor | None, path: Path) -> Tensor | None:
    """What activations are multiplied by before they are decoded, of flat files; None where it is 1."""
    if factors is None or bool((factors == 1).all()):
        return None
    if list(factors.shape) != [told.d_sae] or not bool(torch.isfinite(factors).all()):
        raise UserError(f"tensor 'scaling_factor' in {str(path)!r} is not {told.d_sae} numbers: download it again.")
    if not told.finetuned:
        raise UserError(
            f"{str(path)!r} has a tensor 'scaling_factor', but {CONFIG} does not say whether it is to be used: set "
            "finetuning_scaling_factor to true there, or take the tensor out."
        )
    return factors.double()


def _scale(told: Told, given: Given, folder: Path) -> float | None:
    """What activations were multiplied by in training; None where they were not, or whitened."""
    path, found = folder / SCALER, None
    if path.is_file():
        data = read_json(path)
        if not isinstance(data, dict) or "scaling_factor" not in data:
            raise UserError(f"{str(path)!r} has no 'scaling_factor': restore the file, or delete it and give scale=.")
        found = data["scaling_factor"]
    if told.normalize != SCALED:
        if found is not None or given.scale is not None:
            said = f"scale = {given.scale}" if found is None else f"scaling_factor = {found} in {SCALER}"
            raise UserError(
                f"{str(folder / CONFIG)!r} says normalize_activations = {told.normalize!r}, so there is nothing to "
                f"scale: leave out {said}."
            )
        return None
    if None not in (found, given.scale) and found != given.scale:
        raise UserError(f"{str(path)!r} says scaling_factor = {found}, not {given.scale}: leave scale out.")
    why = "the number its weights still expect activations to be multiplied by (1 if it was folded into them)"
    scale = given.need("scale", found, folder, why)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < math.inf:
        raise UserError(f"scale = {scale!r} of {str(folder)!r} is no number above 0: give the one used in training.")
    return float(scale)


def _scaled(parts: Parts, scale: float) -> Parts:
    """For raw activations instead of those times `scale`; latents stay what they are."""
    if "residual_threshold" in parts.sparsity:
        # The encoder is the decoder, so neither can be scaled: here it is latents that change.
        threshold = parts.sparsity["residual_threshold"] / scale
        return parts._replace(b_dec=parts.b_dec / scale, sparsity={"residual_threshold": threshold})
    return parts._replace(W_enc=parts.W_enc * scale, W_dec=parts.W_dec / scale, b_dec=parts.b_dec / scale)


def _with_unit_rows(parts: Parts) -> Parts:
    """Decoder rows of norm 1, where activations are selected as if they were; the thresholds are meant for that."""
    norms = parts.W_dec.norm(dim=1).clamp(min=SMALLEST_NORM)
    return parts._replace(W_enc=parts.W_enc * norms, b_enc=parts.b_enc * norms, W_dec=parts.W_dec / norms[:, None])


def _whitened(parts: Parts, path: Path) -> Parts:
    """For raw activations instead of whitened ones, (x - mean) @ matrix."""
    if "residual_threshold" in parts.sparsity:
        raise UserError(f"{str(path.parent)!r} pursues whitened activations, which no weights can do on raw ones.")
    d_in = len(parts.W_enc)
    mean, matrix, inverse = (
        tensor.double()
        for tensor in tensor_files.pick(tensor_files.read(path), path, "mean", "matrix", "inverse_matrix")
    )
    if [list(mean.shape), list(matrix.shape), list(inverse.shape)] != [[d_in], [d_in, d_in], [d_in, d_in]]:
        raise UserError(f"{str(path)!r} is not for activations {d_in} wide: it belongs to another SAE.")
    W_enc = matrix @ parts.W_enc
    return parts._replace(
        W_enc=W_enc,
        # Where b_dec is taken off the input, it holds the mean already.
        b_enc=parts.b_enc if parts.takes_off_b_dec else parts.b_enc - mean @ W_enc,
        W_dec=parts.W_dec @ inverse,
        b_dec=parts.b_dec @ inverse + mean,
    )


FORMAT = Format("saelens", "SAELens: SAEs, transcoders and training checkpoints", matches, read, write)
