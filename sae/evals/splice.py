"""What a language model loses when an SAE's reconstruction takes the place of its activations.

Three passes per batch: clean, with reconstructions, with zeros in their place. `ce_recovered` saturates (zeros do so
much harm that any SAE looks good), so the raw difference and the KL divergence always stand beside it.

What a transcoder or crosscoder writes is made from the activations of a clean pass, and takes the place of all it
reconstructs at once. A crosscoder of two models is spliced into each of them, the other left as it is.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.autoencoder.crosscoder import Crosscoder
from sae.autoencoder.sae import SAE
from sae.autoencoder.site import Site
from sae.errors import UserError
from sae.lm.hooks import edit
from sae.lm.pair import PREFIX, bare, is_pairs, models_of
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


class PairedSplices(NamedTuple):
    """What a site costs in each of the models that it writes to."""

    together: SpliceResult
    """Over the predictions of all of them; with one model, its own."""
    models: dict[str, SpliceResult]
    """By the prefix of the model's hook points (see `sae.lm.pair`); "" is the first, or the only one."""


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
    hook_names = None if hook_name is None else [hook_name]
    return splice_all(lm, [sae], batches, hook_names=hook_names, splice_mask=splice_mask)[0].together


@torch.no_grad()
def splice_all(
    lm: Any,
    saes: Sequence[SAE],
    batches: Iterable[TokenBatch],
    *,
    hook_names: Sequence[str] | None = None,
    splice_mask: Callable[[TokenBatch], Bool[Tensor, "batch pos"]] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[PairedSplices]:
    """Measure many SAEs on the same tokens: one clean pass, one zero pass a site and one pass an SAE, per batch.

    Of a `sae.lm.pair.PairedModel`, with the damage to each of the two models.

    Args:
        lm: as in `splice`.
        saes: the autoencoders.
        batches: token rows; read once.
        hook_names: where to splice each; default the SAEs' own hook points.
        splice_mask: as in `splice`.
        progress: called after each batch.

    Raises:
        UserError: there is no prediction to count, or an SAE does not fit its hook point.
    """
    sites = [sae.config.site for sae in saes] if hook_names is None else [Site((name,), (name,)) for name in hook_names]
    elsewhere = list(dict.fromkeys(name for site in sites if site.kind != "sae" for name in site.reads))
    models = models_of(lm)
    totals = [{prefix: _Totals() for prefix in models if written(site, prefix)} for site in sites]
    for batch in batches:
        where = sae_mask(batch.roles) if splice_mask is None else splice_mask(batch)
        read = lm.activations(batch, elsewhere) if elsewhere else {}
        for prefix, model in models.items():
            group = [
                _Spliced(partial(edits_of, sae, site, where, read), written(site, prefix), total[prefix])
                for sae, site, total in zip(saes, sites, totals, strict=True)
                if prefix in total
            ]
            _splice_into(model, batch, where, group)
        progress()
    return [
        PairedSplices(_Totals.join(total.values()).result(), {name: part.result() for name, part in total.items()})
        for total in totals
    ]


class _Spliced(NamedTuple):
    """One SAE, to be spliced into one model."""

    edits: Callable[[], Mapping[str, Callable[..., Tensor]]]
    """By hook point, of other models too; made when its turn comes, since reconstructions are large."""
    writes: tuple[str, ...]
    """The hook points that are this model's."""
    total: "_Totals"


def written(site: Site, prefix: str) -> tuple[str, ...]:
    """The hook points of one model that a site writes, under the names they have here."""
    return tuple(name for name in site.writes if is_pairs(name) == (prefix == PREFIX))


def _splice_into(
    model: Any,
    batch: TokenBatch,
    where: Bool[Tensor, "batch pos"],
    group: Sequence[_Spliced],
) -> None:
    """Run one model clean, with zeros once for each set of hook points, and with each SAE; add to the totals."""
    if not group:
        return
    counted = (batch.mask[:, :-1] & batch.mask[:, 1:]).to(where.device)

    def logs(edits: Mapping[str, Callable[..., Tensor]]) -> Tensor:
        with edit(model, {bare(name): fn for name, fn in edits.items()}):
            logits = model.logits(batch)
        return logits[:, :-1][counted.to(logits.device)].float().log_softmax(-1)

    clean = logs({})
    targets = batch.tokens[:, 1:].to(clean.device)[counted.to(clean.device)]
    for writes in dict.fromkeys(spliced.writes for spliced in group):
        # One at a time: log-probabilities over a large vocabulary are gigabytes.
        zero = logs({name: _replace(where, torch.zeros_like) for name in writes})
        for spliced in group:
            if spliced.writes == writes:
                edits = spliced.edits()
                spliced.total.add(clean, logs({name: edits[name] for name in writes}), zero, targets)
        del zero


class _Totals:
    """Sums over the counted predictions, in float64: CE clean, with the SAE, with zeros; KL of the latter two."""

    def __init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)
        self.n = 0

    def add(self, clean: Tensor, with_sae: Tensor, with_zero: Tensor, targets: Tensor) -> None:
        """Add log-probabilities [n d_vocab] and targets [n]."""

        def ce(logs: Tensor) -> Tensor:
            return -logs.gather(-1, targets[:, None]).double().sum()

        def kl(logs: Tensor) -> Tensor:
            return (clean.exp() * (clean - logs)).sum(-1).double().sum()

        self.sums += torch.stack([ce(clean), ce(with_sae), ce(with_zero), kl(with_sae), kl(with_zero)]).cpu()
        self.n += len(targets)

    @classmethod
    def join(cls, parts: Iterable["_Totals"]) -> "_Totals":
        """The sums of several models."""
        whole = cls()
        for part in parts:
            whole.sums += part.sums
            whole.n += part.n
        return whole

    def result(self) -> SpliceResult:
        """The means."""
        if self.n == 0:
            raise UserError("no next-token prediction between real tokens to evaluate on: give longer texts.")
        ce_clean, ce_sae, ce_zero, kl, kl_zero = (self.sums / self.n).tolist()
        room = ce_zero - ce_clean
        return SpliceResult(
            ce_clean=ce_clean,
            ce_sae=ce_sae,
            ce_zero=ce_zero,
            delta_ce=ce_sae - ce_clean,
            ce_recovered=(ce_zero - ce_sae) / room if room != 0 else math.nan,
            kl=kl,
            kl_zero=kl_zero,
            n_tokens=self.n,
        )


def edits_of(sae: SAE, site: Site, where: Tensor, read: Mapping[str, Tensor]) -> dict[str, Callable[..., Tensor]]:
    """What puts a reconstruction in the place of activations, by hook point.

    `read` holds the activations of a clean pass that a transcoder or crosscoder reads; an SAE needs none.
    """
    if site.kind == "sae":
        return {site.writes[0]: _replace(where, lambda acts: sae(acts).recons)}
    recons = sae(torch.cat([read[name] for name in site.reads], dim=-1)).recons
    parts = sae.split(recons) if isinstance(sae, Crosscoder) else [recons]
    return {name: _replace(where, partial(_instead, part)) for name, part in zip(site.writes, parts, strict=True)}


def _instead(new: Tensor, acts: Tensor) -> Tensor:
    return new


def _replace(where: Tensor, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def replace(acts: Float[Tensor, "batch pos d_in"], step: Any) -> Float[Tensor, "batch pos d_in"]:
        new = fn(acts).to(acts)
        return torch.where(where.to(acts.device)[..., None], new, acts)

    return replace
