"""A behaviour's logit margins as a metric of the weights, started behind what has not changed.

A perturbation of one layer leaves the layers before it as they are. What these give is kept, and a forward goes on
from there; on a model whose blocks cannot be run so, every forward is a whole one, with the same result.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sae.behavior.measure import MarginTask, margin_of
from sae.lm import prefix
from sae.lm.hooks import Step
from sae.lm.model import attention


class MarginMetric:
    """Margins of prompts under the weights as they are now: one forward over all of them is one evaluation.

    With `against`, the margins of those prompts are appended with their sign changed and scaled so that the mean of
    all values is (mean margin of `task` - mean margin of `against`) / 2: the part of the margin that tells prompts on
    which the behaviour is due from others. What merely favours some words everywhere falls out of it.
    """

    def __init__(self, lm: Any, task: MarginTask, against: MarginTask | None = None) -> None:
        self.lm = lm
        self._tasks = [task] if against is None else [task, against]
        sizes = [len(one.behavior_ids) for one in self._tasks]
        self._weights = [1.0] if against is None else [sum(sizes) / (2 * sizes[0]), -sum(sizes) / (2 * sizes[1])]
        self._kept: dict[tuple[int, int, int], prefix.Prefix] = {}

    def __call__(self) -> Float[np.ndarray, " n"]:
        """Return every prompt's value."""
        return self.from_layer(0)

    @torch.no_grad()
    def from_layer(self, layer: int) -> Float[np.ndarray, " n"]:
        """Return the same, given that no layer before this one has changed since this metric was made."""
        found = []
        for number, (task, weight) in enumerate(zip(self._tasks, self._weights, strict=True)):
            for index, (batch, behavior, alternative) in enumerate(task.parts()):
                logits = self._last_logits((number, index, layer), batch)
                found.append(weight * margin_of(logits, behavior, alternative).double())
        return torch.cat(found).numpy()

    def _last_logits(self, key: tuple[int, int, int], batch: Any) -> torch.Tensor:
        layer = key[-1]
        if layer and self.lm._resumable and key not in self._kept:
            self._kept[key] = prefix.record(self.lm, batch, 1, layer)
        batch = batch.to(self.lm.device)
        with self.lm.light(), prefix.starting(self.lm, self._kept.get(key)):
            # Left-padded, so every row's next token is predicted in the last column.
            logits = self.lm.run(batch.tokens, Step.whole(batch), attention(batch.mask), last_only=True)
        return logits[:, -1].float().cpu()
