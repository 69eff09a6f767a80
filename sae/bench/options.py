"""What every suite is told."""

from dataclasses import dataclass

from sae.errors import UserError, unknown

REFERENCE = "reference"
"""Our own dense autograd path in float32: the peer that needs no other environment."""
PEERS = ("sae-lens", "sparsify", "dictionary_learning", REFERENCE)


@dataclass(frozen=True)
class BenchOptions:
    """Settings shared by all suites.

    Raises:
        UserError: an unknown peer, or a count below 1.
    """

    peers: tuple[str, ...] = PEERS
    """Foreign libraries to run beside ours; the reference always runs."""
    peers_env: str = ".venv-peers"
    """Folder of the environment that holds them."""
    models: tuple[str, ...] = ("organism",)
    """Suites `quality` and `rates`: language models whose activations are learned; what is not there is skipped."""
    text: str = ""
    """Suites `quality` and `rates`: the text read by the models other than the organism."""
    threads: int = 2
    """Torch threads of every process."""
    repeats: int = 7
    """Turns each contestant takes."""
    turn_steps: int = 3
    """Timed training steps in one turn."""
    warmup_steps: int = 4
    """Steps before the first turn, not counted."""
    steps: int = 2_000
    """Suites `quality`, `rates` and `memory`: training steps; `rates` takes a quarter of them, too."""
    seeds: int = 3
    """Suites `quality` and `rates`: seeds of each contestant."""
    quick: bool = False
    """Toy sizes: does everything work? The figures mean nothing."""

    def __post_init__(self) -> None:
        for peer in self.peers:
            if peer not in PEERS:
                raise unknown("peer", peer, list(PEERS), "Give bench.peers=[] to run without.")
        for name in ("threads", "repeats", "turn_steps", "warmup_steps", "steps", "seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"bench.{name}={getattr(self, name)} is less than 1: raise it.")

    @property
    def n_steps(self) -> int:
        """Training steps a timed contestant takes in all, warm-up included."""
        return self.warmup_steps + self.repeats * self.turn_steps
