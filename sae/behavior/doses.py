"""Dose-response: the clamp at many values of both signs, and whether more of it means more of the behaviour.

A rate is 0 or 1 over most doses, so that ranks tie; the logit margin keeps moving. And values that no prompt ever gives
a latent say what happens far from the data: there margins turn back, whatever the latent means. So the correlation is
taken between margins and doses over the latent's natural range, and the one over all doses stands beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from sae import stats
from sae.behavior.controls import matched_clamp, matched_latents
from sae.behavior.judge import Judge, Verdict
from sae.behavior.measure import Prompts, SiteData, evaluate_each, margins_each, prepare_margins
from sae.behavior.results import Dose
from sae.behavior.select import ClampChoice
from sae.behavior.settings import BehaviorSettings

Array = np.ndarray
TAILS = (1, 99)
"""Percentiles of the natural range."""


class DoseReport(NamedTuple):
    """Fields of `sae.behavior.results.CausalReport`, which says what they mean."""

    dose_response: list[Dose]
    dose_range: tuple[float, float] | None
    dose_correlation: stats.Correlation | None
    dose_correlation_all: stats.Correlation | None
    dose_correlation_rate: stats.Correlation | None
    dose_spearman: float | None
    random_dose_response: list[list[float]]


@torch.no_grad()
def natural_range(encoder: Any, clamp: ClampChoice, resid: Float[Array, "n d_in"]) -> tuple[float, float]:
    """Return the doses between which prompts put the latents by themselves: percentiles of the pre-activation.

    Pre-activations, since activations stop at 0: a latent that is far from firing is pushed there, too. Of several
    latents the mean is taken, each in its own unit. (A gated SAE's are its gate's, of about its activations' size.)

    Args:
        encoder: the SAE.
        clamp: its latents and their unit.
        resid: activations of prompts of both classes that were not held out.
    """
    unit = np.array(clamp.values) / clamp.multiple
    read = encoder.pre_acts(torch.as_tensor(resid, dtype=torch.float32, device=encoder.device))
    doses = (read[:, list(clamp.latents)].float().cpu().numpy() / unit).mean(axis=1)
    low, high = np.percentile(doses, TAILS)
    return float(low), float(high)


def grid_of(natural: tuple[float, float], settings: BehaviorSettings) -> list[float]:
    """Return `n_doses` doses over the natural range and those of `doses` outside of it, in order."""
    low, high = natural
    inside = np.linspace(low, high, settings.n_doses).round(4).tolist() if high > low else []
    outside = [float(dose) for dose in settings.doses if not (inside and inside[0] <= dose <= inside[-1])]
    return sorted({*inside, *outside})


def dose_report(
    lm: Any,
    encoder: Any,
    site: SiteData,
    clamp: ClampChoice,
    natural: tuple[float, float],
    negatives: Prompts,
    positives: Prompts,
    judge: Judge,
    settings: BehaviorSettings,
    tick: Callable[[int, int], None] | None = None,
) -> DoseReport:
    """Clamp at every dose, on negatives and on positives, and a few matched random latents on negatives.

    Args:
        lm: the model.
        encoder: the SAE.
        site: its latents on the find split; the basis of matching.
        clamp: what is clamped.
        natural: see `natural_range`.
        negatives: prompts held out on which the behaviour is not due.
        positives: and those on which it is.
        judge: see `sae.behavior.judge`.
        settings: doses, and numbers of prompts and draws.
        tick: told (done, all) after each dose.
    """
    grid = grid_of(natural, settings)
    few = settings.n_prompts_dose
    negatives, positives = negatives.first(few), positives.first(few)
    clamps = [[clamp.clamp(encoder, dose, settings.roles)] for dose in grid]
    on_negatives = evaluate_each(lm, clamps, negatives, judge, settings.max_new_tokens)
    on_positives = evaluate_each(lm, clamps, positives, judge, settings.max_new_tokens)
    margin, held_margin = (
        [
            float(values.mean())
            for values in margins_each(lm, clamps, prepare_margins(lm, prompts.records, settings.batch_prompts))
        ]
        for prompts in (negatives, positives)
    )
    found = []
    for index, (dose, on_negative, on_positive) in enumerate(zip(grid, on_negatives, on_positives, strict=True)):
        value = float(np.mean(clamp.values)) * dose / clamp.multiple
        rates = (on_negative.behavior, on_negative.degenerate, on_positive.behavior)
        found.append(Dose(dose, value, *rates, margin[index], held_margin[index]))
        if tick is not None:
            tick(index + 1, len(grid))
    low, high = np.round(natural, 4)
    inside = [one for one in found if low <= one.dose <= high]
    trend = _trend(inside, [one.margin for one in inside])
    return DoseReport(
        found,
        natural,
        trend,
        _trend(found, margin),
        _trend(found, [one.rate.rate for one in found]),
        trend.rho,
        _random(lm, encoder, site, clamp, grid, negatives, judge, settings),
    )


def _trend(doses: Sequence[Dose], values: Sequence[float]) -> stats.Correlation:
    return stats.spearman([one.dose for one in doses], values)


def _random(
    lm: Any,
    encoder: Any,
    site: SiteData,
    clamp: ClampChoice,
    grid: Sequence[float],
    negatives: Prompts,
    judge: Judge,
    settings: BehaviorSettings,
) -> list[list[float]]:
    """Return the behaviour's rate per dose for a few matched random latents."""
    norms = encoder.W_dec.detach().float().norm(dim=1).cpu().numpy()
    drawn = matched_latents(
        site.density, site.effect, clamp.latents, settings.n_random_dose, settings.n_neighbours, settings.seed + 4
    )
    scales = [dose / clamp.multiple for dose in grid]
    clamps = [
        [matched_clamp(encoder, norms, clamp, latents, scale, settings.roles)] for latents in drawn for scale in scales
    ]
    found = evaluate_each(lm, clamps, negatives, judge, settings.max_new_tokens)
    return [[next(found).share(Verdict.BEHAVIOR) for _ in scales] for _ in drawn]
