"""`sae eval suite=probing`: how well few latents tell labelled texts apart.

    sae eval suite=probing name=mine eval.labels=truth.jsonl eval.position=last eval.ks=[1,2,5]

Each line of the file has a text, a label and maybe a group (see `sae.evals.labelled`). k-sparse probes on the latents
of every SAE stand beside a probe on the raw activations, random latents of the same SAE, shuffled labels (see
`sae.evals.probing`) and, where the run has no controls, a random SAE of the same size and L0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sae.autoencoder.sae import SAE, SAEConfig
from sae.config import RunConfig
from sae.errors import UserError
from sae.evals.labelled import Labelled, read_labelled
from sae.evals.pooling import Pooled, pool, read_mask, tokens_read
from sae.evals.probing import Score, check_ks, check_split, held_out_rows, k_sparse_probing
from sae.files import sha256_file
from sae.lm.model import LanguageModel
from sae.lm.tokens import TokenBatch, by_length, sae_mask
from sae.report.progress import Progress
from sae.stages import common, measured
from sae.train.baseline import random_like
from sae.train.grid import SAESpec

SAMPLE_TOKENS = 8_192
"""Tokens, of texts drawn by chance, that the L0 of random SAEs is set on."""


class _Texts(NamedTuple):
    """Labelled texts as the model reads them, shortest first."""

    data: Labelled
    batches: list[TokenBatch]


def run(config: RunConfig) -> None:
    """Run the suite."""
    options = config.eval
    if not options.labels:
        raise UserError('suite=probing needs labelled texts: give eval.labels=path.jsonl, {"text": ..., "label": ...}.')
    data = read_labelled(options.labels)
    _check_splits(data, options.seed, options.labels)
    lm = common.open_lm(config.lm)
    texts = _read_texts(config, lm, data)
    settings = {"position": options.position, "ks": options.ks, "seed": options.seed}
    settings |= {"include_special": config.data.include_special}

    def check(saes: Sequence[SAESpec | SAEConfig]) -> None:
        check_ks(options.ks, min(sae.d_sae for sae in saes))

    work = measured.find(config, lm, settings, {"labels": sha256_file(options.labels)}, check=check)
    if work is None:
        return
    work.open()
    items = work.saes
    if work.wants_baselines:
        items = list(measured.beside(items, _randoms(config, lm, [item.sae for item in items], texts)))
    with Progress(len(texts.batches), "read labelled texts", unit="batch") as bar:
        pooled = pool(
            lm,
            [item.sae for item in items],
            texts.batches,
            options.position,
            include_special=config.data.include_special,
            progress=bar.update,
        )
    found = _probe_all(config, [item.sae for item in items], pooled, texts.data)
    rows = [
        item.about() | {"l0": latents.l0, "labels": results}
        for item, latents, results in zip(items, pooled.latents, found, strict=True)
    ]
    table = [row | _figures(result) for row in rows for result in row["labels"]]
    result = {"saes": rows, "n_texts": len(data.texts), "n_groups": len(set(data.groups)), "grouped": data.grouped}
    columns = [*measured.identity(rows), "l0", *_figures(found[0][0])]
    work.finish(result | {"position": options.position}, [measured.Table(config.suite, columns, table)])


def _check_splits(data: Labelled, seed: int, where: str) -> None:
    """Refuse labels that cannot be split, before anything takes time."""
    test = held_out_rows(data.groups, seed=seed)
    for label, flags in data.tasks().items():
        try:
            check_split(flags, np.asarray(data.groups), test)
        except UserError as error:
            raise UserError(
                f"label {label!r} of {where!r} cannot be split into train and test groups: {error} "
                "Another split is eval.seed=1, 2, ... ."
            ) from None


def _read_texts(config: RunConfig, lm: LanguageModel, data: Labelled) -> _Texts:
    where, tokens = config.eval.labels, lm.tokenize(data.texts)
    lengths = tokens.mask.sum(1)
    longest = int(lengths.argmax())
    if int(lengths[longest]) > lm.ctx_len:
        raise UserError(
            f"{where!r}, record {longest + 1} is {int(lengths[longest])} tokens long, but {lm.name!r} reads "
            f"{lm.ctx_len}: shorten or remove it."
        )
    empty = (~sae_mask(tokens.roles, config.data.include_special).any(dim=1)).nonzero()[:, 0].tolist()
    if empty:
        raise UserError(
            f"{where!r}, record {empty[0] + 1} has no token that an SAE sees, only BOS, EOS and the like "
            f"({data.texts[empty[0]]!r}): give it a word, or remove it."
        )
    rows = list(by_length(lengths, config.eval.batch_tokens))
    return _Texts(data.take(torch.cat(rows).tolist()), [tokens.select(part).to(lm.device) for part in rows])


def _randoms(config: RunConfig, lm: LanguageModel, saes: Sequence[SAE], texts: _Texts) -> list[SAE]:
    """Random SAEs with the L0 of these on some of the texts."""
    generator = torch.Generator().manual_seed(config.eval.seed)
    options = (config.eval.position, config.data.include_special)
    sizes = torch.cat([read_mask(batch, *options).sum(1).cpu() for batch in texts.batches])
    order = torch.randperm(len(sizes), generator=generator)
    enough = int((sizes[order].cumsum(0) <= SAMPLE_TOKENS).sum())
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[order[: max(1, enough)]] = True
    parts = chosen.split([len(batch.tokens) for batch in texts.batches])
    sample = [
        batch.select(here.nonzero()[:, 0].to(batch.tokens.device))
        for batch, here in zip(texts.batches, parts, strict=True)
        if here.any()
    ]
    hooks = list(dict.fromkeys(name for sae in saes for name in sae.config.site.hooks))
    acts = tokens_read(lm, sample, hooks, *options)
    return [random_like(sae, {name: acts[name] for name in sae.config.site.hooks}) for sae in saes]


def _probe_all(config: RunConfig, saes: Sequence[SAE], pooled: Pooled, data: Labelled) -> list[list[dict[str, Any]]]:
    """Probe every label in every SAE; the probe on raw activations once for each place that is read."""
    options, tasks = config.eval, data.tasks()
    dense: dict[tuple[tuple[str, ...], str], Score | None] = {}
    found = []
    with Progress(len(saes) * len(tasks), "probe", unit="label") as bar:
        for sae, latents in zip(saes, pooled.latents, strict=True):
            reads = sae.config.site.reads
            acts = torch.cat([pooled.acts[name] for name in reads], dim=-1)
            results = []
            for label, flags in tasks.items():
                result = k_sparse_probing(
                    latents.batches,
                    flags,
                    data.groups,
                    ks=options.ks,
                    acts=None if (reads, label) in dense else acts,
                    seed=options.seed,
                )
                score = dense.setdefault((reads, label), result.dense)
                results.append(
                    {"label": label, "n_positive": int(flags.sum()), **result._replace(dense=score)._asdict()}
                )
                bar.update()
            found.append(results)
    return found


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """A label's columns in the table."""
    probes = result["sparse"]
    found = {"label": result["label"]}
    found |= {f"auroc k={probe.k}": probe.score.auroc.estimate for probe in probes}
    found |= {"raw": result["dense"].auroc.estimate}
    last = probes[-1]
    return found | {"random latents": last.random.auroc.mean, "shuffled labels": last.shuffled.auroc.mean}
