"""The optimiser of one SAE: Adam, a schedule, gradient clipping, and unit-norm decoder rows."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.kernels.moments import Moments
from sae.kernels.reference import AdamStep, Kernels
from sae.train.controls import FROZEN, SOFT, TRAINED, pull_back
from sae.train.settings import TrainSettings

ADAM_EPS = 1e-8


LR_SCALE = 2.7
LARGEST_TURN = 0.15
"""Adam moves every coordinate by about the learning rate, so a row of norm 1 turns by about lr * sqrt(d_in) radians."""


def default_lr(d_in: int, d_sae: int, n_steps: int) -> float:
    """2.7 / sqrt(d_in) / (d_sae * n_steps)^(1/4), at most 0.15 / sqrt(d_in).

    Fitted to sweeps on real activations and mixtures (docs/lab-notes.md): short runs want far larger rates than the
    published laws, which are for hundreds of thousands of steps, say; there it comes to theirs (2.3e-4 at d_in 2304,
    d_sae 2^14 and 244,000 steps, where 2406.04093's law, as sparsify uses it, gives 2e-4 and SAEBench takes 3e-4).
    """
    return float(min(LR_SCALE / (d_sae * n_steps) ** 0.25, LARGEST_TURN) / d_in**0.5)


def lr_factor(step: int, n_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, constant, linear decay to 0 at the end."""
    warmup = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    decay_steps = int(decay_fraction * n_steps)
    decay = (n_steps - step) / decay_steps if decay_steps and step >= n_steps - decay_steps else 1.0
    return min(warmup, decay, 1.0)


class _Part(NamedTuple):
    """A parameter as the optimiser sees it."""

    rows: Float[Tensor, "rows d"]
    """The parameter itself, as a contiguous matrix: a latent a row, or one row for what is not a matrix."""
    moments: Moments
    lr_unit: float
    """Its learning rate is this times the SAE's."""
    on_sphere: bool
    """Rows keep norm 1."""
    seed: int


class Optimiser:
    """Steps one SAE. fp32 master weights; the moments of the two matrices in fp32, bf16 or 8 bits.

    Args:
        sae: the autoencoder; its parameters are moved in place.
        settings: rates, clipping, and how moments are kept.
        kernels: what computes the step.
        control: what must not be learned; see `sae.train.controls`.
    """

    def __init__(self, sae: SAE, settings: TrainSettings, kernels: Kernels, control: str = TRAINED) -> None:
        self.sae = sae
        self.settings = settings
        self.kernels = kernels
        given, config = settings.lr, sae.config
        self.lr = default_lr(config.d_in, config.d_sae, settings.n_steps) if given is None else given
        self.betas = settings.adam_betas or sae.sparsity.adam_betas
        self.step_count = 0
        self.frozen = FROZEN[control]
        self.start = sae.W_dec.detach().clone() if control == SOFT else None  # drawn from the seed: not part of a state
        self.parts = {name: self._part(name, number) for number, name in enumerate(self._named())}
        warmup = settings.lr_warmup_steps
        self.warmup_steps = min(1000, settings.n_steps // 20) if warmup is None else warmup

    def _named(self) -> dict[str, Tensor]:
        return dict(self.sae.named_parameters())

    def _lengths(self) -> set[str]:
        sparsity = self.sae.sparsity
        return {name for name, _ in sparsity.named_parameters()} - sparsity.unitless

    def _part(self, name: str, number: int) -> _Part:
        parameter = self._named()[name].detach()
        rows = _as_rows(name, parameter)
        assert rows.data_ptr() == parameter.data_ptr(), f"{name} does not lie in memory as SAE made it"
        is_matrix = name in ("W_enc", "W_dec")
        # Biases and thresholds are lengths in a space where inputs have norm sqrt(d_in); the recipes' learning rates
        # are for inputs of norm 1. Adam's steps have the size of the learning rate, so it must grow with the unit.
        is_length = name in ("b_enc", "b_dec") or name.removeprefix("sparsity.") in self._lengths()
        unit = self.sae.config.d_in**0.5 if is_length else 1.0
        kind = self.settings.moments if is_matrix else "float32"
        seed = self.sae.config.seed * 64 + number
        return _Part(rows, Moments.zeros(kind, rows), unit, name == "W_dec", seed)

    @torch.no_grad()
    def step(self, step: int) -> Tensor:
        """Apply the gradients of a batch, then clear them. Return their norm before clipping.

        The component of the decoder's gradient along a row only changes the row's norm, which is restored anyway:
        it is taken out, since it would disturb Adam's moments and the clipping for nothing.
        """
        self.step_count += 1
        factor = lr_factor(step, self.settings.n_steps, self.warmup_steps, self.settings.lr_decay_fraction)
        grads = {
            name: _as_rows(name, parameter.grad)
            for name, parameter in self._named().items()
            if parameter.grad is not None and name not in self.frozen
        }
        norms = {
            name: self.kernels.row_norms(grad, self.parts[name].rows if self.parts[name].on_sphere else None)
            for name, grad in grads.items()
        }
        norm = torch.stack([item.square_sum for item in norms.values()]).sum().sqrt().float()
        scale = (self.settings.clip / (norm + 1e-6)).clamp(max=1.0) if self.settings.clip else torch.ones_like(norm)
        for name, grad in grads.items():
            part = self.parts[name]
            adam = AdamStep(self.lr * factor * part.lr_unit, *self.betas, ADAM_EPS, self.step_count, part.seed)
            self.kernels.adam(part.rows, grad, part.moments, adam, scale, norms[name].along)
        if self.start is not None:
            pull_back(self.parts["W_dec"].rows, self.start)
        self.sae.zero_grad(set_to_none=True)
        return norm

    @property
    def current_lr(self) -> float:
        """Learning rate of the matrices in the last step."""
        step = max(0, self.step_count - 1)
        return self.lr * lr_factor(step, self.settings.n_steps, self.warmup_steps, self.settings.lr_decay_fraction)

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and the step count, by name."""
        found = {"step": torch.tensor(self.step_count)}
        for name, part in self.parts.items():
            found |= {f"{name}.{key}": tensor for key, tensor in part.moments.tensors().items()}
        return found

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave."""
        self.step_count = int(tensors["step"])
        for name, part in self.parts.items():
            for key, tensor in part.moments.tensors().items():
                tensor.copy_(tensors[f"{name}.{key}"])


def _as_rows(name: str, tensor: Tensor) -> Float[Tensor, "rows d"]:
    """View a parameter, or its gradient, as a contiguous matrix. W_enc lies transposed in memory."""
    if name == "W_enc":
        tensor = tensor.t()
    rows = tensor if tensor.ndim == 2 else tensor.reshape(1, -1)
    return rows if rows.is_contiguous() else rows.contiguous()
