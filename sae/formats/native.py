"""Our own folders: `config.json` and `weights.safetensors` (see `sae.autoencoder.sae`)."""

from pathlib import Path

from sae.autoencoder.sae import CONFIG_FILE, SAE, WEIGHTS_FILE
from sae.errors import UserError
from sae.formats.interface import Format, Given


def matches(folder: Path) -> bool:
    """Tell by its files."""
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def read(folder: Path, given: Given) -> SAE:
    """Read it; it says all about itself."""
    if given != Given():
        raise UserError(f"{str(folder)!r} says all about itself: leave out the other arguments of load.")
    return SAE.load(folder)


def write(sae: SAE, folder: Path) -> None:
    """Write it."""
    sae.save(folder)


FORMAT = Format("sae", "this package", matches, read, write)
