"""Choose which latents to ablate or clamp, on the select split only.

The score of the search is the logit margin (`sae.behavior.measure.margins`), which moves before the behaviour does;
a clamp is then chosen by generating, among settings that keep the text well formed.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sae.behavior.contrast import ContrastRecord
from sae.behavior.directions import Direction, difference_of_means
from sae.behavior.judge import Judge, Verdict
from sae.behavior.measure import Prompts, evaluate_each, margins, margins_each, prepare, prepare_margins
from sae.errors import UserError
from sae.lm.tokens import Role
from sae.steering.directions import everywhere
from sae.steering.interventions import Ablate, Add, Clamp, Intervention

EDIT_ROLES = tuple(role for role in Role if role not in (Role.PAD, Role.SPECIAL))
"""Default scope of edits: every token but padding and BOS/EOS, which SAEs are not trained on."""

MULTIPLES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class AblationChoice:
    """A small set of latents whose joint ablation removes the behaviour's margin.

    Attributes:
        latents: the set, in the order chosen.
        margins: mean margin over positives: unsteered, then after each latent of the set.
        flipped: share of positives whose margin is below 0 under the ablation.
    """

    latents: tuple[int, ...]
    margins: tuple[float, ...]
    flipped: float


@dataclass(frozen=True)
class ClampChoice:
    """Latents and values whose clamping brings the behaviour about on negatives.

    Attributes:
        latents, values: what to clamp, and at what.
        multiple: values in units of the latents' typical active values.
        margin: mean margin over negatives under the clamp.
        behavior, degenerate: shares of the select split's negatives.
    """

    latents: tuple[int, ...]
    values: tuple[float, ...]
    multiple: float
    margin: float
    behavior: float
    degenerate: float

    def clamp(self, encoder: Any, dose: float | None = None, roles: Collection[Role] | None = EDIT_ROLES) -> Clamp:
        """Return the clamp; `dose` replaces the chosen multiple of the typical values."""
        scale = 1.0 if dose is None else dose / self.multiple
        return Clamp(encoder, latents=self.latents, value=[value * scale for value in self.values], roles=roles)


@dataclass(frozen=True)
class AddChoice:
    """How strongly to add a direction: `scale` times the vector given; shares as in `ClampChoice`."""

    scale: float
    behavior: float
    degenerate: float


def select_ablation(
    lm: Any,
    encoder: Any,
    candidates: Sequence[int],
    records: Sequence[ContrastRecord],
    max_latents: int = 5,
    *,
    beam: int = 6,
    target: float = 0.95,
    roles: Collection[Role] | None = EDIT_ROLES,
    batch_prompts: int = 256,
) -> AblationChoice:
    """Choose a minimal set greedily: add the latent that lowers the positives' mean margin most, then drop passengers.

    Args:
        lm: the model.
        encoder: the SAE.
        candidates: latents to try, best first.
        records: positives of the select split (others are ignored).
        max_latents: largest set.
        beam: after the first round only the best `beam` candidates are tried further.
        target: stop when this share of positives has a margin below 0.
        roles: kinds of token to edit.
        batch_prompts: prompts run at once.

    Raises:
        UserError: no candidates or no positives.
    """
    positives = [record for record in records if record.label]
    if not candidates or not positives:
        raise UserError(f"{len(candidates)} candidate latents and {len(positives)} positives: both are needed.")
    task = prepare_margins(lm, positives, batch_prompts)

    def ablated_each(sets: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return margins_each(lm, [[Ablate(encoder, tuple(latents), roles=roles)] for latents in sets], task)

    def ablated(latents: Sequence[int]) -> np.ndarray:
        return ablated_each([latents])[0]

    base = margins(lm, task)
    chosen: list[int] = []
    path = [base]
    pool = list(candidates)
    while pool and len(chosen) < max_latents and (path[-1] < 0).mean() < target:
        tried = dict(zip(pool, ablated_each([[*chosen, latent] for latent in pool]), strict=True))
        ordered = sorted(pool, key=lambda latent: float(tried[latent].mean()))
        if chosen and tried[ordered[0]].mean() >= path[-1].mean():
            break
        chosen.append(ordered[0])
        path.append(tried[ordered[0]])
        pool = ordered[1 : beam + 1]
    if not chosen:
        # The margin is already negative without any ablation: the best single latent is still the answer.
        chosen = [candidates[0]]
        path.append(ablated(chosen))
    kept = _smallest_prefix(path, target)
    latents = _without_passengers(chosen[:kept], base, path[kept], ablated, target)
    final = path[kept] if len(latents) == kept else ablated(latents)
    means = [float(step.mean()) for step in path[:kept]] + [float(final.mean())]
    return AblationChoice(tuple(latents), tuple(means), float((final < 0).mean()))


def _smallest_prefix(path: Sequence[np.ndarray], target: float) -> int:
    """Return how many latents to keep: the first that reach the target, else those within 5% of the largest drop."""
    for size, values in enumerate(path[1:], start=1):
        if (values < 0).mean() >= target:
            return size
    drops = [float(path[0].mean() - values.mean()) for values in path]
    return next(size for size in range(1, len(path)) if drops[size] >= 0.95 * max(drops[1:]) or size == len(path) - 1)


def _without_passengers(
    chosen: list[int], base: np.ndarray, reached: np.ndarray, ablated: Any, target: float
) -> list[int]:
    """Drop latents that a later choice made unnecessary."""
    latents = list(chosen)
    goal = min(target, float((reached < 0).mean()))
    for latent in list(chosen):
        rest = [other for other in latents if other != latent]
        if rest:
            values = ablated(rest)
            kept_drop = base.mean() - values.mean() >= 0.95 * (base.mean() - reached.mean())
            if (values < 0).mean() >= goal and kept_drop:
                latents = rest
    return latents


def select_clamp(
    lm: Any,
    encoder: Any,
    sets: Sequence[Sequence[int]],
    typical: Mapping[int, float],
    records: Sequence[ContrastRecord],
    judge: Judge,
    *,
    multiples: Sequence[float] = MULTIPLES,
    beam: int = 6,
    n_generate: int = 6,
    max_degenerate: float = 0.1,
    max_new_tokens: int = 24,
    roles: Collection[Role] | None = EDIT_ROLES,
    batch_prompts: int = 256,
) -> ClampChoice:
    """Choose latents and dose: margins over a grid, then generation for the best few settings.

    Args:
        lm: the model.
        encoder: the SAE.
        sets: latents to try, single or jointly.
        typical: each latent's mean activation where it is active on positives.
        records: negatives of the select split (others are ignored).
        judge: see `sae.behavior.judge`; a plausible reply that shows the behaviour counts, broken text never does.
        multiples: doses to try, in typical activations.
        beam: sets tried at every dose, the best at a middling one.
        n_generate: settings to generate with.
        max_degenerate: settings that break more of the replies than this are taken only if all do.
        max_new_tokens: length of the replies.
        roles: kinds of token to edit.
        batch_prompts: prompts run at once.
    """
    negatives = [record for record in records if not record.label]
    if not sets or not negatives:
        raise UserError(f"{len(sets)} sets of latents and {len(negatives)} negatives: both are needed.")
    task, prompts = prepare_margins(lm, negatives, batch_prompts), prepare(lm, negatives, batch_prompts)

    def measured(asked: Sequence[tuple[tuple[int, ...], float]]) -> list[ClampChoice]:
        """Measure the margins of latents at multiples of their typical values."""
        values = [tuple(multiple * typical[latent] for latent in latents) for latents, multiple in asked]
        clamps = [
            Clamp(encoder, latents=latents, value=value, roles=roles)
            for (latents, _), value in zip(asked, values, strict=True)
        ]
        found = margins_each(lm, [[clamp] for clamp in clamps], task)
        return [
            ClampChoice(latents, value, float(multiple), float(margin.mean()), 0.0, 0.0)
            for (latents, multiple), value, margin in zip(asked, values, found, strict=True)
        ]

    # All sets at a middling dose first; the whole grid only for the best of them.
    middle = sorted(multiples)[len(multiples) // 2]
    coarse = measured([(latents, middle) for latents in dict.fromkeys(tuple(item) for item in sets)])
    coarse = sorted(coarse, key=lambda entry: -entry.margin)[:beam]
    grid = coarse + measured([(entry.latents, m) for entry in coarse for m in multiples if m != middle])
    promising = _promising(grid, n_generate)
    edits = [[entry.clamp(encoder, roles=roles)] for entry in promising]
    tried = [
        dataclasses.replace(entry, behavior=found.share(Verdict.BEHAVIOR), degenerate=found.share(Verdict.DEGENERATE))
        for entry, found in zip(promising, evaluate_each(lm, edits, prompts, judge, max_new_tokens), strict=True)
    ]
    return min(
        tried,
        key=lambda entry: _clamp_order(entry.behavior, entry.degenerate, max_degenerate, entry.multiple),
    )


def _clamp_order(behavior: float, degenerate: float, max_degenerate: float, dose: float) -> tuple[bool, int, float]:
    """Sort key: well-formed settings first, then the most behaviour (to within 2%), then the smallest dose."""
    return degenerate > max_degenerate, -round(behavior / 0.02), dose


def _promising(grid: Sequence[ClampChoice], n: int) -> list[ClampChoice]:
    """Return the settings with the largest margins, plus the best sets' gentler doses: too much breaks the text."""
    ordered = sorted(grid, key=lambda entry: -entry.margin)
    best_sets = list(dict.fromkeys(entry.latents for entry in ordered))[:2]
    gentle = [entry for entry in ordered if entry.latents in best_sets and entry.margin > 0]
    picked = ordered[: max(1, n // 2)] + sorted(gentle, key=lambda entry: entry.multiple)[: n - n // 2]
    return list(dict.fromkeys(picked))


def select_add(
    lm: Any,
    vector: np.ndarray,
    hook_name: str,
    prompts: Prompts,
    judge: Judge,
    *,
    multiples: Sequence[float] = MULTIPLES,
    max_degenerate: float = 0.1,
    max_new_tokens: int = 24,
    roles: Collection[Role] | None = EDIT_ROLES,
) -> AddChoice:
    """Choose how strongly to add a direction, by the same rule as a clamp's dose, so that the comparison is fair."""
    edits = [[Add(direction=vector, scale=scale, hook_name=hook_name, roles=roles)] for scale in multiples]
    tried = [
        AddChoice(float(scale), found.share(Verdict.BEHAVIOR), found.share(Verdict.DEGENERATE))
        for scale, found in zip(multiples, evaluate_each(lm, edits, prompts, judge, max_new_tokens), strict=True)
    ]
    return min(tried, key=lambda entry: _clamp_order(entry.behavior, entry.degenerate, max_degenerate, entry.scale))


def select_everywhere(
    lm: Any,
    resid: Mapping[tuple[str, str], Float[np.ndarray, "n d_in"]],
    labels: Sequence[bool],
    records: Sequence[ContrastRecord],
    *,
    roles: Collection[Role] | None = EDIT_ROLES,
    batch_prompts: int = 256,
) -> tuple[Direction, tuple[Intervention, ...]] | None:
    """Choose the difference of means that does most when it is deleted wherever the residual stream is written.

    As in Arditi et al. (2406.11717) it is taken at every hook point and position that was read, and kept is the one
    whose deletion removes most of the behaviour, here by the margin: the direction that serves best at a single hook
    point may do next to nothing everywhere, and would be a weak rival.

    Args:
        lm: the model.
        resid: activations of the find split by hook point and position.
        labels: of their prompts.
        records: positives of the select split.
        roles: tokens that are edited.
        batch_prompts: prompts run at once.

    Returns:
        The direction and the edits; None where no direction of the residual stream tells the classes apart, or a model
        is built so that the known writes are not all.
    """
    found: list[tuple[Direction, tuple[Intervention, ...]]] = []
    for (hook, position), acts in resid.items():
        try:
            direction = difference_of_means(acts, labels, hook, position)
            if len(direction.vector) == lm.d_model:
                found.append((direction, everywhere(lm, direction.vector, roles=roles)))
        except UserError:
            continue
    if not found:
        return None
    task = prepare_margins(lm, records, batch_prompts)
    left = [float(values.mean()) for values in margins_each(lm, [edits for _, edits in found], task)]
    return found[int(np.argmin(left))]
