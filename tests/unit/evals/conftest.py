"""A tiny random language model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_lms import save_checkpoint


@pytest.fixture(scope="session")
def real_lm(tmp_path_factory):
    """Three layers, width 32."""
    from sae.lm.load import load_lm

    return load_lm(str(save_checkpoint(tmp_path_factory.mktemp("lm"), "llama")), device="cpu")
