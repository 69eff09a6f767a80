"""Find and open the shipped organism."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae.errors import UserError
from sae.lm.load import resolve_model


def organism_folder() -> Path:
    """Return the folder of the shipped organism: the checkout's `checkpoints/organism`, else the packaged copy.

    Raises:
        UserError: neither is there.
    """
    return Path(resolve_model("organism"))


def load_model(folder: Path | str | None = None) -> Any:
    """Load an organism's Hugging Face model, in evaluation mode, without touching the network.

    Args:
        folder: where it was saved; the shipped one if not given.
    """
    from transformers import LlamaForCausalLM

    path = Path(folder) if folder is not None else organism_folder()
    if not (path / "config.json").is_file():
        raise UserError(f"no organism in {str(path)!r}: give the folder that `sae organism train` wrote.")
    with no_progress_bars():
        model = LlamaForCausalLM.from_pretrained(path, local_files_only=True, dtype="float32")
    return model.eval()


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars for a model that loads and saves in an instant."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
