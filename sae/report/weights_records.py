"""What a run found in the weights, as records: located parts and cuts, latents' parts, a circuit, mitigations."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LocatedRow:
    """How one method ranks the weights or parts of one level, beside what was planted."""

    behavior: str
    method: str
    level: str
    seed: int | None
    evaluations: float | None
    auroc: float | None
    auprc: float | None
    base_rate: float | None
    decoy_share: float | None


@dataclass(frozen=True)
class CutRow:
    """What cutting a located set does on held-out prompts."""

    behavior: str
    method: str
    level: str
    fraction: float | None
    before: float | None
    after: float | None
    degenerate: float | None
    others: float | None
    kl: float | None
    random: float | None
    comes_back: str  #: at the smallest masks that bring it back; "" where no worst case was looked for
    passed: bool


@dataclass(frozen=True)
class WiredPart:
    """One of a latent's writers or readers."""

    part: str
    data: float | None
    ablated: float | None
    energy: float | None
    p: float | None


@dataclass(frozen=True)
class WiredLatent:
    """A latent's strongest writers and readers."""

    behavior: str
    hook_name: str
    latent: int | None
    contrast: float | None
    writers: list[WiredPart]
    readers: list[WiredPart]


@dataclass(frozen=True)
class CircuitFound:
    """A circuit: its graph, and how far it stands for the model."""

    behavior: str
    graph: dict[str, Any]
    n_nodes: int | None
    n_edges: int | None
    n_possible: int | None
    faithfulness: float | None
    low: float | None
    high: float | None
    random_mean: float | None
    random_max: float | None
    cpr: float | None
    cmd: float | None


@dataclass(frozen=True)
class MitigatedRow:
    """One mitigation: what is left of the behaviour, what it cost, and whether it holds."""

    behavior: str
    method: str
    before: float | None
    after: float | None
    restored: float | None
    others: float | None
    facts: float | None
    kl: float | None
    n_changed: int | None
    relearned: int | None
    prefix: float | None
    steering: float | None


@dataclass(frozen=True)
class WeightsFound:
    """Everything a run found in the weights."""

    located: list[LocatedRow] = field(default_factory=list)
    cuts: list[CutRow] = field(default_factory=list)
    latents: list[WiredLatent] = field(default_factory=list)
    circuit: CircuitFound | None = None
    mitigated: list[MitigatedRow] = field(default_factory=list)
