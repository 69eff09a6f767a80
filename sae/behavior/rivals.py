"""Latents beside their rivals: what else detects the behaviour, and does it control it as well?

Each method reads the same activations on the find split (the chosen SAE's hook point and position, but for
`..._everywhere`, which chooses among all that were read, as it is published), chooses its dose on the select split by
the same rule, and is measured on the report split: AUROC, and the same two interventions that `sae.behavior.causal`
tests, on the same prompts with the same judge.

| method | readout | removed by | brought about by |
| --- | --- | --- | --- |
| `latent` | the first of the ranking | ablating it | clamping it |
| `latents` | probe on the ablated set | the ablation that is tested | the clamp that is tested |
| `sparse_probe_<k>` | probe on the k latents that differ most | ablating them | clamping those that fire on positives |
| `difference_of_means` | projection | projecting out | adding |
| `..._everywhere` | projection | projecting out at every write to the residual stream | adding where it was taken |
| `pca` | first component of paired differences | the same | the same |
| `dense_probe` | logistic regression on all coordinates | the same, along its weights | the same |
| `dimension` | the best single coordinate (a neuron, at an MLP's hook point) | the same | the same |

At one hook point a direction is projected out to the negatives' mean coefficient, and added at multiples of the
classes' distance along it. On natural models the plain directions often win (AxBench 2501.17148; Yeo et al.
2505.23556): the table is there to show it. What each costs stands beside what it does (`sae.behavior.cost`): a method
is on the front if no other removes (or brings about) at least as much at a smaller KL on harmless prompts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sae import stats
from sae.behavior.candidates import typical_values
from sae.behavior.causal import Choice
from sae.behavior.contrast import ContrastSet
from sae.behavior.controls import direction_edits
from sae.behavior.cost import Cost, CostTasks, measure_costs, on_front
from sae.behavior.directions import Detection, Direction, along, paired_component
from sae.behavior.judge import Judge
from sae.behavior.latents import LatentScore
from sae.behavior.measure import (
    Collected,
    Prompts,
    collect,
    evaluate_each,
    prepare,
)
from sae.behavior.results import CausalReport
from sae.behavior.select import select_add, select_clamp, select_everywhere
from sae.behavior.settings import BehaviorSettings
from sae.errors import UserError
from sae.probe import fit_probe
from sae.steering.interventions import Ablate, Intervention

Array = np.ndarray
Reader = Callable[[Collected], Float[Array, " n"]]
"""Scores of the prompts whose activations were collected from the chosen SAE alone, and at methods' own hook points."""


@dataclass(frozen=True)
class Rival:
    """One method, measured on the report split.

    Attributes:
        method: see the module's text.
        detail: which latents or coordinate, in words.
        position: where it was read.
        auroc: held-out, topics resampled.
        ablate_rate, ablate_restored_rate: the behaviour, and the alternative, on positives when it is removed.
        add_rate, add_degenerate_rate: the behaviour, and broken replies, on negatives when it is added; None if
            nothing about it can be added.
        add_scale: the dose chosen on the select split: typical activations, or distances of the classes.
        remove_cost, add_cost: what else changes.
        on_remove_front, on_add_front: whether no other method does as much for less.
    """

    method: str
    detail: str
    position: str
    auroc: stats.Interval
    ablate_rate: stats.Rate
    ablate_restored_rate: stats.Rate
    add_rate: stats.Rate | None
    add_degenerate_rate: stats.Rate | None
    add_scale: float | None
    remove_cost: Cost
    add_cost: Cost | None
    on_remove_front: bool = False
    on_add_front: bool = False


class _Effect(NamedTuple):
    """What removing and adding did on the report split."""

    ablate_rate: stats.Rate
    ablate_restored_rate: stats.Rate
    add_rate: stats.Rate | None
    add_degenerate_rate: stats.Rate | None


class _Method(NamedTuple):
    """A method, fitted and with its dose chosen."""

    name: str
    detail: str
    position: str
    read: Reader
    scale: float | None
    remove: tuple[Intervention, ...]
    add: tuple[Intervention, ...] | None
    known: _Effect | None = None  #: where the causal test has measured it already
    hook_name: str = ""  #: where it is read, if not where the SAE is


class _Case(NamedTuple):
    """What every method is fitted and chosen on."""

    lm: Any
    choice: Choice
    causal: CausalReport
    seen: Collected  #: the find split, all SAEs
    splits: Mapping[str, ContrastSet]
    judge: Judge
    settings: BehaviorSettings

    @property
    def resid(self) -> Float[Array, "n d_in"]:
        return self.seen.resid[self.choice.site.hook_name, self.choice.position]

    @property
    def acts(self) -> Float[Array, "n d_sae"]:
        return self.choice.site.acts[self.choice.position]

    @property
    def labels(self) -> Bool[Array, " n"]:
        return np.asarray(self.splits["find"].labels, dtype=bool)

    @property
    def typical(self) -> Float[Array, " d_sae"]:
        return typical_values(self.acts[self.labels], self.choice.site.mean_active)

    def prompts(self, split: str, label: bool) -> Prompts:
        records = [record for record in self.splits[split].records if record.label == label]
        return prepare(self.lm, records, self.settings.batch_prompts)


def compare_rivals(
    lm: Any,
    choice: Choice,
    first: LatentScore,
    causal: CausalReport,
    seen: Collected,
    splits: Mapping[str, ContrastSet],
    judge: Judge,
    tasks: CostTasks,
    settings: BehaviorSettings,
) -> dict[str, Rival]:
    """Measure every method on the report split.

    Args:
        lm: the model.
        choice: the chosen SAE with its latents and direction.
        first: the SAE's best-ranked candidate.
        causal: the test of the choice; what it has measured is taken over.
        seen: the find split's activations.
        splits: the contrast set's.
        judge: see `sae.behavior.judge`.
        tasks: what costs are measured on.
        settings: `sparse_ks`, and the search's and the test's own.

    Returns:
        records by method. A direction along which the classes' means coincide is left out.
    """
    case = _Case(lm, choice, causal, seen, splits, judge, settings)
    ks = [k for k in settings.sparse_ks if k <= choice.site.d_sae]
    methods = [_first_latent(case, first), _tested_latents(case), *(_sparse_probe(case, k) for k in ks)]
    methods += [_tested_direction(case), *_everywhere(case), *_directions(case)]
    report = splits["report"]
    positions = dict.fromkeys(method.position for method in methods)
    held = collect(
        lm,
        [choice.encoder],
        prepare(lm, report.records, settings.batch_prompts),
        [name if name == "max" else int(name) for name in positions],
        [method.hook_name for method in methods if method.hook_name],
    )
    adding = [method for method in methods if method.add is not None]
    costs = measure_costs(lm, [*(one.remove for one in methods), *(one.add or () for one in adding)], tasks)
    added = dict(zip((method.name for method in adding), costs[len(methods) :], strict=True))
    found = []
    for method, effect, cost in zip(methods, _effects(case, methods), costs, strict=False):
        area = stats.auroc_interval(
            method.read(held), report.labels, report.topics, settings.n_bootstrap, settings.seed
        )
        rival = Rival(
            method.name,
            method.detail,
            method.position,
            area,
            **effect._asdict(),
            add_scale=method.scale,
            remove_cost=cost,
            add_cost=added.get(method.name),
        )
        found.append(rival)
    return {rival.method: rival for rival in _with_fronts(found)}


def _with_fronts(rivals: list[Rival]) -> list[Rival]:
    """Mark who is on the fronts of effect against KL on harmless prompts."""
    removing = on_front([one.ablate_restored_rate.rate for one in rivals], [one.remove_cost.own.kl for one in rivals])
    adding = on_front(
        [math.nan if one.add_rate is None else one.add_rate.rate for one in rivals],
        [math.nan if one.add_cost is None else one.add_cost.own.kl for one in rivals],
    )
    return [
        dataclasses.replace(one, on_remove_front=removes, on_add_front=adds)
        for one, removes, adds in zip(rivals, removing, adding, strict=True)
    ]


def _effects(case: _Case, methods: Sequence[_Method]) -> list[_Effect]:
    """Measure what each method's interventions do, but for those that were measured before."""
    lm, settings = case.lm, case.settings
    positives, negatives = case.prompts("report", True), case.prompts("report", False)
    new = [method for method in methods if method.known is None]
    adding = [method for method in new if method.add is not None]
    edits = [method.remove for method in new]
    removed = evaluate_each(lm, edits, positives, case.judge, settings.max_new_tokens)
    without = dict(zip((method.name for method in new), removed, strict=True))
    added = evaluate_each(lm, [method.add or () for method in adding], negatives, case.judge, settings.max_new_tokens)
    with_it = dict(zip((method.name for method in adding), added, strict=True))
    effects = []
    for method in methods:
        if method.known is not None:
            effects.append(method.known)
            continue
        gone, brought = without[method.name], with_it.get(method.name)
        effects.append(
            _Effect(
                gone.behavior,
                gone.alternative,
                None if brought is None else brought.behavior,
                None if brought is None else brought.degenerate,
            )
        )
    return effects


def _on_latents(case: _Case, name: str, detail: str, position: str, latents: Sequence[int], read: Reader) -> _Method:
    """A method that ablates latents, and clamps those of them that fire more on positives."""
    settings, encoder = case.settings, case.choice.encoder
    gap = case.acts[case.labels].mean(axis=0) - case.acts[~case.labels].mean(axis=0)
    rising = [latent for latent in latents if gap[latent] > 0]
    remove = (Ablate(encoder, tuple(latents), roles=settings.roles),)
    if not rising:
        return _Method(name, detail, position, read, None, remove, None)
    clamp = select_clamp(
        case.lm,
        encoder,
        [rising],
        {latent: float(case.typical[latent]) for latent in rising},
        case.splits["select"].negatives,
        case.judge,
        multiples=settings.multiples,
        max_degenerate=settings.max_degenerate,
        max_new_tokens=settings.max_new_tokens,
        roles=settings.roles,
        batch_prompts=settings.batch_prompts,
    )
    add = (clamp.clamp(encoder, roles=settings.roles),)
    return _Method(name, detail, position, read, clamp.multiple, remove, add)


def _first_latent(case: _Case, first: LatentScore) -> _Method:
    latent, position = first.latent, first.position

    def read(held: Collected) -> Array:
        return held.sites[0].acts[position][:, latent]

    return _on_latents(case, "latent", f"latent {latent}", position, [latent], read)


def _probe_of(case: _Case, latents: Sequence[int]) -> Reader:
    """A logistic regression on some latents, fitted on the find split."""
    columns, position = list(latents), case.choice.position
    probe = fit_probe(case.acts[:, columns], case.labels)
    return lambda held: probe.scores(held.sites[0].acts[position][:, columns])


def _tested_latents(case: _Case) -> _Method:
    choice, causal, roles = case.choice, case.causal, case.settings.roles
    known = _Effect(
        causal.ablate_rate,
        causal.ablate_restored_rate,
        causal.clamp_rate,
        causal.clamp_degenerate_rate,
    )
    latents = choice.ablation.latents
    return _Method(
        "latents",
        f"ablates {_named(latents)}, clamps {_named(choice.clamp.latents)}",
        choice.position,
        _probe_of(case, latents),
        choice.clamp.multiple,
        (Ablate(choice.encoder, latents, roles=roles),),
        (choice.clamp.clamp(choice.encoder, roles=roles),),
        known,
    )


def _sparse_probe(case: _Case, k: int) -> _Method:
    """The k latents whose class means differ most (Gurnee et al. 2305.01610, as `sae.evals.probing` chooses them)."""
    gap = case.acts[case.labels].mean(axis=0) - case.acts[~case.labels].mean(axis=0)
    latents = np.argsort(-np.abs(gap), kind="stable")[:k].tolist()
    return _on_latents(
        case, f"sparse_probe_{k}", _named(latents), case.choice.position, latents, _probe_of(case, latents)
    )


def _named(latents: Sequence[int]) -> str:
    return ("latent " if len(latents) == 1 else "latents ") + ", ".join(map(str, latents))


def _read_direction(direction: Direction) -> Reader:
    return lambda held: direction.project(held.resid[direction.hook_name, direction.position])


def _tested_direction(case: _Case) -> _Method:
    choice, causal = case.choice, case.causal
    known = _Effect(
        causal.direction_ablate_rate,
        causal.direction_ablate_restored_rate,
        causal.direction_add_rate,
        causal.direction_add_degenerate_rate,
    )
    remove, _, add = direction_edits(choice.direction, choice.add.scale, case.settings.roles)
    read, name = _read_direction(choice.direction), "difference_of_means"
    return _Method(name, "positives minus negatives", choice.position, read, choice.add.scale, (remove,), (add,), known)


def _everywhere(case: _Case) -> list[_Method]:
    """The difference of means deleted wherever the residual stream is written, and added where it was taken."""
    settings = case.settings
    found = select_everywhere(
        case.lm,
        case.seen.resid,
        case.splits["find"].labels,
        case.splits["select"].positives,
        roles=settings.roles,
        batch_prompts=settings.batch_prompts,
    )
    if found is None:
        return []
    direction, remove = found
    scale, add = _added(case, direction, case.prompts("select", False))
    name, detail = "difference_of_means_everywhere", f"positives minus negatives at {direction.hook_name}"
    read = _read_direction(direction)
    return [_Method(name, detail, direction.position, read, scale, remove, (add,), hook_name=direction.hook_name)]


def _added(case: _Case, direction: Direction, negatives: Prompts) -> tuple[float, Intervention]:
    """The dose with which adding a direction does most on the select split, and that addition."""
    settings = case.settings
    chosen = select_add(
        case.lm,
        direction.vector,
        direction.hook_name,
        negatives,
        case.judge,
        multiples=settings.multiples,
        max_degenerate=settings.max_degenerate,
        max_new_tokens=settings.max_new_tokens,
        roles=settings.roles,
    )
    return chosen.scale, direction_edits(direction, chosen.scale, settings.roles)[2]


def _directions(case: _Case) -> list[_Method]:
    """The other directions, each with a dose chosen on the select split as the difference of means has its own."""
    settings, hook = case.settings, case.choice.site.hook_name
    find = case.splits["find"]
    # Many coordinates can reach AUROC 1: among them the one whose classes are furthest apart for their spread.
    area, apart = stats.auroc(case.resid, case.labels), stats.cohens_d(case.resid, case.labels)
    best = int(np.lexsort((-np.abs(apart), -np.abs(area - 0.5)))[0])
    vectors = {
        "pca": ("first component of differences by topic", paired_component(case.resid, find.labels, find.topics)),
        "dense_probe": ("logistic regression", fit_probe(case.resid, case.labels).weight),
        "dimension": (f"dimension {best}", np.eye(case.resid.shape[1])[best]),
    }
    negatives = case.prompts("select", False)
    methods = []
    for name, (detail, vector) in vectors.items():
        try:
            direction = along(vector, case.resid, find.labels, hook, case.choice.position)
        except UserError:  # the classes' means coincide along it: there is no natural dose
            continue
        scale, add = _added(case, direction, negatives)
        remove = direction_edits(direction, scale, settings.roles)[0]
        read = _read_direction(direction)
        methods.append(_Method(name, detail, case.choice.position, read, scale, (remove,), (add,)))
    return methods


def as_detection(rivals: Mapping[str, Rival]) -> list[Detection]:
    """Return the held-out AUROC of the first latent, the difference of means and the dense probe."""
    names = {"latent": rivals["latent"].detail, "difference_of_means": "difference of means", "dense_probe": "probe"}
    return [Detection(name, rivals[method].auroc) for method, name in names.items() if method in rivals]
