"""`sae eval suite=position`: what splicing each SAE in costs, by position in the text.

    sae eval suite=position name=mine eval.bin_width=8

Curves of CE and KL over held-out rows, with standard errors over rows (see `sae.evals.position`). Positions count
tokens in the row that the model reads, which is what it has for context; a row of packed text holds several documents.
"""

from typing import Any

import torch

from sae.config import RunConfig
from sae.evals.position import PairedPositions, PositionResult, by_position_all
from sae.lm.model import LanguageModel
from sae.lm.pair import names_of
from sae.lm.tokens import TokenBatch, sae_mask
from sae.report.progress import Progress
from sae.stages import common, measured
from sae.stages.evaluate import padded_batches

PARTS = 4
"""Of the predictions, in the table that is printed."""


def run(config: RunConfig) -> None:
    """Run the suite."""
    lm = common.open_lm(config.lm)
    settings = {"bin_width": config.eval.bin_width, "batch_tokens": config.eval.batch_tokens}
    work = measured.find(config, lm, settings, held_out=True)
    if work is None:
        return
    work.open()
    batches = list(padded_batches(work.held_out, config.eval.batch_tokens, lm.device))

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
    rows, table, models = [], [], []
    for item, found in zip(work.saes, curves, strict=True):
        about, apart = item.about(), _models(lm, found)
        rows.append(about | found.together._asdict() | {"models": [{"lm": name, **c._asdict()} for name, c in apart]})
        table.append(about | _parts(found.together))
        models += [about | {"lm": name} | _parts(of_one) for name, of_one in apart]
    names, parts = measured.identity(rows), list(_parts(curves[0].together))
    tables = [
        measured.Table(config.suite, [*names, *parts], table),
        measured.Table(f"{config.suite}_models", [*names, "lm", *parts], models),
    ]
    work.finish({"saes": rows}, tables)


def _models(lm: LanguageModel, found: PairedPositions) -> list[tuple[str, PositionResult]]:
    """The curves of each model, by its name; none where there is one, whose curves are those of all."""
    names = names_of(lm)
    return [(names[prefix], curves) for prefix, curves in found.models.items()] if len(found.models) > 1 else []


def _parts(curves: PositionResult) -> dict[str, Any]:
    """Mean difference in CE over each quarter of the predictions, or nearly, by the positions it is about.

    A bin is of the quarter in which its middle prediction falls: few bins may hold most predictions.
    """
    n = curves.n.double()
    part = (PARTS * (n.cumsum(0) - n / 2) / n.sum()).long()
    found = {}
    for number in part.unique():
        here = (part == number).nonzero()[:, 0]
        first, last = int(curves.start[here[0]]), int(curves.start[here[-1]]) + curves.bin_width - 1
        found[f"delta_ce {first}-{last}"] = float((curves.delta_ce.mean[here] * n[here]).sum() / n[here].sum())
    return found
