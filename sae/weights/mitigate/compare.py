"""One mitigation, and the table of several: chosen on the select split, measured on the report split."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae import stats
from sae.behavior.cost import Cost, measure_costs
from sae.behavior.judge import Judge
from sae.behavior.measure import Outcome, Progress, Prompts, evaluate
from sae.errors import UserError, unknown
from sae.weights.mitigate.adversarial import adversarial
from sae.weights.mitigate.case import Case
from sae.weights.mitigate.choose import Chooser, Method, Tried, Weights, Work, put, put_back
from sae.weights.mitigate.finetune import finetune
from sae.weights.mitigate.orthogonalize import orthogonalize, untied
from sae.weights.mitigate.prune import prune
from sae.weights.mitigate.regularize import regularize
from sae.weights.mitigate.robust import Attacks, Relearning, attacks, relearn
from sae.weights.mitigate.save import Change, changes, check_target, save_mitigated
from sae.weights.mitigate.settings import MitigationSettings

METHODS: dict[str, Method] = {
    "prune": prune,
    "regularize": regularize,
    "adversarial": adversarial,
    "finetune": finetune,
    "orthogonalize": orthogonalize,
}


def _silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


class Mitigated(NamedTuple):
    """What a method did to the weights.

    Attributes:
        method: its name.
        chosen: the dials that were chosen on the select split; None where nothing within the budget was better than the
            model as it was, which is then unchanged.
        tried: everything that was looked at there.
        changed: how the parameters differ from the original.
    """

    method: str
    chosen: Tried | None
    tried: tuple[Tried, ...]
    changed: dict[str, Change]


@contextlib.contextmanager
def mitigated(
    lm: Any,
    case: Case,
    method: str,
    settings: MitigationSettings | None = None,
    *,
    scores: Weights | None = None,
    reference: Weights | None = None,
    progress: Progress = _silent,
) -> Iterator[Mitigated]:
    """Context in which the model's weights are changed by a method; afterwards they are as before, bit for bit.

    Args:
        lm: the model.
        case: the behaviour, prepared on this model before.
        method: one of `METHODS`.
        settings: those `case` was prepared with.
        scores: prune: scores of parameters by matrix, larger = more the behaviour's; without, they are computed.
        reference: prune: weights by matrix to restore to; without, parameters are set to zero.
        progress: called now and then.

    Raises:
        UserError: an unknown method, or a model that it cannot be used on.
    """
    if method not in METHODS:
        raise unknown("mitigation", method, list(METHODS))
    settings = settings or MitigationSettings()
    with contextlib.ExitStack() as stack:
        if method == "orthogonalize":
            stack.enter_context(untied(lm))
        before = stack.enter_context(put_back(lm))
        chooser = Chooser(lm, case.select, settings.budget, before)
        METHODS[method](Work(lm, case, settings, before, chooser, progress, scores, reference))
        chosen = chooser.take()
        yield Mitigated(method, chosen, tuple(chooser.tried), changes(lm, before))


class State(NamedTuple):
    """A model on the report split, the original or a mitigated one."""

    outcome: Outcome
    margin: float
    costs: Cost
    others: dict[str, stats.Rate]


def measure(lm: Any, case: Case) -> State:
    """Measure the model as it is on the report split."""
    (costs,) = measure_costs(lm, [[]], case.report.costs)
    others = {name: _rate(lm, prompts, judge, case) for name, (prompts, judge) in case.others.items()}
    return State(case.report.outcome(lm), case.report.margin(lm), costs, others)


def _rate(lm: Any, prompts: Prompts, judge: Judge, case: Case) -> stats.Rate:
    return evaluate(lm, [], prompts, judge, case.report.max_new_tokens).behavior


@dataclass(frozen=True)
class MitigationRow:
    """One method's line of the table. Rates are on the report split, with 95% intervals over topics.

    Attributes:
        method: its name.
        chosen: the dials chosen on the select split; None where nothing within the budget helped.
        n_changed: parameters that differ from the original.
        behavior_before, behavior_after: the behaviour where it is due.
        restored_before, restored_after: its alternative there.
        degenerate_after: broken replies there.
        margin_before, margin_after: mean logit margin there.
        others: other behaviours' rates on their own prompts, before and after.
        other_max_change: the largest change of one of them; None without others.
        facts_before, facts: questions of fact answered truly; None without such questions.
        lookalikes_before, lookalikes: the behaviour's rate where prompts only look as if it were due.
        kl_select, kl_harmless: KL(original || mitigated) on harmless prompts, nats per token; the first one was held to
            the budget.
        ce_harmless: rise of the cross entropy of the original's own replies there.
        relearn_steps: see `Relearning`; None also where this was left out.
        relearn_curve: (steps, rate).
        prefix, steering, triggers: the behaviour's rate under attacks (`sae.weights.mitigate.robust`).
        path: folder of the mitigated model; None where none was written.
        tried: what was looked at on the select split.
        wall_s: seconds, measuring included.
    """

    method: str
    chosen: Tried | None
    n_changed: int
    behavior_before: stats.Rate
    behavior_after: stats.Rate
    restored_before: stats.Rate
    restored_after: stats.Rate
    degenerate_after: stats.Rate
    margin_before: float
    margin_after: float
    others: dict[str, tuple[stats.Rate, stats.Rate]]
    other_max_change: float | None
    facts_before: stats.Rate | None
    facts: stats.Rate | None
    lookalikes_before: stats.Rate | None
    lookalikes: stats.Rate | None
    kl_select: float
    kl_harmless: float
    ce_harmless: float
    relearn_steps: int | None
    relearn_curve: tuple[tuple[int, float], ...]
    prefix: stats.Rate
    steering: stats.Rate
    triggers: dict[str, stats.Rate]
    path: Path | None
    tried: tuple[Tried, ...]
    wall_s: float


class Comparison(NamedTuple):
    """The table.

    Attributes:
        methods: a line for each.
        attacked_before: attacks on the original model, where the behaviour is due.
        attack_controls: attacks on the original model where it is not.
        attack_hook: where the steering attack adds.
        attack_norm: the length of what it adds.
        relearn_untaught: the control of relearning; None where no model without the behaviour is known.
    """

    methods: tuple[MitigationRow, ...]
    attacked_before: Attacks
    attack_controls: Attacks
    attack_hook: str
    attack_norm: float
    relearn_untaught: Relearning | None


def compare_mitigations(
    lm: Any,
    case: Case,
    methods: Sequence[str],
    settings: MitigationSettings,
    *,
    folder: Path | None = None,
    scores: Weights | None = None,
    reference: Weights | None = None,
    untaught: Weights | None = None,
    progress: Progress = _silent,
) -> Comparison:
    """Run methods one after the other, each on the original model, and measure them alike.

    Args:
        lm: the model.
        case: the behaviour.
        methods: names of `METHODS`.
        settings: those `case` was prepared with.
        folder: where each mitigated model is written, under its method's name; None writes none.
        scores: see `mitigated`.
        reference: see `mitigated`.
        untaught: weights, by parameter, that make it a model which never had the behaviour: a control of relearning.
        progress: called now and then.

    Raises:
        UserError: a model that does not show the behaviour; see `mitigated` and `save_mitigated`. Folders are checked
            before anything is run.
    """
    for method in methods:
        if method not in METHODS:
            raise unknown("mitigation", method, list(METHODS))
        if folder is not None:
            check_target(lm, folder / method)
    base = measure(lm, case)
    if not base.outcome.behavior.rate > 0:
        raise UserError(
            f"{lm.name!r} does not show {case.behavior!r} on any of {base.outcome.behavior.n} held-out prompts: there "
            "is nothing to mitigate."
        )
    attacked = attacks(lm, case, case.report.positives.records, settings)
    control = attacks(lm, case, case.negatives, settings)
    rows = []
    for method in methods:
        start = time.perf_counter()
        with mitigated(lm, case, method, settings, scores=scores, reference=reference, progress=progress) as done:
            row = _row(lm, case, done, base, settings, progress, start)
            if folder is not None:
                row = _saved(lm, case, done, row, settings, folder / method)
        rows.append(row)
    fresh = None
    if untaught is not None and settings.relearn_steps:
        with put_back(lm):
            put(lm, untaught)
            fresh = relearn(lm, case, settings, base.outcome.behavior.rate / 2, progress)
    return Comparison(tuple(rows), attacked, control, case.attack.hook_name, case.attack.norm, fresh)


def _row(
    lm: Any,
    case: Case,
    done: Mitigated,
    base: State,
    settings: MitigationSettings,
    progress: Progress,
    start: float,
) -> MitigationRow:
    found = measure(lm, case)
    others = {name: (base.others[name], rate) for name, rate in found.others.items()}
    relearned: Relearning | None = None
    if settings.relearn_steps:
        relearned = relearn(lm, case, settings, base.outcome.behavior.rate / 2, progress)
    attacked = attacks(lm, case, case.report.positives.records, settings)
    return MitigationRow(
        method=done.method,
        chosen=done.chosen,
        n_changed=sum(change.n_changed for change in done.changed.values()),
        behavior_before=base.outcome.behavior,
        behavior_after=found.outcome.behavior,
        restored_before=base.outcome.alternative,
        restored_after=found.outcome.alternative,
        degenerate_after=found.outcome.degenerate,
        margin_before=base.margin,
        margin_after=found.margin,
        others=others,
        other_max_change=max((abs(after.rate - before.rate) for before, after in others.values()), default=None),
        facts_before=base.costs.facts,
        facts=found.costs.facts,
        lookalikes_before=base.costs.lookalikes,
        lookalikes=found.costs.lookalikes,
        kl_select=done.chosen.kl if done.chosen else 0.0,
        kl_harmless=found.costs.own.kl,
        ce_harmless=found.costs.own.ce,
        relearn_steps=relearned.steps if relearned else None,
        relearn_curve=relearned.curve if relearned else (),
        prefix=attacked.prefix,
        steering=attacked.steering,
        triggers=attacked.triggers,
        path=None,
        tried=done.tried,
        wall_s=round(time.perf_counter() - start, 2),
    )


def _saved(
    lm: Any, case: Case, done: Mitigated, row: MitigationRow, settings: MitigationSettings, folder: Path
) -> MitigationRow:
    """Write the model with its card."""
    row = dataclasses.replace(row, path=folder)
    card: Mapping[str, Any] = {
        "behavior": case.behavior,
        "method": done.method,
        "settings": settings,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "changed": done.changed,
        "measured": row,
    }
    save_mitigated(lm, folder, card)
    return row
