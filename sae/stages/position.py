"""`sae eval suite=position`: what splicing each SAE in costs, by position in the text.

    sae eval suite=position name=mine eval.bin_width=8

Curves of CE and KL over held-out rows, with standard errors over rows (see `sae.evals.position`). Positions count
tokens in the row that the model reads, which is what it has for context; a row of packed text holds several documents.
"""

import torch

from sae.config import RunConfig
from sae.evals.position import PositionResult, by_position_all
from sae.lm.tokens import TokenBatch, sae_mask
from sae.report.progress import Progress
from sae.stages import common, measured
from sae.stages.evaluate import padded_batches
from sae.stages.harvest import ensure_tokens

PARTS = 4
"""Of the curve, in the table that is printed."""


def run(config: RunConfig) -> None:
    """Run the suite."""
    lm = common.open_lm(config.lm)
    tokens = ensure_tokens(config, lm)
    settings = {"bin_width": config.eval.bin_width, "batch_tokens": config.eval.batch_tokens}
    settings |= {"include_special": config.data.include_special}
    work = measured.begin(config, lm, settings, {"tokens": tokens.fingerprint})
    if work is None:
        return
    batches = list(padded_batches(tokens.corpus.held_out, config.eval.batch_tokens, lm.device))

    def seen(batch: TokenBatch) -> torch.Tensor:
        return sae_mask(batch.roles, config.data.include_special)

    with Progress(len(batches), "evaluate by position", unit="batch") as bar:
        curves = by_position_all(
            lm,
            [item.sae for item in work.saes],
            batches,
            splice_mask=seen,
            bin_width=config.eval.bin_width,
            progress=bar.update,
        )
    rows = [item.about() | found._asdict() for item, found in zip(work.saes, curves, strict=True)]
    parts = [_parts(found) for found in curves]
    table = [row | part for row, part in zip(rows, parts, strict=True)]
    work.finish({"saes": rows}, table, [*measured.IDENTITY, *parts[0]])


def _parts(curves: PositionResult) -> dict[str, float]:
    """Mean difference in CE over the predictions in each quarter of the bins, by the positions it is about."""
    found = {}
    for here in torch.arange(len(curves.n)).tensor_split(min(PARTS, len(curves.n))):
        first, last = int(curves.start[here[0]]), int(curves.start[here[-1]]) + curves.bin_width - 1
        n = curves.n[here]
        found[f"delta_ce {first}-{last}"] = float((curves.delta_ce.mean[here] * n).sum() / n.sum())
    return found
