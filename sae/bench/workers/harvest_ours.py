"""Our harvest as a worker, and what it is measured by: Hugging Face's forward, cut off behind the last block needed.

python -m sae.bench.workers.harvest_ours
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sae.activations.harvest import Passes, harvest
from sae.bench.workers.harvesting import Harvester, Job, serve, timed
from sae.files import versions
from sae.lm.load import load_lm
from sae.lm.tokens import PackedTokens, Role, TokenBatch

OURS = "ours"
BARE = "bare"
SHARD_TOKENS = 262_144  # the default


class Ours(Harvester):
    """`sae harvest` behind tokenising: passes of the language model and a finished store on disk."""

    version = versions()["sae"]

    def __init__(self, job: Job, tokens: np.ndarray) -> None:
        super().__init__(job, tokens)
        self.lm = load_lm(job.model, device="cpu", dtype=job.dtype)
        self.hook_name = f"blocks.{job.hook_layer}.hook_resid_post"
        self.options = f"Passes and harvest, {job.store} store on disk"

    def sample(self, rows: np.ndarray) -> Tensor:
        """As the passes give them."""
        batch = _batch(rows)
        return self.lm.activations(TokenBatch(batch.tokens.long(), batch.mask, batch.roles), [self.hook_name])[
            self.hook_name
        ]

    def run(self) -> float:
        """A store in a folder of its own, deleted after the clock has stopped."""
        passes = Passes(self.lm, _batch(self.tokens), [self.hook_name], batch_tokens=self.job.batch_tokens)
        folder = Path(tempfile.mkdtemp(dir=self.job.scratch))
        try:
            write = partial(harvest, passes, folder, shard_tokens=SHARD_TOKENS, dtype=self.job.store, seed=0)
            return timed(write)
        finally:
            shutil.rmtree(folder)


class Bare(Harvester):
    """The Hugging Face model with the blocks behind the hook point taken off; activations go nowhere."""

    version = versions()["transformers"]
    options = "blocks behind the hook point removed; no hooks, no logits; nothing kept"

    def __init__(self, job: Job, tokens: np.ndarray) -> None:
        super().__init__(job, tokens)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype)).eval()
        self.model = model.transformer
        self.model.h = self.model.h[: job.hook_layer + 1]
        self.model.ln_f = nn.Identity()

    @torch.no_grad()
    def sample(self, rows: np.ndarray) -> Tensor:
        """What the last block gives."""
        hidden: Tensor = self.model(torch.from_numpy(rows), use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def run(self) -> float:
        """All tokens, as many a pass as everybody has."""
        rows = max(1, self.job.batch_tokens // self.tokens.shape[1])

        def forward() -> None:
            for start in range(0, len(self.tokens), rows):
                self.model(torch.from_numpy(self.tokens[start : start + rows]), use_cache=False)

        return timed(forward)


def _batch(rows: np.ndarray) -> PackedTokens:
    doc = torch.arange(len(rows), dtype=torch.int32)[:, None].expand(rows.shape).contiguous()
    roles = torch.full(rows.shape, int(Role.TEXT), dtype=torch.uint8)
    return PackedTokens(torch.from_numpy(rows).int(), roles, doc)


if __name__ == "__main__":
    serve(lambda job, tokens: (Ours if job.way == OURS else Bare)(job, tokens))
