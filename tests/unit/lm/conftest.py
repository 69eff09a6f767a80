"""Tiny random checkpoints, made once a session."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_lms import ARCHITECTURES, save_checkpoint

from sae.lm.load import load_lm


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of each architecture, made when first asked for."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_checkpoint(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def loaded(checkpoints):
    """Our model and the plain Hugging Face model of each architecture."""
    from transformers import AutoModelForCausalLM

    made: dict[str, tuple] = {}

    def get(kind: str):
        if kind not in made:
            folder = checkpoints(kind)
            plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
            made[kind] = (load_lm(str(folder), device="cpu"), plain)
        return made[kind]

    return get


@pytest.fixture(params=ARCHITECTURES)
def pair(request, loaded):
    return loaded(request.param)


@pytest.fixture
def lm(loaded):
    return loaded("llama")[0]
