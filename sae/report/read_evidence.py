"""Read what stands beside a behaviour's causal test: rivals and costs, candidates, redundancy, confounds, judges."""

from collections.abc import Mapping
from typing import Any

from sae.report.evidence import (
    Audit,
    CandidateRow,
    Confound,
    Confounds,
    Cost,
    Damage,
    DataFile,
    Evidence,
    Hydra,
    JudgePair,
    Judges,
    LatentPair,
    Origin,
    Parting,
    Rival,
    SizePoint,
    Source,
)
from sae.report.values import (
    as_correlation,
    as_dict,
    as_float,
    as_int,
    as_interval,
    as_ints,
    as_list,
    as_rate,
    as_rates,
    as_text,
)


def read_evidence(entry: Mapping[str, Any]) -> Evidence:
    """Read it from a behaviour's record; what is missing or malformed is left out."""
    candidates, interactions = as_dict(entry.get("candidates")), as_dict(entry.get("interactions"))
    agreement = {name: as_correlation(item) for name, item in as_dict(candidates.get("agreement_sampled")).items()}
    dropped = {name: as_int(entry.get(f"dropped_{name}")) for name in ("positives", "negatives")}
    found = entry.get("found")
    numbers = {name: as_int(entry.get(name)) for name in ("n_tested", "n_significant", "n_significant_shuffled")}
    return Evidence(
        found=found if isinstance(found, bool) else None,
        **numbers,
        n_records={name: _counts(item) for name, item in as_dict(entry.get("n_records")).items()},
        dropped={name: count for name, count in dropped.items() if count is not None},
        unfiltered=as_rate(entry.get("unfiltered_base_rate")),
        unfiltered_negatives=as_rate(entry.get("unfiltered_clamp_base_rate")),
        null_share=as_rate(entry.get("null_share")),
        null_share_protocol=as_rate(entry.get("null_share_protocol")),
        decoy_share=as_float(entry.get("decoy_share")),
        rivals=[_rival(name, as_dict(item)) for name, item in as_dict(entry.get("rivals")).items()],
        base_cost=_cost(as_dict(as_dict(entry.get("side_effects")).get("none")).get("remove")),
        sizes=[_size(as_dict(item)) for item in as_list(entry.get("sizes"))],
        pairs=_pairs(interactions.get("pairs")),
        hydras=_hydras(interactions.get("hydras")),
        candidates=_candidates(candidates.get("scores")),
        agreement={name: item for name, item in agreement.items() if item is not None},
        confounds=_confounds(as_dict(entry.get("confounds"))),
        origin=_origin(as_dict(entry.get("provenance"))),
        judges=_judges(as_dict(entry.get("judges"))),
        dose_range=_range(entry.get("dose_range")),
        dose_correlation=as_correlation(entry.get("dose_correlation")),
        dose_correlation_all=as_correlation(entry.get("dose_correlation_all")),
    )


def _range(value: Any) -> tuple[float, float] | None:
    ends = [as_float(item) for item in as_list(value)]
    if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] > ends[1]:
        return None
    return ends[0], ends[1]


def _counts(value: Any) -> dict[str, int]:
    found = {name: as_int(item) for name, item in as_dict(value).items()}
    return {name: item for name, item in found.items() if item is not None}


def _texts(value: Any) -> list[str]:
    return [as_text(item) for item in as_list(value) if item is not None]


def _damage(value: Any) -> Damage | None:
    entry = as_dict(value)
    kl, ce = as_float(entry.get("kl")), as_float(entry.get("ce"))
    return None if kl is None and ce is None else Damage(kl, ce)


def _cost(value: Any) -> Cost:
    entry = as_dict(value)
    rates = {name: as_rate(entry.get(name)) for name in ("lookalikes", "facts", "choices")}
    return Cost(_damage(entry.get("own")), _damage(entry.get("text")), **rates)


def _rival(name: str, entry: Mapping[str, Any]) -> Rival:
    return Rival(
        method=name,
        detail=as_text(entry.get("detail")),
        auroc=as_interval(entry.get("auroc")),
        ablate=as_rate(entry.get("ablate_rate")),
        restored=as_rate(entry.get("ablate_restored_rate")),
        add=as_rate(entry.get("add_rate")),
        add_degenerate=as_rate(entry.get("add_degenerate_rate")),
        add_scale=as_float(entry.get("add_scale")),
        remove_cost=_cost(entry.get("remove_cost")),
        add_cost=_cost(entry.get("add_cost")),
        on_remove_front=entry.get("on_remove_front") is True,
        on_add_front=entry.get("on_add_front") is True,
    )


def _size(entry: Mapping[str, Any]) -> SizePoint:
    rates = {name: as_rate(entry.get(name)) for name in ("behavior", "restored", "degenerate")}
    return SizePoint(as_ints(entry.get("latents")), as_interval(entry.get("margin")), **rates)


def _pairs(value: Any) -> list[LatentPair]:
    found = []
    names = ("alone_first", "alone_second", "together", "interaction")
    for entry in map(as_dict, as_list(value)):
        first, second = as_int(entry.get("first")), as_int(entry.get("second"))
        if first is not None and second is not None:
            found.append(LatentPair(first, second, **{name: as_interval(entry.get(name)) for name in names}))
    return found


def _hydras(value: Any) -> list[Hydra]:
    found = []
    for entry in map(as_dict, as_list(value)):
        latent, partner = as_int(entry.get("latent")), as_int(entry.get("partner"))
        if latent is not None and partner is not None:
            effects = (as_interval(entry.get("alone")), as_interval(entry.get("without_partner")))
            found.append(Hydra(latent, partner, *effects))
    return found


def _candidates(value: Any) -> list[CandidateRow]:
    found = []
    for entry in map(as_dict, as_list(value)):
        latent = as_int(entry.get("latent"))
        if latent is not None:
            row = CandidateRow(
                latent=latent,
                ranked=entry.get("ranked") is True,
                input_score=as_float(entry.get("input_score")),
                output_score=as_interval(entry.get("output_score")),
                gradient=as_float(entry.get("gradient")),
                integrated=as_float(entry.get("integrated")),
                ablation_effect=as_interval(entry.get("ablation_effect")),
            )
            found.append(row)
    return found


def _audit(value: Any, flagged: Any) -> Audit | None:
    entry = as_dict(value)
    rows = [
        Confound(
            as_text(row.get("family")),
            as_text(row.get("kind")),
            as_interval(row.get("auroc")),
            row.get("flagged") is True,
            as_text(row.get("direction")),
        )
        for row in map(as_dict, as_list(entry.get("rows")))
    ]
    return Audit(rows, _texts(flagged), as_float(entry.get("bar"))) if rows else None


def _confounds(entry: Mapping[str, Any]) -> Confounds | None:
    before = _audit(entry.get("audit"), entry.get("flagged"))
    if before is None:
        return None
    after, done = as_dict(entry.get("after")), as_dict(entry.get("balance"))
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for split, classes in as_dict(done.get("counts")).items():
        pairs = {name: as_ints(pair) for name, pair in as_dict(classes).items()}
        counts[split] = {name: (pair[0], pair[1]) for name, pair in pairs.items() if len(pair) == 2}
    method = as_text(done.get("method"))
    return Confounds(
        before,
        _audit(after.get("audit"), after.get("flagged")),
        "" if method == "none" else method,
        _texts(done.get("features")),
        as_int(done.get("n_changed")),
        counts,
    )


def _origin(entry: Mapping[str, Any]) -> Origin | None:
    texts = ("name", "location", "sha256", "licence", "citation", "url")
    files = [
        DataFile(**{name: as_text(item.get(name)) for name in texts}, n_rows=as_int(item.get("n_rows")))
        for item in map(as_dict, as_list(entry.get("files")))
    ]
    sources = [
        Source(
            as_text(item.get("name")),
            as_text(item.get("file")),
            as_int(item.get("n_rows")),
            as_int(item.get("n_kept")),
            _counts(item.get("dropped")),
        )
        for item in map(as_dict, as_list(entry.get("sources")))
    ]
    if not files and not sources:
        return None
    return Origin(as_text(entry.get("name")), files, sources, _texts(entry.get("left_out")))


def _judges(entry: Mapping[str, Any]) -> Judges | None:
    rates = {name: as_rates(item) for name, item in as_dict(entry.get("rates")).items()}
    if not rates:
        return None
    texts = ("prompt", "completion", "first", "second")
    pairs = [
        JudgePair(
            as_text(item.get("first")),
            as_text(item.get("second")),
            as_interval(item.get("kappa")),
            as_int(item.get("n_apart")),
            [
                Parting(*(as_text(one.get(name)) for name in texts))
                for one in map(as_dict, as_list(item.get("examples")))
            ],
        )
        for item in map(as_dict, as_list(entry.get("pairs")))
    ]
    topic = as_dict(entry.get("topic"))
    about = (as_rate(topic.get("own")), as_float(topic.get("other")), as_float(topic.get("p")))
    return Judges(as_int(entry.get("n")), rates, pairs, *about)
