"""What every mitigation of a behaviour is trained, chosen and tested on: made once, of the model as it is."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sae import stats
from sae.behavior.contrast import ContrastRecord, ContrastSet
from sae.behavior.cost import CostTasks, OtherBehavior, measure_costs, prepare_costs
from sae.behavior.directions import Direction, difference_of_means
from sae.behavior.judge import Judge
from sae.behavior.measure import (
    MarginTask,
    Outcome,
    Prompts,
    evaluate,
    margins,
    margins_each,
    prepare,
    prepare_margins,
)
from sae.errors import UserError
from sae.steering.interventions import Add
from sae.weights.mitigate.replies import Replies, given_replies, own_replies
from sae.weights.mitigate.settings import MitigationSettings

DEPTH = 0.8
"""Directions are read in this part of the blocks: further up they are about the words that come next."""


class Gauge(NamedTuple):
    """Prompts of one split on which the model is measured as it is at the time."""

    positives: Prompts
    margin_task: MarginTask
    costs: CostTasks
    judge: Judge
    max_new_tokens: int

    def outcome(self, lm: Any) -> Outcome:
        """Judged greedy replies to the prompts on which the behaviour is due."""
        return evaluate(lm, [], self.positives, self.judge, self.max_new_tokens)

    def margin(self, lm: Any) -> float:
        """Mean logit margin of the behaviour over its alternative there."""
        return float(margins(lm, self.margin_task).mean())

    def kl(self, lm: Any) -> float:
        """Mean KL(original || now) in nats per token, along the original's replies to harmless prompts."""
        (found,) = measure_costs(lm, [[]], self.costs)
        return found.own.kl


class Case(NamedTuple):
    """One behaviour of one model.

    Attributes:
        behavior: its name.
        positives: prompts of the find split on which the behaviour is due.
        targets: those with an alternative reply each: what is learned.
        shown: those with a reply that shows the behaviour.
        retain: harmless prompts of the find split, with the model's own replies: what is kept.
        select: where every dial is chosen.
        report: where everything is measured.
        negatives: prompts of the report split on which the behaviour is not due.
        others: other behaviours, on prompts of their own.
        directions: the behaviour's direction after each block, from the lowest on.
        attack: which of them brings the behaviour about best where it is not due, on the select split.
        judge: of the behaviour.
    """

    behavior: str
    positives: tuple[ContrastRecord, ...]
    targets: Replies
    shown: Replies
    retain: Replies
    select: Gauge
    report: Gauge
    negatives: tuple[ContrastRecord, ...]
    others: Mapping[str, tuple[Prompts, Judge]]
    directions: tuple[Direction, ...]
    attack: Direction
    judge: Judge


def prepare_case(
    lm: Any,
    contrast: ContrastSet,
    judge: Judge,
    settings: MitigationSettings,
    *,
    keep: Sequence[ContrastRecord] = (),
    others: Mapping[str, OtherBehavior] | None = None,
    facts: Sequence[ContrastRecord] = (),
) -> Case:
    """Run the unchanged model over all that mitigations are measured against.

    Harmless prompts are those on which the behaviour is not due, and `keep`, half and half. What neither is like may
    change without being seen.

    Args:
        lm: the model.
        contrast: the behaviour; its behavior_texts and alternative_texts are what is trained against and to.
        judge: of the behaviour.
        settings: see `MitigationSettings`.
        keep: further prompts on which nothing is to change, of all splits.
        others: other behaviours that should stay as they are, on prompts of the report split.
        facts: questions with a true answer, of the report split.

    Raises:
        UserError: a set whose replies cannot be judged, or a split without one of the classes.
    """
    if contrast.unanswerable:
        raise UserError(
            f"{contrast.behavior!r} cannot be mitigated by this contrast set, since {contrast.unanswerable}: give one "
            "with behavior_texts and alternative_texts."
        )
    find, select, report = (contrast.split(name) for name in ("find", "select", "report"))
    positives = find.positives[: settings.n_prompts_find]
    negatives = find.negatives[: settings.n_prompts_find]
    harmless = {part: _mixed(contrast.split(part).negatives, keep, part) for part in stats.SPLITS}
    directions = _directions(lm, positives, negatives, settings)
    return Case(
        behavior=contrast.behavior,
        positives=positives,
        targets=given_replies(lm, positives, _one_of(positives, "alternative_texts", settings.seed)),
        shown=given_replies(lm, positives, _one_of(positives, "behavior_texts", settings.seed)),
        retain=own_replies(
            lm,
            prepare(lm, harmless["find"][: settings.n_prompts_find], settings.batch_prompts),
            settings.max_new_tokens,
        ),
        select=_gauge(lm, select, harmless["select"], judge, settings.n_prompts_select, settings),
        report=_gauge(lm, report, harmless["report"], judge, settings.n_prompts, settings, facts, _alike(report)),
        negatives=report.negatives[: settings.n_prompts],
        others={
            name: (prepare(lm, _due(other.records)[: settings.n_prompts], settings.batch_prompts), other.judge)
            for name, other in (others or {}).items()
        },
        directions=directions,
        attack=_strongest(lm, directions, select.negatives[: settings.n_prompts_select], settings),
        judge=judge,
    )


def _due(records: Sequence[ContrastRecord]) -> list[ContrastRecord]:
    return [record for record in records if record.label]


def _one_of(records: Sequence[ContrastRecord], name: str, seed: int) -> list[str]:
    """One of each record's texts, drawn."""
    rng = np.random.default_rng(seed)
    return [getattr(record, name)[int(rng.integers(len(getattr(record, name))))] for record in records]


def _mixed(
    negatives: Sequence[ContrastRecord], keep: Sequence[ContrastRecord], part: str
) -> tuple[ContrastRecord, ...]:
    """Harmless prompts of a split, so that any first n of them are of both kinds."""
    pairs = itertools.zip_longest(negatives, [record for record in keep if record.split == part])
    return tuple(record for pair in pairs for record in pair if record is not None)


def _alike(part: ContrastSet) -> list[ContrastRecord]:
    """Prompts that only look as if the behaviour were due."""
    return [record for record in part.negatives if record.arm.startswith("lookalike")]


def _gauge(
    lm: Any,
    part: ContrastSet,
    harmless: Sequence[ContrastRecord],
    judge: Judge,
    n: int,
    settings: MitigationSettings,
    facts: Sequence[ContrastRecord] = (),
    lookalikes: Sequence[ContrastRecord] = (),
) -> Gauge:
    costs = prepare_costs(
        lm,
        harmless,
        judge,
        facts=facts,
        n_prompts=n,
        n_tokens=settings.kl_tokens,
        max_new_tokens=settings.max_new_tokens,
        batch_prompts=settings.batch_prompts,
    )
    # Not those it would take from `keep`, which are of other behaviours; and none where only KL is looked at.
    costs = costs._replace(lookalikes=prepare(lm, lookalikes[:n], settings.batch_prompts))
    positives = prepare(lm, part.positives[:n], settings.batch_prompts)
    task = prepare_margins(lm, positives.records, settings.batch_prompts)
    return Gauge(positives, task, costs, judge, settings.max_new_tokens)


@torch.no_grad()
def _directions(
    lm: Any, positives: Sequence[ContrastRecord], negatives: Sequence[ContrastRecord], settings: MitigationSettings
) -> tuple[Direction, ...]:
    """The difference of means at the prompts' last token after each block."""
    last = max(1, int(DEPTH * lm.n_layers))
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(last)]
    records = [*positives, *negatives]
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for batch in prepare(lm, records, settings.batch_prompts).batches:
        for name, acts in lm.activations(batch.repad("left", lm.pad_id).to(lm.device), names).items():
            parts[name].append(acts[:, -1].float().cpu())
    labels = [record.label for record in records]
    return tuple(difference_of_means(torch.cat(parts[name]).numpy(), labels, name, "-1") for name in names)


def _strongest(
    lm: Any, directions: Sequence[Direction], negatives: Sequence[ContrastRecord], settings: MitigationSettings
) -> Direction:
    """The direction that, added at its own length, raises the behaviour's margin most where it is not due."""
    task = prepare_margins(lm, negatives, settings.batch_prompts)
    groups = [[Add(direction=found.vector, hook_name=found.hook_name)] for found in directions]
    means = [float(values.mean()) for values in margins_each(lm, groups, task)]
    return directions[int(np.argmax(means))]
