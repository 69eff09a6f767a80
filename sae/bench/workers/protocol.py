"""What a worker is: a process that holds one SAE, trains it when told to, and says how long each step took.

One request a line on stdin, one reply a line on stdout, both JSON. `{"do": ...}` is one of

    hello     -> version of the library, version of torch
    build     architecture, d_in, d_sae, k, lr, n_steps, ... (see `Request`)  -> dtype, kernels, options
    load      path of a .npy [n_batches batch d_in] float32                   -> n_batches
    run       n_steps on the next batches, again from the first after the last -> ms, peak_bytes
    evaluate  path of a .npy [tokens d_in], batch_tokens, selection            -> fvu, l0, dead_fraction
    quit

A reply with `error` says why a request could not be done; the worker goes on. An idle worker is blocked on its pipe.

This file and the peer_*.py beside it also run in the peers' environment, where the `sae` package is not: they import
torch, numpy, the peer and each other, and nothing of `sae`.
"""

import abc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TRAINING = "training"
"""Latents chosen as in training: BatchTopK by the batch."""
INFERENCE = "inference"
"""Latents chosen as a finished SAE does: BatchTopK by its threshold."""
FLOAT32 = "float32"
AUTOCAST = "bfloat16-autocast"


@dataclass(frozen=True)
class Request:
    """What to build: the same for every contestant."""

    architecture: str
    """topk, batch_topk, jumprelu or relu."""
    d_in: int
    d_sae: int
    k: int
    """Target mean number of active latents a token."""
    batch_tokens: int
    lr: float | None
    """Peak learning rate; None means the library's own default for such a run."""
    n_steps: int
    """Steps of the whole run, for schedules."""
    lr_warmup_steps: int = 0
    lr_decay_steps: int = 0
    """Steps at the end over which the learning rate falls linearly to 0."""
    dead_after_tokens: int = 10_000_000
    """A latent silent for this many tokens is dead."""
    precision: str = FLOAT32
    """A mode of the worker: `float32`, `bfloat16-autocast`; ours has `default` and `reference`."""
    control: str = ""
    """What must not be learned; see `sae.train.controls`. Only ours knows any."""
    seed: int = 0
    threads: int = 2
    device: str = "cpu"


@dataclass(frozen=True)
class Description:
    """What was switched on; goes into every row."""

    dtype: str = FLOAT32
    """Precision of the matrix products."""
    kernels: str = "torch"
    """Whose operations the step consists of."""
    options: str = ""
    """In words."""


class Trainee(abc.ABC):
    """One SAE in training."""

    description = Description()

    def start(self, batches: "Tensor") -> None:  # noqa: B027 -- few need it
        """Called once before the first step, with the first batches [n d_in], for data-dependent starting values."""

    @abc.abstractmethod
    def step(self, x: "Tensor") -> None:
        """One training step on [batch d_in]: forward, backward, optimiser, bookkeeping; no logging."""

    @abc.abstractmethod
    def reconstruct(self, x: "Tensor", selection: str) -> "tuple[Tensor, Tensor]":
        """Return (recons [n d_in], latent activations, of which the non-zero ones are counted)."""


START_BATCHES = 4  # at most


class Session:
    """The state of one worker: answers requests one after another."""

    def __init__(self, library: str, build: Callable[[Request], Trainee]) -> None:
        self.library = library
        self._build = build
        self._trainee: Trainee | None = None
        self._data: np.ndarray | None = None
        self._next = 0
        self._device = "cpu"

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        todo = request.pop("do")
        action = getattr(self, f"_do_{todo}", None)
        if action is None:
            raise ValueError(f"{todo!r} is no request")
        reply: dict[str, Any] = action(**request)
        return reply

    def _do_hello(self) -> dict[str, Any]:
        import torch

        return {"version": metadata.version(self.library), "torch": torch.__version__}

    def _do_build(self, **values: Any) -> dict[str, Any]:
        import torch

        self._trainee = None  # let the old one's memory go first
        request = Request(**values)
        torch.set_num_threads(request.threads)
        torch.manual_seed(request.seed)
        self._device, self._next, self._data = request.device, 0, None
        self._trainee = self._build(request)
        return asdict(self._trainee.description)

    def _do_load(self, path: str) -> dict[str, Any]:
        import numpy as np
        import torch

        self._data = np.load(path, mmap_mode="r")
        first = torch.from_numpy(np.array(self._data[:START_BATCHES])).flatten(0, 1)
        self._built().start(first.to(self._device))
        return {"n_batches": len(self._data)}

    def _do_run(self, n_steps: int) -> dict[str, Any]:
        import torch

        trainee = self._built()
        if not self._device.startswith("cuda"):
            return {"ms": [self._timed([self._batch()], trainee) for _ in range(n_steps)]}
        # A GPU is given the whole turn at once, as in training, where no step waits for the one before.
        torch.cuda.reset_peak_memory_stats()
        took = self._timed([self._batch() for _ in range(n_steps)], trainee)
        return {"ms": [took / n_steps], "peak_bytes": torch.cuda.max_memory_allocated()}

    def _timed(self, batches: "list[Tensor]", trainee: Trainee) -> float:
        """Milliseconds for a step on each of the batches, which are in memory already."""
        self._wait()
        start = time.perf_counter()
        for batch in batches:
            trainee.step(batch)
        self._wait()
        return 1e3 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()

    def _batch(self) -> "Tensor":
        import numpy as np
        import torch

        if self._data is None:
            raise ValueError("load activations first")
        batch = torch.from_numpy(np.array(self._data[self._next % len(self._data)]))
        self._next += 1
        return batch.to(self._device)

    def _do_evaluate(self, path: str, batch_tokens: int, selection: str) -> dict[str, Any]:
        import numpy as np
        import torch

        trainee = self._built()
        data = np.load(path, mmap_mode="r")
        mean = torch.from_numpy(np.mean(data, axis=0, dtype=np.float64))
        error = variance = active = 0.0
        fired: Any = 0
        with torch.no_grad():
            for start in range(0, len(data), batch_tokens):
                block = np.array(data[start : start + batch_tokens])
                recons, acts = trainee.reconstruct(torch.from_numpy(block).to(self._device), selection)
                exact = torch.from_numpy(block).double()
                error += float((exact - recons.detach().cpu().double()).square().sum())
                variance += float((exact - mean).square().sum())
                active += float((acts != 0).sum())
                fired = (acts != 0).sum(0) + fired
        return {"fvu": error / variance, "l0": active / len(data), "dead_fraction": float((fired == 0).float().mean())}

    def _built(self) -> Trainee:
        if self._trainee is None:
            raise ValueError("build something first")
        return self._trainee


def serve(library: str, build: Callable[[Request], Trainee], load: Callable[[], object] = lambda: None) -> None:
    """Answer requests until told to quit, or until nobody is left to ask.

    Args:
        library: the distribution whose version is reported.
        build: makes the SAE.
        load: imports the library; called at once, so that all workers import at the same time, but after the pipes
            are out of the reach of what it prints.
    """
    requests, replies = _claim_pipes()
    load()
    session = Session(library, build)
    for line in requests:
        request = json.loads(line)
        if request["do"] == "quit":
            return
        try:
            reply = session.answer(request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _claim_pipes() -> tuple[TextIO, TextIO]:
    """Take stdin and stdout for the protocol: what libraries print goes to stderr, what they read is empty."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies
