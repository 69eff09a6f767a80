"""From a contrast set to a tested finding, in one call: `find_behavior`.

1. Keep prompts on which the model does what the label says.
2. find split: rank every latent of every SAE and position; all of them are one family.
3. select split: per SAE, choose latents to ablate and to clamp, and the direction's scale; then the best SAE of each
   size, and the best of all.
4. report split, once: the causal test of the best, and the same table for each other dictionary size.

If nothing passes step 2 nothing is claimed: `BehaviorReport.causal` is None.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae import stats
from sae.behavior.causal import Choice, OtherBehavior, causal_report
from sae.behavior.contrast import ContrastRecord, ContrastSet, Filtered, filter_on_behavior, unfiltered
from sae.behavior.directions import Detection, Direction, difference_of_means
from sae.behavior.judge import Judge, Verdict
from sae.behavior.latents import LatentRanking, LatentScore, SiteActs, rank_latents
from sae.behavior.measure import (
    Collected,
    Progress,
    collect,
    completions,
    evaluate,
    margins,
    prepare,
    prepare_margins,
)
from sae.behavior.results import CausalReport
from sae.behavior.select import select_ablation, select_add, select_clamp
from sae.behavior.settings import BehaviorSettings
from sae.errors import UserError
from sae.probe import fit_probe
from sae.steering.apply import steer
from sae.steering.interventions import Ablate, ProjectOut


@dataclass(frozen=True)
class SelectRow:
    """How one SAE did on the select split, on which the best is chosen."""

    encoder: int
    hook_name: str
    d_sae: int
    latents: list[int]
    clamp_latents: list[int]
    clamp_multiple: float
    restored: float  #: share of positives that show the alternative under the ablation
    clamped: float  #: share of negatives that show the behaviour under the clamp

    @property
    def score(self) -> float:
        """Necessity and sufficiency, equally."""
        return self.restored + self.clamped


@dataclass(frozen=True)
class BehaviorReport:
    """Everything found about one behaviour.

    Attributes:
        behavior: its name.
        n_records: prompts and topics used per split and class, e.g. ``{"find": {"positives": 200, ...}}``.
        dropped_positives, dropped_negatives: prompts on which the model did not do what the label says.
        unfiltered_base_rate, unfiltered_clamp_base_rate: the behaviour on the report split's positives and negatives
            before those were dropped; afterwards the rates are 1 and 0 by construction.
        ranking: significant latents, from the find split.
        n_tested, n_significant: size of the family, and how many passed.
        n_significant_shuffled: how many pass when the same records' labels are shuffled; should be 0.
        found: whether anything passed and was tested.
        selection: every SAE's result on the select split.
        detection: held-out AUROC of the best latent, the difference of means and a dense probe.
        causal: the test of the chosen SAE on the report split; None if nothing was found.
        encoder: index of the chosen SAE; None if nothing was found.
        per_size: the same test for the best SAE of each dictionary size, the chosen one included.
    """

    behavior: str
    n_records: dict[str, dict[str, int]]
    dropped_positives: int
    dropped_negatives: int
    unfiltered_base_rate: stats.Rate
    unfiltered_clamp_base_rate: stats.Rate
    ranking: tuple[LatentScore, ...]
    n_tested: int
    n_significant: int
    n_significant_shuffled: int
    found: bool
    selection: list[SelectRow]
    detection: list[Detection]
    causal: CausalReport | None
    encoder: int | None
    per_size: list[CausalReport]


def find_behavior(
    lm: Any,
    encoders: Sequence[Any],
    contrast: ContrastSet,
    judge: Judge,
    settings: BehaviorSettings | None = None,
    *,
    facts: Sequence[ContrastRecord] | None = None,
    others: Mapping[str, OtherBehavior] | None = None,
    progress: Progress | None = None,
) -> BehaviorReport:
    """Run the whole protocol.

    Args:
        lm: the model.
        encoders: SAEs of this model, at any hook points and sizes.
        contrast: the behaviour's prompts.
        judge: see `sae.behavior.judge`.
        settings: see `BehaviorSettings`.
        facts: questions whose answers should stay true; if not given, the report split's negatives with an answer.
        others: other behaviours that should not change.
        progress: told about every step.

    Raises:
        UserError: no SAEs, or a split that lacks a class.
    """
    settings = settings or BehaviorSettings()
    if not encoders:
        raise UserError("no SAEs to search: train some, or load one with sae.load.")
    tell = progress or (lambda what, done, total: None)
    filtered = _keep(lm, capped(contrast, settings), judge, settings)
    kept = filtered.contrast.shuffled(settings.seed) if settings.shuffle_labels else filtered.contrast
    splits = {name: kept.split(name) for name in stats.SPLITS}
    tell("find", 0, 1)
    seen = collect(lm, encoders, prepare(lm, splits["find"].records, settings.batch_prompts), settings.positions)
    ranking = _rank(seen, splits["find"], settings)
    null = _rank(seen, splits["find"].shuffled(settings.seed), settings)
    tell("find", 1, 1)
    counts = {name: _count(part) for name, part in splits.items()}
    empty = BehaviorReport(
        behavior=contrast.behavior,
        n_records=counts,
        dropped_positives=filtered.dropped_positives,
        dropped_negatives=filtered.dropped_negatives,
        unfiltered_base_rate=filtered.report_rates[True],
        unfiltered_clamp_base_rate=filtered.report_rates[False],
        ranking=ranking.scores,
        n_tested=ranking.n_tested,
        n_significant=ranking.n_significant,
        n_significant_shuffled=null.n_significant,
        found=False,
        selection=[],
        detection=[],
        causal=None,
        encoder=None,
        per_size=[],
    )
    searched = _search(lm, encoders, seen, ranking, splits, judge, settings, progress)
    if not searched:
        return empty
    best = max(searched, key=lambda item: item[0].score)
    report = splits["report"].records
    if facts is None:
        facts = [record for record in report if record.answer and not record.label]
    tables = {}
    for row, choice in _best_of_each_size(searched, best):
        main = row.encoder == best[0].encoder
        tables[row.encoder] = causal_report(
            lm,
            choice,
            report,
            judge,
            settings,
            facts=facts,
            others=others,
            n_random=settings.n_random if main else settings.n_random_per_size,
            progress=progress,
        )
    return dataclasses.replace(
        empty,
        found=True,
        selection=[row for row, _ in searched],
        detection=_detection(lm, best[1], ranking, seen, splits, settings),
        causal=tables[best[0].encoder],
        encoder=best[0].encoder,
        per_size=sorted(tables.values(), key=lambda table: table.d_sae),
    )


def _count(part: ContrastSet) -> dict[str, int]:
    return {
        "positives": len(part.positives),
        "negatives": len(part.negatives),
        "positive_topics": len({record.topic for record in part.positives}),
        "negative_topics": len({record.topic for record in part.negatives}),
    }


def capped(contrast: ContrastSet, settings: BehaviorSettings) -> ContrastSet:
    """Keep at most `n_prompts` records per class and split (`n_prompts_select` in the select split), picked at random.

    A file sorted by topic or arm would otherwise be cut to its first ones.
    """
    left: dict[tuple[str, bool], int] = {}
    kept = []
    order = np.random.default_rng(settings.seed).permutation(len(contrast.records))
    for record in (contrast.records[index] for index in order):
        limit = settings.n_prompts_select if record.split == "select" else settings.n_prompts
        key = (record.split, record.label)
        left[key] = left.get(key, limit) - 1
        if left[key] >= 0:
            kept.append(record)
    return ContrastSet(contrast.behavior, tuple(kept))


def _keep(lm: Any, contrast: ContrastSet, judge: Judge, settings: BehaviorSettings) -> Filtered:
    if not settings.filter:
        return unfiltered(contrast)
    prompts = prepare(lm, contrast.records, settings.batch_prompts)
    return filter_on_behavior(contrast, completions(lm, prompts, settings.max_new_tokens), judge)


def _rank(seen: Collected, find: ContrastSet, settings: BehaviorSettings) -> LatentRanking:
    sites = [
        SiteActs(site.encoder, site.hook_name, site.d_sae, position, acts, site.density)
        for site in seen.sites
        for position, acts in site.acts.items()
    ]
    return rank_latents(
        sites,
        find.labels,
        find.topics,
        fdr=settings.fdr,
        top_n=settings.top_n,
        n_permutations=settings.n_permutations,
        n_bootstrap=settings.n_bootstrap,
        seed=settings.seed,
    )


def _search(
    lm: Any,
    encoders: Sequence[Any],
    seen: Collected,
    ranking: LatentRanking,
    splits: Mapping[str, ContrastSet],
    judge: Judge,
    settings: BehaviorSettings,
    progress: Progress | None,
) -> list[tuple[SelectRow, Choice]]:
    """Choose latents, doses and directions for every SAE that has candidates, on the select split."""
    found = []
    directions: dict[str, tuple[Direction, Any]] = {}
    for index, encoder in enumerate(encoders):
        candidates = ranking.candidates(index, settings.n_candidates)
        if candidates:
            hook = str(encoder.config.hook_name)
            if hook not in directions:
                directions[hook] = _direction(lm, hook, seen, splits, judge, settings)
            found.append(_select(lm, index, encoder, candidates, directions[hook], seen, splits, judge, settings))
        if progress is not None:
            progress("select", index + 1, len(encoders))
    return found


def _direction(
    lm: Any,
    hook: str,
    seen: Collected,
    splits: Mapping[str, ContrastSet],
    judge: Judge,
    settings: BehaviorSettings,
) -> tuple[Direction, Any]:
    """Choose the position whose difference of means works best on the select split, and the scale to add it with."""
    select = splits["select"]
    task = prepare_margins(lm, select.positives, settings.batch_prompts)
    tried = []
    for name in (str(position) for position in settings.positions if isinstance(position, int)):
        try:
            direction = difference_of_means(seen.resid[hook, name], splits["find"].labels, hook, name)
        except UserError:  # the prompts are alike up to this position
            continue
        removed = ProjectOut(direction.vector, hook, toward=direction.negative_mean, roles=settings.roles)
        with steer(lm, removed):
            tried.append((float(margins(lm, task).mean()), direction))
    if not tried:
        raise UserError(f"positives and negatives look the same at {hook!r}: read other positions or layers.")
    direction = min(tried, key=lambda item: item[0])[1]
    add = select_add(
        lm,
        direction.vector,
        hook,
        prepare(lm, select.negatives, settings.batch_prompts),
        judge,
        multiples=settings.multiples,
        max_degenerate=settings.max_degenerate,
        max_new_tokens=settings.max_new_tokens,
        roles=settings.roles,
    )
    return direction, add


def _select(
    lm: Any,
    index: int,
    encoder: Any,
    candidates: Sequence[LatentScore],
    direction: tuple[Direction, Any],
    seen: Collected,
    splits: Mapping[str, ContrastSet],
    judge: Judge,
    settings: BehaviorSettings,
) -> tuple[SelectRow, Choice]:
    select = splits["select"]
    latents = [candidate.latent for candidate in candidates]
    ablation = select_ablation(
        lm,
        encoder,
        latents,
        select.positives,
        settings.max_latents,
        beam=settings.beam,
        roles=settings.roles,
        batch_prompts=settings.batch_prompts,
    )
    joint = [latents[:size] for size in range(2, settings.max_latents + 1) if size <= len(latents)]
    ablated_sets = [ablation.latents[:size] for size in range(2, len(ablation.latents) + 1)]
    clamp = select_clamp(
        lm,
        encoder,
        [*([latent] for latent in latents), *joint, *ablated_sets],
        {candidate.latent: candidate.typical for candidate in candidates},
        select.negatives,
        judge,
        multiples=settings.multiples,
        beam=settings.beam,
        max_degenerate=settings.max_degenerate,
        max_new_tokens=settings.max_new_tokens,
        roles=settings.roles,
        batch_prompts=settings.batch_prompts,
    )
    ablate = Ablate(encoder, ablation.latents, roles=settings.roles)
    outcome = evaluate(lm, [ablate], select.positives, judge, settings.max_new_tokens, settings.batch_prompts)
    site = seen.sites[index]
    row = SelectRow(
        index,
        site.hook_name,
        site.d_sae,
        list(ablation.latents),
        list(clamp.latents),
        clamp.multiple,
        outcome.share(Verdict.ALTERNATIVE),
        clamp.behavior if clamp.degenerate <= settings.max_degenerate else 0.0,
    )
    found, add = direction
    negatives = seen.resid[site.hook_name, found.position][~np.array(splits["find"].labels)]
    choice = Choice(encoder, site, found.position, ablation, clamp, found, add, negatives)
    return row, choice


def _best_of_each_size(
    searched: Sequence[tuple[SelectRow, Choice]], best: tuple[SelectRow, Choice]
) -> list[tuple[SelectRow, Choice]]:
    """Return the best SAE of each size by its select score; the overall best comes first."""
    sizes: dict[int, tuple[SelectRow, Choice]] = {best[0].d_sae: best}
    for item in searched:
        held = sizes.get(item[0].d_sae)
        if held is None or (item[0].score > held[0].score and held is not best):
            sizes[item[0].d_sae] = item
    return list(sizes.values())


def _detection(
    lm: Any,
    choice: Choice,
    ranking: LatentRanking,
    seen: Collected,
    splits: Mapping[str, ContrastSet],
    settings: BehaviorSettings,
) -> list[Detection]:
    """Compare detectors on the report split: the chosen SAE's best latent, the direction, a dense probe."""
    report, hook = splits["report"], choice.site.hook_name
    candidate = ranking.candidates(choice.site.encoder, 1)[0]
    prompts = prepare(lm, report.records, settings.batch_prompts)
    positions = tuple(dict.fromkeys((int(choice.position), _position(candidate.position))))
    held = collect(lm, [choice.encoder], prompts, positions)
    probe = fit_probe(seen.resid[hook, choice.position], splits["find"].labels)
    resid = held.resid[hook, choice.position]
    detectors = (
        (f"latent {candidate.latent}", held.sites[0].acts[candidate.position][:, candidate.latent]),
        ("difference of means", choice.direction.project(resid)),
        ("probe", probe.scores(resid)),
    )
    return [
        Detection(
            name,
            stats.auroc_interval(scores, report.labels, report.topics, settings.n_bootstrap, settings.seed),
        )
        for name, scores in detectors
    ]


def _position(name: str) -> int | str:
    return name if name == "max" else int(name)
