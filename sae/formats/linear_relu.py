"""Two linear layers with a ReLU between them, in a file named `<model>-SAE-l<layer>.pt`: Goodfire's and qresearch's.

latent_acts = relu(x @ W_enc^T + b_enc),  recons = latent_acts @ W_dec^T + b_dec,  x the residual stream
"""

import re
from pathlib import Path
from typing import NamedTuple

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.formats import settings, tensors
from sae.formats.assemble import Parts, assemble
from sae.formats.interface import Given

_FILE = re.compile(r"(?P<model>.+)-SAE-l(?P<layer>\d+)\.pth?")
_OWNERS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}


class Names(NamedTuple):
    """What a file's name says."""

    lm_name: str
    layer: int


def parse(name: str) -> Names | None:
    """Read ``<model>-SAE-l<layer>.pt`` or ``.pth``; Llama models are meta-llama's, DeepSeek ones deepseek-ai's."""
    found = _FILE.fullmatch(name)
    if found is None:
        return None
    owner = _OWNERS.get(found["model"].split("-")[0])
    return Names(f"{owner}/{found['model']}" if owner else found["model"], int(found["layer"]))


def read(path: Path, given: Given, *, format: str, encoder: str, decoder: str) -> SAE:
    """Read the file, or the one such file of a folder.

    Args:
        path: it.
        given: the caller's arguments.
        format: name of the format.
        encoder: what the encoder's `weight` and `bias` are prefixed with.
        decoder: likewise.

    Raises:
        UserError: something is unsaid, missing or damaged.
    """
    settings.only(path, given, "hook_name", "lm_name")
    file = file_of(path)
    if file is None:
        raise UserError(f"{str(path)!r} is no file, nor a folder with one <model>-SAE-l<layer>.pt: point at the file.")
    names = parse(file.name)
    hook_name = f"blocks.{names.layer}.hook_resid_post" if names else None
    hook_name = given.need("hook_name", hook_name, file, "where the SAE belongs")
    lm_name = given.need("lm_name", names.lm_name if names else None, file, "the language model")
    wanted = [f"{layer}.{kind}" for kind in ("weight", "bias") for layer in (encoder, decoder)]
    found = tensors.read(file)
    tensors.only(found, file, *wanted)
    W_enc, W_dec, b_enc, b_dec = tensors.pick(found, file, *wanted)
    return assemble(
        Parts(W_enc.T, W_dec.T, b_enc, b_dec, takes_off_b_dec=False),
        architecture="relu",
        hook_name=hook_name,
        lm_name=lm_name,
        metadata=settings.about(format, path, names._asdict() if names else {}),
    )


def file_of(path: Path) -> Path | None:
    """The file itself, or the only one in a folder that is named so."""
    if path.is_file():
        return path
    files = [item for item in sorted(path.glob("*-SAE-l*.pt*")) if parse(item.name)] if path.is_dir() else []
    return files[0] if len(files) == 1 else None


def named(path: Path, start: str) -> bool:
    """Whether a path is, or holds, one such file whose model's name starts so."""
    file = file_of(path)
    return file is not None and parse(file.name) is not None and file.name.startswith(start)
