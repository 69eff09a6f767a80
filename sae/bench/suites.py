"""The suites by name."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sae.bench.options import BenchOptions
from sae.errors import unknown

SUITES = {
    "train": "one training step beside the peers'",
    "quality": "what is learned in the same number of steps, on real activations",
    "rates": "what is learned at multiples of the default learning rate, on real activations",
    "grid": "twelve SAEs from one live stream against twelve alone",
    "harvest": "running the language model and writing the store",
    "store": "reading the store",
    "memory": "bytes, time and quality of each way to keep Adam's moments",
    "density": "up to which share of active latents sparse sums are cheaper than matmuls",
    "profile": "where the time of a step goes",
    "cuda": "the training step on a GPU: rate, share of the matmul ceiling, peak memory",
}
ALL = "all"


class Suite(NamedTuple):
    """One suite, loaded."""

    name: str
    run: Callable[[Path, BenchOptions], list[dict[str, Any]]]
    """Measure, with a folder for temporary files; returns plain records."""
    columns: list[str]
    """The columns to print."""


def pick(name: str) -> list[str]:
    """The suites that `suite=<name>` asks for.

    Raises:
        UserError: no such suite.
    """
    if name == ALL:
        return list(SUITES)
    if name not in SUITES:
        known = [*SUITES, ALL]
        raise unknown("suite", name, known, f"suite= takes one of {', '.join(known)}.")
    return [name]


def load(name: str) -> Suite | None:
    """Import a suite; None when this version does not have it."""
    home = f"sae.bench.{name}"
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        return None
    return Suite(name, module.run, list(module.COLUMNS))
