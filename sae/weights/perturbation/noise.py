"""Random and gradient-directed perturbations: of all weights at once, the classical way, and of one part at a time.

Sizes are relative: noise of size e has a standard deviation of e times the root mean square of the matrix it is added
to, so that it has about e times the norm of what it perturbs.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError
from sae.lm.matrices import Matrix, Part
from sae.weights.perturbation.located import Array, Located, Meter, Metric, Moments, Progress
from sae.weights.perturbation.regions import Region, regions

Gradients = Callable[[], Mapping[str, Tensor]]
"""The gradient of the metric's mean, matrix name to a tensor of its shape, under the weights as they are now."""


def _sizes(parameters: Mapping[str, Tensor], relative: float) -> dict[str, float]:
    """Standard deviation of the noise in each matrix."""
    if not relative > 0:
        raise UserError(f"noise of relative size {relative}: give a number above 0, such as 0.1.")
    return {
        name: relative * float(values.detach().float().square().mean().sqrt()) for name, values in parameters.items()
    }


def plain(
    metric: Metric,
    matrices: Sequence[Matrix],
    parts: Sequence[Part],
    *,
    budget: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    relative: float = 0.1,
) -> Located:
    """Perturb all weights at once, many times, and rank parts by the mean absolute change of the metric.

    The classical procedure. Here to be measured, not to be used: since everything is perturbed in every draw, the mean
    absolute change is the same for all parts, but for how much of each draw's noise fell on a part, by which the
    change is weighted. Where the metric is linear with gradient g (per weight, times the noise's standard
    deviation there) and a part has k weights, its score estimates

        sqrt(2 / pi) ||g|| (1 + ||g_part||^2 / (||g||^2 k)),

    the same number for every part but for its share of the gradient over k, while a single draw scatters by
    sqrt(pi / k) of it. To tell a part of 400 weights that has a tenth of the gradient from one that has none, by two
    standard errors, takes a million draws.

    Args:
        metric: see `sae.weights.perturbation.located.Metric`.
        matrices: all that are perturbed, whether parts lie in them or not.
        parts: what to score.
        budget: evaluations of the metric, at most; each draw is one.
        seed: of the noise.
        progress: called at every evaluation.
        relative: size of the noise.
    """
    meter = Meter("plain", metric, matrices, parts, budget, seed, progress)
    sizes, shares = _sizes(meter.parameters, relative), _Shares(parts)
    whole = [
        Region(matrix.name, 0, torch.arange(len(matrix.parameter), device=matrix.parameter.device))
        for matrix in matrices
    ]
    layer = min(matrix.layer for matrix in matrices)
    source, found = torch.Generator().manual_seed(seed), Moments(len(parts))
    while meter.left:
        noise: dict[str, Tensor] = {}

        def add(region: Region, values: Tensor, noise: dict[str, Tensor] = noise) -> Tensor:
            noise[region.name] = torch.randn(values.shape, generator=source)
            return values + sizes[region.name] * noise[region.name].to(values.device)

        change = abs(float((meter.under(whole, add, layer) - meter.clean).mean()))
        found.add(slice(None), change * shares.of(noise))
        meter.note(lambda: found.mean)
    return meter.located(found.mean, found.error)


class _Shares:
    """How much of a draw of unit noise fell on each part: its mean square over the part's weights."""

    def __init__(self, parts: Sequence[Part]) -> None:
        places: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for index, part in enumerate(parts):
            for one in part.slices:
                places.setdefault((one.name, one.axis), []).extend((row, index) for row in range(one.start, one.stop))
        self._places = {key: torch.tensor(pairs).T for key, pairs in places.items()}
        self._n = len(parts)

    def of(self, noise: Mapping[str, Tensor]) -> Float[Array, " part"]:
        """Shares in a draw, 1 on average."""
        total = torch.zeros(self._n, dtype=torch.float64)
        count = torch.zeros(self._n, dtype=torch.float64)
        for (name, axis), (rows, owner) in self._places.items():
            squares = noise[name].double().square().sum(dim=1 - axis)
            total.index_add_(0, owner, squares[rows])
            count.index_add_(0, owner, torch.full_like(squares[rows], noise[name].shape[1 - axis]))
        return (total / count).numpy()


def random(
    metric: Metric,
    matrices: Sequence[Matrix],
    parts: Sequence[Part],
    *,
    budget: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    relative: float = 0.5,
) -> Located:
    """Perturb one part at a time, by noise and by its opposite, and see how far the metric moves.

    Each pair gives half the difference, in which even orders cancel (first order: g . noise), and half the sum less
    the clean metric, in which odd ones do (second order: noise . H noise / 2). All parts get the same noise as far as
    their shapes agree, on the same prompts, so that they are compared under one draw; estimates of different parts are
    therefore not independent. Parts take their turns in a random order, one pair each, until the budget is spent.

    Args:
        metric: see `sae.weights.perturbation.located.Metric`.
        matrices: those that the parts lie in.
        parts: what to score.
        budget: evaluations of the metric, at most; each pair is two.
        seed: of the noise and the order.
        progress: called at every evaluation.
        relative: size of the noise.

    Returns:
        Scores: the mean square of the first-order effect, unbiased for s^2 ||g||^2 in each part where the metric is
        of second order at most. `detail`: ``second``, unbiased for s^2 tr(H) / 2, with ``second_error``. Parts whose
        turn never came score as the mean of the others, with an infinite error.
    """
    meter = Meter("random", metric, matrices, parts, budget, seed, progress)
    sizes, rng = _sizes(meter.parameters, relative), np.random.default_rng(seed)
    first, second = Moments(len(parts)), Moments(len(parts))
    clean = float(meter.clean.mean())

    def scores() -> Array:
        seen = first.count > 0
        return np.where(seen, first.mean, first.mean[seen].mean()) if seen.any() else first.mean

    where: dict[int, list[Region]] = {}
    while meter.left >= 2:
        draw = int(rng.integers(2**31))
        for index in rng.permutation(len(parts)):
            if meter.left < 2:
                break
            own = where.setdefault(index, regions([parts[index]], _device(meter)))
            up, down = (_moved(meter, own, parts[index].layer, sizes, draw, sign) for sign in (1.0, -1.0))
            first.add(index, ((up - down) / 2) ** 2)
            second.add(index, (up + down) / 2 - clean)
            meter.note(scores)
    return meter.located(scores(), first.error, {"second": second.mean, "second_error": second.error})


def _device(meter: Meter) -> torch.device:
    return next(iter(meter.parameters.values())).device


def _moved(
    meter: Meter, where: Sequence[Region], layer: int, sizes: Mapping[str, float], draw: int, sign: float
) -> float:
    """The metric's mean with a draw of noise in some regions."""
    source = torch.Generator().manual_seed(draw)

    def add(region: Region, values: Tensor) -> Tensor:
        # A column's noise lies along it as a row's does, so that parts of different axes share draws, too.
        line = values.movedim(region.axis, 0)
        noise = torch.randn(line.shape, generator=source).movedim(0, region.axis)
        return values + sign * sizes[region.name] * noise.to(values.device)

    return float(meter.under(where, add, layer).mean())


def gradient_directed(
    metric: Metric,
    matrices: Sequence[Matrix],
    parts: Sequence[Part],
    *,
    gradients: Gradients,
    budget: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    relative: float = 0.1,
) -> Located:
    """Perturb one part at a time along its own gradient, to and fro: the first-order effect in the worst direction.

    The step has the given norm relative to what noise of that size would have in the part. Parts are measured in the
    order of what the gradient promises; those the budget does not reach keep that promise as their score.

    Args:
        metric: see `sae.weights.perturbation.located.Metric`.
        matrices: those that the parts lie in.
        parts: what to score.
        gradients: called once; not counted as an evaluation (a backward pass costs about two).
        budget: evaluations of the metric, at most; each part takes two.
        seed: unused, nothing is drawn.
        progress: called at every evaluation.
        relative: size of the step.

    Returns:
        Scores: half the difference of the metric at both ends; relative size times norm times ||g|| while the metric is
        linear that far. Errors: over prompts. `detail`: ``promised``, what the gradient said.

    Raises:
        UserError: the gradients lack a matrix.
    """
    meter = Meter("gradient_directed", metric, matrices, parts, budget, seed, progress)
    sizes, slopes = _sizes(meter.parameters, relative), gradients()
    where = [regions([part], _device(meter)) for part in parts]
    lacking = sorted({region.name for own in where for region in own} - set(slopes))
    if lacking:
        raise UserError(f"the gradients lack {lacking[0]!r}: give one for every matrix that parts lie in.")
    # Each matrix is measured in units of its own noise, as `random` does: steepest there is s^2 g.
    steep = [math.sqrt(sum(float((sizes[r.name] * r.of(slopes[r.name])).square().sum()) for r in own)) for own in where]
    length = [math.sqrt(sum(r.of(slopes[r.name]).numel() for r in own)) for own in where]
    promised = np.array([one * far for one, far in zip(steep, length, strict=True)])
    scores, errors = promised.copy(), np.full(len(parts), np.inf)
    for index in np.argsort(-promised, kind="stable"):
        if meter.left < 2 or steep[index] == 0:
            break
        up, down = (
            _stepped(meter, where[index], parts[index].layer, sizes, slopes, sign * length[index] / steep[index])
            for sign in (1.0, -1.0)
        )
        half = (up - down) / 2
        scores[index] = half.mean()
        errors[index] = half.std(ddof=1) / math.sqrt(len(half)) if len(half) > 1 else np.inf
        meter.note(lambda: scores)
    return meter.located(scores, errors, {"promised": promised})


def _stepped(
    meter: Meter,
    where: Sequence[Region],
    layer: int,
    sizes: Mapping[str, float],
    slopes: Mapping[str, Tensor],
    step: float,
) -> Float[Array, " n"]:
    """The metric with some regions moved along their gradient."""

    def add(region: Region, values: Tensor) -> Tensor:
        return values + step * sizes[region.name] ** 2 * region.of(slopes[region.name]).to(values)

    return meter.under(where, add, layer)
