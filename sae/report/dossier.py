"""A behaviour's dossier on the page: what was found, how surely, what it does and costs, and what else explains it."""

from typing import Any

from markupsafe import Markup

from sae.report import dossier_plots, findings, plots
from sae.report.background_view import confounds_view, judges_view, origin_tables, records_table
from sae.report.causal_view import causal_figures, necessity_rows, random_table, sufficiency_rows
from sae.report.evidence import Behavior, Evidence, Interval, LatentPair, Ranked
from sae.report.headline import headline
from sae.report.rivals_view import cost_tables, pareto_figures, rivals_table
from sae.report.svg import DASH, number, percent
from sae.report.tables import (
    Cell,
    Column,
    Line,
    interval_cell,
    number_cell,
    rate_cell,
    score_cell,
    share_cell,
    table,
    text_cell,
)

MAX_EXAMPLES = 40  # of one behaviour
MAX_RANKED = 25
MAX_DRAWN = 14  # of the ranked latents
MAX_PAIRS = 10

RATE_LABELS = {
    "base": "before",
    "ablate": "ablated",
    "ablate_restored": "restored",
    "ablate_degenerate": "degenerate",
    "clamp_base": "before clamp",
    "clamp": "clamped",
    "clamp_degenerate": "degenerate (clamp)",
    "after": "after",
    "direction": "difference of means",
}


def behavior_view(behavior: Behavior, *, redact: bool) -> dict[str, Any]:
    """Return everything the page shows about one behaviour."""
    verdicts = [findings.necessity(behavior), findings.sufficiency(behavior)]
    rates = [key for key in RATE_LABELS if any(key in row.rates for row in behavior.per_size)]
    effects = _other_effects(behavior)
    evidence = behavior.evidence
    view = {
        "b": behavior,
        "title": behavior.name.replace("_", " ").capitalize(),
        "anchor": "behavior-" + "".join(c if c.isalnum() and c.isascii() else "-" for c in behavior.name),
        "headline": headline(behavior),
        "verdicts": [(v, Markup(plots.dumbbell(v.before, v.after, v.controls))) for v in verdicts],
        "records": records_table(evidence),
        "kept": _kept(evidence),
        "sure": _sure(evidence),
        **_ranking(behavior),
        "causal": [
            ("Necessity: ablate", necessity_rows(behavior)),
            ("Sufficiency: clamp", sufficiency_rows(behavior)),
        ],
        "bars": causal_figures(behavior),
        "random": random_table(behavior),
        "dose_plot": Markup(
            plots.dose_response(
                behavior.dose_response, behavior.random_dose_response, behavior.name, evidence.dose_range
            )
        )
        if behavior.dose_response
        else None,
        "dose": _dose(evidence),
        "size_rates": rates,
        "costs": cost_tables(evidence),
        "effects": effects,
        "kl_harmless": {} if evidence.rivals else behavior.kl_harmless,
        "effect_columns": _effect_columns(behavior, effects),
        "rivals": rivals_table(evidence),
        "pareto": pareto_figures(evidence.rivals),
        **_redundancy(evidence),
        "confounds": confounds_view(evidence.confounds),
        "origin": origin_tables(evidence.origin),
        "left_out": evidence.origin.left_out if evidence.origin else [],
        "judges": judges_view(evidence.judges, redact=redact),
        **_candidates(behavior),
        "verdict_names": {"behavior": behavior.name, "alternative": "normal reply", "degenerate": "broken reply"},
        "examples": [] if redact else behavior.examples[:MAX_EXAMPLES],
        "n_examples": len(behavior.examples),
    }
    return view | {"missing": _missing(view)}


def _missing(view: dict[str, Any]) -> list[str]:
    """Name what was not measured, so that its absence is not taken for a result."""
    parts = {
        "the ranking": "ranking",
        "the doses": "dose_plot",
        "random draws on the same prompts": "random",
        "other dictionary sizes": "size_rates",
        "costs by method": "costs",
        "rival methods": "rivals",
        "the chosen set at every size": "sizes",
        "latents in pairs": "pairs",
        "confounds of the contrast set": "confounds",
        "agreement of judges": "judges",
        "attribution": "candidates",
    }
    return [name for name, key in parts.items() if not view[key]]


def _other_effects(behavior: Behavior) -> dict[str, Any]:
    """Side effects on facts and other behaviours; the costs by method have the facts where there are any."""
    known = any(one.remove_cost.facts for one in behavior.evidence.rivals)
    return {name: group for name, group in behavior.side_effects.items() if not (known and name == "fact accuracy")}


def _effect_columns(behavior: Behavior, effects: dict[str, Any]) -> list[str]:
    """Return when side effects were measured, in the order of the other tables."""
    kl = {} if behavior.evidence.rivals else behavior.kl_harmless
    found = [*kl, *(key for group in effects.values() for key in group)]
    known = [key for key in RATE_LABELS if key in found]
    return known + [key for key in dict.fromkeys(found) if key not in RATE_LABELS]


def _kept(evidence: Evidence) -> str:
    """How many prompts were left out because the model did something else, in words."""
    parts = [f"{count:,} {name}" for name, count in evidence.dropped.items()]
    if not parts:
        return ""
    said = f"Dropped, since the model did not do there what the label says: {' and '.join(parts)}."
    if evidence.unfiltered and evidence.unfiltered_negatives:
        shares = (percent(evidence.unfiltered.rate), percent(evidence.unfiltered_negatives.rate))
        said += (
            f" On the report split it showed the behaviour on {shares[0]} of the former and {shares[1]} of the latter."
        )
    return said


def _sure(evidence: Evidence) -> list[str]:
    """How far the ranking can be trusted, in sentences."""
    said = []
    if evidence.n_tested is not None:
        passed = f"{evidence.n_significant or 0:,} of {evidence.n_tested:,} latents pass"
        shuffled = evidence.n_significant_shuffled
        said.append(f"{passed}{'' if shuffled is None else f'; with the labels shuffled once, {shuffled:,} do'}.")
    for rate, what in (
        (evidence.null_share, "at q ≤ 0.05"),
        (evidence.null_share_protocol, "at the protocol's thresholds"),
    ):
        if rate is not None:
            within = f" (95%: {percent(rate.low)} to {percent(rate.high)})" if rate.low is not None else ""
            share = f"{percent(rate.rate)} of {rate.n} runs{within}"
            said.append(f"Rankings of shuffled labels that report any latent {what}: {share}.")
    if evidence.decoy_share is not None:
        said.append(
            f"Of the latents tested, {percent(evidence.decoy_share)} lean to another planted behaviour's direction."
        )
    return said


def _dose(evidence: Evidence) -> str:
    found, over_all = evidence.dose_correlation, evidence.dose_correlation_all
    if found is None or found.rho is None:
        return ""
    said = f" Spearman between dose and logit margin {number(found.rho)}"
    said += "" if found.p is None else f" (p = {number(found.p)})"
    if over_all is None or over_all.rho is None:
        return f"{said}."
    return (
        f"{said} over the values that prompts give the latents by themselves (shaded), {number(over_all.rho)} over all "
        "doses: what lies far beyond may turn back."
    )


def _ranking(behavior: Behavior) -> dict[str, Any]:
    """The ranked latents: figure and table."""
    used = set(behavior.latents + behavior.clamp_latents)

    def is_used(row: Ranked) -> bool:
        return row.hook_name == behavior.hook_name and row.d_sae in (behavior.d_sae, None) and row.latent in used

    # The latents that were tested are to be seen, however far down they rank.
    shown = behavior.ranking[:MAX_RANKED] + [row for row in behavior.ranking[MAX_RANKED:] if is_used(row)]
    chosen = [is_used(row) for row in shown]
    starred = [place for place, star in enumerate(chosen) if star][:MAX_DRAWN]
    others = [place for place, star in enumerate(chosen) if not star][: MAX_DRAWN - len(starred)]
    drawn = sorted(starred + others)
    columns = [
        Column("Latent", is_number=False),
        Column("Hook", is_number=False),
        Column("d_sae"),
        Column("Position", is_number=False),
        Column("AUROC", "below 0.5: fires less where the behaviour is due"),
        Column("q", "false discovery rate over the whole family"),
        Column("Family p", "family-wise, by permutations of whole topics"),
        Column("Stability", "share of resampled topics on which it would be listed"),
        Column("Halves", "share of halves of the topics in which it is significant"),
        Column("Density"),
        Column("Effect", "difference of the classes' mean activations"),
    ]
    one_hook, one_position = len({row.hook_name for row in shown}) == 1, len({row.position for row in shown}) == 1
    lines = [
        Line(_ranked_cells(row, one_hook=one_hook, one_position=one_position, star=star), "best" if star else "")
        for row, star in zip(shown, chosen, strict=True)
    ]
    return {
        "ranking": table("Ranked latents", columns, lines, tall=True),
        "ranking_plot": Markup(plots.ranked_latents([shown[i] for i in drawn], [chosen[i] for i in drawn]))
        if shown
        else None,
        "one_hook": shown[0].hook_name if one_hook else "",
        "one_position": shown[0].position if one_position else "",
        "n_hidden": len(behavior.ranking) - len(shown),
    }


def _ranked_cells(row: Ranked, *, one_hook: bool, one_position: bool, star: bool) -> list[Cell]:
    return [
        text_cell(f"{row.latent}{' ★' if star else ''}"),
        text_cell("" if one_hook else plots.short_hook(row.hook_name)),
        text_cell("" if row.d_sae is None else str(row.d_sae)),
        text_cell("" if one_position else row.position),
        score_cell(row.auroc),
        number_cell(row.q),
        number_cell(row.p_family),
        share_cell(row.stability),
        share_cell(row.stability_halves),
        number_cell(row.density),
        number_cell(row.effect),
    ]


def _redundancy(evidence: Evidence) -> dict[str, Any]:
    """The chosen set grown latent by latent, and latents in pairs."""
    lines = [
        Line(
            [
                text_cell(", ".join(map(str, point.latents)) or "none"),
                rate_cell(point.behavior),
                rate_cell(point.restored),
                rate_cell(point.degenerate),
                interval_cell(point.margin),
            ]
        )
        for point in evidence.sizes
    ]
    columns = [
        Column("Ablated", is_number=False, wraps=True),
        Column("Behaviour", "replies that show it"),
        Column("Normal", "replies that do not"),
        Column("Broken", "degenerate replies"),
        Column("Margin", "log-odds of the behaviour's first tokens against the alternative's, nats"),
    ]
    order = sorted(evidence.pairs, key=lambda pair: -abs(pair.interaction.estimate) if pair.interaction else 0.0)
    pair_columns = [
        Column("Latents", is_number=False),
        Column("First alone", "change of the margin, nats"),
        Column("Second alone", "change of the margin, nats"),
        Column("Together", "change of the margin, nats"),
        Column("Interaction", "together less the sum of both alone"),
        Column("", is_number=False),
    ]
    return {
        "sizes": table("The chosen latents one after another", columns, lines),
        "sizes_plot": Markup(dossier_plots.size_curve(evidence.sizes)) if len(evidence.sizes) > 1 else None,
        "pairs": table("Pairs of latents", pair_columns, [_pair_line(pair) for pair in order], limit=MAX_PAIRS),
        "hydras": [
            f"Latent {one.latent} does next to nothing alone ({_nats(one.alone)}), and {_nats(one.without_partner)} "
            f"once latent {one.partner} is gone."
            for one in evidence.hydras
        ],
    }


def _nats(found: Interval | None) -> str:
    return DASH if found is None else f"{number(found.estimate)} nats"


def _pair_line(pair: LatentPair) -> Line:
    found = pair.interaction
    kind = ""
    if found and found.high is not None and found.high < 0:
        kind = "redundant"
    elif found and found.low is not None and found.low > 0:
        kind = "each needs the other"
    effects = (pair.alone_first, pair.alone_second, pair.together, found)
    return Line([text_cell(f"{pair.first}, {pair.second}"), *(interval_cell(one) for one in effects), text_cell(kind)])


def _candidates(behavior: Behavior) -> dict[str, Any]:
    """What each candidate reads, writes, is credited with and does."""
    used, evidence = set(behavior.latents), behavior.evidence
    lines = [
        Line(
            [
                text_cell(f"{row.latent}{' ★' if row.latent in used else ''}", "" if row.ranked else "by attribution"),
                score_cell(row.input_score),
                interval_cell(row.output_score),
                score_cell(row.gradient),
                score_cell(row.integrated),
                interval_cell(row.ablation_effect),
            ],
            "best" if row.latent in used else "",
        )
        for row in evidence.candidates
    ]
    columns = [
        Column("Latent", is_number=False),
        Column("Reads", "input score: AUROC on the find split"),
        Column("Writes", "output score: rise of the log-probability of the behaviour's first tokens, nats"),
        Column("Gradient", "attributed change of the margin by its ablation, nats"),
        Column("Integrated", "the same along the path to all latents ablated"),
        Column("Measured", "change of the margin by its ablation, nats"),
    ]
    said = [
        f"{name} {number(one.rho)}{'' if one.p is None else f' (p = {number(one.p)})'}"
        for name, one in evidence.agreement.items()
        if one.rho is not None
    ]
    return {
        "candidates": table("Candidates", columns, lines, tall=True),
        "candidates_plot": Markup(dossier_plots.attributed(evidence.candidates)) if lines else None,
        "agreement": ", ".join(said),
        "n_agreement": max((one.n or 0 for one in evidence.agreement.values()), default=0),
    }
