"""Is a located set necessary, sufficient, and no more than the behaviour's? Weights are cut, and the model is watched.

Two kinds of measurement. To *choose* (how much to cut) forwards are enough: the share of prompts whose margin is
above 0, and KL on harmless replies. To *report*, the model writes its replies to held-out prompts, a judge reads them,
and the costs of `sae.behavior.cost` are taken. Prompts to choose on and to report on are of different splits.

*Harmless* prompts are negatives on which the clean model does not show the behaviour: taking a behaviour away has to
change the others.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from sae.behavior.contrast import ContrastRecord, ContrastSet
from sae.behavior.cost import CostTasks, Followed, damage, measure_costs, own_replies, prepare_costs
from sae.behavior.judge import Judge, Verdict
from sae.behavior.measure import (
    MarginTask,
    Prompts,
    evaluate,
    margins,
    prepare,
    prepare_margins,
)
from sae.errors import UserError
from sae.weights.adversary import Adversary
from sae.weights.bars import GONE, KL_BAR, MOVED

KL_TOKENS = 8


class Watched(NamedTuple):
    """A behaviour that surgery is to remove, or to leave alone."""

    contrast: ContrastSet
    judge: Judge


class Quick(NamedTuple):
    """What forwards tell, on prompts to choose on.

    Attributes:
        behavior: share of the behaviour's prompts with a margin above 0.
        margin: their mean margin.
        others: the same share for every other behaviour.
        kl: on harmless replies, nats a token.
    """

    behavior: float
    margin: float
    others: dict[str, float]
    kl: float


class Full(NamedTuple):
    """What replies tell, on prompts to report on.

    Attributes:
        behavior: the behaviour's rate where it is due.
        degenerate: share of broken replies there.
        others: every other behaviour's rate where it is due.
        facts: share of questions of fact answered truly; None where there are none.
        kl: on harmless replies, nats a token.
    """

    behavior: float
    degenerate: float
    others: dict[str, float]
    facts: float | None
    kl: float

    def other_max_change(self, clean: "Full") -> float:
        """Largest change of another behaviour's rate or of the facts."""
        changes = [abs(rate - clean.others[name]) for name, rate in self.others.items()]
        if self.facts is not None and clean.facts is not None:
            changes.append(abs(self.facts - clean.facts))
        return max(changes, default=0.0)


@dataclass
class Watch:
    """Everything that is watched during surgery, prepared once on the clean model.

    Attributes:
        lm: the model.
        target, others: task of forwards for the behaviour and for each other one.
        kl: of harmless replies, to choose on.
        prompts: where the behaviour is due, to report on; `other_prompts` likewise.
        costs: of the report split.
        clean_quick, clean: the model as it is.
    """

    lm: Any
    judge: Judge
    target: MarginTask
    others: dict[str, MarginTask]
    kl: list[Followed]
    prompts: Prompts
    other_prompts: dict[str, tuple[Prompts, Judge]]
    costs: CostTasks
    max_new_tokens: int
    clean_quick: Quick = field(init=False)
    clean: Full = field(init=False)

    def __post_init__(self) -> None:
        self.clean_quick = self.quick()
        self.clean = self.full()

    def quick(self) -> Quick:
        """Measure by forwards, under the weights as they are."""
        found = margins(self.lm, self.target)
        return Quick(
            float((found > 0).mean()),
            float(found.mean()),
            {name: float((margins(self.lm, task) > 0).mean()) for name, task in self.others.items()},
            damage(self.lm, self.kl).kl,
        )

    def behavior_rate(self) -> float:
        """Rate of the behaviour in replies, under the weights as they are."""
        return evaluate(self.lm, [], self.prompts, self.judge, self.max_new_tokens).behavior.rate

    def full(self) -> Full:
        """Measure by replies, under the weights as they are."""
        new = self.max_new_tokens
        outcome = evaluate(self.lm, [], self.prompts, self.judge, new)
        (cost,) = measure_costs(self.lm, [[]], self.costs)
        return Full(
            outcome.behavior.rate,
            outcome.degenerate.rate,
            {
                name: evaluate(self.lm, [], prompts, judge, new).behavior.rate
                for name, (prompts, judge) in self.other_prompts.items()
            },
            None if cost.facts is None else cost.facts.rate,
            cost.own.kl,
        )


def harmless(
    lm: Any, records: Sequence[ContrastRecord], judge: Judge, n: int, max_new_tokens: int = 24
) -> list[ContrastRecord]:
    """Return up to `n` records on which the model as it is does not show the behaviour."""
    some = list(records)[: n + n // 4]
    verdicts = evaluate(lm, [], some, judge, max_new_tokens).verdicts if some else ()
    return [record for record, found in zip(some, verdicts, strict=True) if found is not Verdict.BEHAVIOR][:n]


def prepare_watch(
    lm: Any,
    behavior: Watched,
    others: Mapping[str, Watched],
    facts: Sequence[ContrastRecord] = (),
    *,
    n_quick: int = 64,
    n_prompts: int = 200,
    max_new_tokens: int = 24,
) -> Watch:
    """Prepare what surgery is watched by, on the clean model.

    Args:
        lm: the model as it is.
        behavior: what is to go; chosen on its `select` split, reported on `report`.
        others: what is to stay.
        facts: questions with a true answer.
        n_quick: prompts of a kind to choose on.
        n_prompts: prompts of a kind to report on.
        max_new_tokens: length of replies.

    Raises:
        UserError: a set without one of the splits, or the model shows the behaviour on all its negatives.
    """
    select, report = behavior.contrast.split("select"), behavior.contrast.split("report")
    calm = [
        harmless(lm, part.negatives, behavior.judge, n, max_new_tokens)
        for part, n in ((select, n_quick), (report, n_prompts))
    ]
    if not all(calm):
        raise UserError(
            f"{lm.name!r} shows {behavior.contrast.behavior!r} on every negative prompt: give others, without it."
        )
    return Watch(
        lm,
        behavior.judge,
        prepare_margins(lm, select.positives[:n_quick]),
        {
            name: prepare_margins(lm, other.contrast.split("select").positives[:n_quick])
            for name, other in others.items()
        },
        own_replies(lm, prepare(lm, calm[0]), KL_TOKENS),
        prepare(lm, report.positives[:n_prompts]),
        {
            name: (prepare(lm, other.contrast.split("report").positives[:n_prompts]), other.judge)
            for name, other in others.items()
        },
        prepare_costs(
            lm, calm[1], behavior.judge, facts=list(facts)[:n_prompts], n_prompts=n_prompts, n_tokens=KL_TOKENS,
            max_new_tokens=max_new_tokens,
        )._replace(lookalikes=prepare(lm, ())),  # they are among the harmless prompts
        max_new_tokens,
    )  # fmt: skip


Cut = Callable[[], AbstractContextManager[None]]
"""Makes a context in which the weights are cut."""


class Dose(NamedTuple):
    """One point of the dose curve."""

    fraction: float  #: asked for
    share: float  #: of the weights cut in fact
    quick: Quick
    shortfall: float  #: how far it misses the bars, summed; 0 passes


class Surgery(NamedTuple):
    """What cutting a located set does; chosen on one split, measured on another.

    Attributes:
        fraction: share of the weights that is cut.
        before, after: with the set and without it.
        other_max_change: largest change of another behaviour's rate or of the facts.
        random_after: mean rate of the behaviour with as large random sets of the same matrices cut.
        random_worst: the rate that moved furthest among these.
        kept_after: rate with everything but the set at the reference's values (without one: at zero).
        doses: the curve that the fraction was chosen on.
        passed: whether all bars are met on the report split.
        adversary: the worst case found by masks on everything else, where one was looked for.
    """

    fraction: float
    before: Full
    after: Full
    other_max_change: float
    random_after: float
    random_worst: float
    kept_after: float | None
    doses: tuple[Dose, ...]
    passed: bool
    adversary: Adversary | None = None


def shortfall(quick: Quick, clean: Quick) -> float:
    """By how much a cut misses the bars: behaviour gone, others unmoved, harmless replies unchanged."""
    moved = max((abs(rate - clean.others[name]) for name, rate in quick.others.items()), default=0.0)
    gaps = (quick.behavior - GONE, moved - MOVED, quick.kl - KL_BAR)
    return float(sum(max(0.0, gap) for gap in gaps))


def operate(
    watch: Watch,
    cuts: Mapping[float, tuple[float, Cut]],
    random_cuts: Callable[[float], Sequence[Cut]],
    keep: Callable[[float], Cut | None] = lambda fraction: None,
) -> Surgery:
    """Draw the dose curve, choose the cut that comes nearest to the bars (the smallest of equals), and report it.

    Args:
        watch: what is measured.
        cuts: for every fraction asked for, the share cut in fact, and how.
        random_cuts: for a fraction, as large random sets.
        keep: for a fraction, how to leave nothing but the set; None where that makes no sense.

    Raises:
        UserError: nothing to cut.
    """
    if not cuts:
        raise UserError("nothing was located: no score is positive.")
    doses = []
    for fraction, (share, cut) in cuts.items():
        with cut():
            quick = watch.quick()
        doses.append(Dose(fraction, share, quick, shortfall(quick, watch.clean_quick)))
    best = min(doses, key=lambda dose: (dose.shortfall, dose.share))
    with cuts[best.fraction][1]():
        after = watch.full()
    drawn = []
    for cut in random_cuts(best.fraction):
        with cut():
            drawn.append(watch.behavior_rate())
    kept = keep(best.fraction)
    with kept() if kept is not None else nullcontext():
        kept_after = watch.behavior_rate() if kept is not None else None
    before, random_after = watch.clean, float(np.mean(drawn)) if drawn else float("nan")
    change = after.other_max_change(before)
    passed = (
        before.behavior >= 1 - GONE
        and after.behavior <= GONE
        and change <= MOVED
        and after.kl <= KL_BAR
        and abs(random_after - before.behavior) <= GONE
    )
    worst = max(drawn, key=lambda rate: abs(rate - before.behavior), default=float("nan"))
    return Surgery(best.share, before, after, change, random_after, worst, kept_after, tuple(doses), passed)
