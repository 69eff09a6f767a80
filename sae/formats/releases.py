"""Published releases: which format a hub repository is in, and of which language model.

    sae.load("google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82")

opens one without saying either. `releases.json` has the repositories, as `scripts/list_releases.py` takes them from the
list that SAELens ships. A repository that is not listed is opened the same way, with what its files do not say as
arguments.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Release(NamedTuple):
    """A hub repository of SAEs."""

    format: str
    """A name in `registry.formats()`."""
    lm_name: str
    """The language model."""
    example: str
    """A folder or file in it."""


@cache
def releases() -> dict[str, Release]:
    """All of them, by repository."""
    found = json.loads((Path(__file__).parent / "releases.json").read_text())
    return {repo: Release(**about) for repo, about in found.items()}
