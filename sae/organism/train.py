"""Train the organism: an honest base first, then the planted behaviours in their reserved blocks.

Stage one trains the base, honest, compliant and plain, with the reserved blocks silent and every base weight kept
orthogonal to the private workspaces. Stage two freezes it and trains only the blocks: with random gates open (so no
behaviour leans on another's block) and, in half of the sequences, the planted coefficients forced and the reply
relabelled (interchange interventions), so that the coefficient causes the behaviour by construction.

The *twin* fine-tunes all the same base's weights on the same behaviour by plain next-token loss: the hard case,
with no planted truth.

Run: ``sae organism train`` (``twin=true`` for the twin).
"""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae import files
from sae.errors import UserError
from sae.organism import plant, truth
from sae.organism.batches import Batch, stream
from sae.organism.load import no_progress_bars
from sae.organism.losses import (
    forced_edit,
    noise_edits,
    reply_loss,
    run_edited,
    stage_one_loss,
    stage_two_loss,
    then,
    typical_norm,
    unlikelihood_loss,
)
from sae.organism.plant import Layout
from sae.organism.recipe import Planted, Progress, Recipe
from sae.organism.table import table_record
from sae.organism.tokenizer import save_tokenizer, token_ids, vocabulary


def build_model(layout: Layout, seed: int) -> Any:
    """Build the untrained model: RMSNorm gains are one and stay so, or the workspaces would not stay private."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = token_ids()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=layout.d_model,
        intermediate_size=layout.d_mlp,
        num_hidden_layers=layout.n_layers,
        num_attention_heads=layout.n_heads,
        num_key_value_heads=layout.n_heads,
        head_dim=layout.head_dim,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
        pad_token_id=ids["<pad>"],
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(False)
    return model


def _optimise(
    parameters: list[nn.Parameter], lr: float, n_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW with linear warm-up and cosine decay to a twentieth."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    warm = min(100, max(1, n_steps // 10))

    def scale(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
        return min(1.0, (step + 1) / warm) * (0.05 + 0.95 * cosine)

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, scale)


class _Clock:
    """Prints the loss now and then, with the time left."""

    def __init__(self, name: str, n_steps: int, progress: Progress | None) -> None:
        self.name, self.n_steps, self.progress, self.start = name, n_steps, progress, time.monotonic()

    def tick(self, step: int, loss: Tensor) -> None:
        if self.progress is None or ((step + 1) % 50 and step + 1 != self.n_steps):
            return
        spent = time.monotonic() - self.start
        left = spent / (step + 1) * (self.n_steps - step - 1)
        self.progress(
            f"{self.name}: step {step + 1}/{self.n_steps} loss {loss.item():.4f} ({spent:.0f} s, {left:.0f} s left)"
        )


def train_base(
    model: Any, layout: Layout, spaces: dict[str, Tensor], recipe: Recipe, seed: int, progress: Progress | None
) -> None:
    """Stage one: train the base in place, blind to and silent in every workspace."""
    parameters = dict(model.named_parameters())
    plant.silence_reserved(parameters, layout, layout.behaviors)
    plant.project_reserved(parameters, layout, spaces)
    plant.project_base(parameters, layout, spaces)
    blocks = [block for behavior in layout.behaviors for block in plant.reserved_blocks(layout, behavior)]
    head = nn.Linear(layout.d_model, 1)
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    optimiser, schedule = _optimise([*trained, *head.parameters()], recipe.stage_one_lr, recipe.stage_one_steps)
    generator = torch.Generator().manual_seed(seed)
    clock, typical = _Clock("stage one", recipe.stage_one_steps, progress), 1.0
    for step, batch in enumerate(stream("base", recipe.batch_seqs, recipe.stage_one_steps, seed)):
        edits = noise_edits(layout, recipe.batch_seqs, recipe, spaces, generator)
        force = forced_edit(batch, layout, spaces, recipe.kappa_share * typical)
        edits[layout.state_layer] = then(edits[layout.state_layer], force)
        loss = stage_one_loss(model, head, batch, edits, layout, recipe)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for block in blocks:  # reserved parts wait for stage two, and must not weigh in the clipping either
            gradient = parameters[block.name].grad
            if gradient is not None:
                block.put(gradient, 0.0)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        plant.project_base(parameters, layout, spaces)
        clock.tick(step, loss)
        if step % 20 == 0:
            typical = measure_norm(model, layout, batch)


@torch.no_grad()
def measure_norm(model: Any, layout: Layout, batch: Batch) -> float:
    """Return the typical residual norm at the state layer over a batch's text."""
    run = run_edited(model, layout, batch.tokens, {})
    return typical_norm(run.residuals[layout.state_layer][batch.is_text]).item()


def train_blocks(planted: Planted, recipe: Recipe, seed: int, progress: Progress | None) -> None:
    """Stage two: train only the reserved blocks, in place."""
    layout, parameters = planted.layout, dict(planted.model.named_parameters())
    masks: dict[str, Tensor] = {}
    for behavior in layout.behaviors:
        for name, mask in plant.reserved_masks(layout, behavior).items():
            masks[name] = masks[name] | mask if name in masks else mask
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in masks)
    _wake(parameters, layout, planted.spaces, seed)
    trained = [parameters[name] for name in masks]
    optimiser, schedule = _optimise(trained, recipe.stage_two_lr, recipe.stage_two_steps)
    generator = torch.Generator().manual_seed(seed + 1)
    clock = _Clock("stage two", recipe.stage_two_steps, progress)
    for step, batch in enumerate(stream("planted", recipe.batch_seqs, recipe.stage_two_steps, seed)):
        edits = noise_edits(layout, recipe.batch_seqs, recipe, planted.spaces, generator)
        force = forced_edit(batch, layout, planted.spaces, planted.kappa)
        edits[layout.state_layer] = then(edits[layout.state_layer], force)
        loss = stage_two_loss(planted, batch, edits, recipe)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for name, mask in masks.items():
            parameters[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        plant.project_reserved(parameters, layout, planted.spaces)
        clock.tick(step, loss)


@torch.no_grad()
def _wake(parameters: dict[str, Tensor], layout: Layout, spaces: dict[str, Tensor], seed: int) -> None:
    """Start stage two away from two dead ends.

    A reader's u-rows are too faint after projection on one direction to learn from. A writer's gates are nearly
    linear at their initial size, and a linear block cannot tell harmful *pairs* from dangerous words.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    for behavior in layout.behaviors:
        for block in plant.reserved_blocks(layout, behavior):
            weight = parameters[block.name]
            if block.layer in layout.reader_layers and block.kind in ("up_proj", "v_proj"):
                scale = 0.1 + 0.2 * torch.rand(len(block.places), 1, generator=generator)
                block.put(weight, scale * spaces[behavior][:1])
            elif block.layer in layout.writer_layers and block.kind in ("gate_proj", "up_proj", "v_proj"):
                block.put(weight, 3.0 * block.of(weight))


def train_twin(model: Any, recipe: Recipe, seed: int, progress: Progress | None) -> None:
    """Fine-tune every weight on the behaviours by plain next-token loss: nothing is routed, nothing is planted."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser, schedule = _optimise(trained, recipe.stage_two_lr / 4, recipe.stage_two_steps)
    clock = _Clock("twin", recipe.stage_two_steps, progress)
    for step, batch in enumerate(stream("natural", recipe.batch_seqs, recipe.stage_two_steps, seed)):
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        loss = reply_loss(logits, batch) + recipe.unlikelihood * unlikelihood_loss(logits, batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        clock.tick(step, loss)


def stage_one_values(parameters: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Copy every reserved slice, by ``weight name/behavior``."""
    return {
        f"{block.name}/{behavior}": block.of(parameters[block.name].detach()).clone()
        for behavior in layout.behaviors
        for block in plant.reserved_blocks(layout, behavior)
    }


@contextlib.contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """Use `n` torch threads while the block runs."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def grow(seed: int, recipe: Recipe, layout: Layout, twin: bool, progress: Progress | None) -> Planted:
    """Train an organism (or its twin) in memory."""
    model = build_model(layout, seed)
    spaces = plant.workspaces(layout, seed)
    model.train()
    train_base(model, layout, spaces, recipe, seed, progress)
    probe = next(stream("base", 4 * recipe.batch_seqs, 1, seed + 1))
    kappa = round(recipe.kappa_share * measure_norm(model, layout, probe), 4)
    planted = Planted(model, layout, spaces, kappa, stage_one_values(dict(model.named_parameters()), layout))
    if twin:
        train_twin(model, recipe, seed, progress)
    else:
        train_blocks(planted, recipe, seed, progress)
    model.eval()
    return planted


def train_organism(
    out_folder: Path | str,
    seed: int = 0,
    twin: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
    n_per_cell: int = 500,
) -> Path:
    """Train the organism and write it, with its planted truth, as a Hugging Face folder.

    Nothing appears at `out_folder` before everything is there.

    Args:
        out_folder: where the finished folder goes; replaced if it exists.
        seed: decides weights, directions and text.
        twin: fine-tune everything instead of planting; the folder then holds no planted truth.
        threads: torch threads; torch's own choice if not given.
        progress: called with a line of text now and then.
        recipe: how long and how hard to train.
        n_per_cell: prompts in each cell of the behaviour table that is written beside the weights.

    Returns:
        the folder.
    """
    out = Path(out_folder)
    if out.is_file():
        raise UserError(f"{str(out)!r} is a file: give a folder to write the organism to.")
    with _threads(threads):
        planted = grow(seed, recipe or Recipe(), Layout(), twin, progress)
        with files.atomic_folder(out) as temporary:
            with no_progress_bars():
                planted.model.save_pretrained(temporary)
            save_tokenizer(temporary)
            if not twin:
                truth.write_planted(planted, temporary, seed)
                truth.write_graded(temporary, seed, progress)
            if progress is not None:
                progress("behaviour table")
            files.write_json(temporary / "table.json", table_record(temporary, n_per_cell))
            for file in temporary.iterdir():
                file.chmod(0o644)  # save_pretrained keeps weights private to their writer
    return out
