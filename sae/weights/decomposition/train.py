"""Training a decomposition: components that sum to the matrices, and importances as small as the outputs allow.

One step draws a batch, runs the model as it is to see what goes into its matrices and what comes out, and then with
masks drawn between each component's importance and 1: whatever is called unimportant must be dispensable, in all
combinations. Every draw follows from the seed and the step's number, so a run that was interrupted goes on as if it had
not been.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.weights.decomposition import masks as drawing
from sae.weights.decomposition import saved
from sae.weights.decomposition.components import Decomposition, Importance
from sae.weights.decomposition.forward import frozen, masked, watched
from sae.weights.decomposition.settings import DecompositionSettings
from sae.weights.decomposition.target import Target

Progress = Callable[[str, int, int], None]
EPS = 1e-12  # keeps the slope of importance^p finite where p < 1
ROWS_RUN = 7  # of a step, a row: once clean, and twice with a backward
LOGGED = 50  # lines of losses a run


class Losses(NamedTuple):
    """The terms of one step, before their weights."""

    faithfulness: Tensor
    stochastic: Tensor
    layerwise: Tensor
    sparsity: Tensor

    def weighted(self, settings: DecompositionSettings) -> Tensor:
        """Return their weighted sum."""
        weights = (settings.faithfulness, settings.stochastic, settings.layerwise, settings.sparsity)
        return torch.stack([weight * term for weight, term in zip(weights, self, strict=True)]).sum()


def generator_at(settings: DecompositionSettings, step: int, device: torch.device) -> torch.Generator:
    """Return the random numbers of a step."""
    return torch.Generator(device).manual_seed((settings.seed * 1_000_003 + step + 1) % 2**63)


@torch.no_grad()
def clean_run(target: Target, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model as it is; return its outputs and what goes into its matrices."""
    with watched(target.root, target.matrices) as inputs:
        outputs = target.outputs(batch)
    return outputs, inputs


def penalty(importance: dict[str, Importance], p: float, real: Tensor | None) -> Tensor:
    """Return the mean over tokens of the sum over all components of importance^p."""
    total = torch.zeros(())
    for one in importance.values():
        flat = one.penalty.flatten(0, -2)
        flat = flat if real is None else flat[real.to(flat.device)]
        total = total.to(flat.device) + (flat + EPS).pow(p).sum() / len(flat)
    return total


def losses(target: Target, decomposition: Decomposition, step: int) -> Losses:
    """Return the terms of a step's loss, with gradients to the decomposition."""
    settings = decomposition.settings
    generator = generator_at(settings, step, target.device)
    batch = target.draw(generator)
    clean, inputs = clean_run(target, batch)
    importance = decomposition.importance(inputs)
    values = {name: one.masks for name, one in importance.items()}

    def missed(some: dict[str, Tensor]) -> Tensor:
        with masked(target.root, target.matrices, decomposition, drawing.stochastic(some, generator)):
            return target.divergence(clean, target.outputs(batch))

    count = min(settings.layerwise_matrices, len(values))
    order = torch.randperm(len(values), generator=generator, device=target.device)[:count].tolist()
    names = list(values)
    none = torch.zeros((), device=target.device)
    return Losses(
        decomposition.unfaithfulness(target.matrices),
        missed(values) if settings.stochastic else none,
        torch.stack([missed({names[one]: values[names[one]]}) for one in order]).mean() if settings.layerwise else none,
        penalty(importance, settings.p_at(step), target.real(batch)),
    )


def decompose(
    target: Target,
    settings: DecompositionSettings | None = None,
    folder: Path | str | None = None,
    *,
    progress: Progress | None = None,
    checkpoint_seconds: float = 60.0,
    until: int | None = None,
) -> Decomposition:
    """Decompose a model.

    Args:
        target: what is decomposed.
        settings: how.
        folder: where it is saved, every now and then and at the end; an unfinished one there is gone on with, a
            finished one opened. None: it is not saved.
        progress: told after every step.
        checkpoint_seconds: between two saves.
        until: stop after this many steps, unfinished.

    Raises:
        UserError: a model that is too large, or whose matrices have no modules of their own; a folder that holds
            something else.
    """
    settings = settings or DecompositionSettings()
    found = Decomposition(target.matrices, settings, target.fingerprint).to(target.device)
    optimiser = torch.optim.Adam(found.parameters(), lr=settings.lr)
    start = saved.resume(folder, found, optimiser) if folder is not None else None
    with frozen(target.root):
        if start is None:
            start = saved.Start(0, [])
            _calibrate(target, found)
        last = time.monotonic()
        end = min(settings.steps, settings.steps if until is None else until)
        for step in range(start.step, end):
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            terms = losses(target, found, step)
            optimiser.zero_grad(set_to_none=True)
            terms.weighted(settings).backward()
            optimiser.step()
            found.rows_run += ROWS_RUN * target.batch_rows
            if step % max(1, settings.steps // LOGGED) == 0 or step + 1 == settings.steps:
                start.history.append(
                    {"step": step} | {key: float(one.detach()) for key, one in terms._asdict().items()}
                )
            if progress is not None:
                progress("decomposition", step + 1, settings.steps)
            if folder is not None and step + 1 < end and time.monotonic() - last > checkpoint_seconds:
                saved.save(folder, found, target.matrices, step + 1, start.history, optimiser)
                last = time.monotonic()
    if folder is not None and start.step < end:
        unfinished = None if end == settings.steps else optimiser
        saved.save(folder, found, target.matrices, end, start.history, unfinished)
    return found.eval().requires_grad_(False)


def _calibrate(target: Target, found: Decomposition) -> None:
    batch = target.draw(generator_at(found.settings, -1, target.device))
    _, inputs = clean_run(target, batch)
    real = target.real(batch)
    flat = {name: x.flatten(0, -2) for name, x in inputs.items()}
    found.calibrate({name: x if real is None else x[real.to(x.device)] for name, x in flat.items()})
