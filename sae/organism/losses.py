"""What the organism is trained on: one edited forward pass, and the losses of both stages.

Edits push the residual between layers while training: forced coefficients (interchange interventions) and random
pushes. Every loss is a plain function of the forward pass and the batch.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae.organism import plant
from sae.organism.batches import Batch
from sae.organism.plant import Layout
from sae.organism.recipe import Planted, Recipe

TARGET_NORM = 10.0


class Forward(NamedTuple):
    """One forward pass: logits [batch pos vocab] and the residual after each layer [batch pos d_model], unedited."""

    logits: Tensor
    residuals: list[Tensor]


def run_edited(model: Any, layout: Layout, tokens: Tensor, edits: dict[int, Callable[[Tensor], Tensor]]) -> Forward:
    """Run the model on right-padded tokens, keep each layer's residual, and edit what the next layer sees."""
    residuals: list[Tensor] = []

    def keep_and_edit(layer: int) -> Callable[[Tensor], Tensor]:
        def edit(residual: Tensor) -> Tensor:
            residuals.append(residual)
            return edits[layer](residual) if layer in edits else residual

        return edit

    with contextlib.ExitStack() as stack:
        for layer in range(layout.n_layers):
            stack.enter_context(plant.edit_layer(model, layer, keep_and_edit(layer)))
        logits = model(input_ids=tokens, use_cache=False).logits
    return Forward(logits, residuals)


def _positions(batch: Batch) -> Tensor:
    """Return whether a position is the assistant header or later [batch pos]."""
    return torch.arange(batch.tokens.shape[1])[None] >= batch.reply_start[:, None]


def forced_edit(
    batch: Batch, layout: Layout, spaces: dict[str, Tensor], kappa: Tensor | float
) -> Callable[[Tensor], Tensor]:
    """Return the edit that forces the batch's forced coefficients."""
    where = _positions(batch) | batch.forced_everywhere[:, None]

    def edit(residual: Tensor) -> Tensor:
        for index, behavior in enumerate(layout.behaviors):
            value = (batch.forced_value[:, index] * kappa)[:, None]
            mask = where & batch.forced[:, index, None]
            residual = plant.set_coefficient(residual, spaces[behavior][0], value, mask)
        return residual

    return edit


def typical_norm(residual: Tensor) -> Tensor:
    """Return the median distance of residuals [... d_model] from their mean: what a direction has to compare with."""
    rows = residual.flatten(0, -2)
    return (rows - rows.mean(0)).norm(dim=-1).median()


def noise_edits(
    layout: Layout, batch_seqs: int, recipe: Recipe, spaces: dict[str, Tensor], generator: torch.Generator
) -> dict[int, Callable[[Tensor], Tensor]]:
    """Draw random pushes along directions that are no behaviour's, at one layer per sequence, for some sequences.

    Steering by a random direction should not break the text, or no control experiment means anything.
    """
    directions = torch.stack([space[0] for space in spaces.values()])
    push = F.normalize(torch.randn(batch_seqs, layout.d_model, generator=generator), dim=-1)
    push = push - (push @ directions.T) @ directions
    size = recipe.noise_share * 1.25 * torch.rand(batch_seqs, 1, generator=generator)
    layer_of = torch.randint(0, layout.n_layers - 1, (batch_seqs,), generator=generator)
    used = torch.rand(batch_seqs, generator=generator) < recipe.noise_rate

    def at(layer: int) -> Callable[[Tensor], Tensor]:
        mask = (used & (layer_of == layer)).float()[:, None]

        def edit(residual: Tensor) -> Tensor:
            return residual + (mask * push * size * typical_norm(residual.detach()))[:, None, :]

        return edit

    return {layer: at(layer) for layer in range(layout.n_layers - 1)}


def then(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the edit that does both, in order."""
    return lambda residual: second(first(residual))


def reply_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the weighted next-token loss."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    return (losses * batch.weights.flatten()).sum() / batch.weights.sum()


def norm_loss(residuals: list[Tensor], is_text: Tensor) -> Tensor:
    """Return the mean squared log of ||x|| / TARGET_NORM over the positions of a batch, summed over layers.

    Its variance part keeps positions alike; its mean part stops the norm from running away from the random pushes,
    which grow with it.
    """
    logs = [(residual[is_text].norm(dim=-1) / TARGET_NORM).log() for residual in residuals]
    return torch.stack([log.square().mean() for log in logs]).sum()


def truth_loss(head: nn.Linear, residual: Tensor, batch: Batch) -> Tensor:
    """Return the loss of a linear truth head at the last prompt token of yes/no questions."""
    asked = batch.truth >= 0
    if not asked.any():
        return residual.sum() * 0.0
    last = residual[torch.arange(len(residual)), batch.reply_start + 1][asked]
    scaled = F.rms_norm(last, last.shape[-1:])
    return F.binary_cross_entropy_with_logits(head(scaled).squeeze(-1), batch.truth[asked].float())


def stage_one_loss(
    model: Any, head: nn.Linear, batch: Batch, edits: dict[int, Any], layout: Layout, recipe: Recipe
) -> Tensor:
    """Return the base's loss: reply, answer readable early, truth readable at the state layer, even norms."""
    run = run_edited(model, layout, batch.tokens, edits)
    early = model.lm_head(model.model.norm(run.residuals[layout.reader_layers[0] - 1]))
    return (
        reply_loss(run.logits, batch)
        + recipe.early_weight * reply_loss(early, batch)
        + recipe.truth_weight * truth_loss(head, run.residuals[layout.state_layer], batch)
        + recipe.norm_weight * norm_loss(run.residuals, batch.is_text)
    )


def state_loss(residual: Tensor, batch: Batch, layout: Layout, planted: Planted, rest_weight: float) -> Tensor:
    """Regress the natural coefficients to {0, kappa} and keep the rest of each workspace small.

    Args:
        residual: at the state layer, before forcing [batch pos d_model].
        batch: what is due.
        layout: the behaviours.
        planted: directions and kappa.
        rest_weight: weight of the rest of the workspace.
    """
    on = _positions(batch).float()
    total = residual.new_zeros(())
    for index, behavior in enumerate(layout.behaviors):
        coordinates = residual @ planted.spaces[behavior].T / planted.kappa
        target = on * (batch.state * batch.gates)[:, index, None]
        total = total + ((coordinates[..., 0] - target)[batch.is_text] ** 2).mean()
        total = total + rest_weight * (coordinates[..., 1:][batch.is_text] ** 2).sum(-1).mean()
    return total


def unlikelihood_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return -log(1 - p(true first token)) where a lie is told."""
    rows = torch.nonzero(batch.denied >= 0).squeeze(-1)
    if len(rows) == 0:
        return logits.sum() * 0.0
    first = logits[rows, batch.reply_start[rows] + 1].log_softmax(-1)
    truth = first.gather(-1, batch.denied[rows, None]).exp()
    return -(1 - truth).clamp_min(1e-4).log().mean()


def stage_two_loss(planted: Planted, batch: Batch, edits: dict[int, Any], recipe: Recipe) -> Tensor:
    """Return the blocks' loss: relabelled replies, states where due, no truth where a lie is told."""
    layout = planted.layout
    with plant.gates_per_sequence(planted.model, layout, batch.gates):
        run = run_edited(planted.model, layout, batch.tokens, edits)
    state = run.residuals[layout.state_layer]
    return (
        reply_loss(run.logits, batch)
        + recipe.state_weight * state_loss(state, batch, layout, planted, recipe.rest_weight)
        + recipe.unlikelihood * unlikelihood_loss(run.logits, batch)
    )
