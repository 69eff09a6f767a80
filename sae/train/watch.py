"""Early warnings: looks at the metrics of a run as they are logged, and says what will not end well.

A run that has come apart is stopped; from the first sign of it on no checkpoint is kept, so that the last one is good.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError

DEAD = 0.3
"""Fraction of dead latents that is worth a warning."""
DRIFT = 1.5
"""Factor between L0 and its target that is worth a warning, once penalties have had their time."""
SETTLED, SETTLED_STEPS = 0.5, 100
"""Part of the run, and steps, after which L0 should be near its target."""
OUTLIER_FACTOR, OUTLIERS, COMMON = 10.0, 0.01, 0.25
"""Activations so many times longer than the median; the part of a batch from which they are worth a warning; and that
from which they are no outliers, but the others next to nothing."""
SPIKE, SPIKE_FVU = 3.0, 0.05
"""FVU spikes when it is so many times its median over the last logs and so much above it: next to nothing may well
triple."""
PATIENCE = 3
"""Spikes in a row after which a run has come apart."""
MEMORY, ENOUGH = 20, 5
"""Logs the median is over, and how many there must be. One that spikes is not among them."""


@dataclass
class _SAE:
    """What was seen of one SAE."""

    fvu: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))
    spikes: int = 0


class Watch:
    """Follows the SAEs of one run.

    Args:
        targets: target L0 of each SAE, by its name in the metrics.
        n_steps: length of the run.
    """

    def __init__(self, targets: Mapping[str, float], n_steps: int) -> None:
        self.targets = targets
        self.n_steps = n_steps
        self._saes = {name: _SAE() for name in targets}
        self._said: set[tuple[str, str]] = set()

    @property
    def sound(self) -> bool:
        """Whether the state is worth a checkpoint: no SAE's FVU was spiking when last seen."""
        return not any(seen.spikes for seen in self._saes.values())

    def look(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """Take the metrics of a step, named `<SAE>/fvu` and so on; return what there is to warn of, each thing once.

        Raises:
            UserError: an SAE has come apart.
        """
        found = []
        for name, target in self.targets.items():
            fvu, l0, dead = (metrics[f"{name}/{what}"] for what in ("fvu", "l0", "dead_fraction"))
            self._follow(name, fvu, step)
            if dead > DEAD:
                found += self._once(
                    name,
                    "dead",
                    f"{dead:.0%} of the latents of {name!r} are dead at step {step}: lower train.lr, raise "
                    "train.auxk_alpha, or use fewer latents.",
                )
            ratio = l0 / target if target > 0 else 1.0
            if step >= max(SETTLED * self.n_steps, SETTLED_STEPS) and not 1 / DRIFT <= ratio <= DRIFT:
                found += self._once(
                    name,
                    "l0",
                    f"L0 of {name!r} is {l0:.1f} at step {step} for a target of {target:g}: train longer, or lower "
                    "train.lr.",
                )
        return found

    def look_at_inputs(self, norms: Mapping[str, Float[Tensor, " batch"]], step: int) -> list[str]:
        """Take the norms of a batch of activations by hook point; return what there is to warn of."""
        found = []
        for name, values in norms.items():
            far = float((values > OUTLIER_FACTOR * values.median()).float().mean())
            if OUTLIERS < far < COMMON:
                found += self._once(
                    name,
                    "norms",
                    f"{far:.1%} of the activations at {name!r} are over {OUTLIER_FACTOR:g} times as long as the median "
                    f"at step {step}: they rule the loss; leave special tokens out (data.include_special=false), or "
                    "look at another hook point.",
                )
        return found

    def _follow(self, name: str, fvu: float, step: int) -> None:
        seen = self._saes[name]
        usual = statistics.median(seen.fvu) if len(seen.fvu) >= ENOUGH else math.inf
        if fvu > max(SPIKE * usual, usual + SPIKE_FVU):
            seen.spikes += 1
        else:
            seen.spikes = 0
            seen.fvu.append(fvu)
        if seen.spikes >= PATIENCE:
            raise UserError(
                f"FVU of {name!r} went from {usual:.3g} to {fvu:.3g} by step {step} and did not come back: training "
                "stopped, and its last checkpoint is from before; lower train.lr and train under another name."
            )

    def _once(self, name: str, what: str, message: str) -> list[str]:
        if (name, what) in self._said:
            return []
        self._said.add((name, what))
        return [message]
