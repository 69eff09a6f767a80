"""What the page shows about a behaviour, as typed records; `read_behavior.py` and `read_evidence.py` build them.

Everything may be missing: a field that a run's version did not write is None, or empty.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rate:
    """A share of trials with its confidence interval."""

    rate: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Ranked:
    """One latent of the ranking, as measured on the find split."""

    latent: int
    hook_name: str = ""
    position: str = ""
    auroc: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    q: float | None = None
    density: float | None = None
    effect: float | None = None
    d_sae: int | None = None
    p_family: float | None = None  # family-wise, by permutations
    stability: float | None = None  # share of resampled topics on which it is listed
    stability_halves: float | None = None  # share of halves of the topics in which it is significant


@dataclass(frozen=True)
class Dose:
    """The behaviour's rate at one dose."""

    dose: float
    value: float | None
    rate: Rate


@dataclass(frozen=True)
class PerSize:
    """The causal test repeated with one autoencoder of the grid."""

    hook_name: str
    d_sae: int | None
    latents: list[int]
    rates: dict[str, Rate]


@dataclass(frozen=True)
class Example:
    """One prompt with the completion before and after the intervention."""

    prompt: str
    base: str
    steered: str
    what: str
    verdict_base: str
    verdict_steered: str


@dataclass(frozen=True)
class Control:
    """The real intervention on the very prompts that the random draws were measured on.

    `success` are shares of prompts on which a draw did what is claimed, broken replies left out; `p` and `percentile`
    are of the real intervention's among them.
    """

    observed: float | None
    p: float | None
    n_prompts: int | None
    success: list[float] = field(default_factory=list)
    observed_success: float | None = None
    percentile: float | None = None


@dataclass(frozen=True)
class Damage:
    """Text under an intervention, compared with the model as it is: nats a token."""

    kl: float | None
    ce: float | None


@dataclass(frozen=True)
class Cost:
    """What an intervention changes beside what it was to change."""

    own: Damage | None = None  # the model's own replies to harmless prompts
    text: Damage | None = None  # plain text
    lookalikes: Rate | None = None  # the behaviour where it only looks as if it were due
    facts: Rate | None = None
    choices: Rate | None = None

    @property
    def kl(self) -> float | None:
        """KL on harmless prompts: what methods are compared by."""
        return self.own.kl if self.own else None


@dataclass(frozen=True)
class Rival:
    """One method: how well it detects, what removing and adding it does, what that costs."""

    method: str
    detail: str
    auroc: Interval | None
    ablate: Rate | None
    restored: Rate | None
    add: Rate | None
    add_degenerate: Rate | None
    add_scale: float | None
    remove_cost: Cost
    add_cost: Cost
    on_remove_front: bool
    on_add_front: bool


@dataclass(frozen=True)
class SizePoint:
    """The first latents of the chosen set ablated."""

    latents: list[int]
    margin: Interval | None
    behavior: Rate | None
    restored: Rate | None
    degenerate: Rate | None


@dataclass(frozen=True)
class LatentPair:
    """Two latents ablated alone and together: changes of the margin in nats."""

    first: int
    second: int
    alone_first: Interval | None
    alone_second: Interval | None
    together: Interval | None
    interaction: Interval | None


@dataclass(frozen=True)
class Hydra:
    """A latent that does nothing alone and much once its partner is gone."""

    latent: int
    partner: int
    alone: Interval | None
    without_partner: Interval | None


@dataclass(frozen=True)
class CandidateRow:
    """What one latent reads, writes, is credited with, and does."""

    latent: int
    ranked: bool
    input_score: float | None
    output_score: Interval | None
    gradient: float | None
    integrated: float | None
    ablation_effect: Interval | None


@dataclass(frozen=True)
class Correlation:
    """Spearman's, with its p-value."""

    rho: float | None
    p: float | None
    n: int | None


@dataclass(frozen=True)
class Confound:
    """How well one family of features tells the classes apart."""

    family: str
    kind: str
    auroc: Interval | None
    flagged: bool
    direction: str


@dataclass(frozen=True)
class Audit:
    """The audit of a contrast set."""

    rows: list[Confound]
    flagged: list[str]
    bar: float | None


@dataclass(frozen=True)
class Confounds:
    """The audit before anything was done about it, what was done, and the audit after."""

    before: Audit
    after: Audit | None
    method: str
    features: list[str]
    n_changed: int | None
    counts: dict[str, dict[str, tuple[int, int]]]  # split, class: prompts before and after

    @property
    def used(self) -> Audit:
        """The audit of the set that the results rest on."""
        return self.after or self.before


@dataclass(frozen=True)
class DataFile:
    """A file that a contrast set was made from."""

    name: str
    location: str
    sha256: str
    licence: str
    citation: str
    url: str
    n_rows: int | None


@dataclass(frozen=True)
class Source:
    """What was made of a file's rows."""

    name: str
    file: str
    n_rows: int | None
    n_kept: int | None
    dropped: dict[str, int]


@dataclass(frozen=True)
class Origin:
    """How a contrast set came to be."""

    name: str
    files: list[DataFile]
    sources: list[Source]
    left_out: list[str]


@dataclass(frozen=True)
class Parting:
    """A reply on which two judges part."""

    prompt: str
    completion: str
    first: str
    second: str


@dataclass(frozen=True)
class JudgePair:
    """Two judges on the same replies."""

    first: str
    second: str
    kappa: Interval | None
    n_apart: int | None
    examples: list[Parting]


@dataclass(frozen=True)
class Judges:
    """Several judges on the same replies, and whether these are about what was asked."""

    n: int | None
    rates: dict[str, dict[str, Rate]]  # judge, verdict
    pairs: list[JudgePair]
    topic_own: Rate | None
    topic_other: float | None
    topic_p: float | None


@dataclass(frozen=True)
class Evidence:
    """What stands beside the causal test."""

    found: bool | None = None  # whether anything passed and was tested
    n_tested: int | None = None
    n_significant: int | None = None
    n_significant_shuffled: int | None = None
    n_records: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)  # by class
    unfiltered: Rate | None = None  # the behaviour on the report split's positives before any were dropped
    unfiltered_negatives: Rate | None = None
    null_share: Rate | None = None
    null_share_protocol: Rate | None = None
    decoy_share: float | None = None
    rivals: list[Rival] = field(default_factory=list)
    base_cost: Cost = field(default_factory=Cost)  # the model by itself
    sizes: list[SizePoint] = field(default_factory=list)
    pairs: list[LatentPair] = field(default_factory=list)
    hydras: list[Hydra] = field(default_factory=list)
    candidates: list[CandidateRow] = field(default_factory=list)
    # Gradient and integrated with what was measured, over latents that neither chose.
    agreement: dict[str, Correlation] = field(default_factory=dict)
    confounds: Confounds | None = None
    origin: Origin | None = None
    judges: Judges | None = None
    dose_range: tuple[float, float] | None = None
    dose_correlation: Correlation | None = None  # with the margin, within that range
    dose_correlation_all: Correlation | None = None  # and over all doses


@dataclass(frozen=True)
class Behavior:
    """Everything measured about one behaviour on held-out prompts."""

    name: str
    hook_name: str
    d_sae: int | None
    path: str
    latents: list[int]
    clamp_latents: list[int]
    clamp_value: float | None
    controls: dict[str, Control]  # by the names of `draws`: how the real intervention stands among them
    rates: dict[str, Rate]  # base, ablate, ablate_restored, ablate_degenerate, clamp_base, clamp, ...
    draws: dict[str, list[float]]  # random_ablate, random_clamp, random_direction_ablate, random_direction_add
    kl_harmless: dict[str, float]
    side_effects: dict[str, dict[str, Rate]]  # fact accuracy and the other behaviours, by name
    dose_response: list[Dose]
    random_dose_response: list[list[float | None]]
    ranking: list[Ranked]
    per_size: list[PerSize]
    examples: list[Example]
    n_random: int | None
    evidence: Evidence = field(default_factory=Evidence)
