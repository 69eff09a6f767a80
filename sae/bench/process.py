"""The parent's side of a worker: start it, ask it, stop it. See `sae.bench.workers.protocol` for what is said."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from sae.bench.options import REFERENCE, BenchOptions
from sae.errors import UserError

WORKERS = Path(__file__).resolve().parent / "workers"
SCRIPTS = {
    "sae-lens": "peer_sae_lens.py",
    "sparsify": "peer_sparsify.py",
    "dictionary_learning": "peer_dictionary_learning.py",
}
"""Foreign peers and their programs."""
OURS = "ours"
QUIT_SECONDS = 10.0


class Contestant(NamedTuple):
    """Who takes part: a library in one of its modes."""

    name: str
    """`ours`, or a peer."""
    precision: str
    """A mode of its worker."""


OUR_DEFAULT = Contestant(OURS, "default")
OUR_REFERENCE = Contestant(REFERENCE, "reference")


class Worker:
    """One child process, alive until closed."""

    def __init__(self, name: str, command: list[str], *, threads: int = 1) -> None:
        """Start it.

        Args:
            name: what errors call it.
            command: the program and its arguments.
            threads: OpenMP threads.
        """
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed in `close`
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(threads),
            start_new_session=True,  # Ctrl-C is for the parent, which then closes the pipe
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            UserError: the worker refused, or died; with its last words.
        """
        try:
            self._requests.write(json.dumps({"do": do, **fields}) + "\n")
            self._requests.flush()
            line = self._replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._died(do)
        try:
            reply = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(
                f"the worker {self.name!r} answered {do!r} with {line[:80]!r}, which is not JSON: something in it "
                "writes to the protocol's pipe."
            ) from None
        if "error" in reply:
            raise UserError(
                f"the worker {self.name!r} could not {do}: {reply['error'].rstrip('.')}; leave it out with bench.peers."
            )
        assert isinstance(reply, dict)
        return reply

    def _died(self, do: str) -> UserError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(QUIT_SECONDS)
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        words = lines[-1].rstrip(".") if lines else "nothing"
        return UserError(
            f"the worker {self.name!r} died when asked to {do} (status {self._process.returncode}), its last words "
            f"being: {words}; mend its environment, or leave it out with bench.peers."
        )

    def close(self) -> None:
        """Tell it to quit, and see that it does."""
        with contextlib.suppress(OSError):
            self._requests.write('{"do": "quit"}\n')
        with contextlib.suppress(OSError):
            self._requests.close()
        try:
            self._process.wait(QUIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
        self._errors.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _environment(threads: int) -> dict[str, str]:
    dropped = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    # Threads that spin while they wait would slow everybody else down.
    return {**kept, **offline, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def command(contestant: Contestant, options: BenchOptions) -> list[str]:
    """The command line of a contestant's worker.

    Raises:
        UserError: the peers' environment is not there.
    """
    if contestant.name in (OURS, REFERENCE):
        return [sys.executable, "-m", "sae.bench.workers.ours"]
    python = Path(options.peers_env) / "bin" / "python"
    if not python.is_file():
        raise UserError(
            f"there is no {str(python)!r}, the environment of the peers: `make peers` makes it (or name another with "
            "bench.peers_env=, or run without peers with bench.peers=[])."
        )
    return [str(python), str(WORKERS / SCRIPTS[contestant.name])]


@contextlib.contextmanager
def workers(contestants: list[Contestant], options: BenchOptions) -> Iterator[dict[Contestant, Worker]]:
    """Start one worker a contestant; they live until the block ends.

    Raises:
        UserError: a worker cannot be started.
    """
    commands = {one: command(one, options) for one in contestants}
    with contextlib.ExitStack() as stack:
        started = {}
        for one, words in commands.items():
            worker = Worker(one.name, words, threads=options.threads)
            stack.callback(worker.close)
            started[one] = worker
        yield started
