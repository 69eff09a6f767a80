"""What the causal test reports, as records."""

from dataclasses import dataclass, field

from sae import stats
from sae.behavior.agreement import JudgeComparison
from sae.behavior.controls import Control, RandomEffect


@dataclass(frozen=True)
class Dose:
    """The clamp at one dose, on negatives.

    Attributes:
        dose: in units of the latents' typical active values; negative pushes the other way.
        value: mean clamped value.
        rate: the behaviour's rate.
        degenerate: share of broken replies.
        positives: the behaviour's rate on positives under the same clamp.
        margin: mean logit margin on the negatives, in nats: the behaviour's words against the alternative's where they
            part. It keeps moving where rates are at 0 or 1.
        positives_margin: the same on positives.
    """

    dose: float
    value: float
    rate: stats.Rate
    degenerate: stats.Rate
    positives: stats.Rate
    margin: float
    positives_margin: float


@dataclass(frozen=True)
class Example:
    """One prompt with its reply before and after."""

    prompt: str
    base: str
    steered: str
    what: str
    verdict_base: str
    verdict_steered: str


@dataclass(frozen=True)
class CausalReport:
    """Results on the report split. Rates ending in `_ablate*` are of positives, in `_clamp*` and `_add*` of negatives.

    A `_rate` is of the behaviour, `_restored_rate` of the alternative, `_degenerate_rate` of broken replies.
    """

    hook_name: str
    d_sae: int
    position: str
    latents: list[int]
    clamp_latents: list[int]
    clamp_value: float  #: mean over the clamped latents
    clamp_values: list[float]
    clamp_multiple: float
    base_rate: stats.Rate
    base_degenerate_rate: stats.Rate
    ablate_rate: stats.Rate
    ablate_restored_rate: stats.Rate
    ablate_degenerate_rate: stats.Rate
    clamp_base_rate: stats.Rate
    clamp_rate: stats.Rate
    clamp_degenerate_rate: stats.Rate
    direction_ablate_rate: stats.Rate
    direction_ablate_restored_rate: stats.Rate
    direction_ablate_zero_rate: stats.Rate
    direction_add_rate: stats.Rate
    direction_add_degenerate_rate: stats.Rate
    direction_add_scale: float
    negatives_base_alternative_rate: stats.Rate  #: negatives answered as they should be, unsteered
    negatives_ablate_alternative_rate: stats.Rate  #: and under the ablation
    kl_harmless: float  #: nats per token on negatives under the ablation
    kl_harmless_clamp: float
    kl_harmless_direction: float  #: under the direction's projection
    fact_accuracy_base: stats.Rate
    fact_accuracy: stats.Rate  #: under the ablation
    fact_accuracy_clamp: stats.Rate
    other_behaviors: dict[str, dict[str, stats.Rate]]  #: name -> base, ablate, clamp
    n_random: int
    random_ablate: list[float] = field(default_factory=list)
    random_clamp: list[float] = field(default_factory=list)
    random_direction_ablate: list[float] = field(default_factory=list)
    random_clamp_direction: list[float] = field(default_factory=list)  #: random directions of the clamp's norm
    random_direction_add: list[float] = field(default_factory=list)  #: of the added difference of means' norm
    #: The ablation among random latents, and among random directions projected out: share of positives restored.
    random_latents: RandomEffect | None = None
    random_directions: RandomEffect | None = None
    #: The clamp among random latents, and among random directions of its length: share of negatives that behave.
    random_latents_clamp: RandomEffect | None = None
    random_directions_clamp: RandomEffect | None = None
    random_ablate_mean: float = float("nan")
    random_clamp_mean: float = float("nan")
    controls: dict[str, Control] = field(default_factory=dict)
    dose_response: list[Dose] = field(default_factory=list)
    #: Doses that prompts of the find split give the latents by themselves; see `sae.behavior.doses`.
    dose_range: tuple[float, float] | None = None
    dose_correlation: stats.Correlation | None = None  #: of dose and mean margin on negatives, within that range
    dose_spearman: float | None = None  #: its rho alone
    dose_correlation_all: stats.Correlation | None = None  #: over all doses, those far beyond what occurs included
    dose_correlation_rate: stats.Correlation | None = None  #: of dose and rate, over all doses
    random_dose_response: list[list[float]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    judges: JudgeComparison | None = None  #: several judges on these very replies
