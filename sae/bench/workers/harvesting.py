"""What a harvesting worker is: a process that holds one language model and turns the same tokens into activations.

Requests and replies are as in `protocol`, of which this is the smaller sister:

    build     way, model, tokens, hook_layer, batch_tokens, dtype, threads, scratch (see `Job`)  -> version, options
    sample    path                   activations of the first rows, as .npy [tokens d_in] float32
    run                              -> seconds, n_tokens

Runs in the peers' environment too, where the `sae` package is not.
"""

import abc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

try:
    import protocol
except ImportError:  # as a part of the package
    from sae.bench.workers import protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SAMPLE_ROWS = 4


@dataclass(frozen=True)
class Job:
    """What is harvested, and how: the same for everybody but for the last three."""

    model: str
    """Folder of a Hugging Face GPT-2 checkpoint."""
    tokens: str
    """A .npy [row ctx] int64."""
    hook_layer: int
    """Activations are those behind this block."""
    batch_tokens: int
    """Tokens in one forward pass."""
    threads: int
    scratch: str
    """Folder for what is written."""
    way: str
    """Which path of the library; see the worker."""
    dtype: str
    """Of the language model's weights."""
    store: str = ""
    """Of the store, for a path that writes one."""


class Harvester(abc.ABC):
    """A language model that is asked for activations."""

    version = ""
    options = ""

    def __init__(self, job: Job, tokens: "np.ndarray") -> None:
        """Load the model."""
        self.job, self.tokens = job, tokens

    @abc.abstractmethod
    def sample(self, rows: "np.ndarray") -> "Tensor":
        """Activations `[row ctx d_in]` of some rows."""

    @property
    def n_tokens(self) -> int:
        """Tokens of a run."""
        return int(self.tokens.size)

    @abc.abstractmethod
    def run(self) -> float:
        """Seconds to harvest `n_tokens` tokens, without what comes before and after."""


def serve(build: Callable[[Job, "np.ndarray"], Harvester]) -> None:
    """Answer requests until told to quit, or until nobody is left to ask."""
    requests, replies = protocol._claim_pipes()
    harvester: Harvester | None = None

    def answer(do: str, **fields: Any) -> dict[str, Any]:
        nonlocal harvester
        import numpy as np
        import torch

        if do == "build":
            job = Job(**fields)
            torch.set_num_threads(job.threads)
            harvester = build(job, np.load(job.tokens))
            return {"version": harvester.version, "torch": torch.__version__, "options": harvester.options}
        if harvester is None:
            raise ValueError("build something first")
        if do == "sample":
            np.save(fields["path"], harvester.sample(harvester.tokens[:SAMPLE_ROWS]).float().flatten(0, 1).numpy())
            return {}
        if do == "run":
            return {"seconds": harvester.run(), "n_tokens": harvester.n_tokens}
        raise ValueError(f"{do!r} is no request")

    for line in requests:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        try:
            reply = answer(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def timed(action: Callable[[], object]) -> float:
    """Seconds an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
