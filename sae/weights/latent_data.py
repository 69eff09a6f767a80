"""Which heads and neurons write a latent, and which read it: on prompts.

The residual stream is a sum, and a latent's pre-activation is linear in it. So what a part *contributes* to the
pre-activation, its output times the encoder row, is exact: over all parts, embeddings and constants it adds up to the
pre-activation. That is the direct effect; through later parts the same part may do more, which ablating it measures.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae import stats
from sae.autoencoder import normalize
from sae.behavior.measure import Prompts
from sae.errors import UserError
from sae.lm.hooks import edit
from sae.lm.matrices import Part
from sae.lm.tokens import TokenBatch
from sae.weights.latents import columns_of, sites_after, sites_before
from sae.weights.stream import Site, Stream, coordinates_at

Array = np.ndarray


class Contributions(NamedTuple):
    """What adds up to a latent's pre-activation at one token of each prompt.

    Attributes:
        parts: those before the hook point.
        values: by prompt and part.
        embed: of the embeddings; 0 where the hook point is not of the stream.
        constant: biases, of the model and of the SAE.
        pre_acts: what it adds up to.
        gap: largest difference from that, over the prompts; no more than rounding where the parts are all that writes.
    """

    parts: list[Part]
    values: Float[Array, "n part"]
    embed: Float[Array, " n"]
    constant: float
    pre_acts: Float[Array, " n"]
    gap: float

    def contrast(self, labels: Sequence[bool]) -> Float[Array, " part"]:
        """Mean contribution where the behaviour is due minus where it is not."""
        flags = np.asarray(labels, dtype=bool)
        found: Array = self.values[flags].mean(axis=0) - self.values[~flags].mean(axis=0)
        return found


@torch.no_grad()
def contributions(
    lm: Any, stream: Stream, encoder: Any, latent: int, parts: Sequence[Part], prompts: Prompts, position: int = -1
) -> Contributions:
    """Take a latent's pre-activation apart.

    Args:
        lm: the model.
        stream: its sites.
        encoder: an SAE at the stream, or at what attention or MLP add to it.
        latent: which.
        parts: heads and neurons; those that come after the hook point are left out. For a sum without a gap give all.
        prompts: from `sae.behavior.measure.prepare`.
        position: token, counted from the prompt's end (-1 is the last).

    Raises:
        UserError: an SAE that normalises every token by itself, whose latents are no linear function of the stream.
    """
    _check(encoder)
    hook = str(encoder.config.hook_name)
    sites = sites_before(lm, stream, hook)
    row = encoder.W_enc.detach().float()[:, latent].to(lm.device)
    own = [(part, site) for part in parts for site in sites if _at(part, site)]
    values, embed, pre_acts = [], [], []
    for batch in prompts.batches:
        batch = batch.repad("left", lm.pad_id).to(lm.device)
        found = lm.activations(batch, [*stream.hooks, hook])
        last = {name: acts[:, position].float() for name, acts in found.items()}
        along = {site.name: site.coordinates(last) * (row @ site.weight) for site in sites}
        values.append(torch.stack([along[site.name][:, columns_of(part, site)].sum(1) for part, site in own], dim=1))
        streamed = hook.endswith(("hook_resid_pre", "hook_resid_post"))
        embed.append(last[stream.embed] @ row * float(streamed))
        pre_acts.append(encoder.pre_acts(last[hook])[:, latent].float().to(lm.device))
    all_values, all_embed, total = (torch.cat(some).double().cpu() for some in (values, embed, pre_acts))
    constant = total - all_values.sum(1) - all_embed
    return Contributions(
        [part for part, _ in own],
        all_values.numpy(),
        all_embed.numpy(),
        float(constant.mean()),
        total.numpy(),
        float((constant - constant.mean()).abs().max()),
    )


class AblationCheck(NamedTuple):
    """Parts' direct contributions beside what ablating them does.

    Attributes:
        parts: those that were ablated.
        direct: contribution, minus that of the part's mean; mean over the prompts.
        total: fall of the pre-activation when the part gives its mean at every token; mean over the prompts.
        agreement: rank correlation of the two.
        falls: `total` by prompt.
    """

    parts: list[Part]
    direct: Float[Array, " part"]
    total: Float[Array, " part"]
    agreement: stats.Correlation
    falls: Float[Array, "n part"]


@torch.no_grad()
def check_by_ablation(
    lm: Any, stream: Stream, encoder: Any, latent: int, parts: Sequence[Part], prompts: Prompts, position: int = -1
) -> AblationCheck:
    """Mean-ablate each part by itself, at every token, and measure the latent's pre-activation again.

    The mean is over these prompts' tokens. One forward a part and batch.
    """
    _check(encoder)
    hook = str(encoder.config.hook_name)
    sites = sites_before(lm, stream, hook)
    row = encoder.W_enc.detach().float()[:, latent].to(lm.device)
    own = [(part, site) for part in parts for site in sites if _at(part, site)]
    batches = [batch.repad("left", lm.pad_id).to(lm.device) for batch in prompts.batches]
    means = _means(lm, stream, sites, batches)
    direct = torch.zeros(len(own), dtype=torch.float64)
    falls = []
    for batch in batches:
        found = lm.activations(batch, [*stream.hooks, hook])
        clean = encoder.pre_acts(found[hook][:, position].float())[:, latent]
        falls.append(torch.zeros(len(clean), len(own), dtype=torch.float64))
        for index, (part, site) in enumerate(own):
            columns = columns_of(part, site).to(lm.device)
            # Means are of what is before a post-norm, as the ablation is; its scale is the prompt's own.
            gone = found[site.inner][:, position].float()[:, columns] - means[site.inner][columns]
            scale = site.coordinates({name: acts[:, position] for name, acts in found.items()})
            scale = scale.norm(dim=-1) / found[site.inner][:, position].float().norm(dim=-1).clamp_min(1e-30)
            direct[index] += float((gone @ (row @ site.weight)[columns] * scale).double().sum())
            mean = means[site.inner]

            def ablated(acts: Tensor, step: Any, columns: Tensor = columns, mean: Tensor = mean) -> Tensor:
                edited = acts.clone()
                edited[..., columns] = mean[columns].to(acts)
                return edited

            with edit(lm, {site.inner: ablated}):
                now = lm.activations(batch, [hook])[hook][:, position].float()
            falls[-1][:, index] = (clean - encoder.pre_acts(now)[:, latent]).double().cpu()
    by_prompt = torch.cat(falls).numpy()
    means_of = direct.numpy() / len(by_prompt), by_prompt.mean(axis=0)
    return AblationCheck([part for part, _ in own], *means_of, stats.spearman(*means_of), by_prompt)


@torch.no_grad()
def read_effects(
    lm: Any, stream: Stream, encoder: Any, latent: int, parts: Sequence[Part], prompts: Prompts
) -> tuple[list[Part], Float[Array, " part"]]:
    """How much each later part changes what it writes when it alone is not shown the latent.

    Returns:
        The parts after the hook point, and of each the root mean square, over the prompts' tokens, of the length of
        the change. Direct: every part reads the stream as it is, less the latent's own share a * W_dec.

    Raises:
        UserError: an SAE whose latents are not at the stream.
    """
    _check(encoder)
    hook = str(encoder.config.hook_name)
    if not hook.endswith(("hook_resid_pre", "hook_resid_post")):
        raise UserError(f"the SAE at {hook!r} does not stand in the residual stream: its readers are not defined here.")
    after = sites_after(lm, stream, hook)
    own = [(part, site) for part in parts for site in after if _at(part, site)]
    found = torch.zeros(len(own), dtype=torch.float64)
    n = 0
    for batch in prompts.batches:
        batch = batch.repad("left", lm.pad_id).to(lm.device)
        acts = lm.activations(batch, [*stream.hooks, hook])
        shown = encoder.encode(acts[hook].to(encoder.device)).float()[..., latent].to(lm.device)
        share = shown[..., None] * encoder.W_dec.detach().float()[latent].to(lm.device)
        changes = {}
        for site in after:
            inputs = torch.stack([acts[site.reads].float(), acts[site.reads].float() - share])
            clean, without = coordinates_at(lm, site, batch, inputs)
            changes[site.name] = clean - without
        for index, (part, site) in enumerate(own):
            columns = columns_of(part, site).to(lm.device)
            moved = changes[site.name][..., columns] @ site.weight[:, columns].t()
            found[index] += float(moved[batch.mask].square().double().sum())
        n += int(batch.mask.sum())
    return [part for part, _ in own], (found / max(1, n)).sqrt().numpy()


def _means(lm: Any, stream: Stream, sites: Sequence[Site], batches: Sequence[TokenBatch]) -> dict[str, Tensor]:
    """Mean inner activation of each site over all tokens."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        found = lm.activations(batch, [site.inner for site in sites])
        for name, acts in found.items():
            sums[name] = sums.get(name, 0) + acts[batch.mask].double().sum(0)
    n = sum(int(batch.mask.sum()) for batch in batches)
    return {name: (total / n).float() for name, total in sums.items()}


def _at(part: Part, site: Site) -> bool:
    return part.layer == site.layer and (part.level == "head") == (site.kind == "attn") and site.kind != "cut"


def _check(encoder: Any) -> None:
    if getattr(encoder.config, "normalize", normalize.NONE) != normalize.NONE:
        raise UserError(
            f"the SAE at {encoder.config.hook_name!r} normalises every token by itself: its latents are no linear "
            "function of the residual stream."
        )
