"""What a language model loses when an SAE's reconstruction takes the place of its activations.

Three passes per batch: clean, with reconstructions, with zeros in their place. `ce_recovered` saturates (zeros do so
much harm that any SAE looks good), so the raw difference and the KL divergence always stand beside it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.autoencoder.sae import SAE
from sae.errors import UserError
from sae.lm.hooks import edit
from sae.lm.tokens import TokenBatch, sae_mask


class SpliceResult(NamedTuple):
    """Means over predictions, in nats."""

    ce_clean: float
    ce_sae: float
    """Reconstructions in place of the activations."""
    ce_zero: float
    """Zeros in place of the activations."""
    delta_ce: float
    """ce_sae - ce_clean."""
    ce_recovered: float
    """(ce_zero - ce_sae) / (ce_zero - ce_clean); NaN where zeros change nothing."""
    kl: float
    """KL(clean || with reconstructions)."""
    kl_zero: float
    """KL(clean || with zeros)."""
    n_tokens: int
    """Predictions counted: next tokens where both the predicting and the predicted token are real."""


@torch.no_grad()
def splice(
    lm: Any,
    sae: SAE,
    batches: Iterable[TokenBatch],
    *,
    hook_name: str | None = None,
    splice_mask: Callable[[TokenBatch], Bool[Tensor, "batch pos"]] | None = None,
) -> SpliceResult:
    """Measure cross-entropy and KL with the reconstruction spliced in.

    Args:
        lm: has `logits(batch) -> [batch pos d_vocab]` and takes edits from `sae.lm.hooks.edit`.
        sae: the autoencoder.
        batches: token rows.
        hook_name: where to splice; default the SAE's own hook point.
        splice_mask: which tokens are replaced; default those that SAEs are trained on (no padding, no BOS/EOS).

    Raises:
        UserError: there is no prediction to count, or the SAE does not fit the hook point.
    """
    hook_name = sae.config.hook_name if hook_name is None else hook_name
    sums = torch.zeros(5, dtype=torch.float64)
    n_tokens = 0
    for batch in batches:
        where = sae_mask(batch.roles) if splice_mask is None else splice_mask(batch)
        counted = batch.mask[:, :-1] & batch.mask[:, 1:]
        clean = lm.logits(batch)
        with edit(lm, {hook_name: _replace(where, lambda acts: sae(acts).recons)}):
            with_sae = lm.logits(batch)
        with edit(lm, {hook_name: _replace(where, torch.zeros_like)}):
            with_zero = lm.logits(batch)
        sums += _sums(clean, with_sae, with_zero, batch.tokens, counted)
        n_tokens += int(counted.sum())
    if n_tokens == 0:
        raise UserError("no next-token prediction between real tokens to evaluate on: give longer texts.")
    ce_clean, ce_sae, ce_zero, kl, kl_zero = (sums / n_tokens).tolist()
    room = ce_zero - ce_clean
    return SpliceResult(
        ce_clean=ce_clean,
        ce_sae=ce_sae,
        ce_zero=ce_zero,
        delta_ce=ce_sae - ce_clean,
        ce_recovered=(ce_zero - ce_sae) / room if room != 0 else math.nan,
        kl=kl,
        kl_zero=kl_zero,
        n_tokens=n_tokens,
    )


def _replace(where: Tensor, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def replace(acts: Float[Tensor, "batch pos d_in"], step: Any) -> Float[Tensor, "batch pos d_in"]:
        new = fn(acts).to(acts)
        return torch.where(where.to(acts.device)[..., None], new, acts)

    return replace


def _sums(clean: Tensor, with_sae: Tensor, with_zero: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
    """[5] sums over the counted predictions: CE of the three, KL from clean to the other two."""
    counted = counted.to(clean.device)
    targets = tokens.to(clean.device)[:, 1:][counted]
    p, q, zero = (logits[:, :-1][counted].float().log_softmax(-1) for logits in (clean, with_sae, with_zero))

    def ce(logs: Tensor) -> Tensor:
        return -logs.gather(-1, targets[:, None]).double().sum()

    def kl(logs: Tensor) -> Tensor:
        return (p.exp() * (p - logs)).sum(-1).double().sum()

    return torch.stack([ce(p), ce(q), ce(zero), kl(q), kl(zero)]).cpu()
