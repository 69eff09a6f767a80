"""From OpenMOSS's lm_saes (Llama Scope, 2410.20526) to one of our SAEs: the same config and maths in two layouts.

With s_in = sqrt(d_model) / mean |x| of the hook point that is read, s_out likewise of the one that is written, and n_i
the norm of latent i's decoder row as stored:

    pre_acts    = s_in * x @ W_enc + b_enc                      [s_in * x - b_dec where it is taken off the input]
    latent_acts = pre_acts where n_i * pre_acts > threshold     [without n_i where sparsity_include_decoder_norm is off]
    recons      = (latent_acts @ W_dec + b_dec) / s_out

There are two kinds of threshold. One per latent (`log_jumprelu_threshold`) was trained, so it is in the units above.
The single one of hyperparams.json was chosen after the scales had been folded into the weights, as the library does for
inference: there latents have the units of the raw output, and so has it. (Published values bear this out: of four hook
points that were looked at they differ sevenfold, while in the units above they are 1.7 to 2.1.)

What comes out has decoder rows of norm 1 and acts on raw activations: our latents are the library's times n_i / s_out,
which is what the library itself gives after folding both.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.autoencoder.site import ARROW
from sae.errors import UserError
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble

REQUIRED = {"d_model": int, "hook_point_in": str, "act_fn": str, "norm_activation": str}
OPTIONAL = {
    "d_sae": int,
    "expansion_factor": float,
    "hook_point_out": str,
    "sae_type": str,
    "jump_relu_threshold": float,
    "dataset_average_activation_norm": dict,
    "sparsity_include_decoder_norm": bool,
    "use_decoder_bias": bool,
    "apply_decoder_bias_to_pre_encoder": bool,
    "use_glu_encoder": bool,
    "top_k": int,
}
# Of training, of initialising and of the machine; several versions' names.
HARMLESS = (
    *("device", "seed", "dtype", "tp_size", "ddp_size", "strict_loading", "sae_pretrained_name_or_path"),
    *("bias_init_method", "init_decoder_norm", "init_encoder_norm", "init_encoder_with_decoder_transpose"),
    *("init_encoder_with_decoder_transpose_factor", "init_search", "decoder_exactly_fixed_norm"),
    *("lp", "l1_coefficient", "l1_coefficient_warmup_steps", "initial_k", "k_warmup_steps", "use_batch_norm_mse"),
    *("use_ghost_grads", "use_auxk", "jumprelu_threshold_grad_scale", "jumprelu_threshold_window"),
    *("use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel"),
)
TENSORS = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
DATASET_WISE, FOLDED = "dataset-wise", "inference"


class Stored(NamedTuple):
    """Tensors as stored, transposed into our layout."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]


def stored(path: Path, found: Mapping[str, Tensor], *others: str) -> Stored:
    """Encoder and decoder of a file, transposed; `others` are what else may be in it.

    Raises:
        UserError: a tensor is missing, or one is not known.
    """
    tensors.only(found, path, *TENSORS, *others)
    W_enc, W_dec, b_enc, b_dec = tensors.pick(found, path, *TENSORS)
    return Stored(W_enc.T, W_dec.T, b_enc, b_dec)


class Scales(NamedTuple):
    """What activations are multiplied by."""

    read: float
    write: float


def check(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config that is incomplete, misspelt, or of a kind that is not read.

    Raises:
        UserError: naming the key.
    """
    settings.check(path, config, REQUIRED, OPTIONAL, HARMLESS)
    wanted = {
        "sae_type": ("sae", "sae"),
        "act_fn": ("jumprelu", None),
        "use_glu_encoder": (False, False),
        "use_decoder_bias": (True, True),
    }
    for name, (value, default) in wanted.items():
        found = config.get(name, default)
        if (found.lower() if isinstance(found, str) else found) != value:
            raise UserError(f"{name} = {found!r} in {str(path)!r} is not supported: only {value!r} is read.")
    if config["norm_activation"] not in (DATASET_WISE, FOLDED):
        raise UserError(
            f"norm_activation = {config['norm_activation']!r} in {str(path)!r} is not supported: only {DATASET_WISE!r} "
            f"and {FOLDED!r} are read."
        )


def scale(path: Path, d_model: int, norm: Any) -> float:
    """sqrt(d_model) / norm, the mean length of activations.

    Raises:
        UserError: the norm is no positive number.
    """
    if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 < norm < math.inf:
        raise UserError(f"{str(path)!r} has the activation norm {norm!r}, which is not above 0: download it again.")
    return math.sqrt(d_model) / norm


def build(
    path: Path,
    config: Mapping[str, Any],
    parts: Stored,
    scales: Scales,
    *,
    format: str,
    hook_name: str | None,
    lm_name: str,
    log_threshold: Float[Tensor, " d_sae"] | None,
) -> SAE:
    """Fold scales and decoder norms; see the head of the file.

    Args:
        path: of the config, for messages and metadata.
        config: what it says; checked.
        parts: the tensors.
        scales: 1 and 1 where norm_activation says that they are folded.
        format: name of the format.
        hook_name: hook point or site; None takes the config's.
        lm_name: the language model.
        log_threshold: trained thresholds; None takes the config's single one.

    Raises:
        UserError: tensors that do not fit the config.
    """
    d_in, d_sae = parts.W_enc.shape
    said = config["d_model"], config.get("d_sae") or round(config.get("expansion_factor", 0) * config["d_model"])
    if (d_in, d_sae) != said:
        raise UserError(f"{str(path)!r} says {said[0]} to {said[1]}, but its tensors map {d_in} to {d_sae}.")
    reads, writes = config["hook_point_in"], config.get("hook_point_out") or config["hook_point_in"]
    off = bool(config.get("apply_decoder_bias_to_pre_encoder", False))
    if off and (reads != writes or scales.read != scales.write):
        raise UserError(
            f"apply_decoder_bias_to_pre_encoder in {str(path)!r} makes sense where it reads what it writes."
        )
    norms = parts.W_dec.double().norm(dim=1)
    unit = norms / scales.write  # our latents in the library's
    include = bool(config.get("sparsity_include_decoder_norm", True))
    if log_threshold is not None:
        threshold = log_threshold.double().exp() * (1 / scales.write if include else unit)
    else:
        single = config.get("jump_relu_threshold")
        if single is None or single < 0:
            raise UserError(f"jump_relu_threshold = {single!r} in {str(path)!r} is not 0 or more: download it again.")
        raw = torch.full_like(norms, single)
        threshold = raw if include else raw * scales.read * unit
    ours = Parts(
        (parts.W_enc.double() * unit * scales.read).float(),
        (parts.W_dec.double() / norms.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).float(),
        (parts.b_enc.double() * unit).float(),
        parts.b_dec / scales.write,
        takes_off_b_dec=off,
        sparsity={"threshold": threshold.float()},
    )
    return assemble(
        ours,
        architecture="jumprelu",
        hook_name=hook_name or (reads if reads == writes else f"{reads}{ARROW}{writes}"),
        lm_name=lm_name,
        l0=config.get("top_k") or 0,
        metadata=settings.about(format, path, config),
    )
