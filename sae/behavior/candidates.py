"""One table of what the candidates behind a behaviour read, write and do.

- *input score*: AUROC at the prompt's end, on the find split: does the latent tell where the behaviour is due?
- *output score*: how far writing it there raises the log-probability that the reply begins with the behaviour.
- *attribution*: what the gradient says its ablation does to the margin (`sae.behavior.attribution`).
- *ablation effect*: what it does, measured.

The first two rarely go together (Arad et al. 2505.20063): a latent that fires on harmful words need not refuse, and
one that makes the model refuse need not fire on them alone. All but the first are of the select split.

How far the attributions can be trusted is told by latents that had no part in choosing: a sample of those that fire,
spread over their densities. Among the latents of the table, which ranking and attributions put there, the same rank
correlation is over a range that they cut themselves.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae import stats
from sae.behavior.attribution import Agreement, ablation_effects, agreement, attribute
from sae.behavior.contrast import ContrastSet
from sae.behavior.latents import LatentScore
from sae.behavior.measure import (
    MarginTask,
    SiteData,
    collect,
    logsumexp_of,
    prepare,
    prepare_margins,
    readouts_each,
)
from sae.behavior.select import EDIT_ROLES
from sae.behavior.settings import BehaviorSettings
from sae.lm.hooks import Step
from sae.lm.tokens import Role
from sae.steering.interventions import Clamp

Array = np.ndarray


@dataclass(frozen=True)
class CandidateScore:
    """One latent of the chosen SAE. Intervals resample topics; effects of ablation are in nats of margin.

    Attributes:
        latent: its index.
        ranked: whether it passed the ranking; the others are there because attribution put them first.
        input_score: AUROC on the find split.
        output_score: rise of the log-probability of the behaviour's tokens on negatives, in nats; see `output_scores`.
        output_probability: rise of their probability.
        typical: mean activation where it is active on the find split's positives; what was written.
        gradient, integrated: attributed change of the positives' margin by its ablation.
        ablation_effect: the measured change.
    """

    latent: int
    ranked: bool
    input_score: float
    output_score: stats.Interval
    output_probability: stats.Interval
    typical: float
    gradient: float
    integrated: float
    ablation_effect: stats.Interval


class Candidates(NamedTuple):
    """The table, ranked latents first, and how far attributions agree with what was measured."""

    scores: list[CandidateScore]
    agreement_sampled: Agreement  #: over `sampled`
    agreement_listed: Agreement  #: over the latents of the table: a range cut by what put them there
    sampled: list[int]  #: latents drawn by density, whatever ranking and attributions say
    position: str  #: where the input score was read
    output_dose: float  #: what was written for the output score, in typical activations
    n_steps: int  #: of the integrated gradient's path


class OutputScores(NamedTuple):
    """Rises by prompt when a latent is written at the prompt's last token."""

    log_probability: Float[Array, "m n"]  #: nats
    probability: Float[Array, "m n"]


def output_scores(
    lm: Any,
    encoder: Any,
    values: Mapping[int, float],
    task: MarginTask,
    roles: Collection[Role] | None = EDIT_ROLES,
) -> OutputScores:
    """Return how far writing a latent at the prompt's end makes the model begin with the behaviour.

    The latent is clamped to its value at one token: the last before behaviour and alternative part, whose prediction
    is the reply's first telling token. Nothing else of the SAE changes, its error is kept. The score of a prompt is

        log P(behaviour's tokens | clamped) - log P(behaviour's tokens | as it is),

    with P the next-token probability, summed over the tokens that begin the behaviour; 0 for a latent that writes
    nothing to them. Arad et al. score by the rank and probability of the latent's own top logit-lens tokens; here the
    behaviour says which tokens count, so that latents can be compared. The rise of P itself stands beside it: it says
    whether the reply would change, but not which of two latents that change nothing alone comes nearer.

    Args:
        lm: the model.
        encoder: the SAE.
        values: what each latent is clamped to.
        task: prompts where the behaviour is not due.
        roles: kinds of token that may be edited.
    """

    def last(step: Step) -> Tensor:
        # Margins' prompts are padded on the left: the last column predicts the reply in every row.
        return torch.arange(step.mask.shape[1], device=step.mask.device) == step.mask.shape[1] - 1

    groups = [
        [],
        *([Clamp(encoder, latent=key, value=value, positions=last, roles=roles)] for key, value in values.items()),
    ]
    clean, *found = readouts_each(lm, groups, task, _log_probability)
    logs = np.stack(found) if found else np.zeros((0, len(clean)))
    return OutputScores(logs - clean, np.exp(logs) - np.exp(clean))


def _log_probability(
    logits: Float[Tensor, "n d_vocab"], behavior_ids: Sequence[Tensor], alternative_ids: Sequence[Tensor]
) -> Float[Tensor, " n"]:
    return logsumexp_of(logits, behavior_ids) - logits.logsumexp(dim=1)


def score_candidates(
    lm: Any,
    encoder: Any,
    site: SiteData,
    ranked: Sequence[LatentScore],
    splits: Mapping[str, ContrastSet],
    settings: BehaviorSettings,
) -> Candidates:
    """Fill the table for an SAE: its ranked candidates, and as many latents that attribution puts first.

    Args:
        lm: the model.
        encoder: the SAE.
        site: its latents on the find split.
        ranked: its candidates, best first.
        splits: the contrast set's; `find` for the input score, `select` for all else.
        settings: `n_candidates`, `n_agreement`, `n_steps`, `output_dose`, and the search's own.
    """
    select, find = splits["select"], splits["find"]
    positives = prepare_margins(lm, select.positives, settings.batch_prompts)
    negatives = prepare_margins(lm, select.negatives, settings.batch_prompts)
    gradient = attribute(lm, encoder, positives, 0, settings.roles)
    integrated = attribute(lm, encoder, positives, settings.n_steps, settings.roles)
    latents = _listed(ranked, (integrated.mean, gradient.mean), settings.n_candidates)
    # Those that are silent on these prompts do nothing and are credited with nothing: agreement there is no merit.
    live = collect(lm, [encoder], prepare(lm, select.positives, settings.batch_prompts)).sites[0].density
    sampled = spread_sample(live, settings.n_agreement, settings.seed)
    tried = list(dict.fromkeys([*latents, *sampled]))
    effects = ablation_effects(lm, encoder, [[latent] for latent in tried], positives, settings.roles)
    measured, position = effects[: len(latents)], _position(settings)
    acts, flags = site.acts[position][:, latents], np.asarray(find.labels, dtype=bool)
    typical = typical_values(acts[flags], site.mean_active[latents])
    area = stats.auroc(acts, flags)
    doses = {latent: settings.output_dose * float(value) for latent, value in zip(latents, typical, strict=True)}
    output = output_scores(lm, encoder, doses, negatives, settings.roles)

    def interval(values: Array, records: Sequence[Any]) -> stats.Interval:
        topics = [record.topic for record in records]
        return stats.bootstrap_mean(values, topics, settings.n_bootstrap, settings.seed)

    scores = [
        CandidateScore(
            latent=latent,
            ranked=row < len(ranked),
            input_score=float(area[row]),
            output_score=interval(output.log_probability[row], select.negatives),
            output_probability=interval(output.probability[row], select.negatives),
            typical=float(typical[row]),
            gradient=float(gradient.mean[latent]),
            integrated=float(integrated.mean[latent]),
            ablation_effect=interval(measured[row], select.positives),
        )
        for row, latent in enumerate(latents)
    ]
    return Candidates(
        scores,
        agreement(gradient, integrated, sampled, effects[[tried.index(latent) for latent in sampled]]),
        agreement(gradient, integrated, latents, measured),
        sampled,
        position,
        settings.output_dose,
        settings.n_steps,
    )


def _listed(ranked: Sequence[LatentScore], attributed: Sequence[Array], n: int) -> list[int]:
    """The ranked latents, and of each attribution the first `n` that speak for the behaviour."""
    latents = [score.latent for score in ranked]
    for mean in attributed:
        strongest = np.argsort(mean, kind="stable")[:n]
        latents += [int(latent) for latent in strongest if mean[latent] < 0]
    return list(dict.fromkeys(latents))


def spread_sample(density: Float[Array, " d_sae"], n: int, seed: int = 0) -> list[int]:
    """Draw up to `n` latents that fire, one from each of `n` equal parts of them in the order of density."""
    live = np.flatnonzero(density > 0)
    if not n or not len(live):
        return []
    rng = np.random.default_rng(seed)
    ordered = live[np.argsort(density[live], kind="stable")]
    return sorted(int(rng.choice(part)) for part in np.array_split(ordered, min(n, len(ordered))))


def _position(settings: BehaviorSettings) -> str:
    """Return the last token position that is read: where the output score writes, the input score reads."""
    return str(max(position for position in settings.positions if isinstance(position, int)))


def typical_values(acts: Float[Array, "n m"], elsewhere: Float[Array, " m"]) -> Float[Array, " m"]:
    """Return each latent's mean over the rows where it is active; of one that never is, its mean elsewhere."""
    active = acts > 0
    counts = active.sum(axis=0)
    means: Array = np.where(counts > 0, (acts * active).sum(axis=0) / np.maximum(counts, 1), elsewhere)
    return means
