"""SAELens as a worker: its own `SAETrainer.step`, which needs no language model, driven batch by batch as `fit` does.

Run by the peers' Python, as a script.
"""

import importlib
import tempfile
from collections.abc import Iterator
from typing import Any

import protocol
from protocol import Description, Request, Trainee


class SAELens(Trainee):
    """One SAE of SAELens, with the library's defaults for everything a `Request` does not say."""

    def __init__(self, request: Request) -> None:
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        if request.precision not in (protocol.FLOAT32, protocol.AUTOCAST):
            raise ValueError(f"precision {request.precision!r} is not known")
        self.sae, words = _make_sae(request)
        half = request.precision == protocol.AUTOCAST
        config = SAETrainerConfig(
            total_training_samples=request.n_steps * request.batch_tokens,
            train_batch_size_samples=request.batch_tokens,
            lr=request.lr,
            lr_end=request.lr,  # a constant schedule asks for it, too
            lr_warm_up_steps=request.lr_warmup_steps,
            lr_decay_steps=request.lr_decay_steps,
            device=request.device,
            autocast=half,
            # Counted in steps here, in tokens by everybody else.
            dead_feature_window=max(1, request.dead_after_tokens // request.batch_tokens),
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer: Any = SAETrainer(config, self.sae, _no_data())
        self.inference: Any = None
        self.description = Description(
            dtype=request.precision,
            options=f"SAETrainer.step{', autocast=True' if half else ''}; {words}; clip 1; its Adam; "
            "firing statistics; inputs taken as they are (normalize_activations=none)",
        )

    def step(self, x: Any) -> None:
        """Take the library's public step, and count it as `fit` does."""
        self.inference = None
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Any, selection: str) -> tuple[Any, Any]:
        """By the SAE in training, or by the inference SAE that the library would save."""
        if selection == protocol.TRAINING:
            acts, _ = self.sae.encode_with_hidden_pre(x)
            return self.sae.decode(acts), acts
        if self.inference is None:
            self.inference = _as_saved(self.sae, str(x.device))
        acts = self.inference.encode(x)
        return self.inference.decode(acts), acts


def _make_sae(request: Request) -> tuple[Any, str]:
    import sae_lens

    common: dict[str, Any] = {"d_in": request.d_in, "d_sae": request.d_sae, "device": request.device}
    k, warmup = request.k, request.n_steps // 10
    if request.architecture == "topk":
        return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(k=k, **common)), "TopK, AuxK where dead"
    if request.architecture == "batch_topk":
        config = sae_lens.BatchTopKTrainingSAEConfig(k=float(k), **common)
        return sae_lens.BatchTopKTrainingSAE(config), "BatchTopK, AuxK where dead, average threshold"
    if request.architecture == "jumprelu":
        # The only one of its three losses that has a target L0.
        config = sae_lens.JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="quadratic", target_l0=float(k), l0_warm_up_steps=warmup, **common
        )
        return sae_lens.JumpReLUTrainingSAE(config), "JumpReLU, quadratic loss with target L0"
    if request.architecture == "relu":
        config = sae_lens.StandardTrainingSAEConfig(l1_warm_up_steps=warmup, **common)
        return sae_lens.StandardTrainingSAE(config), "standard, l1_coefficient 1 (it has no target L0)"
    raise ValueError(f"SAELens has no architecture {request.architecture!r}")


def _as_saved(sae: Any, device: str) -> Any:
    """The inference SAE: BatchTopK becomes JumpReLU with the average threshold, decoder norms are folded."""
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=device)


def _no_data() -> Iterator[Any]:
    """Batches are handed to `step`; the trainer never asks for one."""
    yield from ()


if __name__ == "__main__":
    protocol.serve("sae-lens", SAELens, lambda: importlib.import_module("sae_lens.training.sae_trainer"))
