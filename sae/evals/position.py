"""What splicing a reconstruction in costs, by position in the text.

    curves = by_position(lm, sae, batches)
    curves.delta_ce.mean, curves.delta_ce.se        # one value a bin

Cross-entropy and KL are those of `sae.evals.splice`, prediction by prediction, averaged within bins of positions:

    mean_b = sum over predictions in bin b / number of predictions in bin b

so that the means of all bins, weighted by `n`, are the numbers of `SpliceResult`. A prediction is at the position of
the token that predicts, counted in its row without padding: 0 is the first real token, usually BOS.

Standard errors take rows of text, not predictions, as independent: of the ratio estimator with row sums s_r over n_r
predictions, se^2 = R / (R - 1) * sum_r (s_r - mean n_r)^2 / (sum_r n_r)^2. `delta_ce` is paired: its error is that of
the difference, far smaller than that of either curve.

Traps. The first positions are unlike the rest (BOS is left alone, there is hardly any context), and few rows reach the
last: look at `n`. Rows of packed text hold several documents, so that a position in the row is none in the document;
give `positions` then.

Of two models (`sae.lm.pair`) each is read with what is written into it, as in `splice_all`; of a crosscoder of both
the curves are over the predictions of both, a row being that of the text.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from sae.autoencoder.sae import SAE
from sae.autoencoder.site import Site
from sae.errors import UserError
from sae.evals import splice
from sae.lm.hooks import edit
from sae.lm.pair import bare, models_of
from sae.lm.tokens import TokenBatch, sae_mask

METRICS = ("ce_clean", "ce_sae", "delta_ce", "kl")


class Curve(NamedTuple):
    """Means by bin, in nats, and their standard errors (NaN for bins that one row alone reaches); float64."""

    mean: Float[Tensor, " bin"]
    se: Float[Tensor, " bin"]


class PositionResult(NamedTuple):
    """Curves over the position in the text. Bins that no prediction falls into are left out."""

    start: Int[Tensor, " bin"]
    """First position of each bin, which reaches up to `start + bin_width - 1`."""
    bin_width: int
    n: Int[Tensor, " bin"]
    """Predictions in each bin."""
    n_rows: Int[Tensor, " bin"]
    """Rows of text they come from."""
    ce_clean: Curve
    ce_sae: Curve
    """Reconstructions in place of the activations."""
    delta_ce: Curve
    """ce_sae - ce_clean."""
    kl: Curve
    """KL(clean || with reconstructions)."""


class PairedPositions(NamedTuple):
    """The curves of what a site writes to."""

    together: PositionResult
    """Over the predictions of all models that it writes to; with one model, its own."""
    models: dict[str, PositionResult]
    """By the prefix of the model's hook points (see `sae.lm.pair`); "" is the first, or the only one."""


def by_position(
    lm: Any,
    sae: SAE,
    batches: Iterable[TokenBatch],
    *,
    hook_name: str | None = None,
    splice_mask: Callable[[TokenBatch], Bool[Tensor, "batch pos"]] | None = None,
    positions: Callable[[TokenBatch], Int[Tensor, "batch pos"]] = TokenBatch.positions,
    bin_width: int = 1,
) -> PositionResult:
    """Measure the curves of one SAE.

    Args:
        lm: as in `splice.splice`.
        sae: the autoencoder, transcoder or crosscoder.
        batches: token rows; read once.
        hook_name: where to splice; default the SAE's own hook points.
        splice_mask: which tokens are replaced; default those that SAEs are trained on (no padding, no BOS/EOS).
        positions: position of every token, 0 or more.
        bin_width: positions a bin.

    Raises:
        UserError: there is no prediction to count, the bin width is not positive, or the SAE does not fit.
    """
    hook_names = None if hook_name is None else [hook_name]
    found = by_position_all(
        lm,
        [sae],
        batches,
        hook_names=hook_names,
        splice_mask=splice_mask,
        positions=positions,
        bin_width=bin_width,
    )
    return found[0].together


@torch.no_grad()
def by_position_all(
    lm: Any,
    saes: Sequence[SAE],
    batches: Iterable[TokenBatch],
    *,
    hook_names: Sequence[str] | None = None,
    splice_mask: Callable[[TokenBatch], Bool[Tensor, "batch pos"]] | None = None,
    positions: Callable[[TokenBatch], Int[Tensor, "batch pos"]] = TokenBatch.positions,
    bin_width: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> list[PairedPositions]:
    """Measure the curves of many SAEs on the same tokens: one clean pass and one pass an SAE, per batch.

    Of a `sae.lm.pair.PairedModel`, with the curves of each of the two models.

    Args:
        lm: as in `splice.splice`.
        saes: the autoencoders, transcoders or crosscoders.
        batches: token rows; read once.
        hook_names: where to splice each; default the SAEs' own hook points.
        splice_mask: as in `by_position`.
        positions: as in `by_position`.
        bin_width: positions a bin.
        progress: called after each batch.

    Raises:
        UserError: as in `by_position`.
    """
    if bin_width < 1:
        raise UserError(f"bin_width={bin_width} is not positive: give 1 or more.")
    sites = [sae.config.site for sae in saes] if hook_names is None else [Site((name,), (name,)) for name in hook_names]
    elsewhere = list(dict.fromkeys(name for site in sites if site.kind != "sae" for name in site.reads))
    models = models_of(lm)
    totals = [_PairedTotals([prefix for prefix in models if splice.written(site, prefix)]) for site in sites]
    for batch in batches:
        where = sae_mask(batch.roles) if splice_mask is None else splice_mask(batch)
        counted = batch.mask[:, :-1] & batch.mask[:, 1:]
        read = lm.activations(batch, elsewhere) if elsewhere else {}
        bins = positions(batch)[:, :-1][counted].cpu() // bin_width
        rows = counted.nonzero()[:, 0].cpu()
        found: list[dict[str, Tensor]] = [{} for _ in saes]
        for prefix, model in models.items():
            here = [number for number, total in enumerate(totals) if prefix in total.models]
            if not here:
                continue
            clean = _logs(model, batch, counted, {})
            for number in here:
                edits = splice.edits_of(saes[number], sites[number], where, read)
                own = {name: edits[name] for name in splice.written(sites[number], prefix)}
                found[number][prefix] = _compare(clean, _logs(model, batch, counted, own), batch, counted)
        for total, values in zip(totals, found, strict=True):
            total.add(values, rows, bins)
        progress()
    return [total.result(bin_width) for total in totals]


def _logs(lm: Any, batch: TokenBatch, counted: Tensor, edits: dict[str, Any]) -> Float[Tensor, "n d_vocab"]:
    with edit(lm, {bare(name): fn for name, fn in edits.items()}):
        logits = lm.logits(batch)
    return logits[:, :-1][counted.to(logits.device)].float().log_softmax(-1)


def _compare(clean: Tensor, spliced: Tensor, batch: TokenBatch, counted: Tensor) -> Float[Tensor, "metric n"]:
    """The metrics of every counted prediction, from log-probabilities; float64, on the CPU."""
    targets = batch.tokens[:, 1:].to(clean.device)[counted.to(clean.device)][:, None]
    ce_clean, ce_sae = (-logs.gather(-1, targets)[:, 0].double().cpu() for logs in (clean, spliced))
    kl = (clean.exp() * (clean - spliced)).sum(-1).double().cpu()
    return torch.stack([ce_clean, ce_sae, ce_sae - ce_clean, kl])


class _Totals:
    """What the means and errors are made of, by bin: counts, and sums over rows of s_r, s_r^2, s_r n_r and n_r^2."""

    def __init__(self) -> None:
        self.n = torch.zeros(0, dtype=torch.int64)
        self.n_rows, self.n_square = self.n, self.n.double()
        self.sums = self.squares = self.products = torch.zeros(len(METRICS), 0, dtype=torch.float64)

    def add(self, values: Float[Tensor, "metric n"], rows: Tensor, bins: Tensor) -> None:
        """Add predictions, each with its row of the batch and its bin."""
        if not len(bins):
            return
        n_rows, n_bins = int(rows.max()) + 1, max(int(bins.max()) + 1, len(self.n))
        place = rows * n_bins + bins
        n = torch.bincount(place, minlength=n_rows * n_bins).view(n_rows, n_bins)
        sums = torch.zeros(len(values), n_rows * n_bins, dtype=torch.float64)
        sums = sums.index_add(1, place, values).view(-1, n_rows, n_bins)
        self.n = _plus(self.n, n.sum(0))
        self.n_rows = _plus(self.n_rows, (n > 0).sum(0))
        self.n_square = _plus(self.n_square, n.double().square().sum(0))
        self.sums = _plus(self.sums, sums.sum(1))
        self.squares = _plus(self.squares, sums.square().sum(1))
        self.products = _plus(self.products, (sums * n).sum(1))

    def result(self, bin_width: int) -> PositionResult:
        """The curves."""
        if not len(self.n):
            raise UserError("no next-token prediction between real tokens to evaluate on: give longer texts.")
        used = self.n > 0
        n, n_rows = self.n[used], self.n_rows[used]
        means = self.sums[:, used] / n
        residual = self.squares[:, used] - 2 * means * self.products[:, used] + means.square() * self.n_square[used]
        # One row says nothing about how rows differ.
        factor = torch.where(n_rows > 1, n_rows / (n_rows - 1).clamp_min(1), torch.nan)
        errors = (factor * residual.clamp_min(0)).sqrt() / n
        curves = {name: Curve(means[i], errors[i]) for i, name in enumerate(METRICS)}
        return PositionResult(used.nonzero()[:, 0] * bin_width, bin_width, n, n_rows, **curves)


class _PairedTotals:
    """Those of each model that a site writes to, and of all of them together."""

    def __init__(self, prefixes: Sequence[str]) -> None:
        self.models = {prefix: _Totals() for prefix in prefixes}
        self.together = _Totals()

    def add(self, values: dict[str, Float[Tensor, "metric n"]], rows: Tensor, bins: Tensor) -> None:
        """Add each model's predictions of the same rows."""
        for prefix, part in values.items():
            self.models[prefix].add(part, rows, bins)
        # What two models make of one row is not independent: it is one row still.
        n = len(values)
        self.together.add(torch.cat([*values.values()], dim=1), rows.repeat(n), bins.repeat(n))

    def result(self, bin_width: int) -> PairedPositions:
        """The curves."""
        models = {prefix: total.result(bin_width) for prefix, total in self.models.items()}
        return PairedPositions(self.together.result(bin_width), models)


def _plus(old: Tensor, new: Tensor) -> Tensor:
    """Add what may have more bins."""
    return functional.pad(old, (0, new.shape[-1] - old.shape[-1])) + new
