"""Train one SAE on a matrix that fits in memory: no stream, no checkpoints, nothing on disk.

    sae = train_on_rows(rows, SAESpec("rows", "batch_topk", 256, 4, 0), TrainSettings(1_536_000, 1024))

For small things such as a meta-SAE on decoder rows; activations of a language model go through `sae.train.trainer`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.kernels import pick, pick_precision
from sae.train.grid import SAESpec
from sae.train.initialise import input_stats, sample_rows
from sae.train.run import SAERun
from sae.train.settings import TrainSettings


def train_on_rows(
    rows: Float[Tensor, "n d_in"],
    spec: SAESpec,
    settings: TrainSettings,
    progress: Callable[[], None] = lambda: None,
) -> SAE:
    """Train on batches of rows, each epoch in an order of its own that the spec's seed fixes.

    Args:
        rows: what is learned, on the device that trains.
        spec: the SAE; its hook name is only a name.
        settings: `total_tokens` counts rows.
        progress: called after every step.

    Returns:
        The SAE, which acts on rows as they are.

    Raises:
        UserError: rows that are not finite, or a loss that stops being so.
    """
    name, device = spec.hook_name, rows.device
    rows = rows.detach().float()
    precision = pick_precision(device, settings.encoder_dtype)
    run = SAERun(spec, {name: rows.shape[1]}, settings, "", "", device, pick(device, settings.kernels), precision)
    order = _Order(len(rows), spec.seed)
    sample = order.take(settings.init_batches * settings.batch_tokens)
    n_sample = sample_rows(spec.d_sae)
    run.initialise({name: input_stats(rows[sample.to(device)].cpu(), name, settings.centre, n_sample)})
    order = _Order(len(rows), spec.seed)  # training sees what was measured, too
    for step in range(settings.n_steps):
        batch = rows[order.take(settings.batch_tokens).to(device)]
        run.train_step(run.inputs({name: batch}), step)
        progress()
    scale = [run.scales[name]]
    run.sae.fold_scales(scale, scale)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in run.sae.state_dict().values()):
        raise UserError(f"training {spec.architecture} on {len(rows)} rows came apart: lower lr = {settings.lr}.")
    return run.sae


class _Order:
    """Numbers of rows without end: all of them, shuffled, then all again in another order."""

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._generator = torch.Generator().manual_seed(seed)
        self._left: Int[Tensor, " left"] = torch.zeros(0, dtype=torch.int64)

    def take(self, count: int) -> Int[Tensor, " count"]:
        while len(self._left) < count:
            self._left = torch.cat([self._left, torch.randperm(self._n, generator=self._generator)])
        taken, self._left = self._left[:count], self._left[count:]
        return taken
