"""Goodfire's SAEs of Llama: `Llama-3.1-8B-Instruct-SAE-l19.pth`; see `sae.formats.linear_relu`."""

from pathlib import Path

from sae.autoencoder.sae import SAE
from sae.formats import linear_relu
from sae.formats.interface import Format, Given


def matches(path: Path) -> bool:
    """Tell by the file's name."""
    return linear_relu.named(path, "Llama-")


def read(path: Path, given: Given) -> SAE:
    """Read it."""
    return linear_relu.read(path, given, format="goodfire", encoder="encoder_linear", decoder="decoder_linear")


FORMAT = Format("goodfire", "Goodfire: SAEs of Llama 3.1 8B and 3.3 70B Instruct", matches, read)
