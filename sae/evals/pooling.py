"""One row a text: activations and latents at its last token, or their mean over its tokens.

The mean of a latent is the mean of its activations over tokens, not its activation on the mean: an SAE knows tokens.
Tokens that SAEs never see (padding, BOS, EOS) are neither last nor counted.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.errors import UserError, unknown
from sae.lm.tokens import TokenBatch, sae_mask

POSITIONS = ("last", "mean")


class PooledLatents(NamedTuple):
    """Latents of one SAE over texts."""

    parts: list[Tensor]
    """Sparse [rows d_sae], on the CPU, in the order of the texts; `batches` gives them dense."""
    l0: float
    """Mean number of active latents over the tokens that were read."""

    def batches(self) -> Iterable[Float[Tensor, "rows d_sae"]]:
        """The rows again, some at a time: what `sae.evals.probing` reads."""
        for part in self.parts:
            yield part.to_dense()


class Pooled(NamedTuple):
    """Rows of the texts, in their order."""

    acts: dict[str, Float[Tensor, "n d_in"]]
    """Raw activations by hook point; float32, on the CPU."""
    latents: list[PooledLatents]
    """One for each SAE."""


@torch.no_grad()
def tokens_read(
    lm: Any, batches: Iterable[TokenBatch], hook_names: Sequence[str], position: str, include_special: bool = False
) -> dict[str, Float[Tensor, "token d_in"]]:
    """Raw activations, by hook point, at every token that `pool` would read.

    Args:
        lm: has `activations(batch, hook_names)`.
        batches: of texts.
        hook_names: where.
        position: "last" or "mean".
        include_special: as in `pool`.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    for batch in batches:
        where = read_mask(batch, position, include_special)
        for name, acts in lm.activations(batch, hook_names).items():
            found[name].append(acts[where.to(acts.device)].float())
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def pool(
    lm: Any,
    saes: Sequence[SAE],
    batches: Iterable[TokenBatch],
    position: str,
    *,
    include_special: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Pooled:
    """Read texts: one pass of the language model for all SAEs.

    Args:
        lm: has `activations(batch, hook_names)`.
        saes: of any hook points; what a transcoder or crosscoder reads counts.
        batches: of texts, in the order of the rows.
        position: "last" token or "mean" over tokens.
        include_special: whether BOS, EOS and the like are read.
        progress: called after each batch.

    Raises:
        UserError: an unknown position, or a text without a token to read.
    """
    hooks = list(dict.fromkeys(name for sae in saes for name in sae.config.site.reads))
    acts: dict[str, list[Tensor]] = {name: [] for name in hooks}
    latents: list[list[Tensor]] = [[] for _ in saes]
    n_active, n_tokens = [0] * len(saes), 0
    for batch in batches:
        where = read_mask(batch, position, include_special)
        n_tokens += int(where.sum())
        found = {name: part[where.to(part.device)].float() for name, part in lm.activations(batch, hooks).items()}
        means = _means(where).to(found[hooks[0]])
        for name in hooks:
            acts[name].append((means @ found[name]).cpu())
        for number, sae in enumerate(saes):
            active = sae.encode(torch.cat([found[name] for name in sae.config.site.reads], dim=-1)).float()
            n_active[number] += int((active != 0).sum())
            latents[number].append((means @ active).cpu().to_sparse())
        progress()
    return Pooled(
        {name: torch.cat(parts) for name, parts in acts.items()},
        [PooledLatents(parts, count / max(1, n_tokens)) for parts, count in zip(latents, n_active, strict=True)],
    )


def read_mask(batch: TokenBatch, position: str, include_special: bool = False) -> Bool[Tensor, "batch pos"]:
    """The tokens that make up the row of each text.

    Raises:
        UserError: an unknown position, or a text without such a token.
    """
    if position not in POSITIONS:
        raise unknown("position", position, list(POSITIONS))
    where = sae_mask(batch.roles, include_special)
    if not bool(where.any(dim=1).all()):
        raise UserError("a text has no token that an SAE sees: give each text a word.")
    if position == "mean":
        return where
    columns = torch.arange(where.shape[1], device=where.device)
    last = torch.where(where, columns, -1).amax(dim=1)
    return columns == last[:, None]


def _means(where: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch token"]:
    """The matrix that takes the mean over each text's tokens, where tokens are listed text by text."""
    text = where.nonzero()[:, 0]
    rows = torch.arange(len(where), device=where.device)
    return (text[None] == rows[:, None]).float() / where.sum(1, keepdim=True)
