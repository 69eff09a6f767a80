"""What an intervention costs: how much it changes where nothing was to change.

Everything is compared with the model as it is, on the same tokens: its own replies to harmless prompts (KL, and how
much less likely they become), plain text, prompts that only look as if the behaviour were due (over-refusal, where the
behaviour is refusal), questions of fact, and multiple-choice questions. A method that removes a behaviour by breaking
the model shows here, and only here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae import stats
from sae.behavior.contrast import ContrastRecord
from sae.behavior.judge import Judge, answers_truly
from sae.behavior.measure import Prompts, completions_each, evaluate_each, prepare
from sae.behavior.together import Groups
from sae.errors import UserError
from sae.files import read_jsonl
from sae.lm.tokens import Role, TokenBatch, Tokenized, pad
from sae.steering.apply import steer

_KL_ROWS = 128  # tokens compared at once


class OtherBehavior(NamedTuple):
    """Another behaviour, to see whether it is touched."""

    records: Sequence[ContrastRecord]  #: its positives are used
    judge: Judge


class MultipleChoice(NamedTuple):
    """A multiple-choice question."""

    question: str
    choices: tuple[str, ...]
    answer: int  #: index of the right one


class Damage(NamedTuple):
    """Text under an intervention, compared with the model as it is. Nats per token."""

    kl: float  #: mean KL(clean || now)
    ce: float  #: mean rise of the cross entropy
    n_tokens: int


@dataclass(frozen=True)
class Cost:
    """Everything that an intervention changed; None where there was nothing to measure it on.

    Attributes:
        own: along the clean model's own replies to prompts on which the behaviour is not due.
        text: on plain text.
        lookalikes: the behaviour's rate on prompts that only look as if it were due.
        facts: share of questions of fact answered truly.
        choices: share of multiple-choice questions answered rightly.
    """

    own: Damage
    text: Damage | None
    lookalikes: stats.Rate | None
    facts: stats.Rate | None
    choices: stats.Rate | None


class CostTasks(NamedTuple):
    """What costs are measured on, prepared once.

    Attributes:
        own, text: tokens, and which of them are predicted in them.
        lookalikes: prompts, none where the contrast set has no such arm.
        judge: of the behaviour.
        facts: questions of fact.
        choices: multiple-choice questions.
        max_new_tokens: length of replies.
    """

    own: "list[Followed]"
    text: "list[Followed]"
    lookalikes: Prompts
    judge: Judge
    facts: Prompts
    choices: "ChoiceTask"
    max_new_tokens: int


class Followed(NamedTuple):
    """Rows of tokens, some of which the model is asked to predict, and what it says unsteered."""

    batch: TokenBatch
    where: Tensor  #: [batch pos] booleans: positions whose next token counts
    clean: Tensor  #: [n d_vocab] log-probabilities there, in float32 on the CPU


class ChoiceTask(NamedTuple):
    """Every choice of every question as a reply to it."""

    questions: tuple[MultipleChoice, ...]
    batches: list[TokenBatch]
    where: list[Tensor]  #: [batch pos] booleans: positions that predict a token by which the choice is scored


def prepare_costs(
    lm: Any,
    negatives: Sequence[ContrastRecord],
    judge: Judge,
    *,
    lookalikes: Sequence[ContrastRecord] = (),
    facts: Sequence[ContrastRecord] = (),
    text: Sequence[TokenBatch] = (),
    choices: Sequence[MultipleChoice] = (),
    n_prompts: int = 64,
    n_tokens: int = 32,
    max_new_tokens: int = 24,
    batch_prompts: int = 256,
) -> CostTasks:
    """Run the model as it is over everything that costs are measured on.

    Args:
        lm: the model, unsteered.
        negatives: held-out prompts on which the behaviour is not due.
        judge: of the behaviour.
        lookalikes: prompts that only look as if it were due; if not given, the negatives whose arm is "lookalike...".
        facts: questions with a true answer.
        text: batches of plain text.
        choices: multiple-choice questions.
        n_prompts: prompts of each kind, at most.
        n_tokens: tokens of the clean model's replies that are followed.
        max_new_tokens: length of replies that are judged.
        batch_prompts: rows run at once.
    """
    arm = [record for record in negatives if record.arm.startswith("lookalike")]
    return CostTasks(
        own=own_replies(lm, prepare(lm, list(negatives)[:n_prompts], batch_prompts), n_tokens),
        text=[_followed(lm, batch, _predicted(batch)) for batch in text],
        lookalikes=prepare(lm, list(lookalikes or arm)[:n_prompts], batch_prompts),
        judge=judge,
        facts=prepare(lm, list(facts)[:n_prompts], batch_prompts),
        choices=choice_task(lm, choices, batch_prompts),
        max_new_tokens=max_new_tokens,
    )


def measure_costs(lm: Any, groups: Groups, tasks: CostTasks) -> list[Cost]:
    """Measure everything again under each group of interventions; an empty one is the model by itself."""
    new = tasks.max_new_tokens
    lookalikes = [found.behavior for found in evaluate_each(lm, groups, tasks.lookalikes, tasks.judge, new)]
    facts = list(fact_accuracies(lm, groups, tasks.facts, new))
    costs = []
    for number, items in enumerate(groups):
        with steer(lm, *items):
            cost = Cost(
                own=damage(lm, tasks.own),
                text=damage(lm, tasks.text) if tasks.text else None,
                lookalikes=lookalikes[number] if tasks.lookalikes.records else None,
                facts=facts[number] if tasks.facts.records else None,
                choices=_choices_right(lm, tasks.choices) if tasks.choices.questions else None,
            )
        costs.append(cost)
    return costs


def own_replies(lm: Any, prompts: Prompts, n_tokens: int) -> list[Followed]:
    """Continue prompts with the model as it is, to be followed token by token by `damage`.

    Several tokens, because damage that the first hides shows later in the text.
    """
    found = []
    for batch in prompts.batches:
        made = lm.generate(batch, n_tokens)
        rows = []
        for row, new, count in zip(batch.rows(), made.tokens.tolist(), made.n_tokens, strict=True):
            tokens = new[: max(1, count)]
            roles = [int(Role.FIRST_RESPONSE), *[int(Role.ASSISTANT)] * (len(tokens) - 1)]
            rows.append((Tokenized([*row.tokens, *tokens], [*row.roles, *roles]), len(tokens)))
        full = pad([row for row, _ in rows], padding_side="left", pad_id=lm.pad_id)
        found.append(_followed(lm, full, _last(full, [count for _, count in rows])))
    return found


@torch.no_grad()
def damage(lm: Any, followed: Sequence[Followed]) -> Damage:
    """Compare the model as it is now with what it said before, along the same text; NaN without any."""
    kl = ce = 0.0
    count = 0
    for batch, where, clean in followed:
        now = _logprobs(lm, batch, where)
        # Predicted tokens are one to the right of the positions that predict them.
        targets = batch.tokens.cpu().roll(-1, dims=1)[where][:, None]
        ce += float((clean.gather(1, targets) - now.gather(1, targets)).double().sum())
        # A part at a time: in float64, a batch over a large vocabulary takes gigabytes.
        for before, after in zip(clean.split(_KL_ROWS), now.split(_KL_ROWS), strict=True):
            kl += float((before.double().exp() * (before.double() - after.double())).sum())
        count += len(clean)
    if count == 0:
        return Damage(math.nan, math.nan, 0)
    return Damage(max(0.0, kl / count), ce / count, count)


def fact_accuracies(lm: Any, groups: Groups, facts: Prompts, max_new_tokens: int) -> Iterator[stats.Rate]:
    """Yield how often questions of fact are answered truly under each group of interventions."""
    topics = [record.topic for record in facts.records]
    for texts in completions_each(lm, groups, facts, max_new_tokens):
        right = [answers_truly(text, record) for text, record in zip(texts, facts.records, strict=True)]
        yield stats.clustered_rate(right, topics)


def on_front(effects: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Which points are on the Pareto front: no other has at least the effect at no more cost, and differs.

    Args:
        effects: more is better.
        costs: less is better; NaN is on no front.
    """
    points = list(zip(effects, costs, strict=True))

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other[0] >= point[0] and other[1] <= point[1] and other != point for other in points if not _is_nan(other)
        )

    return [not _is_nan(point) and not beaten(point) for point in points]


def _is_nan(point: tuple[float, float]) -> bool:
    return any(math.isnan(value) for value in point)


def read_choices(path: Path | str) -> list[MultipleChoice]:
    """Multiple-choice questions of a JSON-lines file with `question`, `choices` and `answer` (an index from 0).

    Raises:
        UserError: naming the line, for anything else.
    """
    found = []
    for number, record in enumerate(read_jsonl(path), start=1):
        where = f"{str(path)!r}, line {number}"
        if not isinstance(record, dict) or not {"question", "choices", "answer"} <= record.keys():
            raise UserError(f"{where}: a question needs the fields question, choices and answer.")
        choices, answer = record["choices"], record["answer"]
        texts = isinstance(choices, list) and all(isinstance(text, str) and text.strip() for text in choices)
        if not texts or len(choices) < 2:
            raise UserError(f"{where}: choices must be a list of at least two texts, none empty, not {choices!r}.")
        twice = next(
            (text for index, text in enumerate(choices) if text.strip() in map(str.strip, choices[:index])), None
        )
        if twice is not None:
            raise UserError(f"{where}: the choice {twice!r} comes twice: give each once.")
        if not isinstance(record["question"], str) or not record["question"].strip():
            raise UserError(f"{where}: question {record['question']!r} is no text: say what is asked.")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise UserError(f"{where}: answer {answer!r} is no index of {len(choices)} choices: count from 0.")
        found.append(MultipleChoice(record["question"], tuple(choices), answer))
    if not found:
        raise UserError(f"{str(path)!r} is empty: give at least one question.")
    return found


def _last(batch: TokenBatch, counts: Sequence[int]) -> Tensor:
    """Positions that predict each row's last tokens; rows are padded on the left."""
    width = batch.tokens.shape[1]
    column = torch.arange(width)[None]
    return (column >= width - 1 - torch.tensor(counts)[:, None]) & (column < width - 1)


def _predicted(batch: TokenBatch) -> Tensor:
    """Positions that predict a real token from a real one."""
    where = torch.zeros_like(batch.mask)
    where[:, :-1] = batch.mask[:, :-1] & batch.mask[:, 1:]
    return where.cpu()


@torch.no_grad()
def _followed(lm: Any, batch: TokenBatch, where: Tensor) -> Followed:
    return Followed(batch, where, _logprobs(lm, batch, where))


def _logprobs(lm: Any, batch: TokenBatch, where: Tensor) -> Tensor:
    return lm.logits(batch.to(lm.device)).float().cpu()[where].log_softmax(dim=-1)


def choice_task(lm: Any, questions: Sequence[MultipleChoice], batch_prompts: int = 256) -> ChoiceTask:
    """Tokenize every choice as the model would give it in reply to its question.

    A choice is tokenized where it stands, after the question, since many tokenizers have one token for "A" and another
    for " A", and only one of them follows here. Tokens with which all choices of a question begin say nothing of them
    and are not scored.

    Raises:
        UserError: two choices of a question that are the same tokens.
    """
    asked = [[{"role": "user", "content": question.question}] for question in questions]
    told = [
        [*chat, {"role": "assistant", "content": text}]
        for chat, question in zip(asked, questions, strict=True)
        for text in question.choices
    ]
    prompts = lm.tokenize_chats(asked).rows() if asked else []
    answered = iter(lm.tokenize_chats(told, add_generation_prompt=False).rows() if told else ())
    rows, counts = [], []
    for question, prompt in zip(questions, prompts, strict=True):
        own = [_as_reply(lm, prompt, next(answered), text) for text in question.choices]
        _refuse_alike(lm, question, [row.tokens for row, _ in own])
        shared = _shared(own)
        rows += [row for row, _ in own]
        counts += [count - shared for _, count in own]
    task = ChoiceTask(tuple(questions), [], [])
    for start in range(0, len(rows), batch_prompts):
        batch = pad(rows[start : start + batch_prompts], padding_side="left", pad_id=lm.pad_id)
        task.batches.append(batch)
        task.where.append(_last(batch, counts[start : start + batch_prompts]))
    return task


def _as_reply(lm: Any, prompt: Tokenized, answered: Tokenized, text: str) -> tuple[Tokenized, int]:
    """Return a question with a choice as its reply, ending with it, and how many tokens at the end are the choice's."""
    said = [place for place, role in enumerate(answered.roles) if role in (Role.FIRST_RESPONSE, Role.ASSISTANT)]
    if said:
        start, stop, n = said[0], said[-1] + 1, len(prompt.tokens)
        # A template that ends in a space: it is part of the reply's first token once there is a reply.
        joined = not lm.tokenizer.decode(prompt.tokens[start:]).strip() if start < n else True
        if joined and answered.tokens[: min(start, n)] == prompt.tokens[: min(start, n)]:
            return Tokenized(answered.tokens[:stop], answered.roles[:stop]), stop - start
    # A template that writes answered chats differently from open ones: the reply follows the open one.
    reply = list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    roles = [int(Role.FIRST_RESPONSE), *[int(Role.ASSISTANT)] * (len(reply) - 1)]
    return Tokenized([*prompt.tokens, *reply], [*prompt.roles, *roles]), len(reply)


def _refuse_alike(lm: Any, question: MultipleChoice, tokens: Sequence[Sequence[int]]) -> None:
    for index, text in enumerate(question.choices):
        if tokens[index] in tokens[:index]:
            other = question.choices[tokens.index(tokens[index])]
            raise UserError(
                f"the choices {other!r} and {text!r} of {question.question[:80]!r} are the same tokens to {lm.name!r}, "
                "so nothing tells which it gives: reword one, or leave the question out."
            )


def _shared(own: Sequence[tuple[Tokenized, int]]) -> int:
    """How many tokens all choices of a question begin with; each keeps one at least."""
    replies = [row.tokens[len(row.tokens) - count :] for row, count in own]
    shared = 0
    while all(len(reply) > shared + 1 for reply in replies) and len({reply[shared] for reply in replies}) == 1:
        shared += 1
    return shared


@torch.no_grad()
def _choices_right(lm: Any, task: ChoiceTask) -> stats.Rate:
    """Share of questions whose right choice has the largest mean log-probability a scored token.

    A mean, as in length-normalised accuracy: a sum favours short choices whatever they say.
    """
    scores: list[float] = []
    for batch, where in zip(task.batches, task.where, strict=True):
        targets = batch.tokens.roll(-1, dims=1)[where][:, None]
        found = torch.zeros(where.shape, dtype=torch.float64)
        found[where] = _logprobs(lm, batch, where).gather(1, targets).squeeze(1).double()
        scores += (found.sum(dim=1) / where.sum(dim=1)).tolist()
    right = 0
    for question in task.questions:
        own, scores = scores[: len(question.choices)], scores[len(question.choices) :]
        right += max(range(len(own)), key=own.__getitem__) == question.answer
    return stats.rate(right, len(task.questions))
