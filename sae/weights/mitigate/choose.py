"""Weights that are put back, and the choice of the best ones within the side-effect budget, on the select split.

All methods choose alike. Of the weights whose KL on harmless prompts is within the budget, those are taken after which
the alternative comes most often (broken replies are no success); among equals those with the least KL. Where nothing
within the budget restores it more often than the model as it was, nothing is changed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.behavior.judge import Verdict
from sae.behavior.measure import Progress
from sae.errors import UserError
from sae.lm.weights import plain_parameters
from sae.weights import restore
from sae.weights.mitigate.case import Case, Gauge
from sae.weights.mitigate.settings import MitigationSettings

Weights = Mapping[str, Tensor]
"""Values of all parameters, on the CPU, by their Hugging Face names."""

_FITTING_ROUNDS = 6
_BELOW = 0.95  # aim a little below the budget: KL is only about quadratic in the change


def weights_now(lm: Any) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: own.detach().to("cpu", copy=True) for name, own in plain_parameters(lm).items()}


@torch.no_grad()
def put(lm: Any, values: Weights) -> None:
    """Write values into the parameters, in place; those not named stay.

    Raises:
        UserError: a name or shape that the model does not have; nothing is written then.
    """
    own = plain_parameters(lm)
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(f"{name!r} of shape {list(value.shape)} is no parameter of {lm.name!r}: give its own.")
    for name, value in values.items():
        own[name].copy_(value)


@contextlib.contextmanager
def put_back(lm: Any) -> Iterator[Weights]:
    """Context in which weights may be changed in place; afterwards they are as before, bit for bit.

    Yields:
        The values to which everything returns.
    """
    own = plain_parameters(lm)
    with restore.put_back(own, keep=lambda copies: {number: values.cpu() for number, values in copies}) as kept:
        yield {name: kept[number] for number, name in enumerate(own)}


class Tried(NamedTuple):
    """Weights that were looked at on the select split.

    Attributes:
        dose: the method's dials.
        share: how much of the change was kept; below 1 where it was shrunk to fit the budget.
        kl: mean KL(original || now) on harmless prompts, in nats per token.
        behavior, restored, degenerate: shares of the replies where the behaviour is due; None beyond the budget, where
            they are not looked at.
        margin: mean logit margin there, None likewise.
    """

    dose: dict[str, Any]
    share: float
    kl: float
    behavior: float | None = None
    restored: float | None = None
    degenerate: float | None = None
    margin: float | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """What is compared: larger is better."""
        return (-math.inf if self.restored is None else self.restored, -self.kl)


class Chooser:
    """Looks at weights as they are tried, and keeps the best within the budget.

    Attributes:
        tried: everything that was looked at, in order.
        best: the best of it; None as long as nothing within the budget is better than the original.
    """

    def __init__(self, lm: Any, gauge: Gauge, budget: float, before: Weights) -> None:
        self._lm, self._gauge, self._budget, self._before = lm, gauge, budget, before
        self._original = self._rated(Tried({}, 1.0, 0.0))
        self._kept: Weights = before
        self.tried: list[Tried] = []
        self.best: Tried | None = None

    def offer(self, dose: Mapping[str, Any], *, fit: bool = False) -> Tried:
        """Look at the weights as they are now.

        Args:
            dose: the method's dials.
            fit: shrink a change that is beyond the budget towards the original until it is within.
        """
        share, kl = 1.0, self._gauge.kl(self._lm)
        if fit and not kl <= self._budget:
            share, kl = self._shrunk(kl)
        found = Tried(dict(dose), share, kl)
        if kl <= self._budget:
            found = self._rated(found)
            if found.rank > (self.best or self._original).rank:
                self.best, self._kept = found, weights_now(self._lm)
        self.tried.append(found)
        return found

    def take(self) -> Tried | None:
        """Put the best weights in: the original ones, where nothing within the budget was better."""
        put(self._lm, self._kept)
        return self.best

    def _rated(self, found: Tried) -> Tried:
        outcome = self._gauge.outcome(self._lm)
        return found._replace(
            behavior=outcome.share(Verdict.BEHAVIOR),
            restored=outcome.share(Verdict.ALTERNATIVE),
            degenerate=outcome.share(Verdict.DEGENERATE),
            margin=self._gauge.margin(self._lm),
        )

    def _shrunk(self, kl: float) -> tuple[float, float]:
        """Shrink the change in place; return the share of it that is left, and its KL."""
        full, share = weights_now(self._lm), 1.0
        for _ in range(_FITTING_ROUNDS):
            # KL grows with the square of a small change; a broken model's (NaN, or huge) says little, so halve at most.
            step = math.sqrt(self._budget / kl) * _BELOW if math.isfinite(kl) else 0.5
            share *= max(0.25, min(_BELOW, step))
            put(
                self._lm,
                {name: old + share * (full[name] - old) for name, old in self._before.items()},
            )
            kl = self._gauge.kl(self._lm)
            if kl <= self._budget:
                break
        return share, kl


class Work(NamedTuple):
    """What a method is given; it changes the weights in place and offers them to the chooser.

    Attributes:
        lm: the model.
        case: the behaviour.
        settings: see `MitigationSettings`.
        before: the original weights.
        chooser: see `Chooser`.
        progress: called now and then.
        scores: prune: scores of parameters by matrix, larger = more the behaviour's; None computes them.
        reference: prune: weights to restore to by matrix; None sets to zero.
    """

    lm: Any
    case: Case
    settings: MitigationSettings
    before: Weights
    chooser: Chooser
    progress: Progress
    scores: Weights | None = None
    reference: Weights | None = None


Method = Callable[[Work], None]
