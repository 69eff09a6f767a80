"""One SAE in training: its weights in normalised units, its optimiser, and when each latent last fired."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.autoencoder.gradients import TrainingLoss, loss_and_gradients
from sae.autoencoder.loss import variance
from sae.autoencoder.revive import AuxK
from sae.autoencoder.sae import SAE, make
from sae.autoencoder.site import Site
from sae.kernels.operands import Precision, Workspace
from sae.kernels.reference import Kernels
from sae.train.grid import SAESpec
from sae.train.initialise import InputStats, initialise
from sae.train.optim import Optimiser
from sae.train.settings import TrainSettings
from sae.train.start import go_on_from, start_folder

AVERAGE_MEMORY = 0.02


class FinalStats(NamedTuple):
    """How an SAE stood at the end of training."""

    l0: float
    fvu: float
    n_dead: int


class Inputs(NamedTuple):
    """A batch at one site, shared by all its SAEs. Scaled so that E||x||^2 = d at every hook point, fp32."""

    x: Float[Tensor, "batch d_in"]
    target: Float[Tensor, "batch d_out"]
    """The same as x, but for transcoders."""
    variance: Tensor
    """Scalar: sum of squares of the target about its batch mean."""

    @classmethod
    def of(cls, scaled: Mapping[str, Float[Tensor, "batch d"]], site: Site) -> "Inputs":
        """Pick a site's own from the scaled activations of all hook points."""

        def joined(names: tuple[str, ...]) -> Tensor:
            return scaled[names[0]] if len(names) == 1 else torch.cat([scaled[name] for name in names], dim=1)

        x = joined(site.reads)
        target = x if site.reads == site.writes else joined(site.writes)
        return cls(x, target, variance(target))


class StepResult(NamedTuple):
    """What one step of one SAE gave."""

    loss: TrainingLoss
    grad_norm: Tensor
    """Scalar, before clipping."""


class SAERun:
    """Everything one SAE needs to take a step, and to be put aside and taken up again."""

    def __init__(
        self,
        spec: SAESpec,
        widths: Mapping[str, int],
        settings: TrainSettings,
        lm_name: str,
        lm_fingerprint: str,
        device: torch.device,
        kernels: Kernels,
        precision: Precision,
        workspace: Workspace | None = None,
    ) -> None:
        self.spec = spec
        self.settings = settings
        self.kernels, self.precision = kernels, precision
        self.workspace = workspace or Workspace()  # shared by the SAEs of a grid, which step one after another
        self.auxk = AuxK(settings.auxk_alpha, settings.k_aux)
        config = spec.config(widths, settings.options, lm_name, lm_fingerprint)
        self.sae = make(config, settings.schedule(spec.seed)).to(device)
        self.scales = dict.fromkeys(spec.site.hooks, 1.0)
        """What the activations of each hook point are multiplied by; folded into the weights at the end."""
        self.optimiser = Optimiser(self.sae, settings, kernels, spec.control)
        self.silent_tokens = torch.zeros(spec.d_sae, dtype=torch.int64, device=device)
        self.averages = torch.full((2,), torch.nan, dtype=torch.float64, device=device)
        """Running averages of l0 and fvu."""

    def initialise(self, stats: Mapping[str, InputStats]) -> None:
        """Take scales from the data; and centre and thresholds, or all the weights of the SAE to start from."""
        self.scales = {name: stats[name].scale for name in self.spec.site.hooks}
        start = start_folder(self.settings.start, self.spec)
        if start is None:
            initialise(self.sae, stats)
        else:
            go_on_from(self.sae, SAE.load(start, device=self.sae.device), self.scales)

    def inputs(self, acts: Mapping[str, Float[Tensor, "batch d"]]) -> Inputs:
        """Its inputs from raw fp32 activations by hook point, for where it is the only SAE that wants them."""
        return Inputs.of({name: acts[name] * scale for name, scale in self.scales.items()}, self.spec.site)

    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Latents silent for `dead_after_tokens`."""
        return self.silent_tokens >= self.settings.dead_after

    def train_step(self, inputs: Inputs, step: int) -> StepResult:
        """Take optimiser step number `step` (from 0) on a batch."""
        # No latent can have been silent for longer than training has lasted: until then there is nothing to look for.
        long_enough = (step + 1) * len(inputs.x) > self.settings.dead_after
        loss = loss_and_gradients(
            self.sae,
            inputs.x,
            step,
            self.dead() if long_enough else None,
            target=inputs.target,
            kernels=self.kernels,
            precision=self.precision,
            auxk=self.auxk,
            target_variance=inputs.variance,
            workspace=self.workspace,
        )
        grad_norm = self.optimiser.step(step)
        self.sae.sparsity.update(loss.stats)
        self._record(loss, len(inputs.x))
        return StepResult(loss, grad_norm)

    def _record(self, loss: TrainingLoss, batch_tokens: int) -> None:
        self.silent_tokens.add_(batch_tokens).masked_fill_(loss.fired, 0)
        now = torch.stack([loss.stats.l0, loss.fvu]).double()
        self.averages = torch.where(self.averages.isnan(), now, self.averages.lerp(now, AVERAGE_MEMORY))

    def state_tensors(self) -> dict[str, Tensor]:
        """All that changes during training, for a checkpoint."""
        found = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        found |= {f"adam.{name}": tensor for name, tensor in self.optimiser.state_tensors().items()}
        return {**found, "silent_tokens": self.silent_tokens, "averages": self.averages}

    def load_state(self, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
        """Restore a checkpoint."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.sae.load_state_dict(part("sae."))
        self.optimiser.load_state_tensors(part("adam."))
        self.silent_tokens.copy_(tensors["silent_tokens"])
        self.averages.copy_(tensors["averages"])
        self.scales = dict(scales)

    def finish(self, folder: Path, identity: str) -> FinalStats:
        """Fold the scales into the weights and save them. The run is over: it cannot take another step."""
        l0, fvu = self.averages.tolist()
        final = FinalStats(l0, fvu, int(self.dead().sum()))
        sae = self.sae
        site = self.spec.site
        reads, writes = ([self.scales[name] for name in names] for names in (site.reads, site.writes))
        sae.fold_scales(reads, writes)
        n_tokens = self.settings.n_steps * self.settings.batch_tokens
        training = {**self.settings.identity(), "lr": self.optimiser.lr, "n_tokens": n_tokens, "run": identity}
        training |= {"kernels": self.kernels.name, "control": self.spec.control, **final._asdict()}
        if self.settings.start:
            training |= {"start": str(start_folder(self.settings.start, self.spec))}
        training |= {"input_scales": reads, "output_scales": writes}
        sae.config = dataclasses.replace(sae.config, metadata={"training": training})
        sae.save(folder)
        return final
