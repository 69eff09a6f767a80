"""What a report shows, as typed records; `read.py` builds them from a run's files.

Those of behaviours are in `evidence.py`.
"""

from dataclasses import dataclass, field
from typing import Any

from sae.report.evidence import Behavior, Rate
from sae.report.weights_records import WeightsFound


@dataclass(frozen=True)
class SourceRow:
    """One hook point of a crosscoder, and what splicing does to its model."""

    hook_name: str
    lm: str
    fvu: float | None
    ce_recovered: float | None
    delta_ce: float | None
    kl: float | None


@dataclass(frozen=True)
class SaeRow:
    """One autoencoder: how it was trained, and what the evaluation measured (or the last training values)."""

    hook_name: str
    d_sae: int | None = None
    architecture: str = ""
    l0_target: float | None = None
    seed: int | None = None
    path: str = ""
    l0: float | None = None
    fvu: float | None = None
    cosine: float | None = None
    dead_fraction: float | None = None
    ce_clean: float | None = None
    ce_sae: float | None = None
    ce_zero: float | None = None
    ce_recovered: float | None = None
    delta_ce: float | None = None
    kl: float | None = None
    n_tokens: int | None = None
    density_edges: list[float] = field(default_factory=list)
    density_counts: list[float] = field(default_factory=list)
    control: str = ""  # what it was not allowed to learn
    before_training: bool = False  # whether it is what others were trained from
    sources: list[SourceRow] = field(default_factory=list)

    @property
    def standing(self) -> list[str]:
        """What tells it from a trained autoencoder of this run; empty for those."""
        return ([f"control: {self.control.replace('_', ' ')}"] if self.control else []) + (
            ["before training"] if self.before_training else []
        )


@dataclass(frozen=True)
class Level:
    """The latents of one size in a family of sizes; the lists have an entry a latent."""

    d_sae: int
    path: str
    parent: list[int]  # latent of the next narrower size, -1 without one; empty at the narrowest
    cosine: list[float | None]  # with the nearest there, whether or not it is near enough to be the parent
    stability: list[float | None]  # similarity with the nearest latent of another seed; empty with one seed
    null_mean: float | None  # of `cosine`, among random rows
    null_high: float | None  # its 99th percentile


@dataclass(frozen=True)
class Family:
    """The sizes of one hook point, architecture, L0 and seed, narrowest first."""

    hook_name: str
    architecture: str
    l0_target: float | None
    control: str
    seed: int | None
    floor: float | None
    levels: list[Level]


@dataclass(frozen=True)
class Added:
    """Latents of a wider SAE that were added to a narrower one."""

    n: int | None
    fvu: float | None
    improving: float | None  # share of them that lower the FVU alone


@dataclass(frozen=True)
class SizePair:
    """Two sizes that follow each other."""

    hook_name: str
    architecture: str
    l0_target: float | None
    control: str
    seed: int | None
    small: int | None
    large: int | None
    shared: float | None
    mean: float | None
    null_mean: float | None  # of `mean`, among random rows
    parents: float | None
    fvu_small: float | None
    fvu_large: float | None
    novel: Added
    known: Added
    silent: int | None
    auroc: float | None


@dataclass(frozen=True)
class SeedRow:
    """How well the latents of one size recur in other seeds."""

    hook_name: str
    architecture: str
    l0_target: float | None
    control: str
    d_sae: int | None
    seeds: list[int]
    mean: list[float]  # an entry a seed
    shared: list[float]
    null_mean: float | None
    null_high: float | None


@dataclass(frozen=True)
class AtomRow:
    """How much of an autoencoder's decoder a meta-SAE of few directions explains."""

    hook_name: str
    architecture: str
    l0_target: float | None
    control: str
    d_sae: int | None
    seed: int | None
    fve: float
    fve_random: float | None


@dataclass(frozen=True)
class Relations:
    """How the SAEs of a run are related; all empty where that was not measured."""

    families: list[Family] = field(default_factory=list)
    pairs: list[SizePair] = field(default_factory=list)
    seeds: list[SeedRow] = field(default_factory=list)
    atoms: list[AtomRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    threshold: float | None = None  # similarity from which a latent counts as shared
    folder: str = "eval/relations"  # of the result, in the run's; another for SAEs that `eval.saes` named
    atoms_folder: str = "eval/geometry"  # likewise, of `atoms`


@dataclass(frozen=True)
class Exclusive:
    """Latents of a crosscoder that are one model's by their norms."""

    by_norm: int | None
    shrunk: int | None
    decoupled: int | None
    confirmed: int | None


@dataclass(frozen=True)
class LoneLatent:
    """A latent near to being one model's alone."""

    latent: int
    relative_norm: float | None
    nu_error: float | None
    nu_reconstruction: float | None
    n_fired: int | None
    verdict: str


@dataclass(frozen=True)
class CrossedRow:
    """What one crosscoder says of two models."""

    hook_name: str
    architecture: str
    d_sae: int | None
    l0_target: float | None
    seed: int | None
    control: str
    path: str
    n_tokens: int | None
    shared: int | None
    between: int | None
    rare: int | None
    first_only: Exclusive
    pair_only: Exclusive
    first_latents: list[LoneLatent]
    pair_latents: list[LoneLatent]
    norm_counts: list[int]  # of judged latents, by relative norm from 0 to 1; empty where they are not on disk


@dataclass(frozen=True)
class Comparison:
    """What crosscoders say of two language models; empty where that was not measured."""

    first: str = ""
    pair: str = ""
    thresholds: dict[str, float] = field(default_factory=dict)
    crosscoders: list[CrossedRow] = field(default_factory=list)
    folder: str = "eval/diff"  # of the result, in the run's; another for SAEs that `eval.saes` named


@dataclass(frozen=True)
class GateRow:
    """The organism under one combination of gates."""

    gates: dict[str, bool]
    cells: dict[str, Rate]


@dataclass(frozen=True)
class StageInfo:
    """Provenance of one stage: its manifest and how long it took."""

    name: str
    manifest: dict[str, Any]
    wall_s: float | None


@dataclass
class ReportData:
    """One run, ready to be shown."""

    name: str
    lm: str = ""
    stages: list[StageInfo] = field(default_factory=list)
    saes: list[SaeRow] = field(default_factory=list)
    evaluated: bool = False
    behaviors: list[Behavior] = field(default_factory=list)
    relations: Relations = field(default_factory=Relations)
    comparison: Comparison = field(default_factory=Comparison)
    weights: WeightsFound = field(default_factory=WeightsFound)
    gates: list[GateRow] = field(default_factory=list)
    probe_auroc: dict[str, float] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    tokens: int | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def is_organism(self) -> bool:
        """Whether the model is the planted one, so that the page must say what that means."""
        return bool(self.gates) or "organism" in self.lm
