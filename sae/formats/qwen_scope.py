"""Qwen Scope (Qwen Team 2026): TopK SAEs of the residual stream, a file a layer.

    SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer14.sae.pt, and config.json for all of them

    pre_acts = x @ W_enc^T + b_enc, the k largest are kept; recons = latent_acts @ W_dec^T + b_dec

The release keeps the k largest even where they are negative. Ours never are: on a token with fewer than k positive
pre-activations, which a wide dictionary hardly has, the others are zero here.
"""

import re
from pathlib import Path
from typing import NamedTuple

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble
from sae.formats.interface import Format, Given

CONFIG = "config.json"
_REQUIRED = {"k": int, "base_model": str, "hook_point": str}
_OPTIONAL = {"model_type": str, "d_model": int, "d_sae": int, "num_layers": int}
_REPO = re.compile(r"SAE-Res-(?P<model>.+)-W(?P<width>\d+)K-L0_(?P<k>\d+)")
_FILE = re.compile(r"layer(?P<layer>\d+)\.sae\.pt")
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


class Names(NamedTuple):
    """What a repository's name says; None where it does not."""

    lm_name: str | None
    d_sae: int | None
    k: int | None


def parse(path: Path) -> Names:
    """Read the repository's name: ``SAE-Res-<model>-W<thousands of 1024 latents>K-L0_<k>``."""
    repo = settings.part(path, _REPO)
    if repo is None:
        return Names(None, None, None)
    return Names(f"Qwen/{repo['model']}", 1024 * int(repo["width"]), int(repo["k"]))


def matches(path: Path) -> bool:
    """Tell by the files' names."""
    return settings.holds(path, _FILE)


def read(path: Path, given: Given) -> SAE:
    """Read one layer, by the file's name or `given.layer`; config.json comes before the repository's name.

    Raises:
        UserError: something is unsaid, misspelt, missing or damaged.
    """
    settings.only(path, given, "hook_name", "lm_name", "layer", "k")
    layer = settings.layer_of(path, _FILE, given)
    folder = path.parent if path.is_file() else path
    file = path if path.is_file() else folder / f"layer{layer}.sae.pt"
    said, named = {}, parse(path)
    if (folder / CONFIG).is_file():
        said = settings.read(folder / CONFIG)
        settings.check(folder / CONFIG, said, _REQUIRED, _OPTIONAL, ("dtype",))
        if said.get("model_type", "topk_sae") != "topk_sae" or said["hook_point"] != "resid_post":
            raise UserError(
                f"{str(folder / CONFIG)!r} has model_type {said.get('model_type')!r} and hook_point "
                f"{said['hook_point']!r}, where topk_sae at resid_post is read: correct it."
            )
        named = Names(said["base_model"], said.get("d_sae"), said["k"])
    k = given.need("k", settings.agreed(path, "k", named.k, given.k), folder, "how many latents are active")
    lm_name = given.need("lm_name", named.lm_name, folder, "the language model")
    W_enc, W_dec, b_enc, b_dec = tensors.pick(tensors.read(file), file, *_TENSORS)
    sizes = {"d_sae": (named.d_sae, b_enc.numel()), "d_model": (said.get("d_model"), b_dec.numel())}
    for name, (expected, size) in sizes.items():
        if expected is not None and expected != size:
            raise UserError(f"{str(file)!r} has {name} = {size}, where {expected} is said: is it another release's?")
    return assemble(
        Parts(W_enc.T, W_dec.T, b_enc, b_dec, takes_off_b_dec=False),
        architecture="topk",
        hook_name=given.hook_name or f"blocks.{layer}.hook_resid_post",
        lm_name=lm_name,
        l0=k,
        metadata=settings.about("qwen_scope", path, said or named._asdict()),
    )


FORMAT = Format("qwen_scope", "Qwen Scope: TopK SAEs of Qwen 3 and 3.5", matches, read)
