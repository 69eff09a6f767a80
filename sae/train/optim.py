"""The optimiser of one SAE: Adam, a schedule, gradient clipping, and unit-norm decoder rows."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.train.settings import TrainSettings

ADAM_EPS = 1e-8


def default_lr(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14): the scaling law of 2406.04093 as sparsify and dictionary_learning use it."""
    return float(2e-4 / (d_sae / 2**14) ** 0.5)


def lr_factor(step: int, n_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, constant, linear decay to 0 at the end."""
    warmup = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    decay_steps = int(decay_fraction * n_steps)
    decay = (n_steps - step) / decay_steps if step >= n_steps - decay_steps else 1.0
    return min(warmup, decay, 1.0)


class Optimiser:
    """Steps one SAE. fp32 master weights and moments."""

    def __init__(self, sae: SAE, settings: TrainSettings) -> None:
        self.sae = sae
        self.settings = settings
        self.lr = default_lr(sae.config.d_sae) if settings.lr is None else settings.lr
        self.named = dict(sae.named_parameters())
        fused = sae.device.type in ("cpu", "cuda")
        betas = sae.sparsity.adam_betas
        # Biases and thresholds are lengths in a space where inputs have norm sqrt(d_in); the recipes' learning rates
        # are for inputs of norm 1. Adam's steps have the size of the learning rate, so it must grow with the unit.
        lengths = [parameter for name, parameter in self.named.items() if name not in ("W_enc", "W_dec")]
        groups = [
            {"params": [sae.W_enc, sae.W_dec], "unit": 1.0},
            {"params": lengths, "unit": sae.config.d_in**0.5},
        ]
        self.adam = torch.optim.Adam(groups, lr=self.lr, betas=betas, eps=ADAM_EPS, fused=fused)
        warmup = settings.lr_warmup_steps
        self.warmup_steps = min(1000, settings.n_steps // 20) if warmup is None else warmup

    @torch.no_grad()
    def step(self, step: int) -> Tensor:
        """Apply the gradients of the last backward pass, then clear them. Return their norm before clipping."""
        factor = lr_factor(step, self.settings.n_steps, self.warmup_steps, self.settings.lr_decay_fraction)
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor * group["unit"]
        w_dec = self.sae.W_dec
        if w_dec.grad is not None:
            # The part of the gradient along a row only changes its norm, which is restored below: it would
            # disturb Adam's moments and the clipping for nothing.
            along = (w_dec.grad * w_dec).sum(1, keepdim=True)
            w_dec.grad.addcmul_(along, w_dec, value=-1)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.settings.clip or math.inf)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        w_dec.div_(w_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name."""
        found = {}
        for name, parameter in self.named.items():
            for key, value in self.adam.state[parameter].items():
                found[f"{name}.{key}"] = value
        return found

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave."""
        for name, parameter in self.named.items():
            state = self.adam.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                saved = tensors.get(f"{name}.{key}")
                if saved is None:  # a parameter that has had no gradient yet has no state
                    continue
                # empty_like keeps the parameter's strides: the fused kernel walks memory, not indices.
                like = (
                    torch.empty_like(parameter) if key != "step" else torch.empty_like(saved, device=parameter.device)
                )
                state[key] = like.copy_(saved)
