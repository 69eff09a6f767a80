"""What a perturbation method found, and the meter by which all of them measure: budget, curve, weights put back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError
from sae.lm.matrices import Matrix, Part
from sae.weights.perturbation.regions import Region, by_name, edited

Array = np.ndarray
Metric = Callable[[], Float[Array, " n"]]
"""Per-prompt values under the weights as they are now. One with a method `from_layer(layer)`, which gives the same
where no earlier layer has changed, is asked for that: see `sae.weights.perturbation.margins.MarginMetric`."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

GROWTH = 1.25  # evaluations from one snapshot to the next


class Snapshot(NamedTuple):
    """The scores as they stood after some evaluations."""

    evaluations: int
    scores: Float[Array, " part"]


@dataclass(frozen=True)
class Located:
    """What a method found about each of a list of parts, in its order.

    Attributes:
        method: its name.
        seed: of its draws.
        scores: larger is more the behaviour's; what they estimate is the method's to say. Metric's units.
        errors: standard errors of the scores; infinite where nothing was measured.
        evaluations: how often the metric was evaluated on all prompts, the first, of the model as it is, included.
        curve: scores after 1.25 times as many evaluations each, and at the end.
        detail: other numbers about each part, by name [part].
    """

    method: str
    seed: int
    scores: Float[Array, " part"]
    errors: Float[Array, " part"]
    evaluations: int
    curve: tuple[Snapshot, ...]
    detail: dict[str, Float[Array, " part"]] = field(default_factory=dict)


class Meter:
    """Evaluates a metric under edits, as often as a budget allows, and keeps the curve."""

    def __init__(
        self,
        method: str,
        metric: Metric,
        matrices: Sequence[Matrix],
        parts: Sequence[Part],
        budget: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        if budget < 3:
            raise UserError(f"a budget of {budget} evaluations: give at least 3, one of them for the model as it is.")
        self.method, self.seed, self.budget = method, seed, budget
        self.parameters = by_name(matrices, parts)
        self._metric, self._progress = metric, progress
        self._curve: list[Snapshot] = []
        self._next = 2.0
        self.evaluations = 1
        self.clean = np.asarray(metric(), dtype=np.float64)
        if self.clean.ndim != 1 or not len(self.clean) or not np.isfinite(self.clean).all():
            raise UserError(f"the metric gives {self.clean.shape} values, some not finite: give one number a prompt.")

    @property
    def left(self) -> int:
        """Evaluations left."""
        return self.budget - self.evaluations

    def under(
        self, where: Sequence[Region], change: Callable[[Region, Tensor], Tensor], layer: int
    ) -> Float[Array, " n"]:
        """The metric with regions changed, none of them before a layer."""
        with edited(self.parameters, where, change):
            return self.now(layer)

    def now(self, layer: int) -> Float[Array, " n"]:
        """The metric under the weights as they are, none before a layer changed; not a number counts as no change."""
        assert self.left > 0, "over budget"
        self.evaluations += 1
        started = getattr(self._metric, "from_layer", None)
        values = np.asarray(self._metric() if started is None else started(layer), dtype=np.float64)
        if self._progress is not None:
            self._progress(self.method, self.evaluations, self.budget)
        return np.where(np.isfinite(values), values, self.clean)  # a model broken by noise says nothing

    def note(self, scores: Callable[[], Float[Array, " part"]]) -> None:
        """Keep a snapshot if one is due; asked for between probes."""
        if self.evaluations >= self._next:
            self._curve.append(Snapshot(self.evaluations, scores().copy()))
            self._next = max(self.evaluations + 1.0, math.ceil(self.evaluations * GROWTH))

    def located(self, scores: Array, errors: Array, detail: Mapping[str, Array] | None = None) -> Located:
        """What was found, with the last snapshot."""
        curve = [one for one in self._curve if one.evaluations < self.evaluations]
        curve.append(Snapshot(self.evaluations, scores.copy()))
        return Located(self.method, self.seed, scores, errors, self.evaluations, tuple(curve), dict(detail or {}))


class Moments:
    """Running means and standard errors of one number for each part."""

    def __init__(self, n: int) -> None:
        self.count, self._sum, self._squares = np.zeros(n), np.zeros(n), np.zeros(n)

    def add(self, index: "int | Array | slice", value: "float | Array") -> None:
        """Add an observation of one part, or of several."""
        self.count[index] += 1
        self._sum[index] += value
        self._squares[index] += np.square(value)

    @property
    def mean(self) -> Float[Array, " part"]:
        """Means; 0 where there are no observations."""
        return self._sum / np.maximum(1, self.count)

    @property
    def error(self) -> Float[Array, " part"]:
        """Standard errors of the means; infinite with fewer than two observations."""
        spread = np.maximum(0.0, self._squares - self.count * self.mean**2)
        return np.where(
            self.count > 1, np.sqrt(spread / np.maximum(1, self.count - 1) / np.maximum(1, self.count)), np.inf
        )
