"""One SAE in training: its weights in normalised units, its optimiser, and when each latent last fired."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from sae.autoencoder.forward import TrainingLoss
from sae.autoencoder.sae import SAE, SAEConfig
from sae.train.grid import SAESpec
from sae.train.initialise import InputStats, initialise
from sae.train.optim import Optimiser
from sae.train.settings import TrainSettings

AVERAGE_MEMORY = 0.02


class FinalStats(NamedTuple):
    """How an SAE stood at the end of training."""

    l0: float
    fvu: float
    n_dead: int


class SAERun:
    """Everything one SAE needs to take a step, and to be put aside and taken up again."""

    def __init__(
        self,
        spec: SAESpec,
        d_in: int,
        settings: TrainSettings,
        lm_name: str,
        lm_fingerprint: str,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.settings = settings
        config = SAEConfig(
            architecture=spec.architecture,
            d_in=d_in,
            d_sae=spec.d_sae,
            l0=spec.l0,
            seed=spec.seed,
            hook_name=spec.hook_name,
            lm_name=lm_name,
            lm_fingerprint=lm_fingerprint,
        )
        self.sae = SAE(config, settings.sparsity_options()).to(device)
        self.scale = 1.0
        """Inputs are multiplied by it; folded into the weights at the end."""
        self.optimiser = Optimiser(self.sae, settings)
        self.silent_tokens = torch.zeros(spec.d_sae, dtype=torch.int64, device=device)
        self.averages = torch.full((2,), torch.nan, dtype=torch.float64, device=device)
        """Running averages of l0 and fvu."""

    def initialise(self, stats: InputStats) -> None:
        """Take scale, centre and thresholds from the data."""
        self.scale = stats.scale
        device = self.sae.device
        initialise(self.sae, InputStats(stats.scale, stats.centre.to(device), stats.sample.to(device)))

    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Latents silent for `dead_after_tokens`."""
        return self.silent_tokens >= self.settings.dead_after_tokens

    def record(self, loss: TrainingLoss, batch_tokens: int) -> None:
        """Count what a batch did."""
        self.silent_tokens.add_(batch_tokens).masked_fill_(loss.fired, 0)
        now = torch.stack([loss.stats.l0, loss.fvu]).double()
        self.averages = torch.where(self.averages.isnan(), now, self.averages.lerp(now, AVERAGE_MEMORY))

    def state_tensors(self) -> dict[str, Tensor]:
        """All that changes during training, for a checkpoint."""
        found = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        found |= {f"adam.{name}": tensor for name, tensor in self.optimiser.state_tensors().items()}
        return {**found, "silent_tokens": self.silent_tokens, "averages": self.averages}

    def load_state(self, tensors: Mapping[str, Tensor], scale: float) -> None:
        """Restore a checkpoint."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.sae.load_state_dict(part("sae."))
        self.optimiser.load_state_tensors(part("adam."))
        self.silent_tokens.copy_(tensors["silent_tokens"])
        self.averages.copy_(tensors["averages"])
        self.scale = scale

    def finish(self, folder: Path, identity: str) -> FinalStats:
        """Fold the input scale into a copy of the weights and save it."""
        l0, fvu = self.averages.tolist()
        final = FinalStats(l0, fvu, int(self.dead().sum()))
        sae = copy.deepcopy(self.sae)
        sae.fold_input_scale(self.scale)
        n_tokens = self.settings.n_steps * self.settings.batch_tokens
        training = {**self.settings.identity(), "lr": self.optimiser.lr, "n_tokens": n_tokens, "run": identity}
        training |= {"input_scale": self.scale, **final._asdict()}
        sae.config = SAEConfig(**{**sae.config.__dict__, "metadata": {"training": training}})
        sae.save(folder)
        return final
