"""Generating text with hooks: greedy or seeded sampling over a key/value cache.

The loop is our own, so that edits see a `Step` for every forward and can be scoped to positions and roles.
"""

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.errors import UserError
from sae.lm.hooks import Step
from sae.lm.tokens import Role, TokenBatch

if TYPE_CHECKING:
    from sae.lm.model import LanguageModel


class Generation(NamedTuple):
    """What was generated after each prompt."""

    tokens: Int[Tensor, "batch new"]  #: int64 on the CPU; padded after a row's end
    texts: list[str]  #: without special tokens
    n_tokens: list[int]  #: tokens generated in each row, the ending EOS included


@torch.no_grad()
def generate(
    lm: "LanguageModel",
    batch: TokenBatch,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool = True,
) -> Generation:
    """Continue every row of a batch until it ends or has `max_new_tokens` new tokens.

    Args:
        lm: the model; installed edits are applied.
        batch: prompts, padded on either side.
        max_new_tokens: the most tokens to add to a row.
        temperature: 0 takes the likeliest token; above, sample from logits / temperature.
        seed: of the sampling. The same batch and seed give the same texts.
        use_cache: keep keys and values (fast). Without, every step runs the whole text again: same tokens.

    Raises:
        UserError: a bad number, or prompts that leave no room in the context.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} is not positive: give 1 or more.")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature} is negative: give 0 (greedy) or more.")
    batch = batch.repad("left", lm.pad_id).to(lm.device)
    lm.check_length(batch.mask.shape[1] + max_new_tokens, "a prompt plus max_new_tokens")
    state = _State(lm, batch, use_cache)
    sampler = torch.Generator(device=lm.device).manual_seed(seed)
    with lm.light():
        for count in range(max_new_tokens):
            chosen = _choose(state.forward(), temperature, sampler)
            if state.append(chosen) or count == max_new_tokens - 1:
                break
    return state.result()


def _choose(logits: Float[Tensor, "batch d_vocab"], temperature: float, sampler: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    chances = (logits.float() / temperature).softmax(dim=-1)
    return torch.multinomial(chances, 1, generator=sampler).squeeze(1)


class _State:
    """Rows growing by one token a step, left-padded so that all end in the same column."""

    def __init__(self, lm: "LanguageModel", batch: TokenBatch, use_cache: bool) -> None:
        self.lm = lm
        self.tokens, self.mask, self.roles = batch
        self.positions = batch.positions()
        self.prompt = batch.tokens.shape[1]
        self.padded = not bool(batch.mask.all())
        self.active = torch.ones(len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)
        self.eos = torch.tensor(sorted(lm.eos_ids), dtype=torch.int64, device=batch.tokens.device)
        self.cache = _new_cache(lm) if use_cache else None
        self.seen = 0  # columns in the cache
        self.last_only = _can_keep_last(lm)
        # A prompt that ends inside an answer is continued; anything else gets its first answer token.
        inside = (batch.roles[:, -1] == Role.ASSISTANT) | (batch.roles[:, -1] == Role.FIRST_RESPONSE)
        self.next_role = torch.where(inside, int(Role.ASSISTANT), int(Role.FIRST_RESPONSE)).to(torch.uint8)

    def forward(self) -> Float[Tensor, "batch d_vocab"]:
        """Logits after the last column."""
        new = slice(self.seen, None)
        step = Step(self.seen, self.mask[:, new], self.roles[:, new], self.positions[:, new])
        logits = self.lm.run(
            self.tokens[:, new],
            step,
            self.mask if self.padded else None,
            cache=self.cache,
            last_only=self.last_only,
        )
        if self.cache is not None:
            self.seen = self.tokens.shape[1]
        return logits[:, -1]

    def append(self, chosen: Int[Tensor, " batch"]) -> bool:
        """Add a token to every row still going; tell whether all rows have ended."""
        chosen = torch.where(self.active, chosen, self.lm.pad_id)
        roles = torch.where(self.active, self.next_role, int(Role.PAD)).to(torch.uint8)
        ended = torch.isin(chosen, self.eos) & self.active
        roles = torch.where(ended, int(Role.SPECIAL), roles).to(torch.uint8)
        self.tokens = torch.cat([self.tokens, chosen[:, None]], dim=1)
        self.roles = torch.cat([self.roles, roles[:, None]], dim=1)
        self.mask = torch.cat([self.mask, self.active[:, None]], dim=1)
        following = self.positions[:, -1:] + self.active[:, None].long()
        self.positions = torch.cat([self.positions, following], dim=1)
        self.active = self.active & ~ended
        self.next_role = torch.full_like(self.next_role, int(Role.ASSISTANT))
        return not bool(self.active.any())

    def result(self) -> Generation:
        new = self.tokens[:, self.prompt :].cpu()
        counts = self.mask[:, self.prompt :].sum(dim=1).tolist()
        rows = [row[:count].tolist() for row, count in zip(new, counts, strict=True)]
        texts = self.lm.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return Generation(new, texts, counts)


def _new_cache(lm: "LanguageModel") -> Any:
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=lm.bridge.original_model.config)


def _can_keep_last(lm: "LanguageModel") -> bool:
    """Whether the model can skip the prompt's logits, and no hook wants to see them."""
    model = lm.bridge.original_model
    if "logits_to_keep" not in inspect.signature(type(model).forward).parameters:
        return False
    points = [point for name, point in lm.bridge.hook_dict.items() if name.startswith("unembed")]
    return not any(point.fwd_hooks for point in points)
