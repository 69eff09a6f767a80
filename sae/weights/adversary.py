"""The worst case for a located set: masks on everything else, chosen by gradients against what is claimed of it.

A *mask* is a number for a head or neuron: W_part -> base + a (W_part - base), with base zero or a reference's values. 1
leaves the part as it is, 0 puts it to the base, above 1 amplifies it. Weights of the located set are never masked,
whichever part they lie in. Masks are found by projected gradient steps on the mean margin (Madry et al. 2018,
1706.06083, on masks instead of inputs), from no mask and from random ones, on prompts to find and to choose on; what is
said of them is measured on prompts to report on.

- *Removed*: the set is cut, and masks are to bring the behaviour back, in balls around 1 and in a wide box. Redundant
  parts that hid while the set was there may do so. A thousand masks together make nearly any behaviour from what is
  left once they may be far from 1: the same attack on prompts on which the behaviour is not due tells the one from the
  other, and small balls tell most.
- *Kept*: the set is left alone, and masks on all that was called unimportant are to take the behaviour away.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.behavior.measure import Progress
from sae.errors import UserError
from sae.lm.matrices import Matrix, Part
from sae.weights import edit
from sae.weights.bars import GONE
from sae.weights.edit import Mask, Weights
from sae.weights.levels import aggregate, parts_of
from sae.weights.objective import Objective
from sae.weights.perturbation.regions import Region, by_name, edited, regions

Array = np.ndarray
OVERSHOOT = 2.5  # total length of the steps, in half-widths of the box


class Box(NamedTuple):
    """What every mask may be."""

    name: str
    low: float
    high: float


FREE = Box("free", 0.0, 2.0)  # from taken away to doubled
EPSILONS = (0.02, 0.05, 0.1)


class Prompts(NamedTuple):
    """Margins as objectives: where masks are found, and where they are reported."""

    fit: Objective
    report: Objective


class Seen(NamedTuple):
    """Mean margin, and share of prompts on which it is above 0; of the report split."""

    margin: float
    rate: float


class Attacked(NamedTuple):
    """Without masks and with the worst ones found."""

    before: Seen
    after: Seen


class Removed(NamedTuple):
    """With a set cut: do masks on the rest bring the behaviour back?

    Attributes:
        box, low, high: what masks may be.
        located: the located set is cut.
        random: as large a random set is cut instead.
        not_due: the located set is cut, and masks are found and measured where the behaviour is not due.
        comes_back: its rate ends above `GONE`, and at most half as high where it is not due; None where the attack says
            nothing, since the cut had left the behaviour or the attack makes it where it is not due, too.
    """

    box: str
    low: float
    high: float
    located: Attacked
    random: Attacked
    not_due: Attacked
    comes_back: bool | None


class Kept(NamedTuple):
    """With a set left alone: do masks on the rest take the behaviour away?

    Attributes:
        box, low, high: what masks may be.
        located: all is masked but the located set.
        random_set: all is masked but as large a random set.
        random_mean, random_worst: random masks on all but the located set: mean over the draws, and the draw with the
            lowest mean margin.
    """

    box: str
    low: float
    high: float
    located: Attacked
    random_set: Attacked
    random_mean: Seen
    random_worst: Seen


class Adversary(NamedTuple):
    """Both worst cases of a located set; `n_parts` heads and neurons were masked."""

    n_parts: int
    removed: tuple[Removed, ...]
    kept: tuple[Kept, ...]


class Masks:
    """Masks on parts, but for a set of weights, under the weights as they are when this is made.

    Holds a copy of the matrices that parts lie in; another while masks are applied.

    Attributes:
        parts: those that have weights outside the set.
    """

    def __init__(self, matrices: Sequence[Matrix], parts: Sequence[Part], fixed: Mask, base: Weights | None) -> None:
        """Take the weights as they are.

        Args:
            matrices: the model's.
            parts: what is masked, none of them overlapping.
            fixed: weights that are not.
            base: where a mask of 0 puts weights; zero if None.

        Raises:
            UserError: no part has a weight outside the set.
        """
        self._fixed, self._base = fixed, base
        self.parts = [
            part
            for part in parts
            if not all(one.name in fixed and bool(one.of(fixed[one.name]).all()) for one in part.slices)
        ]
        if not self.parts:
            raise UserError("the located set holds every head and neuron: nothing is left to mask.")
        self._parameters = by_name(matrices, self.parts)
        device = next(iter(self._parameters.values())).device
        self._where = regions(self.parts, device)
        owner: dict[tuple[str, int], list[int]] = {}
        for index, part in enumerate(self.parts):
            for one in part.slices:
                owner.setdefault((one.name, one.axis), []).extend([index] * (one.stop - one.start))
        self._owner = {key: torch.tensor(index, device=device) for key, index in owner.items()}
        self._start = {region.name: self._parameters[region.name].detach().clone() for region in self._where}
        self._pieces = {name: _within(self.parts, name) for name in self._start}

    @contextlib.contextmanager
    def applied(self, masks: Float[Array, " part"]) -> Iterator[None]:
        """Context in which the parts are masked."""
        line = torch.from_numpy(masks)

        def change(region: Region, values: Tensor) -> Tensor:
            own = line.to(values)[self._owner[region.name, region.axis]]
            base = 0.0 if self._base is None else region.of(self._base[region.name].to(values))
            new = base + (own[:, None] if region.axis == 0 else own[None]) * (values - base)
            fixed = self._fixed.get(region.name)
            return new if fixed is None else torch.where(region.of(fixed.to(values.device)), values, new)

        with edited(self._parameters, self._where, change):
            yield

    def gradient(
        self, objective: Objective, masks: Float[Array, " part"]
    ) -> tuple[Float[Array, " n"], Float[Array, " part"]]:
        """Return every prompt's value under masks, and the gradient of their mean by the masks; 3 evaluations."""
        slope = np.zeros(len(self.parts))

        def receive(matrix: Matrix, gradient: Tensor) -> None:
            if matrix.name in self._pieces:
                index, own = self._pieces[matrix.name]
                slope[index] += aggregate({matrix.name: self._displacement(matrix.name).mul_(gradient)}, own)

        with self.applied(masks):
            values = objective.gradients(receive)
        return values, slope

    def _displacement(self, name: str) -> Tensor:
        """How far each weight goes when its mask goes from 0 to 1; zero in the set."""
        found = self._start[name].float()
        found = found.clone() if self._base is None else found - self._base[name].to(found)
        return found.masked_fill_(self._fixed[name].to(found.device), 0.0) if name in self._fixed else found


def _within(parts: Sequence[Part], name: str) -> tuple[list[int], list[Part]]:
    """Which parts lie in a matrix, and their slices of it."""
    found = [(index, tuple(one for one in part.slices if one.name == name)) for index, part in enumerate(parts)]
    return (
        [index for index, own in found if own],
        [parts[index]._replace(slices=own) for index, own in found if own],
    )


@dataclass
class Arena:
    """What attacks are made with and measured on.

    Attributes:
        matrices: the model's.
        parts: what is masked: heads and neurons.
        due, not_due: prompts on which the behaviour is due, and on which it is not.
        epsilons: half-widths of the balls around 1.
        steps: of an attack, from each start.
        restarts: starts of an attack; the first is no mask at all, the others are random.
        n_random: random masks that the worst ones are compared with.
        seed: of starts and of random masks.
        progress: called after every start.
    """

    matrices: list[Matrix]
    parts: list[Part]
    due: Prompts
    not_due: Prompts
    epsilons: Sequence[float] = EPSILONS
    steps: int = 8
    restarts: int = 2
    n_random: int = 5
    seed: int = 0
    progress: Progress | None = None

    @property
    def balls(self) -> list[Box]:
        """Around leaving parts as they are."""
        return [Box("ball", 1.0 - epsilon, 1.0 + epsilon) for epsilon in self.epsilons]

    def run(self, located: Mask, drawn: Mask, mode: str = "zero", reference: Weights | None = None) -> Adversary:
        """Attack both claims about a located set.

        Args:
            located: its weights.
            drawn: those of as large a random set.
            mode: what cut weights become, of `sae.weights.edit.MODES`.
            reference: another model's matrices; masks then lead to these, where cut weights do.

        Raises:
            UserError: the set is all there is.
        """
        base = reference if mode == "restore" else None
        kept = self.balls if reference is None else [Box("to_reference", 0.0, 1.0)]
        n_parts = len(Masks(self.matrices, self.parts, located, base).parts)
        removed = tuple(self._removed(box, located, drawn, mode, reference, base) for box in (*self.balls, FREE))
        return Adversary(n_parts, removed, tuple(self._kept(box, located, drawn, reference) for box in kept))

    def _removed(
        self, box: Box, located: Mask, drawn: Mask, mode: str, reference: Weights | None, base: Weights | None
    ) -> Removed:
        def attacked(mask: Mask, prompts: Prompts) -> Attacked:
            with edit.replaced(self.matrices, mask, mode, reference):
                return self.attack(Masks(self.matrices, self.parts, mask, base), prompts, box, 1.0)

        own, control = attacked(located, self.due), attacked(located, self.not_due)
        says = own.before.rate <= GONE and (own.after.rate <= GONE or control.after.rate <= own.after.rate / 2)
        back = own.after.rate > GONE if says else None
        return Removed(*box, own, attacked(drawn, self.due), control, back)

    def _kept(self, box: Box, located: Mask, drawn: Mask, base: Weights | None) -> Kept:
        rng = np.random.default_rng(self.seed)
        masks = Masks(self.matrices, self.parts, located, base)
        seen = []
        for _ in range(self.n_random):
            with masks.applied(rng.uniform(box.low, box.high, len(masks.parts))):
                seen.append(_seen(self.due.report))
        mean = Seen(*np.mean(seen, axis=0).tolist()) if seen else Seen(float("nan"), float("nan"))
        worst = min(seen, key=lambda one: one.margin, default=mean)
        own = self.attack(masks, self.due, box, -1.0)
        other = self.attack(Masks(self.matrices, self.parts, drawn, base), self.due, box, -1.0)
        return Kept(*box, own, other, mean, worst)

    def attack(self, masks: Masks, prompts: Prompts, box: Box, sign: float) -> Attacked:
        """Find the masks that raise (sign 1) or lower (-1) the mean margin most, and measure them."""
        before = _seen(prompts.report)
        with masks.applied(self.worst(masks, prompts.fit, box, sign)):
            return Attacked(before, _seen(prompts.report))

    def worst(self, masks: Masks, objective: Objective, box: Box, sign: float) -> Float[Array, " part"]:
        """Return the best masks of all that the steps passed; no mask is one of them."""
        rng, n = np.random.default_rng(self.seed), len(masks.parts)
        rate = OVERSHOOT * (box.high - box.low) / 2 / self.steps
        best, found = -np.inf, np.ones(n)
        for restart in range(self.restarts):
            now = np.ones(n) if restart == 0 else rng.uniform(box.low, box.high, n)
            for step in range(self.steps + 1):
                last = step == self.steps
                values, slope = _values(masks, objective, now) if last else masks.gradient(objective, now)
                if sign * float(values.mean()) > best:  # never where it is no number
                    best, found = sign * float(values.mean()), now
                now = np.clip(now + sign * rate * np.sign(slope), box.low, box.high)
            if self.progress is not None:
                self.progress(f"masks in the {box.name} box", restart + 1, self.restarts)
        return found


def maskable(lm: Any, matrices: list[Matrix]) -> tuple[list[Matrix], list[Part]]:
    """Return a model's heads and neurons, and the matrices that they lie in.

    Raises:
        UserError: a model with neither.
    """
    parts: list[Part] = []
    for level in ("head", "neuron"):
        with contextlib.suppress(UserError):  # one of them will do
            parts += parts_of(lm, matrices, level)
    if not parts:
        raise UserError(f"{lm.name!r} has no heads or neurons of a known kind to mask: leave localize.adversary=false.")
    names = {one.name for part in parts for one in part.slices}
    return [matrix for matrix in matrices if matrix.name in names], parts


def _values(masks: Masks, objective: Objective, now: Array) -> tuple[Array, Array]:
    with masks.applied(now):
        return objective.values(), np.zeros(len(now))


def _seen(objective: Objective) -> Seen:
    found = objective.values()
    return Seen(float(found.mean()), float((found > 0).mean()))
