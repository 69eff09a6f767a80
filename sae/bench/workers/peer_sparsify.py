"""EleutherAI's sparsify as a worker.

Its training step is a closure inside `Trainer.fit` that hangs on a language model's forward pass, so its lines are
repeated here, calling the library's own `SparseCoder`; what only serves the language model (token masks, copies of the
outputs) is left out, in the peer's favour.

Run by the peers' Python, as a script.
"""

import importlib
from typing import Any

import protocol
from protocol import Description, Request, Trainee

AUXK_ALPHA = 1 / 32


class Sparsify(Trainee):
    """One `SparseCoder`, trained as `Trainer.fit` of version 1.3.3 does."""

    def __init__(self, request: Request) -> None:
        import torch
        from sparsify import SparseCoder, SparseCoderConfig

        if request.architecture != "topk":
            raise ValueError(f"sparsify has no architecture {request.architecture!r}")
        if request.precision != protocol.FLOAT32:
            raise ValueError(f"precision {request.precision!r} is not sparsify's to choose")
        torch.set_float32_matmul_precision("high")  # as `fit` does; on a GPU that means TF32
        self.dead_after = request.dead_after_tokens
        self.coder: Any = SparseCoder(
            request.d_in,
            SparseCoderConfig(num_latents=request.d_sae, k=request.k),
            device=request.device,
            dtype=torch.float32,
        )
        # Its default, signum, has learning rates of its own; "adam" is torch's where bitsandbytes is not installed.
        self.optimiser = torch.optim.Adam([{"params": self.coder.parameters(), "lr": request.lr}])
        # Its own schedule decays from the first step on; here everybody has the same learning rates.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: _lr_factor(request, step))
        self.silent_tokens = torch.zeros(request.d_sae, dtype=torch.long, device=request.device)
        self.did_fire = torch.zeros(request.d_sae, dtype=torch.bool, device=request.device)
        self.n_steps = 0
        half = request.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        self.description = Description(
            dtype=protocol.AUTOCAST if half else protocol.FLOAT32,
            options="lines of Trainer.fit; fused encoder; torch Adam (its default is signum); auxk_alpha 1/32 (default "
            "0); unit decoder rows; no clipping (it has none)",
        )

    def step(self, x: Any) -> None:
        """One pass through the hook and the step of `fit`."""
        import torch

        coder = self.coder
        if self.n_steps == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        dead = self.silent_tokens > self.dead_after
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=dead, total_variance=total_variance)
        self.did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # it keeps running averages, which waits for a GPU
        float(out.auxk_loss.detach())
        (out.fvu + AUXK_ALPHA * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        with torch.no_grad():
            self.silent_tokens += len(x)
            self.silent_tokens[self.did_fire] = 0
            self.did_fire.zero_()
        self.n_steps += 1

    def reconstruct(self, x: Any, selection: str) -> tuple[Any, Any]:
        """Top k of each token, in training as at inference."""
        values, latents, _ = self.coder.encode(x)
        return self.coder.decode(values, latents), values


def _lr_factor(request: Request, step: int) -> float:
    warmup = (step + 1) / request.lr_warmup_steps if step < request.lr_warmup_steps else 1.0
    left = request.n_steps - step
    return min(warmup, left / request.lr_decay_steps if left < request.lr_decay_steps else 1.0)


if __name__ == "__main__":
    protocol.serve("eai-sparsify", Sparsify, lambda: importlib.import_module("sparsify"))
