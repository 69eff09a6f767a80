"""The select split: for every SAE latents to ablate and to clamp, for every hook point a direction, with doses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae.behavior.causal import Choice
from sae.behavior.contrast import ContrastSet
from sae.behavior.directions import Direction, difference_of_means
from sae.behavior.doses import natural_range
from sae.behavior.judge import Judge, Verdict
from sae.behavior.latents import LatentRanking, LatentScore
from sae.behavior.measure import Collected, Progress, evaluate, margins, prepare, prepare_margins
from sae.behavior.select import select_ablation, select_add, select_clamp
from sae.behavior.settings import BehaviorSettings
from sae.errors import UserError
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


def search_saes(
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
    natural = natural_range(encoder, clamp, seen.resid[site.hook_name, found.position])
    choice = Choice(encoder, site, found.position, ablation, clamp, found, add, negatives, natural)
    return row, choice


def best_of_each_size(
    searched: Sequence[tuple[SelectRow, Choice]], best: tuple[SelectRow, Choice]
) -> list[tuple[SelectRow, Choice]]:
    """Return the best SAE of each size by its select score; the overall best comes first."""
    sizes: dict[int, tuple[SelectRow, Choice]] = {best[0].d_sae: best}
    for item in searched:
        held = sizes.get(item[0].d_sae)
        if held is None or (item[0].score > held[0].score and held is not best):
            sizes[item[0].d_sae] = item
    return list(sizes.values())
