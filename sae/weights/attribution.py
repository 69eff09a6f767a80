"""How much of a behaviour each single weight carries, by its value, its gradient and its input.

Scores are `{matrix name: tensor of the matrix's shape}` in float32, larger = more the behaviour's:

- `taylor`, (W - W0) * gradient of the mean margin: by how much the margin falls, to first order, when the weight goes
  to its baseline W0 (zero, or a reference model's value). Signed, so that sums over parts are estimates, too
  (Molchanov et al. 2019, 1906.10771).
- `snip`, its absolute value (Lee et al. 2019, 1810.02340; as in Wei et al. 2024, 2402.05162).
- `integrated_gradients`, (W - W0) * mean gradient along the straight path from W0 to W: sums to the whole change of
  the margin between the two (Sundararajan et al. 2017, 1703.01365).
- `fisher`, (W - W0)^2 * mean over prompts of the squared gradient (Theis et al. 2018, 1801.05787).
- `sensitivity`, |W - W0| * mean over prompts of the gradient's size: `snip` without prompts cancelling (Wei et al.).
- `wanda`, |W| * norm of its input over the reply's tokens (Sun et al. 2024, 2306.11695; Wei et al.).
- `act_svd`, the squared entries of (I - Pi_u) Pi_s W, where Pi projects on the leading directions of a matrix's outputs
  over the behaviour's (s) and over other (u) replies (Wei et al.).
- `weight_difference`, |W - W_reference|; `activation_difference`, squared differences of what heads and neurons give in
  the model and with the reference's matrices (Chen et al. 2024, 2406.14144, by their mean square).

Memory: the scores are one more model in float32. The weights that `integrated_gradients` and `activation_difference`
move are kept on disk meanwhile.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.behavior.measure import Progress
from sae.errors import UserError
from sae.lm.matrices import Matrix
from sae.weights.edit import Weights, rewritten
from sae.weights.objective import Objective, Passage
from sae.weights.responses import gathered_inputs, input_norms
from sae.weights.restore import put_back
from sae.weights.stored import Stored

Scores = Mapping[str, Tensor]

IG_STEPS = 16
SVD_TOKENS = 1024


def _displacement(matrix: Matrix, baseline: Weights | None) -> Tensor:
    """W - W0 in float32."""
    now = matrix.parameter.detach().float()
    return now.clone() if baseline is None else now - baseline[matrix.name].to(now)


def _zeros(matrices: Sequence[Matrix]) -> dict[str, Tensor]:
    return {matrix.name: torch.zeros_like(matrix.parameter, dtype=torch.float32) for matrix in matrices}


def taylor(objective: Objective, baseline: Weights | None = None) -> Scores:
    """Return the first-order fall of the objective when each weight goes to its baseline (zero if None)."""
    found = objective.gradient()
    for matrix in objective.matrices:
        found[matrix.name].mul_(_displacement(matrix, baseline))
    return found


def snip(objective: Objective, baseline: Weights | None = None) -> Scores:
    """Return the size of that fall."""
    return {name: values.abs_() for name, values in taylor(objective, baseline).items()}


def integrated_gradients(
    objective: Objective,
    baseline: Weights | None = None,
    steps: int = IG_STEPS,
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> Scores:
    """Return each weight's share of the objective's change along the straight path from the baseline to the model.

    Args:
        objective: what changes.
        baseline: where the path begins; zero if None.
        steps: midpoints at which the gradient is taken.
        progress: called after every step.
        scratch: folder in which the model's weights are kept meanwhile; the system's temporary one if None.
    """
    found = _zeros(objective.matrices)

    def add(matrix: Matrix, gradient: Tensor) -> None:
        found[matrix.name].add_(gradient, alpha=1 / steps)

    parameters = {matrix.name: matrix.parameter for matrix in objective.matrices}
    with put_back(parameters, keep=functools.partial(Stored, folder=scratch)) as own:
        for step in range(steps):
            share = (step + 0.5) / steps
            with torch.no_grad():
                for number, matrix in enumerate(objective.matrices):
                    value = own[number] * share
                    if baseline is not None:
                        value += baseline[matrix.name].to(value) * (1 - share)
                    matrix.parameter.copy_(value)
            objective.gradients(add)
            if progress is not None:
                progress("integrated gradients", step + 1, steps)
    for matrix in objective.matrices:
        found[matrix.name].mul_(_displacement(matrix, baseline))
    return found


def fisher(objective: Objective, baseline: Weights | None = None, progress: Progress | None = None) -> Scores:
    """Return the mean over prompts of (displacement * the prompt's own gradient)^2."""
    return _over_prompts(objective, torch.square, baseline, progress, "fisher")


def sensitivity(objective: Objective, baseline: Weights | None = None, progress: Progress | None = None) -> Scores:
    """Return the mean over prompts of |displacement * the prompt's own gradient|."""
    return _over_prompts(objective, torch.abs, baseline, progress, "sensitivity")


def _over_prompts(
    objective: Objective,
    size: Callable[[Tensor], Tensor],
    baseline: Weights | None,
    progress: Progress | None,
    what: str,
) -> Scores:
    """The mean over prompts of the size of displacement times gradient, of which it is the product of sizes."""
    found, n = _zeros(objective.matrices), len(objective)
    last = objective.matrices[0].name  # a backward comes to the first matrix last

    def add(matrix: Matrix, gradient: Tensor, row: int) -> None:
        found[matrix.name].add_(size(gradient.float()), alpha=1 / n)
        if progress is not None and matrix.name == last:
            progress(what, row + 1, n)

    objective.prompt_gradients(add)
    for matrix in objective.matrices:
        found[matrix.name].mul_(size(_displacement(matrix, baseline)))
    return found


@torch.no_grad()
def wanda(lm: Any, passage: Passage, matrices: Sequence[Matrix]) -> Scores:
    """Return |W| times the norm of the weight's input over the passage's predicted tokens."""
    norms = input_norms(lm, passage, matrices)
    found = {}
    for matrix in matrices:
        size = matrix.parameter.detach().float().abs()
        norm = norms.get(matrix.name, torch.zeros(size.shape[1 - matrix.out_axis])).to(size)  # an expert never asked
        found[matrix.name] = size.mul_(norm if matrix.out_axis == 0 else norm[:, None])
    return found


def weight_difference(matrices: Sequence[Matrix], reference: Weights) -> Scores:
    """Return |W - W_reference|."""
    return {matrix.name: _displacement(matrix, reference).abs_() for matrix in matrices}


@torch.no_grad()
def activation_difference(
    lm: Any, passage: Passage, matrices: Sequence[Matrix], reference: Weights, scratch: Path | None = None
) -> Scores:
    """Return how differently heads and neurons act in the model and with the reference's matrices in it.

    The mean square difference of each input coordinate of attention's and MLP's output matrices, spread evenly over
    its column, so that a neuron's or head's sum is its own mean square difference; elsewhere zero. Embeddings and
    norms are the model's own in both. The model's matrices are kept in a folder meanwhile, `scratch`, or the system's
    temporary one.
    """
    ends = [matrix for matrix in matrices if matrix.kind in ("o", "out")]
    ours = gathered_inputs(lm, passage, ends)
    with rewritten(matrices, reference, keep=functools.partial(Stored, folder=scratch)):
        theirs = gathered_inputs(lm, passage, ends)
    found = _zeros(matrices)
    for matrix in ends:
        square = (ours[matrix.name] - theirs[matrix.name]).square().mean(dim=0)
        square /= matrix.parameter.shape[matrix.out_axis]
        found[matrix.name] += square if matrix.out_axis == 0 else square[:, None]
    return found


class Direction(NamedTuple):
    """One singular direction of what ActSVD would take from a matrix, which is the sum of gain * outer(out, into)."""

    matrix: Matrix
    number: int
    out: Float[Tensor, " d_out"]
    into: Float[Tensor, " d_in"]
    gain: float


@torch.no_grad()
def act_svd(
    lm: Any, shown: Passage, other: Passage, matrices: Sequence[Matrix], rank: int = 16, other_rank: int = 16
) -> dict[str, list[Direction]]:
    """Return the singular directions of (I - Pi_u) Pi_s W of every matrix, largest first.

    Pi_s projects on the `rank` leading left singular directions of the outputs W X over the behaviour's replies, Pi_u
    on the `other_rank` leading ones over other replies. A layer is run at a time, over at most `SVD_TOKENS` tokens.

    Raises:
        UserError: a rank below 1.
    """
    if min(rank, other_rank) < 1:
        raise UserError(f"ranks {rank} and {other_rank} of act_svd must be at least 1.")
    found = {}
    for layer in sorted({matrix.layer for matrix in matrices}):
        own = [matrix for matrix in matrices if matrix.layer == layer]
        inputs = [gathered_inputs(lm, passage, own, SVD_TOKENS) for passage in (shown, other)]
        for matrix in own:
            weight = matrix.parameter.detach().float()
            weight = weight if matrix.out_axis == 0 else weight.T
            if any(matrix.name not in given for given in inputs):
                continue
            kept, removed = (
                _leading(given[matrix.name] @ weight.T, k) for given, k in zip(inputs, (rank, other_rank), strict=True)
            )
            # The product has the rank of `kept`: its singular directions come from two thin factors.
            left, small = torch.linalg.qr(kept - removed @ (removed.T @ kept))
            u, s, vt = torch.linalg.svd(small @ (kept.T @ weight), full_matrices=False)
            out = left @ u
            found[matrix.name] = [
                Direction(matrix, k, out[:, k], vt[k], float(s[k])) for k in range(len(s)) if s[k] > 1e-6 * s[0]
            ]
    return found


def _leading(outputs: Float[Tensor, "token d_out"], rank: int) -> Float[Tensor, "d_out k"]:
    """The leading right singular directions of a matrix of outputs."""
    found: Tensor = torch.linalg.svd(outputs, full_matrices=False).Vh[:rank].T
    return found


def removed_by(directions: Sequence[Direction]) -> Scores:
    """Return the sum of some directions' products, in the matrices' shapes: what `without` takes away."""
    found: dict[str, Tensor] = {}
    for one in directions:
        product = one.gain * torch.outer(one.out, one.into)
        product = product if one.matrix.out_axis == 0 else product.T
        found[one.matrix.name] = found.get(one.matrix.name, 0) + product
    return found


def without(directions: Sequence[Direction]) -> Scores:
    """Return the values of the matrices concerned without some directions, for `rewritten`."""
    own = {one.matrix.name: one.matrix.parameter.detach().float() for one in directions}
    return {name: own[name] - product for name, product in removed_by(directions).items()}


def act_svd_scores(directions: dict[str, list[Direction]], matrices: Sequence[Matrix]) -> Scores:
    """Return the squared entries of what ActSVD takes away: sums over parts are its energy there."""
    found = _zeros(matrices)
    for name, own in directions.items():
        if own:
            found[name] = removed_by(own)[name].square_()
    return found
