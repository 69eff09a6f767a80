"""qresearch's SAE: `DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt`; see `sae.formats.linear_relu`."""

from pathlib import Path

from sae.autoencoder.sae import SAE
from sae.formats import linear_relu
from sae.formats.interface import Format, Given


def matches(path: Path) -> bool:
    """Tell by the file's name."""
    return linear_relu.named(path, "DeepSeek-")


def read(path: Path, given: Given) -> SAE:
    """Read it."""
    return linear_relu.read(path, given, format="deepseek_r1", encoder="encoder", decoder="decoder")


FORMAT = Format("deepseek_r1", "qresearch: SAE of DeepSeek-R1-Distill-Llama-8B", matches, read)
