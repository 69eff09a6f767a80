"""Searching for the parts behind a behaviour coarse to fine: effort goes where the effect is.

All parts of one kind in one layer are probed at once; the group in which most happens is divided, its pieces are
probed, and so on down to single parts, until the budget is spent. Groups are drawn at random within a layer, so that
nothing depends on the order in which a model keeps its neurons.

A group is probed by taking it away (``"ablation"``: its weights to zero, or to another model's values), or by noise in
its weights (``"noise"``). What decides whether it is divided is the root mean square of its effect over the prompts:
parts whose effects differ in sign cancel in the mean, but hardly on every prompt. What an undivided group did is shared
equally among its parts.

Effects of groups are sums of their parts' only in part. Two that do the same work hide each other: taking either away
changes nothing, taking both does. `detail["hidden"]` adds up, over the divided groups a part was in, what each did
beyond the sum of its pieces, shared equally: where it is large beside the scores, parts that do the same work may hide.
(A model that breaks once much of a layer is gone shows there, too: confirm by taking away two at a time.)
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError, unknown
from sae.lm.matrices import Matrix, Part
from sae.weights.perturbation.located import Array, Located, Meter, Metric, Progress
from sae.weights.perturbation.regions import Region, regions

Probe = Literal["ablation", "noise"]
PROBES = ("ablation", "noise")


class Group(NamedTuple):
    """Some parts of one kind in one layer, and what probing them did."""

    members: Float[Array, " m"]
    effect: Float[Array, " n"]  #: fall of the metric per prompt


def adaptive(
    metric: Metric,
    matrices: Sequence[Matrix],
    parts: Sequence[Part],
    *,
    budget: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    probe: Probe = "ablation",
    strength: float = 1.0,
    split: int = 4,
    reference: Mapping[str, Tensor] | None = None,
) -> Located:
    """Find the parts whose loss lowers a metric most, by dividing groups of them.

    Args:
        metric: see `sae.weights.perturbation.located.Metric`.
        matrices: those that the parts lie in.
        parts: what to score: heads, neurons, rows, or some of each, none of them overlapping.
        budget: evaluations of the metric, at most.
        seed: of the groups and the noise.
        progress: called at every evaluation.
        probe: ``"ablation"`` moves weights by `strength` of the way to zero, or to the reference; ``"noise"`` adds
            Gaussian noise of that size relative to each matrix's root mean square and takes it away again: one pair,
            two evaluations.
        strength: of a probe of several parts; an ablation of a single one is always whole.
        split: into how many pieces a group is divided.
        reference: another model's matrices by name; an ablation then takes weights to its values. Parts that both
            models share count for nothing, however much every answer needs them.

    Returns:
        Scores: under ablation the fall of the metric, an undivided group's shared among its parts; under noise the root
        mean square over prompts of the change of first order. Errors: over prompts for parts that were probed
        alone; for others the root mean square of what their group did, since any one of them may have done it all.

    Raises:
        UserError: no such probe, a strength or split that makes no sense, or a reference without one of the matrices.
    """
    if probe not in PROBES:
        raise unknown("probe", probe, list(PROBES))
    if not 0 < strength <= 1 or split < 2:
        raise UserError(f"strength {strength} and split {split}: give 0 < strength <= 1 and split >= 2.")
    missing = [one.name for one in matrices if reference is not None and one.name not in reference]
    if missing:
        raise UserError(f"the reference has no {missing[0]!r}: give a model of the same architecture.")
    meter = Meter("adaptive", metric, matrices, parts, budget, seed, progress)
    return _Search(meter, parts, probe, strength, split, reference).run()


@dataclass
class _Search:
    """The state of one search."""

    meter: Meter
    parts: Sequence[Part]
    probe: Probe
    strength: float
    split: int
    reference: Mapping[str, Tensor] | None

    def __post_init__(self) -> None:
        n = len(self.parts)
        self.scores, self.errors, self.hidden = np.zeros(n), np.full(n, np.inf), np.zeros(n)
        self.rng = np.random.default_rng(self.meter.seed)
        self.waiting: list[tuple[float, int, Group]] = []
        self.n_probed = 0

    @property
    def price(self) -> int:
        """Evaluations a probe takes."""
        return 1 if self.probe == "ablation" else 2

    def run(self) -> Located:
        """Divide groups, the one with most effect first, until the budget is spent or all parts stand alone."""
        for members in self._roots():
            self._probe(members)
        while self.waiting and self.meter.left >= self.price:
            _, _, group = heapq.heappop(self.waiting)
            pieces = np.array_split(group.members, min(self.split, len(group.members)))
            effects = [self._probe(piece) for piece in pieces]
            if all(effect is not None for effect in effects):
                excess = group.effect.mean() - sum(float(effect.mean()) for effect in effects if effect is not None)
                self.hidden[group.members] += excess / len(group.members)
        return self.meter.located(self.scores, self.errors, {"hidden": self.hidden})

    def _roots(self) -> list[Array]:
        """All parts of a kind in a layer, in random order; pieces of matrices by matrix."""
        found: dict[tuple[int, str, str], list[int]] = {}
        for index, part in enumerate(self.parts):
            found.setdefault(part.family, []).append(index)
        return [self.rng.permutation(members) for members in found.values()]

    def _probe(self, members: Array) -> Array | None:
        """Measure a group and put it in line to be divided; None if the budget does not allow it."""
        if self.meter.left < self.price:
            return None
        parts = [self.parts[index] for index in members]
        where = regions(parts, self._device)
        layer = min(part.layer for part in parts)
        effect = self._ablated(where, layer, len(parts)) if self.probe == "ablation" else self._shaken(where, layer)
        size = float(np.sqrt(np.mean(effect**2)))
        alone = len(parts) == 1
        self.scores[members] = effect.mean() / len(parts) if self.probe == "ablation" else size / len(parts) ** 0.5
        self.errors[members] = effect.std(ddof=1) / len(effect) ** 0.5 if alone and len(effect) > 1 else size
        if not alone:
            self.n_probed += 1
            heapq.heappush(self.waiting, (-size, self.n_probed, Group(members, effect)))
        self.meter.note(lambda: self.scores)
        return effect

    @property
    def _device(self) -> torch.device:
        return next(iter(self.meter.parameters.values())).device

    def _ablated(self, where: Sequence[Region], layer: int, n: int) -> Array:
        strength = 1.0 if n == 1 else self.strength

        def change(region: Region, values: Tensor) -> Tensor:
            kept = (1.0 - strength) * values
            return kept if self.reference is None else kept + strength * region.of(self.reference[region.name]).to(kept)

        return (self.meter.clean - self.meter.under(where, change, layer)) / strength

    def _shaken(self, where: Sequence[Region], layer: int) -> Array:
        draw = int(self.rng.integers(2**31))

        def moved(sign: float) -> Array:
            source = torch.Generator().manual_seed(draw)  # the same noise both times

            def change(region: Region, values: Tensor) -> Tensor:
                scale = self.strength * self.meter.parameters[region.name].detach().float().square().mean().sqrt()
                noise = torch.randn(values.shape, generator=source).to(values.device)
                return values + sign * scale * noise

            return self.meter.under(where, change, layer)

        return (moved(1.0) - moved(-1.0)) / 2
