"""Measurements on a model, steered or not: activations, logit margins, judged completions.

Every function reads the model as it is, so inside `with steer(...)` it measures the steered model; those called
`..._each` measure several interventions on the same prompts, together. Prompts are tokenized once (`prepare`) and
reused for all interventions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae import stats
from sae.behavior.contrast import ContrastRecord
from sae.behavior.judge import Judge, Verdict, share_of
from sae.behavior.together import Groups, per_group, sharing
from sae.errors import UserError
from sae.lm.chat import Message
from sae.lm.tokens import Role, TokenBatch, Tokenized, pad
from sae.steering.apply import steer
from sae.steering.interventions import Intervention

Array = np.ndarray
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

Readout = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
"""What is read off [n d_vocab] next-token logits, given each row's ids of behaviour and of alternative."""

_ENCODE_ELEMENTS = 2**26  # latents held at once while encoding: 256 MB in float32


class Prompts(NamedTuple):
    """Records with their tokens, in the records' order."""

    records: tuple[ContrastRecord, ...]
    tokens: TokenBatch
    max_rows: int  #: rows run at once

    @property
    def batches(self) -> list[TokenBatch]:
        """The prompts in batches."""
        return list(self.tokens.split(self.max_rows))

    def first(self, n: int) -> "Prompts":
        """Return the first `n` prompts."""
        return self._replace(records=self.records[:n], tokens=self.tokens.select(range(len(self.records[:n]))))


def prepare(lm: Any, records: Sequence[ContrastRecord], batch_prompts: int = 256) -> Prompts:
    """Tokenize records' chats up to the model's turn, left-padded."""
    if not records:
        none = torch.zeros(0, 0, dtype=torch.int64)
        return Prompts((), TokenBatch(none, none.bool(), none.to(torch.uint8)), batch_prompts)
    return Prompts(tuple(records), lm.tokenize_chats([record.messages for record in records]), batch_prompts)


class SiteData(NamedTuple):
    """What one SAE saw on a set of prompts."""

    encoder: int
    hook_name: str
    d_sae: int
    acts: dict[str, Float[Array, "n d_sae"]]  #: latents by position
    density: Float[Array, " d_sae"]  #: fraction of the prompts' tokens on which each latent fires
    mean_active: Float[Array, " d_sae"]  #: its mean there; 0 if it never fires
    effect: Float[Array, " d_sae"]  #: mean_active x decoder norm: how far one latent typically moves the residual


class Collected(NamedTuple):
    """Latents per SAE, and residual activations per hook point and position."""

    sites: list[SiteData]
    resid: dict[tuple[str, str], Float[Array, "n d_in"]]


@torch.no_grad()
def collect(
    lm: Any,
    encoders: Sequence[Any],
    prompts: Prompts,
    positions: Sequence[int | str] = (-1,),
    hook_names: Sequence[str] = (),
) -> Collected:
    """Run the prompts once and read every SAE at every position.

    Args:
        lm: the model.
        encoders: SAEs, at any hook points.
        prompts: what to read.
        positions: negative integers count from the prompt's end (-1 is the last token, the template's); ``"max"`` is
            each latent's largest value over the prompt.
        hook_names: further hook points whose activations are wanted.

    Raises:
        UserError: a position that is neither, or a prompt shorter than a position asks for.
    """
    for position in positions:
        if position != "max" and not (isinstance(position, int) and position < 0):
            raise UserError(f"position {position!r}: give -1, -2, ... from the prompt's end, or 'max'.")
    hooks = list(dict.fromkeys([*(str(encoder.config.hook_name) for encoder in encoders), *hook_names]))
    names = [str(position) for position in positions]
    acts: list[dict[str, list[Tensor]]] = [{name: [] for name in names} for _ in encoders]
    resid: dict[tuple[str, str], list[Tensor]] = {(hook, name): [] for hook in hooks for name in names if name != "max"}
    sums = [torch.zeros(2, int(encoder.config.d_sae), dtype=torch.float64) for encoder in encoders]
    n_tokens = 0
    for batch in prompts.batches:
        batch = batch.repad("left", lm.pad_id).to(lm.device)
        shortest = min(batch.lengths)
        if any(isinstance(position, int) and -position > shortest for position in positions):
            first = min(position for position in positions if isinstance(position, int))
            raise UserError(f"a prompt of {shortest} tokens has no position {first}: drop it.")
        found = lm.activations(batch, hooks)
        # BOS is left out: its activations are outliers that SAEs are not trained on.
        real = batch.mask & (batch.roles != Role.SPECIAL)
        n_tokens += int(real.sum())
        for hook, name in resid:
            resid[hook, name].append(found[hook][:, int(name)].float().cpu())
        for index, encoder in enumerate(encoders):
            _read_encoder(encoder, found[str(encoder.config.hook_name)], real, acts[index], sums[index])
    sites = [_site(i, encoder, acts[i], sums[i], n_tokens) for i, encoder in enumerate(encoders)]
    return Collected(sites, {key: torch.cat(parts).numpy() for key, parts in resid.items()})


def _read_encoder(encoder: Any, x: Tensor, real: Tensor, acts: dict[str, list[Tensor]], sums: Tensor) -> None:
    """Encode a batch [batch pos d_in] a few rows at a time; extend `acts` and add counts and totals to `sums`."""
    rows = rows_at_once(encoder, x)
    for start in range(0, len(x), rows):
        latents = encoder.encode(x[start : start + rows].to(encoder.W_dec.device)).float().to(x.device)
        kept = latents * real[start : start + rows, :, None]
        sums[0] += (kept > 0).sum(dim=(0, 1)).cpu()
        sums[1] += kept.sum(dim=(0, 1), dtype=torch.float64).cpu()
        for name, parts in acts.items():
            parts.append((kept.amax(dim=1) if name == "max" else latents[:, int(name)]).cpu())


def rows_at_once(encoder: Any, x: Float[Tensor, "batch pos d_in"]) -> int:
    """Return how many rows of x to encode at once, so that memory does not grow with the batch."""
    return max(1, _ENCODE_ELEMENTS // (x.shape[1] * int(encoder.config.d_sae)))


def _site(index: int, encoder: Any, acts: dict[str, list[Tensor]], sums: Tensor, n_tokens: int) -> SiteData:
    mean_active = (sums[1] / sums[0].clamp_min(1)).numpy()
    norms = encoder.W_dec.detach().float().norm(dim=1).cpu().numpy()
    return SiteData(
        encoder=index,
        hook_name=str(encoder.config.hook_name),
        d_sae=int(encoder.config.d_sae),
        acts={name: torch.cat(parts).numpy() for name, parts in acts.items()},
        density=(sums[0] / max(1, n_tokens)).numpy(),
        mean_active=mean_active,
        effect=mean_active * norms,
    )


class MarginTask(NamedTuple):
    """Prompts ending where behaviour and alternative part, with the tokens that tell them apart."""

    batches: list[TokenBatch]
    behavior_ids: list[Tensor]  #: per prompt, token ids
    alternative_ids: list[Tensor]

    def parts(self) -> Iterator[tuple[TokenBatch, list[Tensor], list[Tensor]]]:
        """Yield every batch with its rows' ids of behaviour and of alternative."""
        start = 0
        for batch in self.batches:
            rows = slice(start, start + len(batch.tokens))
            yield batch, self.behavior_ids[rows], self.alternative_ids[rows]
            start = rows.stop


def prepare_margins(lm: Any, records: Sequence[ContrastRecord], batch_prompts: int = 256) -> MarginTask:
    """Tokenize records up to the first token at which their behaviour and alternative texts differ.

    If all texts of a record begin alike ("the capital is ..."), that beginning is given to the model as the start of
    its reply, so that the margin is about the word that matters.

    Raises:
        UserError: a record whose texts cannot be told apart by one token.
    """
    prompts = lm.tokenize_chats([record.messages for record in records]).rows()
    chats = [
        [*record.messages, {"role": "assistant", "content": text}]
        for record in records
        for text in (*record.behavior_texts, *record.alternative_texts)
    ]
    replies = iter(lm.tokenize_chats(chats, add_generation_prompt=False).rows())
    rows: list[Tokenized] = []
    ids: tuple[list[Tensor], list[Tensor]] = ([], [])
    for record, prompt in zip(records, prompts, strict=True):
        tails = [_tail(lm, prompt, next(replies), text) for text in (*record.behavior_texts, *record.alternative_texts)]
        shared = 0
        while all(len(tail) > shared + 1 for tail in tails) and len({tail[shared] for tail in tails}) == 1:
            shared += 1
        split = len(record.behavior_texts)
        behavior = {tail[shared] for tail in tails[:split]}
        alternative = {tail[shared] for tail in tails[split:]}
        both = behavior & alternative
        if not behavior - both or not alternative - both:
            raise UserError(
                f"the record on {record.topic!r} has behavior_texts and alternative_texts that begin with the same "
                f"words ({tails[0][:shared]!r} and on): give texts that part at one word."
            )
        roles = [int(Role.FIRST_RESPONSE), *[int(Role.ASSISTANT)] * (shared - 1)][:shared]
        rows.append(Tokenized([*prompt.tokens, *tails[0][:shared]], [*prompt.roles, *roles]))
        ids[0].append(torch.tensor(sorted(behavior - both)))
        ids[1].append(torch.tensor(sorted(alternative - both)))
    batch = pad(rows, padding_side="left", pad_id=lm.pad_id)
    return MarginTask(list(batch.split(batch_prompts)), *ids)


def reply_tokens(lm: Any, messages: Sequence[Message], text: str) -> list[int]:
    """Return the tokens of a reply as they follow a chat's prompt."""
    (prompt,) = lm.tokenize_chats([list(messages)]).rows()
    chat = [*messages, {"role": "assistant", "content": text}]
    (whole,) = lm.tokenize_chats([chat], add_generation_prompt=False).rows()
    return _tail(lm, prompt, whole, text)


def _tail(lm: Any, prompt: Tokenized, whole: Tokenized, text: str) -> list[int]:
    """Return a reply's tokens as they follow the prompt."""
    start = len(prompt.tokens)
    if len(whole.tokens) > start and whole.tokens[:start] == prompt.tokens:
        return list(whole.tokens[start:])
    # A template that writes answered chats differently from open ones: tokenize the reply by itself.
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def margins(lm: Any, task: MarginTask) -> Float[Array, " n"]:
    """Return logsumexp(behaviour logits) - logsumexp(alternative logits) per record; above 0 the behaviour is likelier.

    Unlike a probability it does not saturate, so a search sees progress long before the behaviour flips.
    """
    (found,) = margins_each(lm, [[]], task)
    return found


def margins_each(lm: Any, groups: Groups, task: MarginTask) -> list[Float[Array, " n"]]:
    """Return the margins under each group of interventions; see `margins`."""
    return readouts_each(lm, groups, task, margin_of)


@torch.no_grad()
def readouts_each(lm: Any, groups: Groups, task: MarginTask, read: Readout) -> list[Float[Array, " n"]]:
    """Read something off the logits where behaviour and alternative part, under each group of interventions.

    One forward each, over the very rows that `margins` runs: what is before the interventions is shared, and common
    batches would round differently, which decides between settings that are the same but for the latents' order.
    """
    found: list[list[Tensor]] = [[] for _ in groups]
    for batch, behavior, alternative in task.parts():
        with sharing(lm, groups, batch, 1):
            for items, values in zip(groups, found, strict=True):
                with steer(lm, *items):
                    # Left-padded, so every row's next token is predicted in the last column.
                    last = lm.logits(batch.to(lm.device))[:, -1].float().cpu()
                values.append(read(last, behavior, alternative).double())
    return [torch.cat(values).numpy() if values else np.zeros(0) for values in found]


def margin_of(
    logits: Float[Tensor, "n d_vocab"], behavior_ids: Sequence[Tensor], alternative_ids: Sequence[Tensor]
) -> Float[Tensor, " n"]:
    """Return logsumexp over each row's behaviour tokens minus that over its alternative tokens."""
    return logsumexp_of(logits, behavior_ids) - logsumexp_of(logits, alternative_ids)


def logsumexp_of(logits: Tensor, ids: Sequence[Tensor]) -> Tensor:
    """Return logsumexp over each row's own token ids."""
    index = pad_sequence(list(ids), batch_first=True, padding_value=-1)
    chosen = logits.gather(1, index.clamp_min(0))
    return chosen.masked_fill(index < 0, float("-inf")).logsumexp(dim=1)


def completions(lm: Any, prompts: Prompts, max_new_tokens: int) -> list[str]:
    """Return the model's greedy reply to every prompt."""
    (texts,) = completions_each(lm, [[]], prompts, max_new_tokens)
    return texts


def completions_each(lm: Any, groups: Groups, prompts: Prompts, max_new_tokens: int) -> Iterator[list[str]]:
    """Yield the replies to all prompts under each group of interventions."""

    def read(batch: TokenBatch, _: list[int]) -> list[str]:
        texts: list[str] = lm.generate(batch, max_new_tokens).texts
        return texts

    return per_group(lm, groups, prompts.tokens, prompts.max_rows, read)


@dataclass(frozen=True)
class Outcome:
    """What a set of completions did.

    Attributes:
        behavior, alternative, degenerate: rates; they sum to 1. Prompts of one topic are alike, and the intervals know.
        verdicts: one per record.
        texts: one per record.
    """

    behavior: stats.Rate
    alternative: stats.Rate
    degenerate: stats.Rate
    verdicts: tuple[Verdict, ...]
    texts: tuple[str, ...]

    def share(self, verdict: Verdict, n: int | None = None) -> float:
        """Return the share of a verdict among the first `n` records (all if None)."""
        part = self.verdicts[:n]
        return sum(found is verdict for found in part) / max(1, len(part))


def outcome_of(texts: Sequence[str], records: Sequence[ContrastRecord], judge: Judge) -> Outcome:
    """Judge completions."""
    verdicts = tuple(judge(text, record) for text, record in zip(texts, records, strict=True))
    counts = {verdict: share_of(verdicts, records, verdict) for verdict in Verdict}
    return Outcome(
        counts[Verdict.BEHAVIOR],
        counts[Verdict.ALTERNATIVE],
        counts[Verdict.DEGENERATE],
        verdicts,
        tuple(texts),
    )


def evaluate(
    lm: Any,
    interventions: Sequence[Intervention],
    records: Sequence[ContrastRecord] | Prompts,
    judge: Judge,
    max_new_tokens: int = 24,
    batch_prompts: int = 256,
) -> Outcome:
    """Generate under interventions and judge the replies.

    Args:
        lm: the model.
        interventions: what to apply; none measures the model as it is.
        records: prompts, prepared or not.
        judge: see `sae.behavior.judge`.
        max_new_tokens: length of the replies.
        batch_prompts: prompts generated at once.
    """
    prompts = records if isinstance(records, Prompts) else prepare(lm, records, batch_prompts)
    (found,) = evaluate_each(lm, [interventions], prompts, judge, max_new_tokens)
    return found


def evaluate_each(
    lm: Any, groups: Groups, prompts: Prompts, judge: Judge, max_new_tokens: int = 24
) -> Iterator[Outcome]:
    """Yield the outcome on the same prompts under each group of interventions; see `evaluate`."""
    for texts in completions_each(lm, groups, prompts, max_new_tokens):
        yield outcome_of(texts, prompts.records, judge)


@torch.no_grad()
def shift_norm(lm: Any, intervention: Intervention, prompts: Prompts) -> float:
    """Return how far an intervention moves a token's activations, on average over the prompts' tokens."""
    total, count = 0.0, 0
    for batch in prompts.batches:
        batch = batch.to(lm.device)
        x = lm.activations(batch, [intervention.hook])[intervention.hook]
        real = batch.mask & (batch.roles != Role.SPECIAL)
        moved = intervention.delta(x[real][None])
        total += float(moved.double().norm(dim=-1).sum())
        count += int(real.sum())
    return total / max(1, count)
