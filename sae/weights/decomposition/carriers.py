"""Which components carry a behaviour, and what that says of single weights.

A component is first judged by the gradient: with G the gradient of the behaviour's mean margin to W, taking component c
out of every token lets the margin fall by U_c' G V_c to first order, which is the slope to its mask. For the largest,
the fall is then measured, with the component subtracted from its matrix.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.lm.matrices import Matrix
from sae.weights.attribution import Scores
from sae.weights.decomposition.components import Decomposition, oriented
from sae.weights.edit import rewritten
from sae.weights.objective import Objective, Passage
from sae.weights.responses import for_inputs

Progress = Callable[[str, int, int], None]


class Carrier(NamedTuple):
    """One component and what it is to a behaviour.

    Attributes:
        matrix, component: which.
        attribution: fall of the mean margin when it is taken out, to first order.
        effect: the fall as measured; None where it was not.
        due, other: its mean importance where replies are predicted, on the behaviour's prompts and on others.
    """

    matrix: str
    component: int
    attribution: float
    effect: float | None
    due: float
    other: float

    @property
    def fall(self) -> float:
        """The measured fall, or else the estimate."""
        return self.attribution if self.effect is None else self.effect


class Carried(NamedTuple):
    """What carries an objective.

    Attributes:
        components: all of them: the measured ones, then the others, each by how much they carry.
        gradient: of the objective, by matrix.
    """

    components: list[Carrier]
    gradient: Scores


def find_carriers(
    lm: Any,
    decomposition: Decomposition,
    objective: Objective,
    due: Passage,
    other: Passage,
    n_measured: int = 64,
    progress: Progress | None = None,
) -> Carried:
    """Find the components that carry an objective.

    Args:
        lm: the model.
        decomposition: of the objective's matrices.
        objective: a behaviour's margin, say. Evaluations: 3 for the gradient, 1, and 1 for each measured component.
        due: replies where the behaviour is due, on which importances are averaged.
        other: replies where it is not, for comparison.
        n_measured: components, of the largest attributions by size, whose effect is measured.
        progress: told after each.
    """
    gradient = objective.gradient()
    matrices = {matrix.name: matrix for matrix in objective.matrices}
    slopes = {}
    for one in decomposition:
        g = gradient[one.name] if matrices[one.name].out_axis == 0 else gradient[one.name].t()
        slopes[one.name] = ((one.U @ g) * one.V).sum(dim=1).detach()
    means = [_mean_importance(lm, decomposition, passage, objective.matrices) for passage in (due, other)]
    order = sorted(
        ((name, index) for name, values in slopes.items() for index in range(len(values))),
        key=lambda key: -abs(float(slopes[key[0]][key[1]])),
    )
    effects = _measured(decomposition, objective, matrices, order[:n_measured], progress)
    found = [
        Carrier(
            name, index, float(slopes[name][index]), effects.get((name, index)),
            *(float(mean[name][index]) for mean in means),
        )
        for name, index in order
    ]  # fmt: skip
    return Carried(sorted(found, key=lambda one: (one.effect is None, -one.fall)), gradient)


def _measured(
    decomposition: Decomposition,
    objective: Objective,
    matrices: dict[str, Matrix],
    chosen: Sequence[tuple[str, int]],
    progress: Progress | None,
) -> dict[tuple[str, int], float]:
    before = float(objective.values().mean())
    found = {}
    for number, (name, index) in enumerate(chosen):
        new = oriented(matrices[name]) - decomposition.pieces(name).component(index)
        new = new if matrices[name].out_axis == 0 else new.t()
        with rewritten(objective.matrices, {name: new}):
            found[name, index] = before - float(objective.values().mean())
        if progress is not None:
            progress("components measured", number + 1, len(chosen))
    return found


@torch.no_grad()
def _mean_importance(
    lm: Any, decomposition: Decomposition, passage: Passage, matrices: Sequence[Matrix]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def see(matrix: Matrix, x: Tensor) -> None:
        one = decomposition.pieces(matrix.name).importance(x).masks.sum(dim=0)
        sums[matrix.name] = sums.get(matrix.name, 0) + one

    n_tokens = for_inputs(lm, passage, matrices, see)
    return {name: total / n_tokens for name, total in sums.items()}


@torch.no_grad()
def weight_scores(decomposition: Decomposition, found: Carried, matrices: Sequence[Matrix]) -> Scores:
    """Return, of each weight, what the components that carry the objective put into it, times the objective's gradient.

    To first order the fall of the objective when that share of the weight goes: `taylor`'s score without the components
    that carry nothing or work against it. Scores add up to those components' attributions.
    """
    carrying: dict[str, list[int]] = {}
    for one in found.components:
        if one.fall > 0:
            carrying.setdefault(one.matrix, []).append(one.component)
    scores = {}
    for matrix in matrices:
        pieces, chosen = decomposition.pieces(matrix.name), carrying.get(matrix.name, [])
        share = pieces.U[chosen].t() @ pieces.V[chosen]
        scores[matrix.name] = (share if matrix.out_axis == 0 else share.t()) * found.gradient[matrix.name]
    return scores
