"""SAELens's way to activations as a worker, and TransformerLens's own, which it is built on.

Run by the peers' Python, as a script. The model is a `HookedTransformer` without processing, as SAELens loads it, with
the checkpoint's weights; it is built from its configuration, since loading by name would ask the Hugging Face Hub.
"""

import importlib
from importlib import metadata
from typing import Any

import numpy as np
import torch
from harvesting import Harvester, Job, serve, timed
from torch import Tensor

STORE = "sae-lens"
AUTOCAST = "sae-lens autocast_lm"
EVERYTHING = "run_with_cache"
BATCH = 4_096  # train_batch_size_tokens, SAELens's default
BUFFER_PROMPTS = 64  # n_batches_in_buffer as in its documentation; the default of 20 is refused by its own check


class Peer(Harvester):
    """A `HookedTransformer`."""

    def __init__(self, job: Job, tokens: np.ndarray) -> None:
        super().__init__(job, tokens)
        self.model = _load(job)
        self.hook_name = f"blocks.{job.hook_layer}.hook_resid_post"
        if job.way == EVERYTHING:  # slow, and the cache of a whole batch would take gigabytes
            self.tokens = tokens[: max(1, len(tokens) // 4)]
        self.rows = max(1, job.batch_tokens // tokens.shape[1] // (4 if job.way == EVERYTHING else 1))
        self.store: Any = None
        if job.way in (STORE, AUTOCAST):
            self.version = metadata.version("sae-lens")
            self.options = (
                "ActivationsStore.next_batch on a tokenised dataset, its buffer of 64 prompts; nothing written"
            )
            self.store = self._open_store()
            next(self.store)  # fills the buffer
        else:
            self.version = metadata.version("transformer-lens")
            self.options = "HookedTransformer.run_with_cache of every hook point, a quarter of the batch"

    def _open_store(self) -> Any:
        datasets = importlib.import_module("datasets")
        data = datasets.Dataset.from_dict({"tokens": self.tokens.tolist()})
        module = importlib.import_module("sae_lens.training.activations_store")
        return module.ActivationsStore(
            model=self.model,
            dataset=data,
            streaming=False,
            hook_name=self.hook_name,
            hook_head_index=None,
            context_size=self.tokens.shape[1],
            d_in=self.model.cfg.d_model,
            n_batches_in_buffer=max(BUFFER_PROMPTS, -(-BATCH // self.tokens.shape[1])),
            total_training_tokens=self.tokens.size,
            store_batch_size_prompts=self.rows,
            train_batch_size_tokens=min(BATCH, self.tokens.size),
            prepend_bos=True,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            autocast_lm=self.job.way == AUTOCAST,
        )

    @torch.no_grad()
    def sample(self, rows: np.ndarray) -> Tensor:
        """By the call that the store makes, or by the cache of everything."""
        if self.store is not None:
            found: Tensor = self.store.get_activations(torch.from_numpy(rows))
            return found
        cached: Tensor = self.model.run_with_cache(torch.from_numpy(rows), prepend_bos=False)[1][self.hook_name]
        return cached

    @torch.no_grad()
    def run(self) -> float:
        """As many batches as the tokens make; in the long run each costs one pass."""
        if self.store is not None:
            return timed(lambda: [next(self.store) for _ in range(self.tokens.size // min(BATCH, self.tokens.size))])

        def cache() -> None:
            for start in range(0, len(self.tokens), self.rows):
                rows = torch.from_numpy(self.tokens[start : start + self.rows])
                self.model.run_with_cache(rows, prepend_bos=False)

        return timed(cache)


def _load(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    lens = importlib.import_module("transformer_lens")
    conversions = importlib.import_module("transformer_lens.pretrained.weight_conversions")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    given = model.config
    config = lens.HookedTransformerConfig(
        n_layers=given.n_layer,
        d_model=given.n_embd,
        n_ctx=given.n_positions,
        n_heads=given.n_head,
        d_head=given.n_embd // given.n_head,
        d_mlp=given.n_inner or 4 * given.n_embd,
        d_vocab=given.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=given.layer_norm_epsilon,
        device="cpu",
        default_prepend_bos=False,
    )
    hooked = lens.HookedTransformer(config)
    hooked.load_and_process_state_dict(
        conversions.convert_gpt2_weights(model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked.eval()


if __name__ == "__main__":
    serve(Peer)
