"""One method at one level: its scores, how they stand against the planted truth, and surgery on what it locates."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae import stats
from sae.lm.matrices import Matrix, Part
from sae.organism.truth import Truth
from sae.weights import edit, truth
from sae.weights.adversary import Arena
from sae.weights.attribution import Direction, Scores, without
from sae.weights.edit import Mask, Weights
from sae.weights.levels import Located, locate, matched, matched_indices
from sae.weights.perturbation.blocks import Blocks
from sae.weights.surgery import Cut, Surgery, Watch, operate

Array = np.ndarray


class MethodRow(NamedTuple):
    """A line of `methods` in `result.json`; truth columns are None without planted truth."""

    behavior: str
    method: str
    level: str
    auroc: float | None
    auprc: float | None
    base_rate: float | None
    decoy_share: float | None
    evaluations: float
    seed: int


class SurgeryRow(NamedTuple):
    """A line of `surgery` in `result.json`; see `sae.weights.surgery.Surgery`."""

    behavior: str
    method: str
    level: str
    seed: int
    mode: str
    fraction: float
    behavior_before: float
    behavior_after: float
    degenerate_after: float
    other_max_change: float
    kl_harmless: float
    random_after: float
    random_worst: float
    kept_after: float | None
    passed: bool
    doses: tuple[Any, ...]
    adversary: Any = None


class SeedsRow(NamedTuple):
    """A random method over its seeds: means with 95% bootstrap intervals; None without planted truth."""

    behavior: str
    method: str
    level: str
    n_seeds: int
    auroc: stats.Interval | None
    auprc: stats.Interval | None
    decoy_share: stats.Interval | None


class Scored(NamedTuple):
    """Scores of one method at one level.

    Attributes:
        method, level, seed: which.
        evaluations: what they took.
        scores: of single weights, or of the parts.
        parts: the parts; none for single weights.
    """

    method: str
    level: str
    seed: int
    evaluations: float
    scores: Scores | Float[Array, " part"]
    parts: list[Part]


def random_parameters(matrices: Sequence[Matrix], seed: int) -> Scores:
    """Return a random score for every weight."""
    generator = torch.Generator().manual_seed(seed)
    return {
        matrix.name: torch.rand(matrix.parameter.shape, generator=generator).to(matrix.parameter.device)
        for matrix in matrices
    }


def method_row(found: Scored, behavior: str, planted: Truth | None, threshold: float = truth.THRESHOLD) -> MethodRow:
    """Score against the planted truth, where there is one for this behaviour and level."""
    columns: tuple[float | None, float | None, float | None, float | None] = (None, None, None, None)
    if planted is not None and behavior in planted.layout.behaviors and truth.is_measured(planted, found.level):
        if isinstance(found.scores, Mapping):
            values, effects = truth.sampled(planted, found.scores), planted.sample_effects.numpy()
        else:
            values, effects = found.scores, truth.effects_of(planted, found.parts)
        got = truth.score(values, effects, planted, behavior, threshold)
        columns = (got.auroc, got.auprc, got.base_rate, got.decoy_share)
    return MethodRow(behavior, found.method, found.level, *columns, found.evaluations, found.seed)


def seeds_rows(rows: Sequence[MethodRow]) -> list[SeedsRow]:
    """Summarise each method and level that was run with several seeds."""
    groups: dict[tuple[str, str, str], list[MethodRow]] = {}
    for row in rows:
        groups.setdefault((row.behavior, row.method, row.level), []).append(row)

    def over(group: list[MethodRow], name: str) -> stats.Interval | None:
        values = [getattr(row, name) for row in group]
        return None if None in values else stats.bootstrap_mean(values)

    return [
        SeedsRow(*key, len(group), *(over(group, name) for name in ("auroc", "auprc", "decoy_share")))
        for key, group in groups.items()
        if len(group) > 1
    ]


def cut_out(
    watch: Watch,
    found: Scored,
    matrices: Sequence[Matrix],
    fractions: Sequence[float],
    *,
    mode: str = "zero",
    reference: Weights | None = None,
    n_random: int = 5,
    arena: Arena | None = None,
) -> Surgery:
    """Cut what a method locates, at every dose; see `sae.weights.surgery.operate`.

    Args:
        watch: what is measured.
        found: the method's scores.
        matrices: the model's.
        fractions: of the weights, to try.
        mode: what cut weights become, of `sae.weights.edit.MODES`.
        reference: for mode "restore", and for leaving nothing but the set.
        n_random: random sets to compare with.
        arena: where the set that was chosen is put to its worst case; None leaves this out.

    Raises:
        UserError: no score is positive.
    """
    sets: dict[float, Located] = {}
    for fraction in fractions:
        located = locate(found.scores, found.parts, matrices, fraction)
        share = edit.share_of(located.mask, matrices)
        # A small budget may give the same part as a smaller one, or nothing.
        if located.mask and all(edit.share_of(other.mask, matrices) != share for other in sets.values()):
            sets[fraction] = located

    def cut(mask: Mask) -> Cut:
        return functools.partial(edit.replaced, matrices, mask, mode, reference)

    def random_cuts(fraction: float) -> list[Cut]:
        return [cut(matched(sets[fraction], found.parts, matrices, seed)) for seed in range(n_random)]

    def keep(fraction: float) -> Cut:
        return functools.partial(edit.only, matrices, sets[fraction].mask, reference)

    cuts = {fraction: (edit.share_of(one.mask, matrices), cut(one.mask)) for fraction, one in sets.items()}
    done = operate(watch, cuts, random_cuts, keep)
    if arena is None:
        return done
    chosen = next(sets[fraction] for fraction, (share, _) in cuts.items() if share == done.fraction)
    drawn = matched(chosen, found.parts, matrices, 0)
    return done._replace(adversary=arena.run(chosen.mask, drawn, mode, reference))


def cut_directions(
    watch: Watch,
    directions: Mapping[str, list[Direction]],
    matrices: Sequence[Matrix],
    fractions: Sequence[float],
    *,
    n_random: int = 5,
) -> Surgery:
    """Take ActSVD's directions out, most weight first; a direction counts as d_out + d_in weights.

    The random sets are as many random directions of outputs of the same matrices, projected out.
    """
    every = sorted((one for own in directions.values() for one in own), key=lambda one: -one.gain)

    def draw(count: int, seed: int) -> list[Direction]:
        return _random_like(every[:count], seed)

    return _cut_groups(watch, [[one] for one in every], matrices, fractions, draw, n_random)


def cut_blocks(
    watch: Watch,
    found: Scored,
    blocks: Blocks,
    matrices: Sequence[Matrix],
    fractions: Sequence[float],
    *,
    n_random: int = 5,
) -> Surgery:
    """Take low-rank blocks out, best first; each of its directions counts as d_out + d_in weights.

    The random sets are as many other blocks of the same matrices.

    Raises:
        UserError: no score is positive.
    """
    assert not isinstance(found.scores, Mapping)
    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] > 0].tolist()
    groups: dict[Hashable, list[int]] = {}
    for index, part in enumerate(blocks.parts):
        groups.setdefault(part.family, []).append(index)

    def draw(count: int, seed: int) -> list[Direction]:
        drawn = matched_indices(order[:count], list(groups.values()), np.random.default_rng(seed))
        return [one for index in drawn for one in blocks.directions(blocks.parts[index])]

    located = [blocks.directions(blocks.parts[index]) for index in order]
    return _cut_groups(watch, located, matrices, fractions, draw, n_random)


def _cut_groups(
    watch: Watch,
    groups: Sequence[Sequence[Direction]],
    matrices: Sequence[Matrix],
    fractions: Sequence[float],
    draw: Callable[[int, int], list[Direction]],
    n_random: int,
) -> Surgery:
    """Take the first groups of directions out; `draw(count, seed)` are as many groups' at random."""
    total = sum(matrix.parameter.numel() for matrix in matrices)
    size = np.cumsum([sum(len(one.out) + len(one.into) for one in group) for group in groups])
    counts = {fraction: max(1, int((size <= fraction * total).sum())) for fraction in fractions if groups}
    counts = {fraction: count for count, fraction in {count: fraction for fraction, count in counts.items()}.items()}

    def cut(chosen: Sequence[Direction]) -> Cut:
        return lambda: edit.rewritten(matrices, without(chosen))

    def first(count: int) -> list[Direction]:
        return [one for group in groups[:count] for one in group]

    def random_cuts(fraction: float) -> list[Cut]:
        return [cut(draw(counts[fraction], seed)) for seed in range(n_random)]

    cuts = {fraction: (float(size[count - 1] / total), cut(first(count))) for fraction, count in counts.items()}
    return operate(watch, cuts, random_cuts)


def _random_like(chosen: Sequence[Direction], seed: int) -> list[Direction]:
    """As many random directions of the same matrices' outputs; taking one out is W - u (u'W)."""
    generator = torch.Generator().manual_seed(seed)
    counts: dict[str, int] = {}
    own = {one.matrix.name: one.matrix for one in chosen}
    for one in chosen:
        counts[one.matrix.name] = counts.get(one.matrix.name, 0) + 1
    found = []
    for name, matrix in own.items():
        weight = matrix.parameter.detach().float()
        weight = weight if matrix.out_axis == 0 else weight.T
        drawn = torch.randn(len(weight), counts[name], generator=generator).to(weight)
        basis: Tensor = torch.linalg.qr(drawn).Q
        found += [Direction(matrix, k, basis[:, k], basis[:, k] @ weight, 1.0) for k in range(basis.shape[1])]
    return found


def surgery_row(found: Surgery, behavior: str, method: str, level: str, seed: int, mode: str) -> SurgeryRow:
    """Return a surgery as a line of `result.json`."""
    return SurgeryRow(
        behavior=behavior,
        method=method,
        level=level,
        seed=seed,
        mode=mode,
        fraction=found.fraction,
        behavior_before=found.before.behavior,
        behavior_after=found.after.behavior,
        degenerate_after=found.after.degenerate,
        other_max_change=found.other_max_change,
        kl_harmless=found.after.kl,
        random_after=found.random_after,
        random_worst=found.random_worst,
        kept_after=found.kept_after,
        passed=found.passed,
        doses=found.doses,
        adversary=found.adversary,
    )
