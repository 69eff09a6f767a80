"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, in a folder named after the module it was trained at.

    pre_acts = relu((x - b_dec) @ encoder.weight.T + encoder.bias)      x itself where `transcode`
    recons   = latent_acts @ W_dec + b_dec [+ x @ W_skip.T]

The k largest are active, or with `activation: groupmax` the largest of each of k groups, or with `signed`, which old
versions had, the k largest in size. `multi_topk`, `normalize_decoder` and `expansion_factor` are about training only
(with `multi_topk` their `forward` gives back what 4k latents make, their `encode` k latents as ever).
Read from sparsify 1.3.3, whose older files are the same without some of the fields.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae.autoencoder.sae import SAE
from sae.autoencoder.site import Site
from sae.errors import UserError, unknown
from sae.files import atomic_folder, write_json, write_tensors
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble, check_writable, take_apart
from sae.formats.interface import Format, Given

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
TITLE = "EleutherAI's sparsify"
ACTIVATIONS = {"topk": "topk", "groupmax": "groupmax"}
"""Their name for what is kept, and ours."""
WRITES = {"topk": "topk", "hierarchical_topk": "topk", "groupmax": "groupmax"}
"""Architectures that can be written, and their name for each."""
NEW_INPUTS = ("embed_skip", "gram_lookup")
"""Flags of newer versions that add something to a reconstruction which is not made of the activations."""
REQUIRED: settings.Kinds = {"k": int, "d_in": int}
OPTIONAL: settings.Kinds = {
    **dict.fromkeys(("expansion_factor", "num_latents"), int),
    **dict.fromkeys(("skip_connection", "transcode", "signed", *NEW_INPUTS), bool),
    **dict.fromkeys(("activation", "hook_name", "lm_name"), str),  # `write` adds the last two, sparsify skips them
}
HARMLESS = ("normalize_decoder", "multi_topk", "lookup_max_order", "gram_table_hash")


def matches(folder: Path) -> bool:
    """Tell by its files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def site_of(module: str, transcode: bool) -> str:
    """The site of a module of a Hugging Face model, "" if the rule does not know it.

    An autoencoder reads what the module gives out; a transcoder reads what the module is given, too:

        layers.5 or h.5                                        blocks.5.hook_resid_post
        layers.5.mlp                                           blocks.5.mlp.hook_out
        layers.5.self_attn (.attention, .attn)                 blocks.5.attn.hook_out
        embed_tokens (embed_in, wte)                           hook_embed
        layers.5 or h.5, transcode                             blocks.5.hook_resid_pre->blocks.5.hook_resid_post
        layers.5.mlp, transcode                                blocks.5.mlp.hook_in->blocks.5.mlp.hook_out

    `hook_mlp_out` would be the MLP's output only in models that do not normalise it once more, as Gemma 2 does.

    Args:
        module: its name below the model without its head: the last part of a folder's path.
        transcode: whether it is a transcoder's.
    """
    if module in ("embed_tokens", "embed_in", "wte"):
        return "" if transcode else "hook_embed"
    found = re.fullmatch(r"(?:layers|h)\.(\d+)(?:\.(mlp|self_attn|attention|attn))?", module)
    if found is None:
        return ""
    block, inner = f"blocks.{found[1]}", found[2]
    if inner is None:
        return f"{block}.hook_resid_pre->{block}.hook_resid_post" if transcode else f"{block}.hook_resid_post"
    if inner == "mlp":
        return f"{block}.mlp.hook_in->{block}.mlp.hook_out" if transcode else f"{block}.mlp.hook_out"
    return "" if transcode else f"{block}.attn.hook_out"


def read(folder: Path, given: Given) -> SAE:
    """Read it. What neither it nor the run's folder above it says: hook_name, lm_name."""
    settings.only(folder, given, "hook_name", "lm_name")
    path = folder / CONFIG
    cfg = settings.read(path)
    settings.check(path, cfg, REQUIRED, OPTIONAL, HARMLESS)
    for name in NEW_INPUTS:
        if cfg.get(name):
            raise UserError(
                f"{str(path)!r} has {name}, which needs more than activations: such SAEs are not supported."
            )
    transcode = bool(cfg.get("transcode"))
    place = folder.absolute()
    if re.fullmatch(r"seed\d+", place.name):  # a run with several seeds has a folder for each, one level down
        place = place.parent
    found = cfg.get("hook_name") or site_of(place.name, transcode)
    hook_name = given.need("hook_name", found, folder, "since its folder's name is no module that has one")
    if (transcode or cfg.get("skip_connection")) and Site.parse(hook_name).kind != "transcoder":
        raise UserError(f"{str(folder)!r} is a transcoder: its hook_name is 'read->write', not {hook_name!r}.")
    lm_name = cfg.get("lm_name") or ("" if given.lm_name else _lm_of_run(place.parent))
    return assemble(
        _parts(folder, cfg),
        architecture=_architecture(path, cfg),
        hook_name=hook_name,
        lm_name=given.need("lm_name", lm_name, folder, "the language model it was trained on"),
        l0=cfg["k"],
        metadata=settings.about(FORMAT.name, folder, cfg),
    )


def _architecture(path: Path, cfg: Mapping[str, Any]) -> str:
    name = cfg.get("activation") or "topk"  # there was no other before there was the field
    if name not in ACTIVATIONS:
        raise unknown(f"activation in {str(path)!r}", name, list(ACTIVATIONS))
    if not cfg.get("signed"):
        return ACTIVATIONS[name]
    if name != "topk":
        raise UserError(f"{str(path)!r} has signed with activation {name!r}, which no version had: correct it.")
    return "abs_topk"


def _parts(folder: Path, cfg: Mapping[str, Any]) -> Parts:
    path, skip = folder / WEIGHTS, bool(cfg.get("skip_connection"))
    held = tensors.read(path)
    names = ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if skip else [])]
    tensors.only(held, path, *names)
    weight, bias, W_dec, b_dec, *linear = tensors.pick(held, path, *names)
    d_in, d_sae = cfg["d_in"], cfg.get("num_latents") or cfg["d_in"] * (cfg.get("expansion_factor") or 0)
    if tuple(weight.shape) != (d_sae, d_in):
        raise UserError(
            f"encoder.weight in {str(path)!r} is {list(weight.shape)} where {CONFIG} says {[d_sae, d_in]}: "
            "are both files of one folder?"
        )
    takes_off_b_dec = not cfg.get("transcode")
    return Parts(weight.t(), W_dec, bias, b_dec, takes_off_b_dec, W_skip=linear[0].t() if skip else None)


def _lm_of_run(folder: Path) -> str:
    """The model that the run's own `config.json`, one level above its SAEs, names; "" if there is none."""
    path = folder / "config.json"
    run = settings.read(path) if path.is_file() else {}
    return str(run.get("model") or "") if "sae" in run else ""


def write(sae: SAE, folder: Path) -> None:
    """Write it as sparsify 1.3.3 does, with hook_name and lm_name besides.

    HierarchicalTopK is written as the TopK it is in use.

    Raises:
        UserError: an architecture or a kind that sparsify does not have.
    """
    config = sae.config
    if config.architecture not in WRITES:
        raise UserError(f"{TITLE} has no {config.architecture}, only {', '.join(WRITES)}: choose another format.")
    check_writable(sae, TITLE)
    transcode = sae.kind == "transcoder"
    parts = take_apart(sae, takes_off_b_dec=not transcode)
    held = {"encoder.weight": parts.W_enc.t(), "encoder.bias": parts.b_enc, "W_dec": parts.W_dec, "b_dec": parts.b_dec}
    if parts.W_skip is not None:
        held["W_skip"] = parts.W_skip.t()
    norms = parts.W_dec.norm(dim=1)
    cfg: dict[str, Any] = {
        "activation": WRITES[config.architecture],
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": torch.allclose(norms, torch.ones_like(norms), atol=1e-3),
        "num_latents": config.d_sae,
        "k": int(sae.sparsity.l0),
        "multi_topk": False,
        "skip_connection": parts.W_skip is not None,
        "transcode": transcode,
        "d_in": config.d_in,
        "hook_name": config.hook_name,
        "lm_name": config.lm_name,
    }
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS, held)
        write_json(temporary / CONFIG, cfg)


FORMAT = Format("sparsify", f"{TITLE}: SAEs and transcoders", matches, read, write)
