"""From single weights to parts (rows, columns, neurons, heads, matrices), and from scores to the set that is located.

A part's score is the *sum* of its weights' scores. For signed scores that is what theory says: first-order effects and
shares of a path integral add, so the sum estimates the effect of the part as a whole (a mean would not), and within a
head or neuron the two ends of one computation may cancel, as they do where it is idle. For absolute scores
(snip, wanda, fisher) the sum is an upper bound that grows with a part's size and noise; it is kept for comparison with
the literature.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import unknown
from sae.lm.matrices import Matrix, Part, columns, heads, neurons, rows, tensors
from sae.weights.attribution import Scores
from sae.weights.edit import Mask, mask_of

Array = np.ndarray
LEVELS = ("parameter", "row", "column", "neuron", "head", "tensor")
_BISECTIONS = 60
_LINES = 64  # that are summed up at once


def parts_of(lm: Any, matrices: list[Matrix], level: str) -> list[Part]:
    """Return the parts of a level; none for single parameters.

    Raises:
        UserError: an unknown level, or a model without such parts.
    """
    if level not in LEVELS:
        raise unknown("level", level, list(LEVELS))
    if level == "parameter":
        return []
    inside = {"row": rows, "column": columns, "tensor": tensors}
    return inside[level](matrices) if level in inside else {"neuron": neurons, "head": heads}[level](lm, matrices)


class LineSums(NamedTuple):
    """Sums of scores over each row (axis 0) and column (axis 1) of every matrix: all that parts' scores are made of."""

    sums: dict[tuple[str, int], Array]  #: by matrix name and axis


def line_sums(scores: Scores) -> LineSums:
    """Return the sums over rows and columns, in float64."""
    return LineSums({(name, axis): _summed(values, axis) for name, values in scores.items() for axis in (0, 1)})


def _summed(values: Tensor, axis: int) -> Array:
    """Sums of a matrix's rows or columns; some at a time, since they are copied to float64 first."""
    parts = values.split(_LINES, dim=axis)
    return torch.cat([part.sum(dim=1 - axis, dtype=torch.float64) for part in parts]).cpu().numpy()


def aggregate(scores: Scores | LineSums, parts: Sequence[Part]) -> Float[Array, " part"]:
    """Return the sum of scores over each part's slices, all of which run through a whole axis."""
    lines = scores if isinstance(scores, LineSums) else line_sums(scores)
    found = np.zeros(len(parts))
    for index, part in enumerate(parts):
        for one in part.slices:
            found[index] += lines.sums[one.name, one.axis][one.start : one.stop].sum()
    return found


def sizes(parts: Sequence[Part], matrices: Sequence[Matrix]) -> Float[Array, " part"]:
    """Return the number of weights of each part."""
    shapes = {matrix.name: matrix.parameter.shape for matrix in matrices}
    return np.array(
        [sum((one.stop - one.start) * shapes[one.name][1 - one.axis] for one in part.slices) for part in parts],
        dtype=np.float64,
    )


class Located(NamedTuple):
    """A located set.

    Attributes:
        mask: its weights.
        parts: indices of its parts, best first; None at the level of single parameters.
    """

    mask: Mask
    parts: tuple[int, ...] | None


def locate(
    scores: Scores | Float[Array, " part"], parts: Sequence[Part], matrices: Sequence[Matrix], fraction: float
) -> Located:
    """Return the best-scored weights or parts that make up a fraction of the matrices' weights.

    Only what has a positive score is taken: what is negative works against the behaviour, or is the utility's. At least
    one part is; weights that tie at the edge are all left out.

    Args:
        scores: of weights, or one for each part.
        parts: the parts; ignored for scores of weights.
        matrices: the model's.
        fraction: of all weights of the matrices, at most.
    """
    budget = fraction * sum(matrix.parameter.numel() for matrix in matrices)
    if isinstance(scores, Mapping):
        return Located(_above(scores, int(budget)), None)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] > 0]
    total = np.cumsum(sizes([parts[index] for index in order], matrices))
    chosen = order[: max(1, int((total <= budget).sum()))].tolist()
    return Located(mask_of([parts[index] for index in chosen], matrices), tuple(chosen))


def _above(scores: Scores, count: int) -> Mask:
    """Mark the weights above the lowest positive threshold that at most `count` exceed."""
    # Bisection counts without putting all scores side by side, which for a large model would be one more of it.
    low, high = 0.0, max(float(values.max()) for values in scores.values())
    if _n_above(scores, low) > count:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if _n_above(scores, middle) <= count else (middle, high)
        low = high
    marks = {name: values > low for name, values in scores.items()}
    return {name: marked for name, marked in marks.items() if bool(marked.any())}


def _n_above(scores: Scores, threshold: float) -> int:
    return sum(int((values > threshold).sum()) for values in scores.values())


def matched(found: Located, parts: Sequence[Part], matrices: Sequence[Matrix], seed: int) -> Mask:
    """Return the mask of a random set of the same size, with as many parts (or weights) from the same matrices.

    It is drawn from what was not located, as long as enough of that is left: a random set that holds located parts says
    nothing about how special they are. Of whole matrices the others of the same kind and shape are drawn from.

    Args:
        found: the located set.
        parts: all parts of its level.
        matrices: the model's.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    if found.parts is None:
        return {name: _like(marked, rng) for name, marked in found.mask.items()}
    kinds = {matrix.name: (matrix.kind, tuple(matrix.parameter.shape)) for matrix in matrices}
    groups: dict[Hashable, list[int]] = {}
    for index, part in enumerate(parts):
        names = tuple(one.name for one in part.slices)
        groups.setdefault(kinds[names[0]] if part.level == "tensor" else names, []).append(index)
    return mask_of([parts[index] for index in matched_indices(found.parts, list(groups.values()), rng)], matrices)


def matched_indices(chosen: Sequence[int], groups: Sequence[Sequence[int]], rng: np.random.Generator) -> list[int]:
    """Return as many random indices of each group as were chosen of it; of those not chosen, if enough are left."""
    drawn: list[int] = []
    for group in groups:
        taken = set(group) & set(chosen)
        left = [index for index in group if index not in taken]
        pool = left if len(left) >= len(taken) else group
        drawn += rng.choice(pool, len(taken), replace=False).tolist()
    return drawn


def _like(marked: Tensor, rng: np.random.Generator) -> Tensor:
    flat = marked.flatten().cpu()
    count = int(flat.sum())
    left = (~flat).nonzero().flatten()
    pool = left if len(left) >= count else torch.arange(len(flat))
    drawn = torch.zeros_like(flat)
    drawn[pool[torch.from_numpy(rng.choice(len(pool), count, replace=False))]] = True
    return drawn.view(marked.shape).to(marked.device)
