"""The causal test: on topics never looked at, do these latents control the behaviour, and what else do they change?

Necessity: ablating them removes the behaviour and restores the alternative (not babble). Sufficiency: clamping them
brings it about where it is not due. Both against matched random latents and directions, beside the difference of means,
with dose-response and side effects. Everything was chosen before (`sae.behavior.select`) on another split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae import stats
from sae.behavior.agreement import JudgeComparison, compare_judges
from sae.behavior.contrast import ContrastRecord
from sae.behavior.controls import (
    Control,
    direction_edits,
    plan_controls,
    random_effect,
    run_control,
)
from sae.behavior.cost import Followed, MultipleChoice, OtherBehavior, damage, fact_accuracies, own_replies
from sae.behavior.directions import Direction
from sae.behavior.doses import dose_report
from sae.behavior.judge import Judge, Verdict
from sae.behavior.measure import (
    Outcome,
    Progress,
    Prompts,
    SiteData,
    evaluate_each,
    prepare,
    shift_norm,
)
from sae.behavior.results import CausalReport, Example
from sae.behavior.select import AblationChoice, AddChoice, ClampChoice
from sae.behavior.settings import BehaviorSettings
from sae.lm.tokens import TokenBatch
from sae.steering.apply import steer
from sae.steering.interventions import Ablate, Clamp, Intervention, ProjectOut


class Beside(NamedTuple):
    """What stands beside a behaviour's own prompts, to see what else an intervention changes.

    Attributes:
        facts: questions whose answers should stay true; if None, the report split's negatives with an answer.
        others: other behaviours that should not change.
        lookalikes: prompts that only look as if the behaviour were due; if none, the negatives of such an arm.
        text: batches of plain text.
        choices: multiple-choice questions.
        panel: judges to compare on the replies.
        planted: the true direction of each behaviour in the residual stream, where it is known.
    """

    facts: Sequence[ContrastRecord] | None = None
    others: Mapping[str, OtherBehavior] | None = None
    lookalikes: Sequence[ContrastRecord] = ()
    text: Sequence[TokenBatch] = ()
    choices: Sequence[MultipleChoice] = ()
    panel: Mapping[str, Judge] | None = None
    planted: Mapping[str, Float[np.ndarray, " d_model"]] | None = None


@dataclass(frozen=True)
class Choice:
    """Everything decided before the report split is opened.

    Attributes:
        encoder: the SAE.
        site: its latents on the find split; the basis of matching.
        position: where latents and direction were read.
        ablation: the latents to ablate.
        clamp: the latents and values to clamp.
        direction: the difference of means at the same hook point.
        add: how strongly to add it.
        negative_resid: [n d_in] negatives' activations of the find split at the position.
        dose_range: doses of the clamp that prompts of the find split give its latents by themselves.
    """

    encoder: Any
    site: SiteData
    position: str
    ablation: AblationChoice
    clamp: ClampChoice
    direction: Direction
    add: AddChoice
    negative_resid: np.ndarray
    dose_range: tuple[float, float]


class _Case(NamedTuple):
    """The report split, prepared, with its unsteered outcomes."""

    positives: Prompts
    negatives: Prompts
    base: Outcome
    clamp_base: Outcome


def causal_report(
    lm: Any,
    choice: Choice,
    records: Sequence[ContrastRecord],
    judge: Judge,
    settings: BehaviorSettings | None = None,
    *,
    beside: Beside | None = None,
    n_random: int | None = None,
    progress: Progress | None = None,
) -> CausalReport:
    """Test a choice on held-out records.

    Args:
        lm: the model.
        choice: what was decided on the other splits.
        records: the report split, positives and negatives.
        judge: see `sae.behavior.judge`.
        settings: doses, numbers of prompts and draws.
        beside: facts and other behaviours that should stay as they are, and other judges.
        n_random: draws per control; the settings' if not given. Without draws, dose-response is left out too.
        progress: told about every step.
    """
    settings, beside = settings or BehaviorSettings(), beside or Beside()
    n_random = settings.n_random if n_random is None else n_random
    new, batch = settings.max_new_tokens, settings.batch_prompts
    positives = prepare(lm, [record for record in records if record.label], batch)
    negatives = prepare(lm, [record for record in records if not record.label], batch)
    ablate = Ablate(choice.encoder, choice.ablation.latents, roles=settings.roles)
    clamp = choice.clamp.clamp(choice.encoder, roles=settings.roles)
    toward, to_zero, add = direction_edits(choice.direction, choice.add.scale, settings.roles)
    on_positives: dict[str, list[Intervention]] = {
        "base": [],
        "ablate": [ablate],
        "direction_ablate": [toward],
        "direction_ablate_zero": [to_zero],
    }
    on_negatives: dict[str, list[Intervention]] = {
        "clamp_base": [],
        "clamp": [clamp],
        "direction_add": [add],
        "spared": [ablate],
    }
    outcomes: dict[str, Outcome] = {}
    for prompts, edits in ((positives, on_positives), (negatives, on_negatives)):
        outcomes |= zip(edits, evaluate_each(lm, list(edits.values()), prompts, judge, new), strict=True)
    case = _Case(positives, negatives, outcomes["base"], outcomes["clamp_base"])
    controls = _controls(lm, choice, case, outcomes, clamp, judge, settings, n_random, progress)
    doses = (
        dose_report(
            lm, choice.encoder, choice.site, choice.clamp, choice.dose_range, negatives, positives, judge, settings,
            None if progress is None else lambda done, total: progress("dose-response", done, total),
        )
        if n_random
        else None
    )  # fmt: skip
    return CausalReport(
        hook_name=choice.site.hook_name,
        d_sae=choice.site.d_sae,
        position=choice.position,
        latents=list(choice.ablation.latents),
        clamp_latents=list(choice.clamp.latents),
        clamp_value=float(np.mean(choice.clamp.values)),
        clamp_values=list(choice.clamp.values),
        clamp_multiple=choice.clamp.multiple,
        direction_add_scale=choice.add.scale,
        n_random=n_random,
        **_rates(case, outcomes),
        **_side_effects(lm, negatives, ablate, clamp, toward, beside.facts or (), beside.others or {}, settings),
        **_draws(controls),
        controls=controls,
        **({} if doses is None else doses._asdict()),
        examples=_examples(case, outcomes["ablate"], outcomes["clamp"], settings.n_examples),
        judges=_compared(case, outcomes, beside.panel, settings.seed) if beside.panel else None,
    )


def _compared(case: _Case, outcomes: Mapping[str, Outcome], panel: Mapping[str, Judge], seed: int) -> JudgeComparison:
    """Judge the replies that the claim rests on by every judge of the panel."""
    replies = [
        (text, record)
        for name, prompts in (
            ("base", case.positives),
            ("ablate", case.positives),
            ("clamp_base", case.negatives),
            ("clamp", case.negatives),
        )
        for text, record in zip(outcomes[name].texts, prompts.records, strict=True)
    ]
    return compare_judges([text for text, _ in replies], [record for _, record in replies], panel, seed=seed)


def _rates(case: _Case, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Name the rates of every outcome as `CausalReport` does."""
    return {
        "base_rate": case.base.behavior,
        "base_degenerate_rate": case.base.degenerate,
        "ablate_rate": outcomes["ablate"].behavior,
        "ablate_restored_rate": outcomes["ablate"].alternative,
        "ablate_degenerate_rate": outcomes["ablate"].degenerate,
        "clamp_base_rate": case.clamp_base.behavior,
        "clamp_rate": outcomes["clamp"].behavior,
        "clamp_degenerate_rate": outcomes["clamp"].degenerate,
        "direction_ablate_rate": outcomes["direction_ablate"].behavior,
        "direction_ablate_restored_rate": outcomes["direction_ablate"].alternative,
        "direction_ablate_zero_rate": outcomes["direction_ablate_zero"].behavior,
        "direction_add_rate": outcomes["direction_add"].behavior,
        "direction_add_degenerate_rate": outcomes["direction_add"].degenerate,
        "negatives_base_alternative_rate": case.clamp_base.alternative,
        "negatives_ablate_alternative_rate": outcomes["spared"].alternative,
    }


def _draws(controls: Mapping[str, Control]) -> dict[str, Any]:
    found: dict[str, Any] = {f"random_{name}": control.draws for name, control in controls.items()}
    means = {f"random_{name}_mean": controls[name].mean for name in ("ablate", "clamp")}
    effects = {
        name: random_effect(controls[real].observed_success, controls[drawn].success)
        for name, real, drawn in (
            ("random_latents", "ablate", "ablate"),
            ("random_directions", "ablate", "direction_ablate"),
            ("random_latents_clamp", "clamp", "clamp"),
            ("random_directions_clamp", "clamp", "clamp_direction"),
        )
    }
    return {**found, **means, **effects}


def _side_effects(
    lm: Any,
    negatives: Prompts,
    ablate: Ablate,
    clamp: Clamp,
    toward: ProjectOut,
    facts: Sequence[ContrastRecord],
    others: Mapping[str, OtherBehavior],
    settings: BehaviorSettings,
) -> dict[str, Any]:
    """Measure what else changes: the text of harmless replies, facts, other behaviours."""
    kl = own_replies(lm, negatives.first(settings.n_prompts_kl), settings.kl_tokens)
    questions = prepare(lm, list(facts)[: settings.n_prompts], settings.batch_prompts)
    accuracies = fact_accuracies(lm, [[], [ablate], [clamp]], questions, settings.max_new_tokens)
    return {
        "kl_harmless": _kl(lm, kl, ablate),
        "kl_harmless_clamp": _kl(lm, kl, clamp),
        "kl_harmless_direction": _kl(lm, kl, toward),
        **dict(zip(("fact_accuracy_base", "fact_accuracy", "fact_accuracy_clamp"), accuracies, strict=True)),
        "other_behaviors": _others(lm, others, ablate, clamp, settings),
    }


def _kl(lm: Any, replies: Sequence[Followed], intervention: Intervention) -> float:
    with steer(lm, intervention):
        return damage(lm, replies).kl


def _controls(
    lm: Any,
    choice: Choice,
    case: _Case,
    outcomes: Mapping[str, Outcome],
    clamp: Clamp,
    judge: Judge,
    settings: BehaviorSettings,
    n_random: int,
    progress: Progress | None,
) -> dict[str, Control]:
    """Measure every control on fewer prompts; the real intervention is compared on the same ones."""
    few = settings.n_prompts_random
    positives, negatives = case.positives.first(few), case.negatives.first(few)

    def negative_mean_of(unit: np.ndarray) -> float:
        return float((choice.negative_resid @ unit).mean())

    plan = plan_controls(
        choice.encoder,
        choice.site,
        choice.ablation.latents,
        choice.clamp,
        negative_mean_of,
        shift_norm(lm, clamp, negatives),
        choice.add.scale * choice.direction.norm,
        n_random,
        settings.n_neighbours,
        settings.roles,
        settings.seed,
    )
    found: dict[str, Control] = {}
    for name, edits, real in (
        ("ablate", plan.ablate, "ablate"),
        ("clamp", plan.clamp, "clamp"),
        ("clamp_direction", plan.clamp_direction, "clamp"),
        ("direction_ablate", plan.direction_ablate, "direction_ablate"),
        ("direction_add", plan.direction_add, "direction_add"),
    ):
        removes = name.endswith("ablate")
        found[name] = run_control(
            lm,
            edits,
            positives if removes else negatives,
            judge,
            outcomes[real],
            Verdict.ALTERNATIVE if removes else Verdict.BEHAVIOR,
            settings.max_new_tokens,
            _ticker(progress, f"random {name}", len(edits)),
        )
    return found


def _ticker(progress: Progress | None, what: str, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(what, done, total)

    return tick


def _others(
    lm: Any, others: Mapping[str, OtherBehavior], ablate: Ablate, clamp: Clamp, settings: BehaviorSettings
) -> dict[str, dict[str, stats.Rate]]:
    """Return the other behaviours' rates on their own positives: unsteered, ablated, clamped."""
    found = {}
    for name, other in others.items():
        records = [record for record in other.records if record.label][: settings.n_prompts]
        prompts = prepare(lm, records, settings.batch_prompts)
        outcomes = evaluate_each(lm, [[], [ablate], [clamp]], prompts, other.judge, settings.max_new_tokens)
        found[name] = {
            what: outcome.behavior for what, outcome in zip(("base", "ablate", "clamp"), outcomes, strict=True)
        }
    return found


def _examples(case: _Case, ablated: Outcome, clamped: Outcome, n: int) -> list[Example]:
    found = []
    for what, prompts, base, steered in (
        ("ablate", case.positives, case.base, ablated),
        ("clamp", case.negatives, case.clamp_base, clamped),
    ):
        for index, record in enumerate(prompts.records[:n]):
            found.append(
                Example(
                    record.prompt,
                    base.texts[index],
                    steered.texts[index],
                    what,
                    base.verdicts[index].value,
                    steered.verdicts[index].value,
                )
            )
    return found
