"""Prompts beside what they are compared with: the state of the model without the behaviour.

A component's *contribution* to a behaviour is a difference: what it gives on a prompt where the behaviour is due,
minus what it would give if it were not. The other state is

- *paired*: that of a negative prompt with as many tokens and the same words to tell behaviour from alternative; of
  these, the one that shares most tokens. A state the model is really in; for contrast sets of minimal pairs.
- *mean*: the mean over the negatives, of each position by itself in the tokens that all prompts begin or end with
  (BOS, the template), and over all others together. For prompts of any length; not a state the model is ever in.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.behavior.contrast import ContrastRecord
from sae.behavior.measure import MarginTask, prepare_margins
from sae.errors import UserError, unknown
from sae.lm.tokens import TokenBatch, Tokenized, pad
from sae.weights.stream import Stream

CORRUPTIONS = ("auto", "paired", "mean")


class Rows(NamedTuple):
    """One batch of prompts on which the behaviour is due.

    Attributes:
        clean: the prompts, padded on the left.
        corrupt: their partners, padded alike; None where the mean over all negatives stands for these.
        slots: which of the means stands for each token; where there are partners, all 0.
        behavior_ids, alternative_ids: per prompt, the tokens whose logits make the margin.
    """

    clean: TokenBatch
    corrupt: TokenBatch | None
    slots: Int[Tensor, "batch pos"]
    behavior_ids: list[Tensor]
    alternative_ids: list[Tensor]


class Contrasted(NamedTuple):
    """All batches, and the means where they are needed."""

    rows: list[Rows]
    method: str  #: "paired" or "mean"
    n_dropped: int  #: prompts without a partner
    means: dict[str, Float[Tensor, "slot width"]]  #: by hook point, and by site for its inner coordinates

    @property
    def n(self) -> int:
        """Number of prompts."""
        return sum(len(rows.behavior_ids) for rows in self.rows)


class State(NamedTuple):
    """A batch in both states. Differences are 0 at padding.

    Attributes:
        inner: by site, its coordinates on the prompts.
        corrupt: the same in the other state.
        embed, corrupt_embed: what the embeddings add.
        reads: by site, the stream it reads in the other state; under "logits", the last stream.
        real: which tokens are no padding.
    """

    inner: dict[str, Float[Tensor, "batch pos inner"]]
    corrupt: dict[str, Float[Tensor, "batch pos inner"]]
    embed: Float[Tensor, "batch pos d_model"]
    corrupt_embed: Float[Tensor, "batch pos d_model"]
    reads: dict[str, Float[Tensor, "batch pos d_model"]]
    real: Float[Tensor, "batch pos 1"]


def contrasted(
    lm: Any,
    stream: Stream,
    positives: Sequence[ContrastRecord],
    negatives: Sequence[ContrastRecord],
    method: str = "auto",
    batch_prompts: int = 64,
) -> Contrasted:
    """Set prompts on which the behaviour is due beside the other state.

    Args:
        lm: the model.
        stream: its sites.
        positives: where the behaviour is due.
        negatives: where it is not.
        method: "paired", "mean", or "auto": paired where at least half of the positives have a partner.
        batch_prompts: prompts run at once.

    Raises:
        UserError: no prompts, an unknown method, or no partner for any prompt.
    """
    if method not in CORRUPTIONS:
        raise unknown("way to corrupt prompts", method, list(CORRUPTIONS))
    if not positives or not negatives:
        raise UserError(f"{len(positives)} positives and {len(negatives)} negatives: both are needed, add prompts.")
    # In one go, so that batches are not cut to different widths.
    task = prepare_margins(lm, positives, len(positives))
    own = task.batches[0].rows()
    other_task = prepare_margins(lm, negatives, len(negatives))
    others = other_task.batches[0].rows()
    own_ids, other_ids = (
        [_ids(task, index) for index in range(n)] for task, n in ((task, len(own)), (other_task, len(others)))
    )
    partners = [
        _partner(row, others, [found == ids for found in other_ids]) for row, ids in zip(own, own_ids, strict=True)
    ]
    kept = [index for index, partner in enumerate(partners) if partner is not None]
    if method == "paired" and not kept:
        raise UserError(
            "no positive has a negative of as many tokens and the same reply words: use the mean over negatives (mean)."
        )
    paired = method == "paired" or (method == "auto" and 2 * len(kept) >= len(own))
    chosen = kept if paired else list(range(len(own)))
    shared = _shared(own, others)
    rows = []
    for start in range(0, len(chosen), batch_prompts):
        part = chosen[start : start + batch_prompts]
        clean = pad([own[index] for index in part], padding_side="left", pad_id=lm.pad_id).to(lm.device)
        other = [others[partners[index]] for index in part] if paired else []  # type: ignore[index]
        rows.append(
            Rows(
                clean,
                pad(other, padding_side="left", pad_id=lm.pad_id).to(lm.device) if paired else None,
                torch.zeros_like(clean.tokens) if paired else _slots(clean, shared),
                [task.behavior_ids[index] for index in part],
                [task.alternative_ids[index] for index in part],
            )
        )
    means = {} if paired else _means(lm, stream, others, shared, batch_prompts)
    return Contrasted(rows, "paired" if paired else "mean", len(own) - len(chosen), means)


def _ids(task: MarginTask, index: int) -> tuple[list[int], list[int]]:
    return task.behavior_ids[index].tolist(), task.alternative_ids[index].tolist()


def _partner(row: Tokenized, others: Sequence[Tokenized], fits: Sequence[bool]) -> int | None:
    """Index of the fitting row of the same length with most tokens in common; None where there is none."""
    alike = [
        (sum(a == b for a, b in zip(row.tokens, other.tokens, strict=True)), -index)
        for index, other in enumerate(others)
        if fits[index] and len(other.tokens) == len(row.tokens)
    ]
    return -max(alike)[1] if alike else None


class _Shared(NamedTuple):
    """Number of tokens that all prompts begin, and end, with."""

    first: int
    last: int


def _shared(own: Sequence[Tokenized], others: Sequence[Tokenized]) -> _Shared:
    rows = [row.tokens for row in (*own, *others)]
    shortest = min(map(len, rows))
    first = last = 0
    while first < shortest and len({row[first] for row in rows}) == 1:
        first += 1
    while last < shortest - first and len({row[-1 - last] for row in rows}) == 1:
        last += 1
    return _Shared(first, last)


def _slots(batch: TokenBatch, shared: _Shared) -> Int[Tensor, "batch pos"]:
    """Slot 0 for what differs, one each for the shared beginning, then for the shared end counted backwards."""
    width = batch.tokens.shape[1]
    from_start = batch.positions()
    from_end = (width - 1 - torch.arange(width, device=batch.tokens.device)).expand_as(from_start)
    slots = torch.where(from_start < shared.first, 1 + from_start, 0)
    return torch.where(from_end < shared.last, 1 + shared.first + from_end, slots)


@torch.no_grad()
def _means(
    lm: Any, stream: Stream, others: Sequence[Tokenized], shared: _Shared, batch_prompts: int
) -> dict[str, Float[Tensor, "slot width"]]:
    n_slots = 1 + shared.first + shared.last
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(n_slots, dtype=torch.float64)
    for start in range(0, len(others), batch_prompts):
        batch = pad(others[start : start + batch_prompts], padding_side="left", pad_id=lm.pad_id).to(lm.device)
        values = _values(lm, stream, batch)
        slots = _slots(batch, shared)[batch.mask].cpu()
        counts += torch.bincount(slots, minlength=n_slots)
        for name, acts in values.items():
            flat = acts[batch.mask].double().cpu()
            sums.setdefault(name, torch.zeros(n_slots, flat.shape[-1], dtype=torch.float64)).index_add_(0, slots, flat)
    total = {name: value.sum(0) / counts.sum() for name, value in sums.items()}
    # Where every token is of the shared beginning or end, none is left for slot 0.
    return {
        name: torch.where(counts[:, None] > 0, value / counts[:, None].clamp_min(1), total[name]).float().to(lm.device)
        for name, value in sums.items()
    }


def _values(lm: Any, stream: Stream, batch: TokenBatch) -> dict[str, Float[Tensor, "batch pos width"]]:
    """The stream where it is read, and every site's coordinates."""
    found = lm.activations(batch, stream.hooks)
    values = {name: found[name].float() for name in (stream.embed, stream.final)}
    for site in stream.sites:
        values[site.reads] = found[site.reads].float()
        values[site.name] = site.coordinates(found)
    return values


@torch.no_grad()
def read_state(lm: Any, stream: Stream, given: Contrasted, rows: Rows) -> State:
    """Run a batch, and its partners where there are any."""
    clean = _values(lm, stream, rows.clean)
    if rows.corrupt is None:
        other = {name: values[rows.slots] for name, values in given.means.items()}
    else:
        other = _values(lm, stream, rows.corrupt)
    real = rows.clean.mask[..., None].float()
    return State(
        inner={site.name: torch.lerp(other[site.name], clean[site.name], real) for site in stream.sites},
        corrupt={site.name: other[site.name] for site in stream.sites},
        embed=torch.lerp(other[stream.embed], clean[stream.embed], real),
        corrupt_embed=other[stream.embed],
        reads={**{site.name: other[site.reads] for site in stream.sites}, "logits": other[stream.final]},
        real=real,
    )
