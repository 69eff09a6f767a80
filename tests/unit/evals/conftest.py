"""A tiny random language model."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def real_lm(tmp_path_factory):
    """Three layers, width 32."""
    from sae.lm.load import load_lm

    sys.path.insert(0, str(Path(__file__).parent.parent / "lm"))
    try:
        from tiny_lms import save_checkpoint
    finally:
        sys.path.pop(0)
    return load_lm(str(save_checkpoint(tmp_path_factory.mktemp("lm"), "llama")), device="cpu")
