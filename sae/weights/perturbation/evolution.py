"""Evolution strategies: the metric's gradient from evaluations alone, for metrics that have none.

Block by block (all parts of a level in one layer), everything in a block is perturbed at once, by a draw and by its
opposite; half the difference times the draw is, on average, the gradient (Salimans et al. 2017, arXiv:1703.03864;
Spall 1992). What a block's other parts do is noise in a part's estimate, which falls with the number of draws, not
with the number of parts: hundreds are estimated from tens of draws, roughly.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sae.errors import UserError, unknown
from sae.lm.matrices import Matrix, Part
from sae.weights.perturbation.located import Array, Located, Meter, Metric, Moments, Progress
from sae.weights.perturbation.regions import Region, regions

Space = Literal["parts", "weights"]
SPACES = ("parts", "weights")


def evolution(
    metric: Metric,
    matrices: Sequence[Matrix],
    parts: Sequence[Part],
    *,
    budget: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    space: Space = "parts",
    relative: float = 0.1,
) -> Located:
    """Estimate, for every part, how fast the metric falls as the part is taken away, without gradients.

    That is the sum of W * gradient over a part's last slice, its output: what SNIP sums without its absolute value.

    Args:
        metric: see `sae.weights.perturbation.located.Metric`.
        matrices: those that the parts lie in.
        parts: what to score, none of them overlapping.
        budget: evaluations of the metric, at most; each pair is two.
        seed: of the draws.
        progress: called at every evaluation.
        space: what is drawn. ``"parts"``: one sign for each part, which scales its output by 1 + sign * relative; the
            variance of an estimate is the sum of the squares of the block's other effects, over the number of pairs.
            ``"weights"``: Gaussian noise in every weight of the outputs, projected on them afterwards; the
            variance is ||W_part||^2 ||gradient of the block||^2 over the number of pairs, much more as a rule.
        relative: size of the draws.

    Returns:
        Scores: estimates, unbiased where the metric is of second order at most; errors: their standard errors.

    Raises:
        UserError: no such space, or a size that is not above 0.
    """
    if space not in SPACES:
        raise unknown("space", space, list(SPACES))
    if not relative > 0:
        raise UserError(f"draws of relative size {relative}: give a number above 0, such as 0.1.")
    meter = Meter("evolution", metric, matrices, parts, budget, seed, progress)
    device = next(iter(meter.parameters.values())).device
    blocks = [_Block(parts, members, device) for members in _blocks(parts)]
    rng, found = np.random.default_rng(seed), Moments(len(parts))
    while meter.left >= 2:
        for block in blocks:
            if meter.left < 2:
                break
            found.add(block.members, block.pair(meter, rng, space, relative))
            meter.note(lambda: found.mean)
    return meter.located(found.mean, found.error)


def _blocks(parts: Sequence[Part]) -> list[list[int]]:
    found: dict[tuple[int, str], list[int]] = {}
    for index, part in enumerate(parts):
        found.setdefault((part.layer, part.level), []).append(index)
    return list(found.values())


class _Block:
    """The outputs of some parts of one layer, and which line of which matrix is whose."""

    def __init__(self, parts: Sequence[Part], members: Sequence[int], device: torch.device) -> None:
        own = [parts[index]._replace(slices=parts[index].slices[-1:]) for index in members]
        self.members, self.layer = np.array(members), min(part.layer for part in own)
        self.where = regions(own, device)
        lines: dict[tuple[str, int], list[int]] = {}
        for number, part in enumerate(own):
            for one in part.slices:
                lines.setdefault((one.name, one.axis), []).extend([number] * (one.stop - one.start))
        self._owner = {key: torch.tensor(numbers, device=device) for key, numbers in lines.items()}

    def pair(self, meter: Meter, rng: np.random.Generator, space: Space, relative: float) -> Array:
        """One pair's estimate for every member."""
        if space == "parts":
            signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=len(self.members)))
            up, down = (self._scaled(meter, sign * relative * signs) for sign in (1.0, -1.0))
            return (up - down) / (2 * relative) * signs.numpy()
        draw = int(rng.integers(2**31))
        noise = self._noise(meter, draw)
        up, down = (self._shifted(meter, noise, sign * relative) for sign in (1.0, -1.0))
        return (up - down) / (2 * relative) * self._along_weights(meter, noise)

    def _line(self, region: Region, values: Tensor, numbers: Tensor) -> Tensor:
        """One number for each part, laid along its rows or columns."""
        line = numbers.to(values)[self._owner[region.name, region.axis]]
        return line[:, None] if region.axis == 0 else line[None]

    def _scaled(self, meter: Meter, by: Tensor) -> float:
        def scale(region: Region, values: Tensor) -> Tensor:
            return values * (1 + self._line(region, values, by))

        return float(meter.under(self.where, scale, self.layer).mean())

    def _noise(self, meter: Meter, draw: int) -> dict[tuple[str, int], Tensor]:
        """Noise of each matrix's root mean square in the outputs."""
        source = torch.Generator().manual_seed(draw)
        found = {}
        for region in self.where:
            values = meter.parameters[region.name].detach().float()
            shape = region.of(values).shape
            found[region.name, region.axis] = values.square().mean().sqrt() * torch.randn(shape, generator=source).to(
                values.device
            )
        return found

    def _shifted(self, meter: Meter, noise: dict[tuple[str, int], Tensor], by: float) -> float:
        def shift(region: Region, values: Tensor) -> Tensor:
            return values + by * noise[region.name, region.axis]

        return float(meter.under(self.where, shift, self.layer).mean())

    def _along_weights(self, meter: Meter, noise: dict[tuple[str, int], Tensor]) -> Array:
        """Sum of weight times noise, in units of the noise's variance, for each member."""
        total = torch.zeros(len(self.members), dtype=torch.float64)
        for region in self.where:
            key = (region.name, region.axis)
            values = meter.parameters[region.name].detach().float()
            product = region.of(values) * noise[key] / values.square().mean()
            total.index_add_(0, self._owner[key].cpu(), product.sum(dim=1 - region.axis).double().cpu())
        return total.numpy()
