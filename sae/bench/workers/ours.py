"""Our own training step as a worker: what `sae.train.trainer` does with every batch, without logging and checkpoints.

Precision `default` is what training uses when nothing is said; `reference` is plain dense autograd in float32, the
truth that the fast path is tested against.

    python -m sae.bench.workers.ours
"""

import torch
from torch import Tensor

from sae.bench.workers import protocol
from sae.bench.workers.protocol import Description, Request, Trainee
from sae.kernels import pick, pick_precision
from sae.train.grid import SAESpec
from sae.train.initialise import input_stats
from sae.train.run import SAERun
from sae.train.settings import TrainSettings

DEFAULT = "default"
REFERENCE = "reference"
HOOK = "bench"


class Ours(Trainee):
    """One SAE of this package."""

    def __init__(self, request: Request) -> None:
        if request.precision not in (DEFAULT, REFERENCE):
            raise ValueError(f"precision {request.precision!r}: use {DEFAULT!r} or {REFERENCE!r}")
        plain = request.precision == REFERENCE
        settings = TrainSettings(
            total_tokens=request.n_steps * request.batch_tokens,
            batch_tokens=request.batch_tokens,
            lr=request.lr,
            lr_warmup_steps=request.lr_warmup_steps,
            lr_decay_fraction=request.lr_decay_steps / request.n_steps,
            dead_after_tokens=request.dead_after_tokens,
            encoder_dtype="float32" if plain else "auto",
            kernels="reference" if plain else "auto",
        )
        device = torch.device(request.device)
        kernels, precision = pick(device, settings.kernels), pick_precision(device, settings.encoder_dtype)
        spec = SAESpec(HOOK, request.architecture, request.d_sae, request.k, request.seed, request.control)
        self.run = SAERun(spec, {HOOK: request.d_in}, settings, "", "", device, kernels, precision)
        self.n_steps = 0
        self.description = Description(
            dtype=precision.value,
            kernels=kernels.name,
            options=f"SAERun.train_step; clip {settings.clip:g}; AuxK where dead; unit decoder rows; checks for NaN; "
            f"moments {settings.moments}",
        )

    def start(self, batches: Tensor) -> None:
        """Take the input scale, the centre and thresholds from the first batches."""
        self.run.initialise({HOOK: input_stats(batches.cpu(), HOOK)})

    def step(self, x: Tensor) -> None:
        """One step, as the trainer takes it, with its checks."""
        finite = torch.isfinite(x).all()
        loss, grad_norm = self.run.train_step(self.run.inputs({HOOK: x.to(torch.float32)}), self.n_steps)
        self.n_steps += 1
        finite = finite & torch.isfinite(loss.total) & torch.isfinite(grad_norm)
        if not x.is_cuda and not bool(finite):  # a GPU is asked only now and then: reading waits for it
            raise ValueError(f"step {self.n_steps} is not finite")

    def reconstruct(self, x: Tensor, selection: str) -> tuple[Tensor, Tensor]:
        """Encode and decode in raw units."""
        sae, scale = self.run.sae, self.run.scales[HOOK]
        pre_acts = sae.pre_acts(x * scale)
        if selection == protocol.TRAINING:
            acts = sae.sparsity.train_acts(pre_acts)
        else:
            acts = sae.sparsity.infer_acts(pre_acts)
        return sae.decode(acts) / scale, acts


if __name__ == "__main__":
    protocol.serve("sae", Ours)
